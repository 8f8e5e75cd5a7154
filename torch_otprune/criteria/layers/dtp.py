"""Differentiable transportation pruning of whole layers: masks that training finds."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.layers.base import LayerNeed, ScoreLayerCriterion, register
from torch_otprune.criteria.masks import MaskSetting
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["DTP"]


@register
class DTP(MaskSetting, ScoreLayerCriterion):
    """Keep the layers that training keeps, under a budget that every step meets.

    A layer whose mask is m adds m times what it changes in the stream. All else is as for
    channels, with which it shares one budget.

    Limits: needs training, and looks at nothing else: without it, the size of the weights
    decides. Training ends without the removed layers, so `replace="identity"` is exact.

    Source: Li et al. 2023, "Differentiable transportation pruning", for channels; on layers: ours.
    """

    kind: Literal["dtp"] = "dtp"
    learns: ClassVar[bool] = True
    needs: ClassVar[frozenset[LayerNeed]] = frozenset()

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Return the mean absolute weight of each block."""
        return evidence.weights
