"""A residual map of low rank stands in for the block."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from torch_otprune.nn import LowRank as LowRankModule
from torch_otprune.plan.replacement import register
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.replace.base import Fitted, paired
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.structure.graph import Block
from torch_otprune.surgery.cut import put_

__all__ = ["LowRank", "reduced_rank"]

_RIDGE = 1e-4


@register
class LowRank(Fitted):
    """Add a map of low rank to the stream, by reduced-rank regression on paired activations.

    For a block that no layer in front can stand in for. It costs twice the rank times the width
    in parameters and, per position, in MACs. Of a branch, nothing stands in.

    Source: Izenman 1975 for the regression; ours for its use.
    """

    stand_in: ClassVar[Literal["scale", "low_rank", "hidden"] | None] = "low_rank"
    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(default=8, ge=1, description="rank of the map, at most the width")

    def rank_for(self, block: Block) -> int:
        """Never more than the stream has channels."""
        return min(self.rank, block.channels)

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Regress what a block adds on what it reads."""
        notes = []
        for drop in patient.drops:
            module = patient.small.get_submodule(drop.block)
            if not isinstance(module, LowRankModule):  # a branch
                continue
            mean_x, mean_y, cov_x, cov_y, cross = paired(patient, drop).moments()
            up, down = reduced_rank(cov_x, cross - cov_x, module.rank)
            spare = module.rank - len(down)  # a cut stream may have fewer channels than that
            up, down = F.pad(up, (0, spare)), F.pad(down, (0, 0, 0, spare))
            put_(module, "up", up)
            put_(module, "down", down)
            put_(module, "bias", mean_y - mean_x - up @ (down @ mean_x))
            total = (cov_y.diagonal() + mean_y.square()).sum().clamp_min(1e-300)
            moved = cov_y + cov_x - cross - cross.T
            fitted = up @ down
            left = moved - fitted @ (cross - cov_x) - (fitted @ (cross - cov_x)).T
            left = left + fitted @ cov_x @ fitted.T
            first = moved.trace() + (mean_y - mean_x).square().sum()
            before, after = (float(e.clamp_min(0) / total) for e in (first, left.trace()))
            notes.append(Note(self.kind, drop.block, before, after, accepted=True))
        return tuple(notes)


def reduced_rank(cov: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the best map of low rank from centred x to centred y.

    Args:
        cov: covariance of x.
        cross: covariance of x with y, x first.
        rank: of the map.

    Returns:
        `up` (y x rank) and `down` (rank x x), in float64: y is about `up @ down @ x`.
    """
    factor = ridge_factor(cov, _RIDGE)
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank], upper=True).T
    return right[:rank].T * values[:rank], down
