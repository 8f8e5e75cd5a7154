"""Whether a map that knows laws alone may leave its closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_otprune.maps.gap import Cost, monge_gap, paid
from torch_otprune.maps.samples import SHOWN, Samples, apart

__all__ = ["Trial"]

_SPLITS = 3  # of the target, for the null
_LEAST = 8  # rows to judge by
_SLACK = 0.01  # of what the start pays: a gap of samples moves by that much without a reason

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """Rows to learn from, rows to judge by, and what chance does to the judgement.

    A squared distance of samples is the squared distance of their laws plus a bias that halves of
    one law show too, and a map can lower the bias. So a step away from the closed form counts only
    if it takes more off than the whole bias, and only if the map does not re-arrange more.

    Args:
        learn: one half of each side.
        x: source rows of the other half.
        y: target rows of the other half; where the same inputs made both sides, not those of `x`.
        null: squared distance between halves of the target, as many rows as `y`.
    """

    learn: Samples
    x: Tensor
    y: Tensor
    null: float

    @classmethod
    def of(cls, samples: Samples) -> Trial:
        """Split both sides in halves, crosswise, and measure the null.

        Args:
            samples: unpaired.

        Returns:
            the trial.
        """
        (learn_x, x), (y, learn_y) = (_halves(p, seed=0) for p in (samples.x, samples.y))
        size = min(len(x), len(y), SHOWN)
        nulls = []
        for seed in range(_SPLITS):
            one, other = _halves(samples.y, seed=seed)
            nulls.append(apart(one[:size], other[:size]) ** 2)
        return cls(Samples(learn_x, learn_y), x[:size], y[:size], sum(nulls) / _SPLITS)

    def far(self, found: Map) -> float:
        """Measure the squared distance to the target on the rows that are held out."""
        return apart(found(self.x), self.y) ** 2

    def settled(self, start: Map) -> bool:
        """Tell whether not even a perfect map could count: it leaves the null, or rows are few."""
        return len(self.x) < _LEAST or self.far(start) <= 2 * self.null

    def verdict(self, start: Map, moved: Map, cost: Cost) -> tuple[bool, str]:
        """Judge a step.

        Args:
            start: the closed form.
            moved: what descent made of it.
            cost: of the gap.

        Returns:
            whether it counts, and why.
        """
        before, after = self.far(start), self.far(moved)
        chance = f"{self.null**0.5:.3g}"
        ends = f"the distance on a held-out half, {before**0.5:.3g} -> {after**0.5:.3g}"
        if not before - after > self.null:
            return False, f"the closed form stays: {ends}, gains less than chance, {chance}"
        gaps = [self._gap(found, cost) for found in (start, moved)]
        told = f"the Monge gap there, {gaps[0]:.3g} -> {gaps[1]:.3g}"
        slack = _SLACK * float(paid(self.x, start(self.x), cost).mean())
        if gaps[1] > gaps[0] + slack:
            return False, f"the closed form stays: {told}, would grow"
        return True, f"left the closed form: {ends}, gains more than chance, {chance}"

    def _gap(self, found: Map, cost: Cost) -> float:
        return float(monge_gap(self.x, found(self.x), cost=cost, solver="exact"))


def _halves(points: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    order, half = order.to(points.device), len(points) // 2
    return points[order[:half]], points[order[half:]]
