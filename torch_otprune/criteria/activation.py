"""How strongly a unit is active."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Need, ScoreCriterion, register
from torch_otprune.criteria.moments import observed
from torch_otprune.statistics.evidence import Evidence

__all__ = ["Activation"]


@register
class Activation(ScoreCriterion):
    """Keep the units whose signal varies most (is largest, where no bias absorbs the mean).

    Limits: blind to what the consumers do with the signal, and to redundancy.

    Source: Polyak & Wolf 2015, "Channel-level acceleration of deep face representations".
    """

    kind: Literal["activation"] = "activation"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Take the root mean square over samples, positions and consumers."""
        power = [
            torch.einsum("iaia->i", c.second) / c.second.shape[1]
            for c in observed(evidence, "activation")
            if c.second is not None
        ]
        return torch.stack(power).mean(0).clamp_min(0).sqrt()
