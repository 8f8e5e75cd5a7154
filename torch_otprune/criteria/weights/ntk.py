"""Keep the weights that the network's tangent kernel owes most to."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import settle
from torch_otprune.criteria.weights.base import Thinned, WeightCase, WeightNeed, register
from torch_otprune.criteria.weights.masking import Masking

__all__ = ["NTK"]


@register
class NTK(Masking):
    """Keep the weights whose mask changes the trace of the tangent kernel most.

    Weights that move no kernel at all, such as those of dead units, come behind all others, by
    size; how many of them stay stands in the report.

    Limits: measures what a network can still learn, not what it answers now: meant for a network
    that is trained afterwards. Every layer keeps the asked share; the publication compares
    weights of all layers, at initialisation, over many rounds. Takes some two hundred times as
    long as running the calibration data once.

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
        """Take what nudges of all weights said of each, and sizes where they said nothing."""
        assert case.saliency is not None
        told, size = settle(case.saliency), case.weight.abs()
        # both fit below: what moves the kernel is above 1, what does not is below
        moved = 1 + told / told.max().clamp_min(1e-300)
        return moved.where(told != 0, size / (2 * size.max().clamp_min(1e-300)))

    def thin(self, case: WeightCase) -> Thinned:
        """Keep the largest scores, and say where these are no scores."""
        assert case.saliency is not None
        found = super().thin(case)
        idle = int(((found.weight != 0) & (settle(case.saliency) == 0)).sum())
        note = f"{idle:,} of the weights that stay move no kernel: taken by size" if idle else ""
        return replace(found, note=note)
