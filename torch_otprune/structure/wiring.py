"""Where the stream is among what a block is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, fx

from torch_otprune.structure.flow import Visit, tensors
from torch_otprune.structure.graph import Wiring

__all__ = ["first_of", "stream_of", "wiring_of"]

_USUAL = ("hidden_states", "x", "input", "inputs", "hidden_state")


def stream_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find the stream among a block's arguments.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        the first floating tensor: positional, under a usual name, under any other; None where
        there is none, or it is wrapped in a tuple, in which no stand-in looks.
    """
    usual = [kwargs[name] for name in _USUAL if name in kwargs]
    for value in (*args, *usual, *kwargs.values()):
        if _flows(value):
            return value
    return None


def _flows(value: object) -> TypeGuard[Tensor]:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, fx.Proxy)  # a symbolic trace has no dtypes


def first_of(output: Any) -> Tensor | None:
    """Find the stream in what a block returned: the first floating tensor."""
    return next((t for t in tensors(output) if t.is_floating_point()), None)


def wiring_of(visit: Visit, *, stream: bool = True) -> Wiring | None:
    """Describe how a module returns its stream and what it hands through.

    Args:
        visit: one call.
        stream: whether other outputs must be inputs handed through; otherwise they become None.

    Returns:
        the wiring; None where it returns something else as well.
    """
    output = visit.output
    if isinstance(output, Tensor):
        return "tensor"
    if not isinstance(output, (tuple, list)):
        return None
    main, wiring = first_of(output), list[str | int | None]()
    for entry in output:
        if entry is main and "x" in wiring:  # twice: no stand-in could tell them apart
            return None
        if entry is main:
            wiring.append("x")
        elif entry is None:
            wiring.append(None)
        else:
            handed = _handed(visit, entry)
            if (handed is None and stream) or handed == "x":
                return None
            wiring.append(handed)
    return tuple(wiring)


def _handed(visit: Visit, entry: object) -> str | int | None:
    places: list[tuple[str | int, object]] = [*enumerate(visit.args), *visit.kwargs.items()]
    return next((place for place, given in places if given is entry), None)
