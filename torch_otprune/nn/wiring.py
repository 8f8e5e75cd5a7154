"""What a block is given and what it gives back, so that something simpler can stand in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch_otprune.errors import StructureError
from torch_otprune.structure.graph import Wiring
from torch_otprune.structure.wiring import stream_of

__all__ = ["STREAM", "Wiring", "check_wiring", "streamed", "wired"]

STREAM = "x"  # the place of the stream in a tuple
_BARE = "tensor"  # the whole return value is the stream


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


def streamed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Find the stream among a stand-in's inputs.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        the tensor that `stream_of` finds.

    Raises:
        StructureError: if there is none.
    """
    if (stream := stream_of(args, kwargs)) is not None:
        return stream
    raise StructureError(
        "the block is given no floating tensor.",
        where=f"a call with {len(args)} positional inputs and the names {sorted(kwargs)}",
        fix="replace a block whose input is the stream of activations.",
    )


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
