"""A soft choice of the k largest: two-point entropic transport in closed form."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import finite, positive, refuse
from torch_otprune.transport.threshold import fill_, threshold

__all__ = ["soft_topk"]


def soft_topk(
    scores: Float[Tensor, "*shape"],
    k: float,
    *,
    eps: float = 0.1,
    costs: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Spread a budget over entries, softly preferring the largest scores.

    Args:
        scores: what to rank, any shape, in any unit.
        k: the budget: the sum of the mask, or of mask x costs; strictly inside its range.
        eps: softness in the unit of the scores; towards 0 the mask becomes a hard top-k.
        costs: positive cost of each entry, whose scores are then per unit of cost; None is 1.

    Returns:
        a mask in (0, 1) that meets the budget to rounding, with the exact gradient in `scores`.

    Raises:
        TransportError: if the budget is not strictly between nothing and everything.

    Source: entropic transport onto {0, 1}: mask = logistic((score - t) / eps) with one scalar t
    from the budget (Xie et al. 2020, in closed form); gradient by the implicit function theorem.

    Example:
        >>> soft_topk(torch.tensor([1.0, 2.0, 3.0]), 1.5, eps=0.5)
        tensor([0.1192, 0.5000, 0.8808])
    """
    scores = finite(scores, "scores")
    weights = None if costs is None else finite(costs, "costs").to(scores)
    _check(scores, k, eps, weights)
    mask: Tensor = _SoftTopK.apply(scores, float(k), float(eps), weights)  # type: ignore[no-untyped-call]
    return mask


def _check(scores: Tensor, k: float, eps: float, costs: Tensor | None) -> None:
    positive(eps, "eps")
    wrong = costs is not None and (costs.shape != scores.shape or bool((costs <= 0).any()))
    refuse(
        wrong,
        "a cost is missing, zero or negative.",
        where="soft_topk, argument costs",
        fix="pass one positive cost per score.",
    )
    total = float(scores.numel() if costs is None else costs.double().sum())
    refuse(
        not 0 < k < total,
        f"a budget of {k:g} is not strictly between 0 and {total:g}.",
        where="soft_topk, argument k",
        fix="ask for less than everything and more than nothing.",
    )


class _SoftTopK(torch.autograd.Function):
    """The mask and its closed-form derivative; the budget is kept by every step along it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: float, eps: float, costs: Tensor | None) -> Tensor:
        found = threshold([scores], k, eps=eps, costs=None if costs is None else [costs])
        mask = fill_(
            torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
            scores,
            found.at,
            eps,
        )
        ctx.save_for_backward(mask, *([] if costs is None else [costs]))
        ctx.eps = eps
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        mask, *rest = ctx.saved_tensors
        slope = mask * (1 - mask)
        paid = slope * rest[0] if rest else slope
        total = paid.double().sum()
        # A mask that is hard to the last digit has no slope left to share out.
        mean = (slope * grads[0]).double().sum() / total if total > 0 else total
        back = slope * grads[0] - paid * mean.to(slope)
        return back / ctx.eps, None, None, None
