"""How large the weights of a block are."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.layers.base import LayerNeed, ScoreLayerCriterion, register
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["Magnitude"]


@register
class Magnitude(ScoreLayerCriterion):
    """Keep the blocks whose linear layers have large weights: the mean absolute weight.

    Limits: a norm behind a layer takes its scale away again, so the size of weights says little
    about what a block does.

    Source: the oldest baseline for channels and single weights (Han et al. 2015, "Learning both
    Weights and Connections for Efficient Neural Networks"), applied to a block as a whole.
    """

    kind: Literal["magnitude"] = "magnitude"
    needs: ClassVar[frozenset[LayerNeed]] = frozenset()

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Return the mean absolute weight of each block."""
        return evidence.weights
