"""The contract of a weight criterion: one layer and what it reads in, a layer with zeros out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import checked
from torch_otprune.policy.registry import WEIGHT_CRITERIA
from torch_otprune.policy.weights import Pattern, WeightSetting

__all__ = [
    "Certificate",
    "Fitted",
    "Mode",
    "Samples",
    "Thinned",
    "WeightCase",
    "WeightCriterion",
    "WeightNeed",
    "largest",
    "register",
]

WeightNeed = Literal["moments", "rows", "saliency"]
Mode = Literal["cascade", "sequential", "parallel"]
register = WEIGHT_CRITERIA.register

_Weight = Float[Tensor, "groups out columns"]


@dataclass(frozen=True)
class Samples:
    """Some of what a layer reads and writes, seen through the rectifier behind it.

    Everything is in the unit of what the rectifier sees: `x @ weight.T`, times the scale of a
    batch-norm in between.

    Args:
        x: input rows; where the layer can be shifted, a column of ones comes last.
        target: what the dense layer writes there.
        active: where the dense rectifier is on; everywhere where there is none.
        roof: where it is off, the most that may be written without switching it on.
        own: what the present weight writes on these inputs; what slack is given in a cascade.
        scale: of each output, by a batch-norm.
        shifts: whether the last column of `x` is of ones.
    """

    x: Float[Tensor, "groups rows columns"]
    target: Float[Tensor, "groups rows out"]
    active: Bool[Tensor, "groups rows out"]
    roof: Float[Tensor, "groups rows out"]
    own: Float[Tensor, "groups rows out"]
    scale: Float[Tensor, "groups out"]
    shifts: bool


@dataclass(frozen=True)
class WeightCase:
    """One layer, as a weight criterion sees it. Everything in float64.

    Columns are ordered so that the neighbours of a pattern lie side by side: a kernel position's
    input channels together.

    Args:
        path: the layer.
        weight: as it is; one matrix per group of a grouped convolution.
        aim: the dense weight that least squares would choose; the weight itself where inputs and
            answers belong together.
        second: averaged products of what it reads; about the mean where a constant has somewhere
            to go. None where the criterion needs no data.
        power: averaged squares of each column, about zero; None likewise.
        amount: how many weights stay; None where the criterion decides.
        pattern: where zeros may lie.
        rows: how many rows were averaged.
        samples: rows themselves, for a criterion that needs them.
        saliency: what each weight does to the trace of the tangent kernel, for a criterion that
            needs it.
    """

    path: str
    weight: _Weight
    aim: _Weight
    second: Float[Tensor, "groups columns columns"] | None
    power: Float[Tensor, "groups columns"] | None
    amount: int | None
    pattern: Pattern
    rows: int = 0
    samples: Samples | None = None
    saliency: _Weight | None = None


@dataclass(frozen=True)
class Certificate:
    """What a convex program guarantees about one layer, on its calibration rows.

    Args:
        radius: how far the layer's answers may be from the dense ones, behind the rectifier: root
            of the summed squares over all outputs, averaged over rows.
        spent: how far they are; the identity coupling of both makes this a bound on their W2.
        gap: how far the l1 norm that was found may be above the least one, as a share of it;
            None where no dual point was found.
        growth: factor by which an error in front may grow, promised before the solution is known:
            the root of gamma in a cascade; None where each layer has a radius of its own.
    """

    radius: float
    spent: float
    gap: float | None
    growth: float | None


@dataclass(frozen=True)
class Thinned:
    """A layer with zeros.

    Args:
        weight: as in the case.
        shift: what to add to each output; None leaves that to whoever knows the means.
        certificate: of a criterion that gives one.
        note: what a reader of the report should know; empty as a rule.
    """

    weight: _Weight
    shift: Float[Tensor, "groups out"] | None = None
    certificate: Certificate | None = None
    note: str = ""


class WeightCriterion(WeightSetting, ABC):
    """Choose the weights of a layer that go. A subclass is one file."""

    by_row: ClassVar[bool] = False  # whether every output keeps equally many

    damping: float = Field(
        default=1e-2, gt=0, description="share of the mean squared input that a fit adds to each"
    )

    @property
    def needs(self) -> frozenset[WeightNeed]:
        """Tell what must be known about the inputs."""
        return frozenset({"moments"})

    @property
    def refits(self) -> bool:
        """Tell whether weights that stay may change their values."""
        return False

    @property
    def reads(self) -> Mode:
        """Tell which inputs and answers the layer is fitted to."""
        return "sequential"

    @abstractmethod
    def thin(self, case: WeightCase) -> Thinned:
        """Choose which weights of one layer stay, and what they become.

        Args:
            case: the layer and what it reads.

        Returns:
            the layer with zeros: at most `amount` others, in the pattern.
        """


class Fitted(WeightCriterion, ABC):
    """What criteria that refit have in common: inputs and answers to fit to."""

    mode: Mode = Field(
        default="cascade",
        description="`cascade`: inputs from the layers already pruned, answers of the dense "
        "network; `sequential`: these inputs, and the layer's own answers to them, as published; "
        "`parallel`: inputs and answers of the dense network",
    )

    @property
    def refits(self) -> bool:
        """Tell that weights that stay change their values."""
        return True

    @property
    def reads(self) -> Mode:
        """Tell which inputs and answers the layer is fitted to."""
        return self.mode


def largest(
    score: _Weight, amount: int, pattern: Pattern, *, where: str, by_row: bool = False
) -> Bool[Tensor, "groups out columns"]:
    """Mark the weights with the largest scores.

    Args:
        score: one per weight; the first of equals is taken.
        amount: how many in all.
        pattern: where zeros may lie; one that is not free decides how many itself.
        where: the layer, for errors.
        by_row: whether every output keeps equally many; `amount` is a multiple then.

    Returns:
        the mask.

    Raises:
        CalibrationError: if a score is NaN or infinite.
    """
    flat = checked(score.flatten(), "weight", where=f"layer '{where}'")
    if not pattern.free:
        rows, count = flat.view(-1, pattern.m), pattern.n
    elif by_row:
        rows = flat.view(-1, score.shape[-1])
        count = amount // len(rows)
    else:
        rows, count = flat[None], amount
    order = rows.argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(rows, dtype=torch.bool)
    return mask.scatter_(1, order, value=True).view(score.shape)
