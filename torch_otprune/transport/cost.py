"""Ground costs between points, without the cancellation of the matmul shortcut."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import order_of, same_space, wide

__all__ = ["ground_cost", "root", "sqdist"]

BLOCK = 512  # rows of a block of a symmetric matrix: what is above the diagonal is done twice
ROWS = 1024  # rows of a block of any other
CACHE = 2**18  # entries that stay in the cache while differences are added up, one axis a time
MANY = 2**16  # entries of each matrix up to which a batch of them is one product
SMALL = 2**14  # entries up to which one call of torch.cdist is faster than a few calls per axis
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
        squared distances, non-negative; close pairs are recomputed from their differences. What is
        not a number stays none.
    """
    x = wide(x, "x")
    if y is not None:
        same_space(x, y)
        y = y.to(x)
    if x.ndim > 2:
        return _batched(x, x if y is None else y, itself=y is None)
    if x.shape[1] <= 8:
        other = x if y is None else y
        return _by_difference(x, other)
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        with torch.no_grad():
            value = _symmetric(x) if y is None else _rectangular(x, y)
        live = _by_matmul(x, x if y is None else y)
        return value + (live - live.detach())
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


def _batched(x: Tensor, y: Tensor, *, itself: bool) -> Tensor:
    """Measure many small clouds by one product, and large ones one by one."""
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    live = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if n * m > MANY or live:
        pairs = zip(x, y, strict=True)
        return torch.stack([sqdist(a, None if itself else b) for a, b in pairs])
    left, right = x.reshape(-1, n, d), y.reshape(-1, m, d)
    centre = (left.sum(1, keepdim=True) + right.sum(1, keepdim=True)) / (n + m)
    left, right = left - centre, right - centre
    norms = _squares(left)[:, :, None] + _squares(right)[:, None, :]
    if itself:  # a point and itself are near, and known to be at 0
        norms.diagonal(dim1=1, dim2=2).fill_(-1)
    out = _block(left, right, norms)
    if itself:
        out.diagonal(dim1=1, dim2=2).fill_(0)
    return out.reshape(*x.shape[:-2], n, m)


def _by_difference(x: Tensor, y: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return (x[:, None] - y[None]).square().sum(-1)
    if x.device.type != "cpu" or len(x) * len(y) <= SMALL:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()
    return _by_axis(x.T.contiguous(), y.T.contiguous())


def _by_axis(x: Tensor, y: Tensor) -> Tensor:
    """Add up squared differences, one row of x and y an axis, without leaving the cache."""
    n, m = x.shape[1], y.shape[1]
    step = max(1, CACHE // m)
    out, spare = x.new_empty(n, m), x.new_empty(min(step, n), m)
    for i in range(0, n, step):
        total = out[i : i + step]
        gap = spare[: len(total)]
        torch.sub(x[0, i : i + step, None], y[0], out=total).square_()
        for left, right in zip(x[1:, i : i + step, None], y[1:], strict=True):
            torch.sub(left, right, out=gap)
            total.addcmul_(gap, gap)
    return out


def _by_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Measure for the derivative's sake: close pairs lose digits, and fall below 0."""
    centre = torch.cat([x, y]).detach().mean(0)
    x, y = x - centre, y - centre
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return norms - 2 * x @ y.T


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
    if len(x) <= ROWS:
        return _block(x, y, left + right)
    out = x.new_empty(len(x), len(y))
    for i in range(0, len(x), ROWS):
        rows = slice(i, i + ROWS)
        out[rows] = _block(x[rows], y, left[rows] + right)
    return out


def _squares(x: Tensor) -> Tensor:
    """Square the length of every row in one pass that stores nothing else."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length.square_()


def _block(x: Tensor, y: Tensor, norms: Tensor) -> Tensor:
    """Measure one block by matmul, and its close pairs again by difference."""
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    out = product(norms, x, y.mT, alpha=-2).clamp_(min=0)
    near = out <= norms.mul_(CLOSE[x.dtype])
    if not bool(near.any()):
        return out
    count = int(near.count_nonzero())
    if x.dtype == torch.float32 and count > out.numel() // 16:
        x, y = x.double(), y.double()
        return _block(x, y, _squares(x)[..., None] + _squares(y)[..., None, :]).float()
    step = max(1, 2**22 // x.shape[-1])
    for part in near.nonzero().split(step):
        at = tuple(part.unbind(1))
        out[at] = (x[at[:-1]] - y[at[:-2] + at[-1:]]).square_().sum(1)
    return out
