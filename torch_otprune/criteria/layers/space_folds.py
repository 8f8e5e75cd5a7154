"""How much an activation bends the space between samples, and what it adds to the folds there."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from torch_otprune.criteria.layers.base import LayerNeed, SiteCriterion, register
from torch_otprune.criteria.layers.sites import affine_residual, observed
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import SiteEvidence, SiteFold

__all__ = ["SpaceFolds"]


@register
class SpaceFolds(SiteCriterion):
    """Keep the rectifiers that bend most and that add most folds.

    Along a straight path from one sample to another, units switch. What of these switches leads
    no further from the start is a fold. The score is the affine residual, the share of the output
    that the best line per channel misses, plus `share` times what the rectifier adds to the folds
    of all in front of it.

    The fold score of a rectifier alone is offered as `by="fold"` for comparison and is no ranking:
    later layers inherit the folds of earlier ones, and a first layer has the score 0 whatever it
    does. `benchmarks/space_folds.py` measures all of these: the residual does the work.

    Limits: rectifiers only: a smooth activation has no kink to count. It costs `steps` + 1 forward
    passes per path beyond the others. Straight paths leave the data. What is read of a unit beyond
    the next layers is not seen.

    Source: Lewandowski et al. 2025, "On Space Folds of ReLU Neural Networks", for the fold score;
    the residual, the increment and the weights are ours.
    """

    kind: Literal["space_folds"] = "space_folds"
    needs: ClassVar[frozenset[LayerNeed]] = frozenset({"sites", "folds"})
    by: Literal["residual", "switch", "increment", "fold"] = Field(
        default="residual",
        description="affine residual or switch rate, each plus `share` of the increment; the "
        "increment alone; or the raw fold score, which hardly follows the harm",
    )
    share: float = Field(
        default=1.0, ge=0, description="weight of the increment; a falling one is 0"
    )
    weighted: bool = Field(default=True, description="count units by how much they bend")
    paths: int = Field(default=32, ge=1, description="between calibration samples")
    steps: int = Field(default=32, ge=2, multiple_of=2, description="of each path")

    def site(self, evidence: SiteEvidence) -> float:
        """Add the increment to what the rectifier bends."""
        seen = observed(evidence, self.kind)
        fold = _followed(seen)
        weighted = self.weighted
        added = max(fold.weighted_increment if weighted else fold.increment, 0.0)
        if self.by == "fold":
            return fold.weighted_score if weighted else fold.score
        if self.by == "increment":
            return added
        if self.by == "switch":
            return (fold.weighted_switch if weighted else fold.switch) + self.share * added
        return affine_residual(seen) + self.share * added


def _followed(evidence: SiteEvidence) -> SiteFold:
    """Refuse an activation that no path went through."""
    if evidence.fold is None:
        raise CalibrationError(
            f"activation '{evidence.name}' is a {evidence.function} and has no kink, so it folds "
            "nothing.",
            where="criterion space_folds",
            fix="rank it by 'stein', or target ReLU, ReLU6, LeakyReLU and PReLU only.",
        )
    return evidence.fold
