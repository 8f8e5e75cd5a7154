"""The layer in front is carried behind the gap by any affine map of the table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from torch_otprune.maps import AffineMap, TransportMap
from torch_otprune.plan.replacement import register
from torch_otprune.policy.registry import MAPS, Entry, Setting
from torch_otprune.repair.mapping import foldable
from torch_otprune.repair.replace.mapped import Mapped

__all__ = ["AnyMap"]


@register
class AnyMap(Mapped):
    """Fold any affine transport map: `map` names it.

    Limits: those of a folded map.

    Source: ours.
    """

    kind: Literal["transport_map"] = "transport_map"
    map: Annotated[Setting, Entry(MAPS), AfterValidator(foldable)] = Field(
        default=AffineMap(), description="a transport map by name, with its settings"
    )

    def transport(self) -> TransportMap:
        """Give the map."""
        assert isinstance(self.map, TransportMap)
        return self.map
