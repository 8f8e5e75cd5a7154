"""The layer in front is fitted to the stream behind the block, and moves no more than it must."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from torch_otprune.maps import MongeMap as Map
from torch_otprune.maps import TransportMap
from torch_otprune.plan.replacement import register
from torch_otprune.policy.base import problem
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
    map: Map = Field(default=Map(), description="settings of the map; its form is affine")

    @field_validator("map")
    @classmethod
    def _folds(cls, value: Map) -> Map:
        if value.form != "affine":
            raise problem(
                f"a map of form {value.form!r} cannot be folded.",
                fix="use the form 'affine', or replace='monge_net' for a layer of its own.",
            )
        return value

    def transport(self) -> TransportMap:
        """Give the map."""
        return self.map
