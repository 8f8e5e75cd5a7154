"""What is known of a tensor as a function of the input, element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "INFINITE",
    "UNBOUNDED",
    "Facts",
    "all_of",
    "constant",
    "outside",
    "saturated",
    "seed",
    "unknown",
]

INFINITE = 1e30  # a slope above this is unbounded
# how it is written: so large that no product with small slopes looks bounded
UNBOUNDED = 1e300


@dataclass(frozen=True)
class Facts:
    """Curvature, sign and slopes of every element.

    Args:
        cvx: is convex in the input.
        ccv: is concave; with `cvx`, affine.
        pos: is never negative.
        lcx: its logarithm is convex, or it is zero; implies `cvx` and `pos`.
        flat: does not depend on the input that is asked about.
        lo: bound of each partial derivative from below, inputs first; None where all are zero.
        hi: the same from above.
        fixed: depends on no input at all: its value is that of every call.
        root: the tensor of which it is a function element by element; itself where None.
        same: is a convex non-decreasing function of that element.
    """

    cvx: Tensor
    ccv: Tensor
    pos: Tensor
    lcx: Tensor
    flat: Tensor
    lo: Tensor | None
    hi: Tensor | None
    fixed: bool = False
    root: Facts | None = None
    same: Tensor | None = None

    @property
    def origin(self) -> Facts:
        """The facts of its root."""
        return self if self.root is None else self.root

    @property
    def follows(self) -> Tensor:
        """Whether each element is a convex non-decreasing function of its root's."""
        return torch.ones_like(self.cvx) if self.same is None else self.same

    def slopes(self, inputs: int) -> tuple[Tensor, Tensor]:
        """Give both bounds, zeros written out."""
        if self.lo is None or self.hi is None:
            zero = torch.zeros(inputs, *self.cvx.shape, dtype=torch.float64, device=self.cvx.device)
            return zero, zero
        return self.lo, self.hi

    def bent(
        self, cvx: Tensor, ccv: Tensor, pos: Tensor, *, lo: Tensor, hi: Tensor, lcx: Tensor
    ) -> Facts:
        """Write what a function of it is; what is flat stays so."""
        lo, hi = (torch.where(self.flat, torch.zeros_like(t), t) for t in (lo, hi))
        lcx = lcx | (self.flat & pos)
        return Facts(cvx | self.flat, ccv | self.flat, pos, lcx, self.flat, *saturated(lo, hi))

    def shaped(self, change: Callable[[Tensor], Tensor]) -> Facts:
        """Carry every fact through a change of shape."""
        flags = (self.cvx, self.ccv, self.pos, self.lcx, self.flat)
        cvx, ccv, pos, lcx, flat = (change(t.double()) != 0 for t in flags)
        lo = None if self.lo is None else torch.vmap(change)(self.lo)
        hi = None if self.hi is None else torch.vmap(change)(self.hi)
        return Facts(cvx, ccv, pos, lcx, flat, lo, hi, self.fixed)

    def rooted(self, root: Facts, same: Tensor) -> Facts:
        """Say of what it is a function element by element."""
        return replace(self, root=root, same=same)


def saturated(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Write what is unbounded as one large number, so that it stays so."""
    lo = torch.where(lo < -INFINITE, torch.full_like(lo, -UNBOUNDED), lo)
    return lo, torch.where(hi > INFINITE, torch.full_like(hi, UNBOUNDED), hi)


def constant(value: Tensor) -> Facts:
    """Describe a parameter, a buffer or what is computed of them."""
    yes = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    pos = ~yes if value.is_complex() else value >= 0
    return Facts(yes, yes, pos, pos, yes, None, None, fixed=True)


def outside(value: Tensor) -> Facts:
    """Describe an input that is not asked about: any number, the same for all that are compared."""
    yes = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    return Facts(yes, yes, ~yes, ~yes, yes, None, None)


def seed(value: Tensor, *, hull: bool) -> Facts:
    """Describe the input itself.

    Args:
        value: the input of one sample.
        hull: whether one pair of bounds serves all inputs, where there are too many.

    Returns:
        the facts.
    """
    yes = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    if hull:
        hi = torch.ones(1, *value.shape, dtype=torch.float64, device=value.device)
        return Facts(yes, yes, ~yes, ~yes, ~yes, torch.zeros_like(hi), hi)
    count = value.numel()
    eye = torch.eye(count, dtype=torch.float64, device=value.device).reshape(count, *value.shape)
    return Facts(yes, yes, ~yes, ~yes, ~yes, eye, eye)


def unknown(value: Tensor, inputs: int) -> Facts:
    """Describe what nothing is known of."""
    no = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    big = torch.full((inputs, *value.shape), UNBOUNDED, dtype=torch.float64, device=value.device)
    return Facts(no, no, no, no, no, -big, big)


def all_of(found: Sequence[Facts], name: str) -> bool:
    """Tell whether all elements of some tensors have a property."""
    if name == "up":
        return all(f.lo is None or bool((f.lo >= 0).all()) for f in found)
    if name == "bounded":
        both = [t for f in found for t in (f.lo, f.hi) if t is not None]
        return all(bool((t.abs() < INFINITE).all()) for t in both)
    return all(bool(f.cvx.all()) for f in found)
