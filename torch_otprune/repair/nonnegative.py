"""Least squares whose solution must not be negative in some entries."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["nonnegative"]

_ROUNDS = 200
_BLOCK = 1 << 24  # numbers in the systems that are solved at a time
_ZERO = 1e-10  # relative to the largest entry


def nonnegative(
    gram: Float[Tensor, "columns columns"],
    cross: Float[Tensor, "columns out"],
    floor: Bool[Tensor, "columns out"],
) -> Float[Tensor, "columns out"]:
    """Minimise `w' gram w - 2 w' cross` for every output, some entries not below zero.

    Args:
        gram: symmetric, positive definite; float64.
        cross: one right-hand side per output.
        floor: which entries must not be negative.

    Returns:
        the minimum; exact zeros where the bound holds.

    Source: block principal pivoting (Portugal, Judice & Vicente 1994; Kim & Park 2011), with
    Murty's rule where exchanging whole blocks does not get ahead, so it ends.
    """
    size = max(_BLOCK // max(len(gram) ** 2, 1), 1)
    outs = range(0, cross.shape[1], size)
    parts = [_pivoted(gram, cross[:, o : o + size], floor[:, o : o + size]) for o in outs]
    return torch.cat(parts, 1) if parts else cross


def _pivoted(gram: Tensor, cross: Tensor, floor: Tensor) -> Tensor:
    """Exchange entries between those at zero and those above until all signs are right."""
    out, columns = cross.shape[1], len(gram)
    free = torch.ones(out, columns, dtype=torch.bool, device=gram.device)
    left = torch.full((out,), columns + 1, device=gram.device)
    tries = torch.full((out,), 3, device=gram.device)
    bound, scale = floor.T, cross.abs().amax(0).clamp_min(1e-300)[:, None]
    order = torch.arange(columns, device=gram.device)
    for _ in range(_ROUNDS):
        weight = _solved(gram, cross, free)
        slope = weight @ gram - cross.T
        size = weight.abs().amax(1, keepdim=True).clamp_min(1e-300)
        wrong = (free & bound & (weight < -_ZERO * size)) | (~free & (slope < -_ZERO * scale))
        count = wrong.sum(1)
        if not bool(count.any()):
            break
        better = count < left
        left = torch.minimum(left, count)
        tries = torch.where(better, torch.full_like(tries, 3), tries - 1)
        last = torch.where(wrong, order, -1).amax(1, keepdim=True)  # Murty: one, the last
        block = (better | (tries >= 0))[:, None]
        free = free ^ torch.where(block, wrong, wrong & (order == last))
    return torch.where(bound, weight.clamp_min(0), weight).T


def _solved(gram: Tensor, cross: Tensor, free: Tensor) -> Tensor:
    """Solve for the free entries of every output, the others at zero."""
    both = free[:, :, None] & free[:, None, :]
    system = torch.where(both, gram, torch.zeros_like(gram))
    system = system + torch.diag_embed((~free).to(gram))
    found: Tensor = torch.linalg.solve(system, torch.where(free, cross.T, 0.0)[:, :, None])
    return found.squeeze(-1)
