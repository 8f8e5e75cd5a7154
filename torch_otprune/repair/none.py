"""No repair."""

from __future__ import annotations

from typing import Literal

from torch_otprune.repair.base import Note, Patient, Repair, register

__all__ = ["NoRepair"]


@register
class NoRepair(Repair):
    """Leave the cut model as it is: it computes what the dense one does with the units masked.

    Source: the baseline that every repair has to beat.
    """

    kind: Literal["none"] = "none"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Do nothing."""
        return ()
