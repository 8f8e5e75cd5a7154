"""What a rule may ask of a call, and what it notes about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_otprune.certify.facts import Facts
from torch_otprune.structure.forward import flat_tensors, map_tensors

__all__ = ["SHAPES", "Context", "parts_of", "tensors_of"]

# Functions that only move elements, or copy them.
SHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "swapaxes", "unbind",
    "stack", "cat", "concat", "chunk", "split", "tensor_split", "unsqueeze", "squeeze", "expand",
    "expand_as", "repeat", "contiguous", "clone", "detach", "narrow",
    "select", "index_select", "getitem", "movedim", "moveaxis", "roll", "flip", "tile", "get",
    "broadcast_to", "view_as", "reshape_as", "hstack", "vstack", "repeat_interleave", "iter",
})  # fmt: skip

_JOINS = frozenset({"cat", "concat", "stack", "hstack", "vstack"})


def parts_of(index: Any) -> list[Tensor]:
    """List the tensors that bound slices.

    Args:
        index: what stands between square brackets.

    Returns:
        the tensors.
    """
    entries = index if isinstance(index, (tuple, list)) else (index,)
    slices = [e for e in entries if isinstance(e, slice)]
    return flat_tensors([(s.start, s.stop, s.step) for s in slices])


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """List all tensors that a call is given, bounds of slices included.

    Args:
        args: by position.
        kwargs: by name.

    Returns:
        the tensors, in order.
    """
    return flat_tensors([args, list(kwargs.values())]) + [t for a in args for t in parts_of(a)]


@dataclass
class Context:
    """What a rule may ask and note.

    Args:
        facts: gives what is known of a tensor.
        inputs: number of inputs that slopes are kept for.
        function: the torch function itself.
        names: path of each parameter and buffer, by identity.
        why: why a property is lost, by property.
        signs: weights that must not be negative, and which of their entries.
    """

    facts: Callable[[Tensor], Facts]
    inputs: int
    function: Any
    names: dict[int, str]
    why: dict[str, str] = field(default_factory=dict)
    signs: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {"convex": {}, "monotone": {}}
    )

    def reshaped(self, args: Any, kwargs: Any) -> list[Facts] | None:
        """Carry every fact through a function that only moves elements."""
        given, whole = flat_tensors([args, list(kwargs.values())]), tensors_of(args, kwargs)
        if any(not t.is_floating_point() and not self.facts(t).fixed for t in whole):
            return None  # an index that depends on the input
        if self.function.__name__ in _JOINS and not all(t.is_floating_point() for t in given):
            return None  # whole numbers that are values, not indices
        if any(isinstance(v, torch.dtype) for v in (*args, *kwargs.values())):
            return None  # `view` reads the same bits as other numbers

        real = [t for t in given if t.is_floating_point()]

        def call(*parts: Tensor) -> tuple[Tensor, ...]:
            left = iter(parts)

            def swap(t: Tensor) -> Tensor:  # whole numbers are indices and stay
                return next(left) if t.is_floating_point() else t

            whole = map_tensors([list(args), dict(kwargs)], swap)
            return tuple(flat_tensors(self.function(*whole[0], **whole[1])))

        known = [self.facts(t) for t in real]
        flags = [[t != 0 for t in call(*(read(f).double() for f in known))] for read in _FLAGS]
        slopes = [f.slopes(self.inputs) for f in known]
        sides = [torch.vmap(call)(*(pair[side] for pair in slopes)) for side in (0, 1)]
        every = [*flags, *[[t.double() for t in side] for side in sides]]
        return [Facts(*found) for found in zip(*every, strict=True)]

    def known(self, weight: Tensor) -> bool:
        """Tell whether a factor is the same finite number in every call.

        Args:
            weight: the factor.

        Returns:
            whether it is.
        """
        if not self.facts(weight).fixed:
            return False
        if bool(weight.isfinite().all()):
            return True
        name = f"`{self.names.get(id(weight), 'a weight')}` has infinite entries"
        self.why.update(dict.fromkeys(("convex", "monotone", "lipschitz"), name))
        return False

    def noted(self, weight: Tensor, mask: Tensor, live: Tensor) -> None:
        """Remember which entries of a parameter must not be negative.

        Args:
            weight: the parameter.
            mask: entries that multiply a signal which is convex and not affine.
            live: entries that multiply a signal which depends on the input and never falls.
        """
        if id(weight) in self.names:
            self.signs["convex"][self.names[id(weight)]] = mask
            self.signs["monotone"][self.names[id(weight)]] = live

    def negative(self, weight: Tensor, mask: Tensor) -> None:
        """Say why a sum is not convex."""
        bad = (weight < 0) & mask
        if bool(bad.any()):
            count, least = int(bad.sum()), float(weight[bad].min())
            name = self.names.get(id(weight), "a weight")
            few = "entry that reads" if count == 1 else "entries that read"
            self.why["convex"] = (
                f"`{name}` has {count} negative {few} a convex signal; the least is {least:.3g}"
            )
        self.why["monotone"] = f"`{self.names.get(id(weight), 'a weight')}` has negative entries"


_FLAGS: tuple[Callable[[Facts], Tensor], ...] = (
    lambda f: f.cvx,
    lambda f: f.ccv,
    lambda f: f.pos,
    lambda f: f.lcx,
    lambda f: f.flat,
)
