"""Sweep over the inputs once: what goes is made up for by the inputs that come after it."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.weights.base import Fitted, Thinned, WeightCase, largest, register
from torch_otprune.criteria.weights.refit import damped
from torch_otprune.policy.weights import Pattern
from torch_otprune.statistics.moments import ridge_factor

__all__ = ["SparseGPT", "sweep"]


@register
class SparseGPT(Fitted):
    """Sweep over the inputs once; what a weight's going costs, the later ones make up for.

    In blocks of inputs, the weights with the least `w^2 / u^2` go, where u is the diagonal of the
    upper Cholesky factor of the inverse moments: the share of an input that later ones cannot
    make up for. Where moments have no inverse, the damping grows until they do.

    Limits: earlier inputs never make up for later ones, so the order of the inputs matters.

    Source: Frantar & Alistarh 2023, "SparseGPT", algorithm 1. Every block gives up its share
    exactly; the answers to fit to are the dense network's unless `mode` says otherwise.
    """

    kind: Literal["sparsegpt"] = "sparsegpt"
    block: int = Field(default=128, ge=1, description="inputs whose weights are chosen together")

    def thin(self, case: WeightCase) -> Thinned:
        """Sweep group by group."""
        assert case.second is not None
        assert case.amount is not None
        lifted, dead = damped(case.second, self.damping)
        step = -(-self.block // case.pattern.m) * case.pattern.m
        each = _shares(case.amount, len(case.aim))
        parts = [
            sweep(
                case.aim[g].masked_fill(dead[g], 0.0),
                lifted[g],
                each[g],
                case.pattern,
                block=step,
                where=case.path,
            )
            for g in range(len(case.aim))
        ]
        return Thinned(torch.stack(parts))


def _shares(amount: int, parts: int) -> list[int]:
    """Divide a number so that the parts differ by one at most."""
    edges = [amount * i // parts for i in range(parts + 1)]
    return [b - a for a, b in pairwise(edges)]


def sweep(
    aim: Float[Tensor, "out columns"],
    second: Float[Tensor, "columns columns"],
    amount: int,
    pattern: Pattern,
    *,
    block: int,
    where: str,
) -> Float[Tensor, "out columns"]:
    """Thin one matrix.

    Args:
        aim: what the answers would be with.
        second: moments of the inputs, lifted.
        amount: how many weights stay.
        pattern: where zeros may lie.
        block: inputs that are looked at together; a multiple of the pattern's m.
        where: the layer, for errors.

    Returns:
        the matrix with zeros.
    """
    width, weight = aim.shape[1], aim.clone()
    upper = _upper(second)
    for start in range(0, width, block):
        end = min(start + block, width)
        share = amount * end // width - amount * start // width
        own = upper[start:end, start:end]
        found, lost = _block(weight[:, start:end], own, share, pattern, where=where)
        weight[:, start:end] = found
        weight[:, end:] -= lost @ upper[start:end, end:]
    return weight


def _upper(second: Tensor) -> Tensor:
    """Factor the inverse of moments as `U' U` with U upper triangular.

    Turned about both ways, it is the inverse of the lower factor of the moments turned about,
    so that no inverse is factored, which rounding may have made indefinite.

    Returns:
        U.
    """
    lower = ridge_factor(second.flip(0, 1), 1e-12)
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1)


def _block(
    weight: Tensor, upper: Tensor, amount: int, pattern: Pattern, *, where: str
) -> tuple[Tensor, Tensor]:
    """Thin some columns; return them, and what later ones have to make up for."""
    weight, root = weight.clone(), upper.diagonal()
    lost, kept = torch.zeros_like(weight), torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    if pattern.free:
        score = (weight / root).square()
        mask = largest(score[None], amount, pattern, where=where)[0]
    for j in range(weight.shape[1]):
        if not pattern.free and j % pattern.m == 0:
            near = slice(j, j + pattern.m)
            score = (weight[:, near] / root[near]).square()
            mask[:, near] = largest(score[None], 0, pattern, where=where)[0]
        kept[:, j] = weight[:, j] * mask[:, j]
        lost[:, j] = (weight[:, j] - kept[:, j]) / root[j]
        weight[:, j:] -= torch.outer(lost[:, j], upper[j, j:])
    return kept, lost
