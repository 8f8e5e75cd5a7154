"""Two sets of points, checked: which rows belong together, and what sampling alone looks like."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport import divergence
from torch_otprune.transport.checks import cloud, refuse

__all__ = ["Pairs", "Samples", "apart", "held_out", "some_of", "warn_of_few"]

Pairs = Tensor | bool | None

SHOWN = 512  # rows that a report looks at
_LEAST = 4  # rows, or pairs, that a fit takes
_FEW = 2  # rows per dimension below which a fit is not to be trusted
_HELD = 8  # one row in this many is held out
_HALVES = 3  # splits for the null


@dataclass(frozen=True, eq=False)
class Samples:
    """Two sets of points, and which belong together.

    Args:
        x: source, in float64.
        y: target, in float64.
        matched: rows of both that belong together, as many of each; None where unpaired.
    """

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "m e"]
    matched: tuple[Tensor, Tensor] | None = None

    @property
    def same(self) -> bool:
        """Tell whether both live in one space."""
        return self.x.shape[1] == self.y.shape[1]

    @cached_property
    def shown(self) -> Samples:
        """Take the rows that a report looks at, spread over all."""
        matched = None
        if self.matched is not None:
            xs, ys = self.matched
            matched = _spread(xs), _spread(ys)
        return Samples(_spread(self.x), _spread(self.y), matched)

    def some(self, most: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw up to so many rows of each side."""
        return some_of(self.x, most, seed)[0], some_of(self.y, most, seed + 1)[0]

    @cached_property
    def null(self) -> float:
        """Measure how far random halves of the target are from one another."""
        target = self.shown.y
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(_HALVES):
            order = torch.randperm(len(target), generator=generator).to(target.device)
            half = len(target) // 2
            halves = target[order[:half]], target[order[half : 2 * half]]
            found.append(apart(*halves))
        return sum(found) / len(found)

    @classmethod
    def read(cls, source: Tensor, target: Tensor, pairs: Pairs = None) -> Samples:
        """Check what a user passed.

        Args:
            source: points.
            target: points.
            pairs: True where row i of both belongs together, or a whole-number matrix with one
                row per pair: a row of the source, and one of the target.

        Returns:
            both in float64.
        """
        x, y = cloud(source, "source").detach().double(), cloud(target, "target").detach().double()
        refuse(
            min(len(x), len(y)) < _LEAST,
            f"{min(len(x), len(y))} samples are too few for a map.",
            where=f"TransportMap.fit, source {tuple(x.shape)}, target {tuple(y.shape)}",
            fix=f"pass at least {_LEAST} rows, and rather several per dimension.",
        )
        if pairs is None or pairs is False:
            return cls(x, y)
        if pairs is True:
            _fitting_pairs(len(x) != len(y), f"{len(x)} and {len(y)} rows are not paired.")
            return cls(x, y, (x, y))
        told = f"pairs of type {type(pairs).__name__} match no rows."
        _fitting_pairs(not isinstance(pairs, Tensor), told)
        at = torch.as_tensor(pairs, device=x.device)
        wrong = at.dim() != 2 or at.shape[1] != 2 or at.is_floating_point() or not at.numel()
        _fitting_pairs(wrong, f"pairs of shape {tuple(at.shape)} match no rows.")
        _fitting_pairs(len(at) < _LEAST, f"{len(at)} pairs are too few for a map.")
        ends = at.new_tensor([len(x), len(y)])
        _fitting_pairs(
            bool(((at < 0) | (at >= ends)).any()), "a pair names a row that is not there."
        )
        return cls(x, y, (x[at[:, 0]], y[at[:, 1]]))


def _fitting_pairs(wrong: bool, problem: str) -> None:
    refuse(
        wrong,
        problem,
        where="TransportMap.fit, argument pairs",
        fix="pass True for rows in one order, a k x 2 matrix of row numbers, or None.",
    )


def some_of(points: Float[Tensor, "n d"], most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows at random, in their order.

    Args:
        points: to draw from.
        most: rows, at most.
        seed: of the draw.

    Returns:
        the rows, and their numbers.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    at = order[:most].sort().values.to(points.device)
    return points[at], at


def held_out(points: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
    """Part points into those to learn from, and one in eight to look at."""
    held = torch.arange(len(points), device=points.device) % _HELD == 0
    return points[~held], points[held]


def _spread(points: Tensor) -> Tensor:
    step = max(1, -(-len(points) // SHOWN))
    return points[::step]


def apart(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Measure the debiased Sinkhorn distance, in the unit of the points."""
    with torch.no_grad():
        return float(divergence(x, y, eps=0.05))


def warn_of_few(samples: Samples) -> None:
    """Warn where sampling alone moves points as far as a map would."""
    seen = (samples.x, samples.y) if samples.matched is None else samples.matched
    rows, width = min(map(len, seen)), samples.y.shape[1]
    if rows >= _FEW * width:
        return
    far = f"{apart(samples.shown.x, samples.shown.y):.3g}" if samples.same else "unknown"
    warnings.warn(
        f"{rows} samples in {width} dimensions are too few for a map: source and target are "
        f"{far} apart, random halves of the target {samples.null:.3g}. Pass at least "
        f"{_FEW * width} rows, or fit fewer channels.",
        stacklevel=3,
    )
