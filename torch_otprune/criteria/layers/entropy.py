"""How often the units of an activation change their state."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torch_otprune.criteria.layers.base import SiteCriterion, register
from torch_otprune.criteria.layers.sites import entropy_bits, observed
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import SiteEvidence

__all__ = ["Entropy"]


@register
class Entropy(SiteCriterion):
    """Keep the activations whose units are now on, now off.

    A unit that is always on is linear and one that is always off is dead; an activation of such
    units has zero entropy and is no longer needed. Counts are pooled over all samples: averaging
    the entropies of batches, as the published code does, takes a rare state for none.

    Limits: the sign says little about activations other than rectifiers. A unit that is on half
    the time has the largest entropy, yet an affine map may follow it well: see `stein`. Never seen
    on in n observations only bounds the share by about 3 / n.

    Source: Liao et al. 2023, "Can Unstructured Pruning Reduce the Depth in Deep Neural Networks?"
    (EGP), and Liao et al. 2024 (NEPENTHE), whose budget is entropy times `magnitude`; the pooled
    counts and the third state are ours.
    """

    kind: Literal["entropy"] = "entropy"
    states: Literal[2, 3] = Field(default=2, description="3 tells a ReLU6 at its cap from on")
    exclude_degenerate: bool = Field(
        default=True, description="average over the units that change their state only"
    )
    magnitude: bool = Field(
        default=False, description="multiply by the mean weight of the layer in front"
    )

    def site(self, evidence: SiteEvidence) -> float:
        """Average the entropy of the units, in bits."""
        evidence = observed(evidence, self.kind)
        capped = self.states == 3 and evidence.function == "relu6"
        off = 1 - evidence.positive
        bits = entropy_bits(off, evidence.capped) if capped else entropy_bits(off)
        if self.exclude_degenerate:
            bits = bits[bits != 0]  # NaN stays, to be refused
        mean = float(bits.mean()) if len(bits) else 0.0
        return mean * self._weight(evidence) if self.magnitude else mean

    def _weight(self, evidence: SiteEvidence) -> float:
        if evidence.magnitude is None:
            raise CalibrationError(
                f"activation '{evidence.name}' has no linear layer in front.",
                where="criterion entropy, magnitude=True",
                fix="leave magnitude at False.",
            )
        return evidence.magnitude
