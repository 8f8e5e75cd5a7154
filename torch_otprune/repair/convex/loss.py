"""Losses of a head: value, slope, conjugate and proximal step, sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["LOSSES", "Hinge", "Logistic", "Loss", "LossName", "Squared", "simplex"]

LossName = Literal["squared", "hinge", "logistic"]
_NEWTON, _PROJECTED = 4, 10  # inner steps of a proximal step; the next round starts from them


class Loss(ABC):
    """A convex loss of every sample's answers."""

    labelled: bool = True

    @abstractmethod
    def each(self, answer: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
        """Measure each row's loss.

        Args:
            answer: rows x outputs.
            target: rows x outputs; one-hot where the loss takes labels.

        Returns:
            one number per row.
        """

    @abstractmethod
    def conjugate(self, slope: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
        """Evaluate the convex conjugate at slopes that the loss has somewhere, or between these."""

    @abstractmethod
    def near(self, start: Tensor, metric: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """Solve `slope = the loss's slope at start - metric slope`, row by row.

        Args:
            start: rows x outputs.
            metric: rows x outputs x outputs, positive definite.
            target: as for `each`.
            slope: a guess.

        Returns:
            the slope; rows x outputs.
        """

    @abstractmethod
    def slope(self, answer: Tensor, target: Tensor) -> Tensor:
        """Differentiate each row's loss; any subgradient where it has a kink."""

    @abstractmethod
    def idle(self, target: Tensor) -> Tensor:
        """Give slopes where no unit answers: at the best constant, or near it.

        Args:
            target: as for `each`.

        Returns:
            rows x outputs.
        """

    @abstractmethod
    def worst(self, high: Tensor, low: Tensor, target: Tensor) -> Float[Tensor, " rows"]:
        """Bound the loss where answers are known by bounds.

        Args:
            high: upper bounds; of answers, or with labels of answers less that of the label.
            low: lower bounds of answers; not looked at where the loss takes labels.
            target: as for `each`.

        Returns:
            one number per row.
        """


class Squared(Loss):
    """Half the squared distance."""

    labelled = False

    def each(self, answer: Tensor, target: Tensor) -> Tensor:
        """Measure half the squared distance."""
        return (answer - target).square().sum(1) / 2

    def slope(self, answer: Tensor, target: Tensor) -> Tensor:
        """Give the error."""
        return answer - target

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """Evaluate the conjugate."""
        return (slope.square() / 2 + slope * target).sum(1)

    def near(self, start: Tensor, metric: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """Solve one small linear system per row."""
        eye = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
        found: Tensor = torch.linalg.solve(eye + metric, (start - target)[:, :, None])
        return found[:, :, 0]

    def idle(self, target: Tensor) -> Tensor:
        """Give the error of the mean."""
        return target.mean(0) - target

    def worst(self, high: Tensor, low: Tensor, target: Tensor) -> Tensor:
        """Take the farther bound of every answer."""
        return torch.maximum(high - target, target - low).square().sum(1) / 2


class Logistic(Loss):
    """Cross-entropy."""

    def each(self, answer: Tensor, target: Tensor) -> Tensor:
        """Measure nats."""
        return answer.logsumexp(1) - (answer * target).sum(1)

    def slope(self, answer: Tensor, target: Tensor) -> Tensor:
        """Subtract the label from the probabilities."""
        return answer.softmax(1) - target

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """Evaluate the negative entropy of the probabilities."""
        chance = (slope + target).clamp_min(0)
        return (chance * chance.clamp_min(1e-300).log()).sum(1)

    def near(self, start: Tensor, metric: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """Take a few Newton steps."""
        eye = torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
        guess = start - (metric @ slope[:, :, None])[:, :, 0]
        answer = (slope + target).clamp_min(1e-9).log()
        answer = answer + (guess - answer).mean(1, keepdim=True)
        for _ in range(_NEWTON):
            chance = answer.softmax(1)
            bend = torch.diag_embed(chance) - chance[:, :, None] * chance[:, None]
            off = answer - start + (metric @ (chance - target)[:, :, None])[:, :, 0]
            move = torch.linalg.solve(eye + metric @ bend, off[:, :, None])[:, :, 0]
            # full steps overshoot where the bend is small: the third derivative bounds a safe one
            reach = (move.amax(1) - move.amin(1)).clamp_min(1e-9)[:, None]
            answer = answer - reach.log1p() / reach * move
        return answer.softmax(1) - target

    def idle(self, target: Tensor) -> Tensor:
        """Subtract the label from the shares of the classes."""
        return target.mean(0) - target

    def worst(self, high: Tensor, low: Tensor, target: Tensor) -> Tensor:
        """Measure nats where every other answer is as far ahead as it can be."""
        return high.logsumexp(1)


class Hinge(Loss):
    """How far the best wrong answer comes within one of the right one."""

    def each(self, answer: Tensor, target: Tensor) -> Tensor:
        """Measure the missing margin."""
        return ((answer + 1 - target).amax(1) - (answer * target).sum(1)).clamp_min(0)

    def slope(self, answer: Tensor, target: Tensor) -> Tensor:
        """Point to the answer that comes nearest, or nowhere."""
        first = (answer + 1 - target).argmax(1)
        return torch.nn.functional.one_hot(first, answer.shape[1]).to(answer) - target

    def conjugate(self, slope: Tensor, target: Tensor) -> Tensor:
        """Evaluate the conjugate."""
        return (slope * target).sum(1)

    def near(self, start: Tensor, metric: Tensor, target: Tensor, slope: Tensor) -> Tensor:
        """Take accelerated projected steps of the dual, a quadratic program over a simplex."""
        # both bound its curvature; the rows' sums are the nearer one for many classes
        trace, sums = metric.diagonal(dim1=1, dim2=2).sum(1), metric.abs().sum(2).amax(1)
        step = 1 / torch.minimum(trace, sums)[:, None]
        weight = last = simplex(slope + target)
        for turn in range(_PROJECTED):
            ahead = weight + turn / (turn + 3) * (weight - last)
            down = start + 1 - target - (metric @ (ahead - target)[:, :, None])[:, :, 0]
            last, weight = weight, simplex(ahead + step * down)
        return weight - target

    def idle(self, target: Tensor) -> Tensor:
        """Share the slope out between the wrong answers, which all tie, by the classes' shares."""
        others = (1 - target) * target.mean(0)
        return others / others.sum(1, keepdim=True).clamp_min(1e-300) - target

    def worst(self, high: Tensor, low: Tensor, target: Tensor) -> Tensor:
        """Measure the margin that is missing in the worst case."""
        return (high + 1 - target).amax(1)


def simplex(value: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows outputs"]:
    """Project every row onto the probabilities."""
    ordered = value.sort(dim=1, descending=True).values
    count = torch.arange(1, value.shape[1] + 1, dtype=value.dtype, device=value.device)
    level = (ordered.cumsum(1) - 1) / count
    last = (ordered > level).sum(1, keepdim=True) - 1
    return (value - level.gather(1, last)).clamp_min(0)


LOSSES: dict[LossName, Loss] = {"squared": Squared(), "hinge": Hinge(), "logistic": Logistic()}
