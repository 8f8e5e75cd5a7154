"""What a block is given and what it gives back, so that something simpler can stand in for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, fx

from torch_otprune.errors import StructureError
from torch_otprune.structure.graph import Wiring

__all__ = ["STREAM", "Wiring", "check_wiring", "stream_of", "wired", "wiring_of"]

STREAM = "x"  # the place of the stream in a tuple
_BARE = "tensor"  # the whole return value is the stream
_USUAL = ("hidden_states", "x", "input", "inputs", "hidden_state")


def check_wiring(wiring: str | Sequence[str | int | None]) -> Wiring:
    """Read a wiring, for instance from JSON, where tuples became lists.

    Args:
        wiring: `tensor`, or one entry per returned value: `x` for the stream, None, or the name
            (position) of the keyword (positional) input that is handed through.

    Returns:
        the same, hashable.

    Raises:
        StructureError: if it is neither.
    """
    if wiring == _BARE:
        return _BARE
    good = not isinstance(wiring, str) and all(map(_is_entry, wiring))
    if not good or list(wiring).count(STREAM) != 1:
        raise StructureError(
            f"{wiring!r} does not say how a block returns its stream.",
            where="wiring",
            fix="write 'tensor', or a tuple with 'x' once and otherwise None or names of inputs.",
        )
    return tuple(wiring)


def _is_entry(entry: object) -> bool:
    if isinstance(entry, int):
        return not isinstance(entry, bool) and entry >= 0
    return entry is None or (isinstance(entry, str) and bool(entry))


def stream_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find the stream among a block's inputs.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        the first floating tensor: positional, under a usual name, under any other name.

    Raises:
        StructureError: if there is none.
    """
    usual = [kwargs[name] for name in _USUAL if name in kwargs]
    for value in (*args, *usual, *kwargs.values()):
        if _flows(value):
            return value
    raise StructureError(
        "the block is given no floating tensor.",
        where=f"a call with {len(args)} positional inputs and the names {sorted(kwargs)}",
        fix="replace a block whose input is the stream of activations.",
    )


def _flows(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, fx.Proxy)  # a symbolic trace has no dtypes


def wired(wiring: Wiring, stream: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a stream in the structure that the block's caller expects.

    Args:
        wiring: what the block returned.
        stream: the tensor to return in its place.
        args: the call's positional arguments.
        kwargs: its keyword arguments; one that is absent here is returned as None.

    Returns:
        the stream, alone or in a tuple.
    """
    if isinstance(wiring, str):
        return stream
    return tuple([_entry(entry, stream, args, kwargs) for entry in wiring])


def _entry(
    entry: str | int | None, stream: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    if entry is None:
        return None
    if isinstance(entry, int):
        return args[entry] if entry < len(args) else None
    return stream if entry == STREAM else kwargs.get(entry)


def wiring_of(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    *,
    branch: bool = False,
    unread: Collection[int] = (),
) -> Wiring:
    """Describe how a block returned its stream, from one call of it.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        output: what the block returned.
        branch: whether it is a branch, which may write another shape than it reads.
        unread: places of a returned tuple that nobody reads, such as attention weights.

    Returns:
        the wiring.

    Raises:
        StructureError: if the block returns something that is neither its stream nor an input.

    Limits: an input that is handed through is recognised by identity, a copy is not.
    """
    given = [*args, *kwargs.values()]
    stream = stream_of(args, kwargs)
    if _carries(output, stream, given, branch):
        return _BARE
    entries = output if type(output) is tuple else ()
    places = [
        place
        for place, value in enumerate(entries)
        if place not in unread and _carries(value, stream, given, branch)
    ]
    if not places:
        _refuse("the block returns", output, stream)
    return tuple(
        STREAM
        if place == places[0]
        else None
        if place in unread
        else _origin(place, value, args, kwargs)
        for place, value in enumerate(entries)
    )


def _carries(value: Any, stream: Tensor, given: Sequence[Any], branch: bool) -> bool:
    """Tell the stream from an input of its shape that is handed through, such as a memory."""
    if value is stream:
        return True
    if not isinstance(value, Tensor) or any(value is one for one in given):
        return False
    return value.dtype == stream.dtype and (branch or value.shape == stream.shape)


def _origin(
    place: int, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | int | None:
    if value is None:
        return None
    for position, given in enumerate(args):
        if value is given:
            return position
    for name, given in kwargs.items():
        if value is given and name != STREAM:
            return name
    return _refuse(f"entry {place} of the block's return value is", value, stream_of(args, kwargs))


def _refuse(problem: str, value: Any, stream: Tensor) -> NoReturn:
    raise StructureError(
        f"{problem} {_named(value)}, neither its stream nor one of its inputs.",
        where=f"a block whose stream has shape {tuple(stream.shape)}",
        fix="keep this block, or turn the side output off in the model's configuration.",
    )


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} tensor of {value.dtype}"
    if type(value) is tuple:
        return f"a tuple of {', '.join(_named(v) for v in value) or 'nothing'}"
    return f"of type {type(value).__name__}"
