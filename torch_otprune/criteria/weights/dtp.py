"""Differentiable transportation pruning of single weights: masks that training finds."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch_otprune.criteria.masks import UNTRAINED, MaskSetting
from torch_otprune.criteria.weights.base import (
    Thinned,
    WeightCase,
    WeightCriterion,
    WeightNeed,
    largest,
    register,
)

__all__ = ["DTP"]


@register
class DTP(MaskSetting, WeightCriterion):
    """Keep the weights that training keeps, the asked share of every layer at every step.

    Every weight has a score and a mask, as channels do under the criterion of the same name.
    Masks that are hard are zeros in the weights, and those are what stays.

    Limits: needs training; without it, the size of the weights decides. Zeros may lie anywhere:
    no pattern n:m. Scores, logits, masks and moments take six numbers per weight.

    Source: Li et al. 2023, "Differentiable transportation pruning"; no code of it is public.
    """

    kind: Literal["dtp"] = "dtp"
    learns: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[WeightNeed]:
        """Ask for no data."""
        return frozenset()

    def thin(self, case: WeightCase) -> Thinned:
        """Keep what is not zero; the largest weights where training has not decided."""
        assert case.amount is not None
        left = int((case.weight != 0).sum())
        mask = largest(case.weight.abs(), case.amount, case.pattern, where=case.path)
        return Thinned(case.weight * mask, note=UNTRAINED if left > case.amount else "")
