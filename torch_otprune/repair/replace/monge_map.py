"""The layer in front is fitted to the stream behind the block, and moves no more than it must."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from torch_otprune.maps import MongeMap as Map
from torch_otprune.maps import TransportMap
from torch_otprune.plan.replacement import register
from torch_otprune.repair.mapping import foldable
from torch_otprune.repair.replace.mapped import Mapped

__all__ = ["MongeMap"]


@register
class MongeMap(Mapped):
    """Carry what the layer in front writes by an affine map with a small Monge gap.

    Limits: those of a folded map; where pairs are known and rows are many, `affine` has the
    smaller error on the calibration data.

    Source: Uscidda & Cuturi 2023 for the gap; ours for its use.
    """

    kind: Literal["monge_map"] = "monge_map"
    map: Annotated[Map, AfterValidator(foldable)] = Field(
        default=Map(), description="settings of the map; its form is affine"
    )

    def transport(self) -> TransportMap:
        """Give the map."""
        return self.map
