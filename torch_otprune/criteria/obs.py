"""Remove one unit after the other, each time the one that the rest can best replace."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Criterion, Need, Ranking, register, settle
from torch_otprune.criteria.moments import observed, silent
from torch_otprune.statistics.evidence import Consumer, Evidence
from torch_otprune.statistics.moments import ridge_factor

__all__ = ["OBS"]


@register
class OBS(Criterion):
    """Keep the units whose loss least squares could not repair.

    Backward elimination: at each step the unit goes whose removal costs least after the
    consumers have been refitted on all that is left, `tr(W_S (H^-1_SS)^-1 W_S')`.

    Limits: greedy; the inverse needs a ridge where units are linearly dependent.

    Source: Hassibi & Stork 1993, "Second order derivatives for network pruning: optimal brain
    surgeon"; for whole structures Kurtic et al. 2023 (ZipLM), equation 4.
    """

    kind: Literal["obs"] = "obs"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    ridge: float = Field(default=1e-3, gt=0, description="share of the mean second moment")

    def rank(self, evidence: Evidence) -> Ranking:
        """Eliminate unit by unit."""
        states = [_State(c, self.ridge) for c in observed(evidence, "obs")]
        alive = torch.ones(evidence.units, dtype=torch.bool)
        gone, spent = [], [0.0]
        for _ in range(evidence.units):
            price = torch.stack([state.prices() for state in states]).sum(0)
            price = settle(price)
            price[~alive] = torch.inf
            unit = int(price.argmin())
            gone.append(unit)
            spent.append(spent[-1] + max(float(price[unit]), 0.0))
            alive[unit] = False
            for state in states:
                state.remove(unit)
        curve = torch.tensor(spent[::-1], dtype=torch.float64)
        return Ranking(torch.tensor(gone[::-1]), curve, silent(evidence))


class _State:
    """One consumer during the elimination: its refitted weight and the inverse moments."""

    def __init__(self, consumer: Consumer, ridge: float) -> None:
        assert consumer.second is not None
        _, self.units, self.taps = consumer.weight.shape
        size = self.units * self.taps
        factor = ridge_factor(consumer.second.reshape(size, size), ridge)
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = consumer.felt().flatten(1)
        self.eye = torch.eye(self.taps, dtype=torch.float64)

    def prices(self) -> Float[Tensor, " units"]:
        """Price the removal of every unit, the rest refitted."""
        blocks = self.inverse.view(self.units, self.taps, self.units, self.taps)
        diagonal = torch.einsum("iaib->iab", blocks)
        weight = self.weight.view(-1, self.units, self.taps).permute(1, 2, 0)
        refitted: Tensor = torch.linalg.solve(diagonal, weight)
        return (weight * refitted).sum((1, 2))

    def remove(self, unit: int) -> None:
        """Refit the rest and take the unit out of the inverse."""
        at = slice(unit * self.taps, (unit + 1) * self.taps)
        share = torch.linalg.solve(self.inverse[at, at], self.inverse[at])
        self.weight -= self.weight[:, at] @ share
        self.inverse -= self.inverse[:, at] @ share
        self.weight[:, at] = 0
        self.inverse[at, :] = 0
        self.inverse[:, at] = 0
        self.inverse[at, at] = self.eye
