"""Ground costs between points, without the cancellation of the matmul shortcut."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import order_of

__all__ = ["ground_cost", "root", "sqdist"]

BLOCK = 1024
# Below this share of the squared norms a matmul distance has lost half its digits.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9}


def sqdist(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"] | None = None
) -> Float[Tensor, "*batch n m"]:
    """Measure squared Euclidean distances between all points.

    Args:
        x: one cloud, or a batch of them.
        y: another; None measures x against itself, with a diagonal of exact zeros.

    Returns:
        squared distances, non-negative; close pairs are recomputed from their differences.
    """
    if x.ndim > 2:
        pairs = zip(x, x if y is None else y, strict=True)
        return torch.stack([sqdist(a, None if y is None else b) for a, b in pairs])
    if x.shape[1] <= 8:
        other = x if y is None else y
        return _by_difference(x, other)
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        return _by_matmul(x, x if y is None else y)
    return _symmetric(x) if y is None else _rectangular(x, y)


def ground_cost(
    x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"], *, p: float
) -> Float[Tensor, "*batch n m"]:
    """Raise the Euclidean distances between two clouds to the power p.

    Args:
        x: source points.
        y: target points.
        p: order of the distance, at least 1.

    Returns:
        the cost whose optimal value is W_p^p.
    """
    squared = sqdist(x, y)
    if order_of(p) == 2:
        return squared
    return root(squared, 2 / p)


def root(total: Tensor, p: float = 2.0) -> Tensor:
    """Take the p-th root with derivative 0 at 0, the one subgradient that leaves 0 alone."""
    if not (torch.is_grad_enabled() and total.requires_grad):
        return total.sqrt() if p == 2 else total.pow(1 / p)
    safe = total.where(total > 0, total.new_ones(()))
    return safe.pow(1 / p).where(total > 0, total.new_zeros(()))


def _by_difference(x: Tensor, y: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return (x[:, None] - y[None]).square().sum(-1)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _by_matmul(x: Tensor, y: Tensor) -> Tensor:
    centre = torch.cat([x, y]).detach().mean(0)
    x, y = x - centre, y - centre
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return (norms - 2 * x @ y.T).clamp(min=0)


def _symmetric(x: Tensor) -> Tensor:
    """Compute the upper triangle of blocks and mirror it."""
    x = x - x.mean(0)
    squares, out = _squares(x), x.new_empty(len(x), len(x))
    parts = [slice(i, i + BLOCK) for i in range(0, len(x), BLOCK)]
    for i, rows in enumerate(parts):
        for columns in parts[i:]:
            norms = squares[rows, None] + squares[columns]
            if rows == columns:  # a point and itself are near, and known to be at 0
                norms.fill_diagonal_(-1)
            block = _block(x[rows], x[columns], norms)
            out[rows, columns] = block
            out[columns, rows] = block.T
    return out.fill_diagonal_(0)


def _rectangular(x: Tensor, y: Tensor) -> Tensor:
    centre = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    x, y = x - centre, y - centre
    left, right = _squares(x)[:, None], _squares(y)
    parts = [slice(i, i + BLOCK) for i in range(0, len(x), BLOCK)]
    rows = [_block(x[part], y, left[part] + right) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _squares(x: Tensor) -> Tensor:
    """Square the length of every row in one pass that stores nothing else."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length.square_()


def _block(x: Tensor, y: Tensor, norms: Tensor) -> Tensor:
    """Measure one block by matmul, and its close pairs again by difference."""
    out = torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)
    near = out <= norms.mul_(CLOSE[x.dtype])
    count = int(near.count_nonzero())
    if count and x.dtype == torch.float32 and count > out.numel() // 16:
        x, y = x.double(), y.double()
        return _block(x, y, _squares(x)[:, None] + _squares(y)).float()
    if count:
        rows, columns = near.nonzero(as_tuple=True)
        step = max(1, 2**22 // x.shape[1])
        for i in range(0, count, step):
            r, c = rows[i : i + step], columns[i : i + step]
            out[r, c] = (x[r] - y[c]).square_().sum(1)
    return out
