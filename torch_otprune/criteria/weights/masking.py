"""What criteria that only choose weights have in common: a refit for those who want it."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.weights.base import (
    Mode,
    Thinned,
    WeightCase,
    WeightCriterion,
    largest,
)
from torch_otprune.criteria.weights.refit import towards

__all__ = ["Masking"]


class Masking(WeightCriterion):
    """Keep the weights with the largest scores as they are."""

    refit: bool = Field(
        default=False,
        description="fit the weights that stay to what the dense layer wrote: worth more than the "
        "choice of weights, and no part of the published recipe",
    )

    @property
    def refits(self) -> bool:
        """Tell whether weights that stay may change their values."""
        return self.refit

    @property
    def reads(self) -> Mode:
        """Tell which inputs and answers a refit fits to."""
        return "cascade" if self.refit else "sequential"

    @abstractmethod
    def score(self, case: WeightCase) -> Float[Tensor, "groups out columns"]:
        """Score every weight; larger means keep.

        Args:
            case: the layer and what it reads.

        Returns:
            one finite number per weight.
        """

    def thin(self, case: WeightCase) -> Thinned:
        """Keep the largest scores."""
        assert case.amount is not None
        mask = largest(
            self.score(case), case.amount, case.pattern, where=case.path, by_row=self.by_row
        )
        if not self.refit:
            return Thinned(case.weight * mask)
        assert case.second is not None
        return Thinned(towards(mask, case.aim, case.second, self.damping))
