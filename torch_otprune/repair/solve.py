"""Ridge regression towards the old weights, with the ridge chosen on rows held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torch_otprune.repair.nonnegative import nonnegative
from torch_otprune.statistics.moments import add_gram_, ridge_factor

__all__ = ["Fit", "Normal", "solve"]


@dataclass
class Normal:
    """Streaming normal equations, in float64.

    Args:
        gram: summed products of inputs with inputs.
        cross: summed products of inputs with targets.
        power: summed squares of each target.
    """

    gram: Float[Tensor, "columns columns"]
    cross: Float[Tensor, "columns out"]
    power: Float[Tensor, " out"]

    @classmethod
    def empty(cls, columns: int, out: int, device: torch.device) -> Normal:
        """Start with nothing seen."""
        zeros = torch.zeros(columns + 1, out, dtype=torch.float64, device=device)
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        return cls(gram, zeros[1:], zeros[0])

    def update(self, x: Float[Tensor, "rows columns"], y: Float[Tensor, "rows out"]) -> None:
        """Add rows and their targets."""
        add_gram_(self.gram, x)
        self.cross.addmm_(x.T, y)
        self.power += y.square().sum(0)

    def plus(self, other: Normal) -> Normal:
        """Pool two sets of rows."""
        return Normal(self.gram + other.gram, self.cross + other.cross, self.power + other.power)

    def part(self, columns: Tensor, out: Tensor) -> Normal:
        """Restrict to some columns and outputs, for a grouped layer."""
        return Normal(self.gram[columns][:, columns], self.cross[columns][:, out], self.power[out])

    def error(self, weight: Float[Tensor, "columns out"]) -> float:
        """Sum the squared residuals of a weight over all rows and outputs."""
        fitted = (weight * (self.gram @ weight)).sum() - 2 * (weight * self.cross).sum()
        return max(float(self.power.sum() + fitted), 0.0)


@dataclass(frozen=True)
class Fit:
    """A refitted weight and what it achieved.

    Args:
        weight: columns x out.
        ridge: share of the mean squared column that was chosen.
        before: relative squared error of the old weight on all rows.
        after: the same for the new one.
        held_before: on rows that the ridge was chosen on, the old weight's.
        held_after: there, the weight fitted without them.
    """

    weight: Float[Tensor, "columns out"]
    ridge: float
    before: float
    after: float
    held_before: float
    held_after: float


RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def solve(
    fit: Normal,
    held: Normal,
    old: Float[Tensor, "columns out"],
    *,
    ridge: float | None = None,
    floor: Bool[Tensor, "columns out"] | None = None,
) -> Fit:
    """Minimise `|Y - XW|^2 + ridge |W - old|^2`.

    Args:
        fit: rows to fit on.
        held: rows to choose the ridge on; they join the fit once it is chosen.
        old: the weights to stay near where the data say nothing.
        ridge: share of the mean squared column; None chooses among powers of ten on `held`.
        floor: entries that must not be negative, and are not in `old`; None where all are free.

    Returns:
        the fit; its squared error on all rows is not above the old weight's.

    Source: ridge regression centred on a prior weight; `methods` call it least-squares refit.
    """
    choices = RIDGES if ridge is None else (ridge,)
    held_errors = [held.error(_ridge(fit, old, r, floor)) for r in choices]
    best = min(range(len(choices)), key=lambda i: (held_errors[i], -choices[i]))
    every = fit.plus(held)
    weight = _ridge(every, old, choices[best], floor)
    scale, held_scale = (max(float(n.power.sum()), 1e-300) for n in (every, held))
    return Fit(
        weight,
        choices[best],
        every.error(old) / scale,
        every.error(weight) / scale,
        held.error(old) / held_scale,
        held_errors[best] / held_scale,
    )


def _ridge(normal: Normal, old: Tensor, ridge: float, floor: Tensor | None) -> Tensor:
    mean = normal.gram.diagonal().mean()
    if float(mean) <= 0:
        return old
    factor = ridge_factor(normal.gram, ridge)
    off = normal.cross - normal.gram @ old
    if floor is None or not bool(floor.any()):
        return old + torch.cholesky_solve(off, factor)
    lifted = factor @ factor.T
    return nonnegative(lifted, off + lifted @ old, floor)
