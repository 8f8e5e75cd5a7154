"""Look for the support and its weights together, by alternating directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.weights.base import Fitted, Thinned, WeightCase, largest, register
from torch_otprune.criteria.weights.refit import damped, off, refit
from torch_otprune.policy.weights import Pattern

__all__ = ["ALPS"]

_CHECK = 3  # rounds between two looks at the support
_GENTLE = 1e-6  # smallest penalty


@register
class ALPS(Fitted):
    """Look for the support and its weights together, by alternating directions.

    One copy of the weights fits the layer's answers, the other has no more weights than allowed;
    a growing penalty brings them together. The weights on the support that is found are fitted by
    conjugate gradients. Inputs are brought to one size first.

    Limits: no optimum is promised. Where keeping the weights that carry most, refitted, does
    better, these are taken, and the note says so. One eigendecomposition per layer takes the cube
    of its inputs, times kernel positions: a second or two at 1,500, minutes at 9,000, and then up
    to `rounds` products of weights with inputs x inputs. What memory this takes is quoted before
    the first batch; `wanda` takes less than half of it.

    Source: Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for
    large language models", algorithm 1, with its schedule of the penalty. That it starts from, and
    is held to, the refitted weights of largest carry is ours.
    """

    kind: Literal["alps"] = "alps"
    rounds: int = Field(default=300, ge=1, description="rounds of alternating directions, at most")
    steps: int = Field(default=100, ge=1, description="steps of conjugate gradients, at most")

    def thin(self, case: WeightCase) -> Thinned:
        """Find the support, then fit."""
        assert case.second is not None
        assert case.amount is not None
        lifted, dead = damped(case.second, self.damping)
        size = lifted.diagonal(dim1=1, dim2=2).sqrt()
        second = lifted / (size[:, :, None] * size[:, None, :])
        aim = case.aim.masked_fill(dead[:, None, :], 0.0) * size[:, None, :]
        first = largest(aim.abs(), case.amount, case.pattern, where=case.path)
        search = _Search(aim, second, case.amount, case.pattern)
        cross = aim @ second
        found = [
            refit(mask, second, cross, aim * mask, steps=self.steps)
            for mask in (search.support(first, self.rounds), first)
        ]
        costs = [float(off(weight, aim, second).sum()) for weight in found]
        best = 0 if costs[0] <= costs[1] else 1
        note = "kept what carries most: alternating directions found nothing better"
        return Thinned(found[best] / size[:, None, :], note=note if best else "")


@dataclass(frozen=True)
class _Search:
    """Alternating directions for one layer.

    Args:
        aim: the dense weight, of inputs of size one.
        second: their moments, lifted.
        amount: weights that stay.
        pattern: where zeros may lie.
    """

    aim: Float[Tensor, "groups out columns"]
    second: Float[Tensor, "groups columns columns"]
    amount: int
    pattern: Pattern

    def support(
        self, mask: Bool[Tensor, "groups out columns"], rounds: int
    ) -> Bool[Tensor, "groups out columns"]:
        """Move a support to a better one.

        Args:
            mask: the first guess.
            rounds: at most.

        Returns:
            a support of the same size.
        """
        values, basis = torch.linalg.eigh(self.second)
        cross = self.aim @ self.second
        sparse, dual, penalty = self.aim * mask, torch.zeros_like(self.aim), 0.1
        moved = False
        last = mask
        for turn in range(1, rounds + 1):
            inside = ((cross - dual + penalty * sparse) @ basis) / (values + penalty)[:, None, :]
            dense = inside @ basis.mT
            wanted = dense + dual / penalty
            mask = self._top(wanted)
            sparse = wanted * mask
            dual = dual + penalty * (dense - sparse)
            if turn % _CHECK:
                continue
            share = float((mask ^ last).sum()) / max(2 * self.amount, 1)
            if share == 0 and moved:
                break
            moved = moved or share > 0
            penalty, last = _penalty(penalty, share, moved), mask
            if penalty < _GENTLE:
                break
        return mask

    def _top(self, weight: Tensor) -> Tensor:
        """Mark the largest; equals need not be told apart before the end."""
        if not self.pattern.free:
            rows, count = weight.abs().view(-1, self.pattern.m), self.pattern.n
        else:
            rows, count = weight.abs().view(1, -1), self.amount
        chosen = rows.topk(count, dim=1, sorted=False).indices
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, value=True)
        return mask.view(weight.shape)


def _penalty(penalty: float, share: float, moved: bool) -> float:
    """Tighten the penalty, slower as the support settles; loosen it while nothing ever moved."""
    if not moved:
        return penalty / 5
    return penalty * (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1)
