"""How much the output would change, to first order."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Need, ScoreCriterion, register
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.evidence import Evidence

__all__ = ["Taylor"]


@register
class Taylor(ScoreCriterion):
    """Keep the units whose removal would change the network's output most, to first order.

    The published score needs labels and a loss. This one needs neither: the gradient of random
    combinations of the outputs replaces the loss's.

    Limits: first order; blind to what other units can take over.

    Source: Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient
    inference" (activation times gradient); the label-free gradient is ours.
    """

    kind: Literal["taylor"] = "taylor"
    needs: ClassVar[frozenset[Need]] = frozenset({"sensitivity"})

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Take the root mean square of activation times gradient, summed over positions."""
        if evidence.taylor is None:
            raise CalibrationError(
                "no gradients were gathered.",
                where=f"group '{evidence.name}', criterion taylor",
                fix="run calibration data through the model before planning.",
            )
        return evidence.taylor.sqrt()
