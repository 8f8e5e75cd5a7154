"""What every verb asks of its input before it computes anything."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from torch_otprune.errors import TransportError

__all__ = [
    "at_least_one",
    "cloud",
    "clouds",
    "finite",
    "masses",
    "number",
    "order_of",
    "positive",
    "reals",
    "refuse",
    "same_space",
    "wide",
]


def refuse(wrong: Tensor | bool, problem: str, *, where: str, fix: str) -> None:
    """Raise a TransportError if something is wrong."""
    if wrong:
        raise TransportError(problem, where=where, fix=fix)


def finite(x: Tensor, name: str) -> Tensor:
    """Return x in float32 or float64, and refuse what is not a number."""
    x = wide(x, name)
    # One number tells almost always; a sum of finite entries may still overflow.
    if math.isfinite(x.detach().sum().item()):
        return x
    bad = int((~x.detach().isfinite()).sum())
    refuse(
        bad > 0,
        f"{bad} of {x.numel()} entries of {name} are NaN or infinite.",
        where=f"argument {name}, shape {tuple(x.shape)}",
        fix="pass finite values, for example by dropping the samples that overflowed.",
    )
    return x


def wide(x: Tensor, name: str) -> Tensor:
    """Return x in float32 or float64, whatever real numbers it holds."""
    x = reals(x, name)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def reals(x: Tensor, name: str) -> Tensor:
    """Return x as it is, and refuse what holds no real numbers."""
    if isinstance(x, Tensor) and not x.is_complex():
        return x
    kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
    raise TransportError(
        f"{name} is no tensor of real numbers, but {kind}.",
        where=f"argument {name}",
        fix="pass a tensor, for example torch.as_tensor(values).",
    )


def number(value: object) -> bool:
    """Say whether a setting is a number, so that it can be compared with one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, float | int | Real)


def positive(value: float, name: str) -> None:
    """Refuse a temperature that is zero, negative, infinite, NaN or no number."""
    refuse(
        not number(value) or not 0 < value < math.inf,
        f"{name} is {value!r}.",
        where=f"argument {name}",
        fix=f"pass a positive, finite {name}.",
    )


def at_least_one(value: int, name: str) -> None:
    """Refuse a number of things that is none."""
    refuse(
        not number(value) or not 1 <= value < math.inf or value != int(value),
        f"{name} is {value!r}.",
        where=f"argument {name}",
        fix=f"pass a whole number of {name}, at least 1.",
    )


def cloud(x: Tensor, name: str, *, batched: bool = False) -> Tensor:
    """Check a point cloud, points x dimensions; one dimension may be left out."""
    x = finite(x, name)
    x = x[:, None] if x.ndim == 1 else x
    if (x.ndim == 2 or (batched and x.ndim > 2)) and x.numel():
        return x
    raise TransportError(
        f"{name} of shape {tuple(x.shape)} is no point cloud.",
        where=f"argument {name}",
        fix="pass a matrix, points x dimensions, with at least one of each.",
    )


def clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check two clouds, or two batches of as many clouds, and give them one dtype and device."""
    x, y = cloud(x, "x", batched=True), cloud(y, "y", batched=True)
    refuse(
        x.shape[:-2] != y.shape[:-2],
        f"batches of shapes {tuple(x.shape)} and {tuple(y.shape)} do not match.",
        where="arguments x and y",
        fix="pass as many clouds on both sides, batch x points x dimensions.",
    )
    same_space(x, y)
    return x, y.to(x)


def masses(weights: Tensor | None, like: Tensor, size: int, name: str) -> Tensor:
    """Return non-negative weights of positive total; uniform with total 1 if there are none."""
    if weights is None:
        return like.new_full((*like.shape[:-2], size), 1.0 / size)
    weights = finite(weights, name).to(like)
    rows = weights.shape[:-1]
    alone = rows not in {(), like.shape[:-2], (1,) * (like.ndim - 2)}
    wrong = alone or weights.shape[-1:] != (size,) or bool((weights < 0).any())
    refuse(
        wrong or bool((weights.sum(-1) <= 0).any()),
        f"{name} of shape {tuple(weights.shape)} weighs no measure of {size} points.",
        where=f"argument {name}",
        fix="pass one non-negative weight per point, not all of them zero.",
    )
    return weights.expand(*like.shape[:-2], size)


def order_of(p: float) -> float:
    """Check the order of a distance."""
    if number(p) and 1 <= p < math.inf:
        return float(p)
    raise TransportError(
        f"W_p needs 1 <= p < infinity, not {p!r}.",
        where="argument p",
        fix="use p=2, or p=1 where outliers matter.",
    )


def same_space(x: Tensor, y: Tensor) -> None:
    """Refuse two clouds of different dimensions."""
    if x.shape[-1] == y.shape[-1]:
        return
    raise TransportError(
        f"points of {x.shape[-1]} dimensions cannot be compared with points of {y.shape[-1]}.",
        where="arguments x and y",
        fix="pass two clouds with the same number of columns.",
    )
