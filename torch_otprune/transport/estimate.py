"""What a distance between samples means: its null, its spread, and the paired shortcut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import cloud, refuse, same_space
from torch_otprune.transport.cost import root
from torch_otprune.transport.couple import Coupling
from torch_otprune.transport.critic import Critic
from torch_otprune.transport.divergence import Divergence
from torch_otprune.transport.flowtree import Flowtree
from torch_otprune.transport.gaussian import GaussianMap
from torch_otprune.transport.geometry import Cloud
from torch_otprune.transport.sliced import MaxSliced

__all__ = ["Estimate", "estimate", "paired_distance", "paired_rows"]

Found = Tensor | float | Coupling | Critic | Divergence | Flowtree | GaussianMap | MaxSliced
Distance = Callable[[Tensor, Tensor], Found]


@dataclass(frozen=True)
class Estimate:
    """A distance between two empirical laws, with what sampling alone would give.

    Args:
        value: the distance.
        null: mean distance between random halves of the first sample: no effect at all looks
            like this. Halves are smaller than the samples, so it errs towards caution.
        null_high: the largest of them.
        low: lower end of the bootstrap interval.
        high: upper end.
    """

    value: float
    null: float
    null_high: float
    low: float
    high: float

    @property
    def excess(self) -> float:
        """Give what is left above the null, at least 0."""
        return max(0.0, self.value - self.null)

    @property
    def visible(self) -> bool:
        """Say whether the distance is larger than every null."""
        return self.value > self.null_high


def estimate(
    distance: Distance,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    paired: bool = False,
    splits: int = 10,
    resamples: int = 50,
    level: float = 0.9,
    seed: int = 0,
) -> Estimate:
    """Measure a distance together with its null and a bootstrap interval.

    Args:
        distance: any verb of this room that takes two clouds, or any function of two that gives one
            number. For `paired_distance`, whose rows belong together, no effect reads exactly 0.
        x: sample of the reference law; its halves make the null.
        y: sample of the other law.
        paired: whether row i of both is the same input; resampling then keeps rows together.
        splits: number of random halvings.
        resamples: number of bootstrap samples.
        level: probability of the interval.
        seed: of halvings and resamples.

    Returns:
        value, null and interval in the unit of the distance. The interval shows the spread around
        the value, and not the bias, for which the null stands.
    """
    x, y = cloud(x, "x"), cloud(y, "y")
    same_space(x, y)
    refuse(
        len(x) < 4 or (paired and len(x) != len(y)),
        f"samples of {len(x)} and {len(y)} rows give no null.",
        where="estimate, arguments x and y",
        fix="pass at least 4 rows, and equally many on both sides if they are paired.",
    )
    refuse(
        min(splits, resamples) < 1 or not 0 < level < 1,
        f"splits is {splits}, resamples is {resamples} and level is {level:g}.",
        where="estimate, arguments splits, resamples and level",
        fix="pass at least one of each, and a level between 0 and 1 such as 0.9.",
    )
    generator, matched = torch.Generator().manual_seed(seed), distance is paired_distance
    value, paired = _number(distance(x, y)), paired or matched
    nulls = [0.0 if matched else _halved(distance, x, generator) for _ in range(splits)]
    again = [_resampled(distance, x, y, paired, generator) for _ in range(resamples)]
    spread = torch.tensor(again, dtype=torch.float64, device="cpu")
    spread = spread - spread.mean()  # resampling repeats points, which shifts every distance
    tail = (1 - level) / 2
    low, high = (float(spread.quantile(q)) for q in (tail, 1 - tail))
    null = sum(nulls) / len(nulls)
    return Estimate(value, null, max(nulls), max(0.0, value + low), value + high)


def paired_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Measure the root mean square of the differences of matching rows.

    Args:
        x: answers to some inputs.
        y: other answers to the same inputs.

    Returns:
        in the unit of the points: an upper bound of W_2, and equal to it where no other matching
        is shorter, which `coupling_points` checks.
    """
    x, y = cloud(x, "x"), cloud(y, "y")
    paired_rows(x, y)
    return root((x - y.to(x)).square().sum(1).mean())


def paired_rows(x: Tensor, y: Tensor) -> None:
    """Refuse clouds whose rows cannot belong together."""
    refuse(
        x.shape != y.shape,
        f"clouds of shapes {tuple(x.shape)} and {tuple(y.shape)} are not paired.",
        where="paired_distance, arguments x and y",
        fix="pass one row per input, in the same order.",
    )


def _number(found: Found) -> float:
    """Read the one distance off what a verb returns."""
    if isinstance(found, Coupling):
        p = found.geometry.p if isinstance(found.geometry, Cloud) else 1.0
        return float(max(found.cost, 0.0) ** (1 / p))
    if isinstance(found, Critic | Divergence | Flowtree | GaussianMap | MaxSliced):
        found = found.distance
    entries = found.numel() if isinstance(found, Tensor) else 1
    refuse(
        entries != 1,
        f"the distance has {entries} entries, not one.",
        where="estimate, argument distance",
        fix="pass a function of two clouds that gives one number.",
    )
    return float(found)


def _halved(distance: Distance, x: Tensor, generator: torch.Generator) -> float:
    order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
    half = len(x) // 2
    return _number(distance(x[order[:half]], x[order[half : 2 * half]]))


def _resampled(
    distance: Distance, x: Tensor, y: Tensor, paired: bool, generator: torch.Generator
) -> float:
    i = _drawn(len(x), generator)
    j = i if paired else _drawn(len(y), generator)
    return _number(distance(x[i.to(x.device)], y[j.to(y.device)]))


def _drawn(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(size, (size,), generator=generator, device="cpu")
