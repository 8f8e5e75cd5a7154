"""Writes in place: whoever looks at the same memory sees the new labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.forest import KEPT
from torch_otprune.structure.coupling.ledger import Fact, Ledger

__all__ = ["fill", "like", "seen", "write", "written"]


def write(ledger: Ledger, op: Any, given: Any, out: Any) -> None:
    """A copy into a tensor: what was there is gone; a constant belongs to whoever is there."""
    x, source = given["self"], given["src"]
    fact = ledger.fact(source)
    if source.numel() == 1 or fact.source == "filler":
        _overwritten(ledger, x)
        return
    fields = [spread(field, x.shape) for field in fact.fields]
    before, after = ([ledger.roots(f) for f in fs] for fs in (ledger.fact(x).fields, fields))
    if not _alike(before, after):
        _overwritten(ledger, x)
    ledger.put(x, fields, fact.source)


def like(ledger: Ledger, op: Any, given: Any, out: Any) -> None:
    """A constant of another tensor's shape: its labels, but the number is everywhere the same."""
    fact = ledger.fact(given["self"])
    ledger.put(out, fact.fields if out.shape == given["self"].shape else (), fact.source)
    ledger.note(out, replace(ledger.fact(out), even=True))


def fill(ledger: Ledger, op: Any, given: Any, out: Any) -> None:
    """A constant instead of what was there: it belongs to whoever is there."""
    _overwritten(ledger, given["self"])


def _overwritten(ledger: Ledger, tensor: Tensor) -> None:
    """Object to cuts where some channels of a larger tensor are replaced: a number names them.

    The trial alone would not do: where the numbers that move up are zero on the example, as behind
    a ReLU, it sees no difference.
    """
    fact = ledger.fact(tensor)
    here = _roots(ledger, fact)
    if not here or fact.source == "filler":
        return
    for mate in (m for m in ledger.mates(tensor) if not ledger.facts[m].even):
        if _roots(ledger, ledger.facts[mate]) - here:
            for labels in (core(field) for field in ledger.facts[mate].fields):
                ledger.object(labels, "mix", "some are written over at places named by numbers")


def _roots(ledger: Ledger, fact: Fact) -> set[int]:
    found = (ledger.forest.roots(core(field)).unique().tolist() for field in fact.fields)
    return {root for roots in found for root in roots} - {KEPT}


def seen(ledger: Ledger, tensors: Sequence[Tensor]) -> None:
    """Write down tensors that no op of the run has made."""
    for tensor in tensors:
        found = ledger.facts.get(tensor)
        if found is None:
            ledger.note(tensor, ledger.fact(tensor))
        else:
            ledger.near[id(tensor)] = found
        if ledger.alone and (one := ledger.alone.take(tensor)) is not None:
            ledger.object(one, "mix", "one of them is picked by its number")


def written(ledger: Ledger, tensor: Tensor, before: Fact) -> None:
    """Tell all views of a tensor's memory what was written to it.

    Args:
        ledger: what is known of them.
        tensor: what an op has written to; its own labels are known already.
        before: what was known of it.
    """
    after = ledger.facts[tensor]
    if _alike(after.fields, before.fields):
        return
    for mate in ledger.mates(tensor):
        known = ledger.facts[mate]
        if mate.dtype != tensor.dtype:
            for field in (*after.fields, *known.fields):
                ledger.object(core(field), "unknown", "they are written as another type of number")
            continue
        pairs = _paired(after.fields, known.fields, same=mate.dim() == tensor.dim())
        fields = [_joint(mate, tensor, new, was) for new, was in pairs]
        ledger.put(mate, [f for f in fields if f is not None])


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def _paired(
    new: Sequence[Tensor], old: Sequence[Tensor], *, same: bool
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Find which of the old labels each of the new ones is written over."""
    left = sorted(old, key=varying)
    for field in sorted(new, key=varying):
        fits = [was for was in left if not same or set(varying(was)) & set(varying(field))]
        if fits:
            left = [was for was in left if was is not fits[0]]
        yield field, fits[0] if fits else None
    for was in left:
        yield None, was


def _joint(mate: Tensor, tensor: Tensor, new: Tensor | None, was: Tensor | None) -> Tensor | None:
    """Write labels over others."""
    # a channel whose numbers are written in part, as one row of a picture, is still that channel
    starts = _starts(mate, tensor)
    if starts is not None and new is None and was is not None:
        narrow = {a for a, (_, _, n) in enumerate(starts) if n < mate.shape[a]}
        if narrow - set(varying(was)):
            return was
    wide = None if starts is None or new is None else _extended(mate, starts, new, was)
    return _over(mate, tensor, new, was) if wide is None else wide


def _starts(mate: Tensor, tensor: Tensor) -> list[tuple[int, int, int]] | None:
    """Read a view as first place, step and number of places along each axis."""
    if mate.dim() != tensor.dim() or 0 in mate.stride():
        return None
    offset = int(tensor.storage_offset()) - int(mate.storage_offset())
    found: list[tuple[int, int, int]] = [(0, 1, 1)] * mate.dim()
    strides: tuple[int, ...] = tensor.stride()
    steps: tuple[int, ...] = mate.stride()
    for axis in sorted(range(mate.dim()), key=lambda a: (-steps[a], mate.shape[a])):
        first, offset = divmod(offset, steps[axis])
        step = strides[axis] // steps[axis] if tensor.shape[axis] > 1 else 1
        last = first + step * (tensor.shape[axis] - 1)
        if not (first >= 0 and step > 0 and last < mate.shape[axis]):
            return None
        if tensor.shape[axis] > 1 and strides[axis] % steps[axis]:
            return None
        found[axis] = (first, step, tensor.shape[axis])
    return None if offset else found


def _extended(
    mate: Tensor, starts: list[tuple[int, int, int]], new: Tensor, was: Tensor | None
) -> Tensor | None:
    """Write over nobody's places, along axes where the labels do not vary to the end."""
    vary, kept = set(varying(new)), core(new)
    old = torch.full((1,) * mate.dim(), KEPT, device="cpu") if was is None else core(was)
    shape = [mate.shape[a] if a in vary else old.shape[a] for a in range(mate.dim())]
    old = old.expand(shape).clone()
    place = tuple(
        slice(first, first + step * count, step) if axis in vary else slice(None)
        for axis, (first, step, count) in enumerate(starts)
    )
    if bool((old[place] != KEPT).any()):
        return None
    old[place] = kept
    return compact(old.expand(mate.shape))


def _over(mate: Tensor, tensor: Tensor, new: Tensor | None, was: Tensor | None) -> Tensor:
    """Write labels over others, place by place of the memory."""
    size = mate.untyped_storage().nbytes() // max(mate.element_size(), 1)
    places = torch.full((size,), KEPT, device="cpu")
    if was is not None:
        _window(places, mate).copy_(was)
    _window(places, tensor).copy_(torch.tensor(KEPT, device="cpu") if new is None else new)
    return compact(_window(places, mate).clone())


def _window(places: Tensor, tensor: Tensor) -> Tensor:
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
