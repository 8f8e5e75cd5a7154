"""One factor and one shift per channel stand in for the block."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch_otprune.nn import ChannelScale
from torch_otprune.plan.replacement import register
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.replace.base import Fitted, paired
from torch_otprune.surgery.cut import put_

__all__ = ["Scale"]


@register
class Scale(Fitted):
    """Scale and shift every channel of the stream, by least squares on paired activations.

    Limits: costs two parameters per channel and one pass over the stream. Of a branch, nothing
    stands in.

    Source: the diagonal case of a linear stand-in (LinearPatch, Chen et al. 2025), with a shift.
    """

    stand_in: ClassVar[Literal["scale", "low_rank", "hidden"] | None] = "scale"
    kind: Literal["scale"] = "scale"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Regress every channel behind a block on the same channel in front of it."""
        notes = []
        for drop in patient.drops:
            module = patient.small.get_submodule(drop.block)
            if not isinstance(module, ChannelScale):  # a branch
                continue
            mean_x, mean_y, cov_x, cov_y, cross = paired(patient, drop).moments()
            spread, shared = cov_x.diagonal(), cross.diagonal()
            floor = 1e-9 * spread.mean().clamp_min(1e-300)
            slope = shared / (spread + floor)
            put_(module, "scale", slope)
            put_(module, "shift", mean_y - slope * mean_x)
            total = (cov_y.diagonal() + mean_y.square()).sum().clamp_min(1e-300)
            moved = (mean_y - mean_x).square() + cov_y.diagonal() + spread - 2 * shared
            left = cov_y.diagonal() - shared.square() / (spread + floor)
            before, after = (float(e.sum().clamp_min(0) / total) for e in (moved, left))
            notes.append(Note(self.kind, drop.block, before, after, accepted=True))
        return tuple(notes)
