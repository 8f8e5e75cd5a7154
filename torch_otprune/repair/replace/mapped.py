"""The layer in front is carried onto what should stand behind the gap, by a fitted map."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from torch_otprune.maps import TransportMap
from torch_otprune.repair.base import Note, Patient
from torch_otprune.repair.mapping import Mapping
from torch_otprune.repair.replace.base import Fitted, hand_norms_, unmet

__all__ = ["Mapped"]


class Mapped(Fitted):
    """Fit an affine map of what the layer in front writes, and multiply it into the layer.

    Pairs are known, because the same input runs through both networks; `paired=False` forgets
    them and compares laws alone.

    Limits: only for layers whose bias, or the batch-norm behind them, takes up the constant, and
    not for grouped convolutions. Where a rectifier follows the addition, the layer can only add
    where the rectifier is on.
    """

    aims: ClassVar[bool] = True
    paired: bool = Field(default=True, description="whether rows of both networks are matched")
    rows: int = Field(default=4096, ge=8, description="rows that the map is fitted on")

    @abstractmethod
    def transport(self) -> TransportMap:
        """Give the map that is to be fitted."""

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map the layers in front of the gaps."""
        hand_norms_(patient)
        sites = [patient.site(p) for p in patient.graph.order if p in patient.aims]
        work = Mapping(patient, self.kind, self.transport(), self.paired, self.rows)
        return (*work.walk_(sites), *unmet(patient, self.kind))
