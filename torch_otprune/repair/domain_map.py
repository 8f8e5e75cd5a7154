"""Give what every consumer writes the law that it had in the dense network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torch_otprune.maps import DomainMap as Map
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.mapping import Mapping, mapped_sites_

__all__ = ["DomainMap"]


@register
class DomainMap(Repair):
    """Map what each consumer writes onto the law of what it wrote in the dense network.

    Means and covariances, or what an entropic plan couples; the method `diagonal` is batch-norm
    re-estimation that also works without batch-norms. Front to back; a map is kept where samples
    that are held out come nearer to the dense network's own values.

    Limits: it does not use which rows belong together unless `paired`, and `least_squares` uses
    more; layers without bias or batch-norm and grouped convolutions are left alone and noted. For
    a shift of the data itself there is `adapt_`.

    Source: Courty, Flamary et al. 2017 for the maps; their use after a cut is ours.
    """

    kind: Literal["domain_map"] = "domain_map"
    map: Map = Field(default=Map(), description="settings of the map")
    paired: bool = Field(default=False, description="whether rows of both networks are matched")
    rows: int = Field(default=4096, ge=8, description="rows that a map is fitted on")

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Map site by site."""
        work = Mapping(patient, self.kind, self.map, self.paired, rows=self.rows, judged=True)
        return mapped_sites_(work)
