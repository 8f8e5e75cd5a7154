"""Keep the weights that carry most of what comes in."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.weights.base import WeightCase, register
from torch_otprune.criteria.weights.masking import Masking

__all__ = ["Wanda"]


@register
class Wanda(Masking):
    """Keep, for every output, the weights whose size times the size of their input is largest.

    Limits: inputs are weighed one by one; of two that say the same, both may stay.

    Source: Sun et al. 2024, "A simple and effective pruning approach for large language models",
    equation 1; inputs come from the layers already pruned, as there.
    """

    by_row: ClassVar[bool] = True

    kind: Literal["wanda"] = "wanda"

    def score(self, case: WeightCase) -> Float[Tensor, "groups out columns"]:
        """Multiply sizes with the root mean squares of the inputs."""
        assert case.power is not None
        return case.weight.abs() * case.power.clamp_min(0).sqrt()[:, None, :]
