"""Let what every consumer writes flow to the law that it had in the dense network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from torch_otprune.maps import Flow as Map
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.mapping import Mapping, foldable, mapped_sites_

__all__ = ["Flow"]


@register
class Flow(Repair):
    """Carry what each consumer writes to the dense law by implicit steps of a gradient flow.

    Front to back; the affine map read off the particles is multiplied into the layer, and kept
    where samples that are held out come nearer to the dense network's own values.

    Limits: it knows laws alone, and takes seconds per layer; `domain_map` restores the same law in
    milliseconds, and `least_squares` uses more. Hidden units themselves flow in `flow_neurons`.
    Layers without bias or batch-norm and grouped convolutions are left alone and noted.

    Source: Fan, Zhang, Taghvaei & Chen 2022 for the flow; its use after a cut is ours.
    """

    kind: Literal["flow"] = "flow"
    map: Annotated[Map, AfterValidator(foldable)] = Field(
        default=Map(), description="settings of the flow; its form is `affine`"
    )
    rows: int = Field(default=4096, ge=8, description="rows that a map is fitted on")

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map site by site."""
        work = Mapping(patient, self.kind, self.map, paired=False, rows=self.rows, judged=True)
        return mapped_sites_(work)
