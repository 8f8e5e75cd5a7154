"""Keep the weights that the network's tangent kernel owes most to."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.weights.base import WeightCase, WeightNeed, register
from torch_otprune.criteria.weights.masking import Masking

__all__ = ["NTK"]


@register
class NTK(Masking):
    """Keep the weights whose mask changes the trace of the tangent kernel most.

    Limits: measures what a network can still learn, not what it answers now: meant for a network
    that is trained afterwards. Every layer keeps the asked share; the publication compares
    weights of all layers, at initialisation, over many rounds.

    Source: Wang, Li & Sun 2023, "NTK-SAP: improving neural network pruning by aligning training
    dynamics", equation 7, in one round at the given weights and on the given data, over some
    thirty nudges: one alone says little of single weights.
    """

    by_row: ClassVar[bool] = False

    kind: Literal["ntk"] = "ntk"

    @property
    def needs(self) -> frozenset[WeightNeed]:
        """Ask for saliencies; a refit reads moments as well."""
        return frozenset({"moments", "saliency"})

    def score(self, case: WeightCase) -> Float[Tensor, "groups out columns"]:
        """Take what a random nudge of all weights said of each."""
        assert case.saliency is not None
        return case.saliency
