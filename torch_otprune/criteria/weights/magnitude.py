"""Keep the weights that are largest."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.weights.base import WeightCase, WeightNeed, register
from torch_otprune.criteria.weights.masking import Masking

__all__ = ["Magnitude"]


@register
class Magnitude(Masking):
    """Keep the weights that are largest in size.

    Limits: looks at no data, so a large weight on an input that is always zero stays.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural
    networks", one layer at a time and without training; the refit is least squares.
    """

    kind: Literal["magnitude"] = "magnitude"

    @property
    def needs(self) -> frozenset[WeightNeed]:
        """Ask for data only where there is something to fit."""
        return super().needs if self.refit else frozenset()

    def score(self, case: WeightCase) -> Float[Tensor, "groups out columns"]:
        """Measure sizes."""
        return case.weight.abs()
