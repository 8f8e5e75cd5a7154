"""The numbers that layers carry, and the places that they take in a key-value cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_otprune.nn import ChannelScale, LowRank, Perceptron, Skip, Zero

__all__ = ["NUMBERS", "Entry", "places", "renumber_", "silenced"]

NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")
_STANDINS = (Skip, Zero, ChannelScale, LowRank, Perceptron)


@dataclass(frozen=True)
class Entry:
    """One layer that stays.

    Args:
        old: its number before.
        module: the layer.
    """

    old: int
    module: nn.Module


def silenced(entries: Sequence[Entry]) -> bool:
    """Tell whether part of some entry no longer carries the number that others carry."""
    standins = {path for entry in entries for path in _standins(entry.module)}
    return any(_under(path, standins) for _, path, _ in _carried(entries))


def renumber_(entries: Sequence[Entry], types: list[Any] | None) -> list[Any] | None:
    """Number the layers that stay without gaps.

    A layer's number is also its place in the key-value cache. Where some layers have lost their
    attention, the others move up, since the cache reads the number of past tokens from its first
    place; among places of one type, if layers have types, since each type has its own cache.

    Args:
        entries: what stays, in order.
        types: the type of every entry, as the cache will see them; None where there are none.

    Returns:
        the types as they must be now; the same where no type lost all its attentions.

    Limits: only numbers that grow by one from layer to layer; others mean something else. Some
    attention must stay: a cache that nobody fills knows no past. Places of sliding layers that
    stay empty cannot be cropped, so Transformers' assisted decoding fails there.
    """
    for (path, name), found in _numbers(entries).items():
        mute = [n for n, e in enumerate(entries) if _under(path, set(_standins(e.module)))]
        values = {new: vars(module)[name] for new, module in found.items()}
        first = _first({v - entries[new].old for new, v in values.items()}, bool(mute))
        shared = len({id(module) for module in found.values()}) < len(found)
        if first is None or shared or not _comparable(path, len(found), first):
            continue
        if mute:
            types = _retyped(types, sorted(found), mute)
        for new, place in places(sorted(found), mute, types).items():
            vars(found[new])[name] = place + first
    return types


def _comparable(path: str, found: int, first: int) -> bool:
    """Believe a number that nothing can be compared with only if it is the layer's own."""
    return found > 1 or (first == 0 and not any(p.isdecimal() for p in path.split(".")))


def _first(offsets: set[int], moved: bool) -> int | None:
    """Tell the number of the first layer; None where the numbers mean something else."""
    if len(offsets) == 1 and min(offsets) >= 0:
        return min(offsets)
    return 0 if moved else None  # an earlier pass has moved them up


def places(live: Sequence[int], mute: Sequence[int], types: Sequence[Any] | None) -> dict[int, int]:
    """Give every live layer the first free place of its type.

    Args:
        live: numbers of the layers that use the cache.
        mute: numbers of the layers that did.
        types: the type of every layer; None where all are alike.

    Returns:
        each live layer's place.

    Example:
        >>> places([1, 2, 3], [0], None)
        {1: 0, 2: 1, 3: 2}
        >>> places([1, 2, 3], [0], ["near", "far", "near", "far"])
        {1: 1, 2: 0, 3: 3}
    """
    free: dict[Any, list[int]] = defaultdict(list)
    for place in sorted([*live, *mute]):
        free[types[place] if types else None].append(place)
    return {layer: free[types[layer] if types else None].pop(0) for layer in live}


def _retyped(types: list[Any] | None, live: Sequence[int], mute: Sequence[int]) -> list[Any] | None:
    """Give mute layers of a type that nobody uses any more a type that is in use."""
    if not types or not live:
        return types
    used = {types[layer] for layer in live}
    changed = [*types]
    for layer in mute:
        if types[layer] not in used:
            changed[layer] = types[live[0]]
    return changed


def _numbers(entries: Sequence[Entry]) -> Mapping[tuple[str, str], dict[int, nn.Module]]:
    """Collect the modules that carry a number, by their path within the layer."""
    found: dict[tuple[str, str], dict[int, nn.Module]] = defaultdict(dict)
    for new, path, module in _carried(entries):
        for name in NUMBERS:
            if type(vars(module).get(name)) is int:
                found[path, name][new] = module
    return found


def _carried(entries: Sequence[Entry]) -> Iterator[tuple[int, str, nn.Module]]:
    for new, entry in enumerate(entries):
        for path, module in entry.module.named_modules():
            if any(type(vars(module).get(name)) is int for name in NUMBERS):
                yield new, path, module


def _standins(layer: nn.Module) -> Iterator[str]:
    return (path for path, module in layer.named_modules() if isinstance(module, _STANDINS))


def _under(path: str, standins: set[str]) -> bool:
    """Tell whether a stand-in took a module's place, or that of something around it."""
    parts = path.split(".")
    return "" in standins or any(".".join(parts[: i + 1]) in standins for i in range(len(parts)))
