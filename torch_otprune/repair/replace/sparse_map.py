"""The layer in front makes up for the block on a few of its channels; the others stay."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from torch_otprune.maps import SparseMap as Map
from torch_otprune.maps import TransportMap
from torch_otprune.plan.replacement import register
from torch_otprune.repair.mapping import foldable
from torch_otprune.repair.replace.mapped import Mapped

__all__ = ["SparseMap"]


@register
class SparseMap(Mapped):
    """Correct a budget of the channels that the layer in front writes.

    Weights of all other channels are left bit for bit.

    Limits: those of a folded map; without a budget half of the channels may move.

    Source: ours; a budgeted form of displacement-sparse transport (Chen, Xie & Zhang 2025).
    """

    kind: Literal["sparse_map"] = "sparse_map"
    map: Annotated[Map, AfterValidator(foldable)] = Field(
        default=Map(), description="settings of the map; its solver is `group`"
    )

    def transport(self) -> TransportMap:
        """Give the map."""
        return self.map
