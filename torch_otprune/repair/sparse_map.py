"""Correct a few of the channels that every consumer writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from torch_otprune.maps import SparseMap as Map
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.mapping import Mapping, foldable, mapped_sites_

__all__ = ["SparseMap"]


@register
class SparseMap(Repair):
    """Map a budget of the channels that each consumer writes; the weights of the others stay.

    Front to back, as in `least_squares`, but a map of the layer's outputs is fitted instead of its
    weights. It is kept where samples that are held out come nearer to the dense network.

    Limits: a map of outputs knows less than a refit of weights, so `least_squares` has the smaller
    error; layers without bias or batch-norm and grouped convolutions are left alone and noted.

    Source: ours; a budgeted form of displacement-sparse transport (Chen, Xie & Zhang 2025).
    """

    kind: Literal["sparse_map"] = "sparse_map"
    map: Annotated[Map, AfterValidator(foldable)] = Field(
        default=Map(), description="settings of the map; its solver is `group`"
    )
    paired: bool = Field(default=True, description="whether rows of both networks are matched")
    rows: int = Field(default=4096, ge=8, description="rows that a map is fitted on")

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map site by site."""
        work = Mapping(patient, self.kind, self.map, self.paired, rows=self.rows, judged=True)
        return mapped_sites_(work)
