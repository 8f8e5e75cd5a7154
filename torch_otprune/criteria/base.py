"""The contract of a criterion: evidence about a group in, a ranking of its units out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import CalibrationError
from torch_otprune.policy.registry import CRITERIA, Setting
from torch_otprune.statistics.evidence import Evidence

__all__ = ["IDLE", "Criterion", "Need", "Ranking", "ScoreCriterion", "checked", "register"]

Need = Literal["moments", "sensitivity", "signals", "tangents"]
register = CRITERIA.register
IDLE = "their order says nothing"


@dataclass(frozen=True)
class Ranking:
    """Nested sets of units, and what keeping each would cost.

    Args:
        order: units, the first to keep first; the best set of size k is `order[:k]`.
        curve: `curve[k]` is the predicted cost of keeping `order[:k]`; zero when all stay.
        note: what a reader of the plan should know about how it came about; empty as a rule.
        unit: `kernel` where the curve holds shares of the network's tangent kernel, which groups
            have in common already; empty where the plan prices the order itself.
        size: how many units stay, where that is settled; None leaves it to the plan.
    """

    order: Int[Tensor, " units"]
    curve: Float[Tensor, " sizes"]
    note: str = ""
    unit: Literal["", "kernel"] = ""
    size: int | None = None


class Criterion(Setting, ABC):
    """Rank the units of a group. A subclass is one file: settings, limits, source, algorithm."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    learns: ClassVar[bool] = False  # whether masks are trained while the policy is attached

    @abstractmethod
    def rank(self, evidence: Evidence) -> Ranking:
        """Order the units from the first to keep to the first to go.

        Args:
            evidence: what is known about the group.

        Returns:
            the ranking.
        """

    def refine(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> Int[Tensor, " kept"]:
        """Improve the set of one size beyond the nested one.

        Args:
            evidence: what is known about the group.
            keep: the nested set.

        Returns:
            a set of the same size; the nested one unless a criterion knows better.
        """
        return keep

    def certify(self, evidence: Evidence, keep: Int[Tensor, " kept"]) -> str:
        """Say what is guaranteed of a set of units, for the reason in the plan.

        Args:
            evidence: what is known about the group.
            keep: the units that stay.

        Returns:
            one sentence without a full stop; empty unless a criterion guarantees anything.
        """
        return ""


class ScoreCriterion(Criterion, ABC):
    """Rank by one independent number per unit."""

    @abstractmethod
    def score(self, evidence: Evidence) -> Float[Tensor, " units"]:
        """Score every unit; larger means keep.

        Args:
            evidence: what is known about the group.

        Returns:
            one finite number per unit, not below zero.
        """

    def rank(self, evidence: Evidence) -> Ranking:
        """Sort by score; a set costs the share of squared score that it leaves out."""
        score = checked(self.score(evidence), "unit", where=f"group '{evidence.name}'")
        order = torch.argsort(score, descending=True, stable=True)
        power = score[order].square()
        left = power.flip(0).cumsum(0).flip(0)
        curve = torch.cat([left, left.new_zeros(1)]) / power.sum().clamp_min(1e-300)
        alike = evidence.units > 1 and bool((score == score[0]).all())
        return Ranking(order, curve, f"all {len(score)} units score alike; {IDLE}" if alike else "")


def checked(score: Tensor, noun: str, *, where: str) -> Tensor:
    """Refuse scores that are not finite, and blur rounding so that ties are ties everywhere.

    Args:
        score: one number each.
        noun: what is scored, for the error.
        where: what they are part of, for the error.

    Returns:
        the scores to nine digits.

    Raises:
        CalibrationError: if a score is NaN or infinite.
    """
    if not bool(torch.isfinite(score).all()):
        bad = int((~torch.isfinite(score)).nonzero()[0])
        raise CalibrationError(
            f"{noun} {bad} scored {float(score[bad])}.",
            where=where,
            fix="look for NaN or infinity in the weights or the calibration data.",
        )
    return settle(score)


def settle(values: Tensor) -> Tensor:
    """Round to nine digits of the largest entry: sums in another order then decide alike."""
    scale = float(values.abs().max()) if values.numel() else 0.0
    if not scale or not math.isfinite(scale):
        return values
    # in double precision: what an unnormalised net costs is beyond the largest float32
    step = 10.0 ** max(math.floor(math.log10(scale)) - 9, -307)
    return (values / step).round() * step
