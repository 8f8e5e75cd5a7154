"""What it takes to try a plan on the real model, and how to try it in parts that take less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from torch_otprune.plan.model import Cut, Drop, Trial
from torch_otprune.surgery.copied import lendable
from torch_otprune.surgery.cut import merged, places
from torch_otprune.surgery.experts import entries

__all__ = ["Part", "need", "parts", "told"]

_Place: TypeAlias = tuple[nn.Module, str]


class Part(NamedTuple):
    """Decisions that are tried together.

    Args:
        cuts: of units.
        drops: of blocks.
        bytes: what they take beside the model.
    """

    cuts: tuple[Cut, ...]
    drops: tuple[Drop, ...]
    bytes: int


def need(model: nn.Module, cuts: Sequence[Cut]) -> int:
    """Quote the memory of a trial, before anything is copied.

    That is: what a copy cannot share with the model, the shorter tensors, and the masked ones or
    what lies between two cuts of one tensor, whichever is more. Parameters that are not cut are
    shared; the activations of two passes on the example come on top.

    Args:
        model: the dense model.
        cuts: what would be cut.

    Returns:
        bytes at most.
    """
    return _own(model) + _cut(model, cuts)


def _own(model: nn.Module) -> int:
    """Sum up what even a copy with no cut does not share."""
    shared = {id(parameter) for parameter in lendable(model)}
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in shared)


def _cut(model: nn.Module, cuts: Sequence[Cut]) -> int:
    left: dict[_Place, list[float]] = {}  # of a tensor: bytes after one cut and the next
    whole: dict[_Place, int] = {}
    for place, share in _shares(model, cuts):
        tensor: Tensor = getattr(*place)
        whole[place] = tensor.numel() * tensor.element_size()
        sizes = left.setdefault(place, [])
        sizes.append((sizes[-1] if sizes else tensor.numel() * tensor.element_size()) * share)
    between = sum(sum(sizes[:-1]) for sizes in left.values())
    shorter = sum(sizes[-1] for sizes in left.values())
    return round(shorter + max(between, sum(whole.values())))


def _shares(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[tuple[_Place, float]]:
    modules = dict(model.named_modules())
    for piece in merged(cuts):
        if entries(modules.get(piece.path), piece.side):  # a list: no tensor is written
            continue
        for owner, name, axis in places(model, piece):
            size = getattr(owner, name).shape[axis]
            kept = len({index % size for index in piece.keep}) if size else 0
            yield (owner, name), kept / size if size else 0.0


def parts(
    model: nn.Module, cuts: Sequence[Cut], drops: Sequence[Drop], *, limit: float
) -> tuple[Part, ...]:
    """Divide a plan so that each part can be tried within a limit.

    All that fits is one part. Otherwise groups are taken in their order, as many at a time as
    fit; one that does not fit alone is a part of its own, and blocks, which need no memory, go
    with the first. Where groups share so many tensors that no part takes less than all of them
    do, that is one part as well.

    Args:
        model: the dense model.
        cuts: a plan's decisions about units.
        drops: its decisions about blocks.
        limit: how much a part may take, in bytes.

    Returns:
        the parts; one where the limit allows.
    """
    size = need(model, cuts)
    whole = Part(tuple(cuts), tuple(drops), size)
    if size <= limit or not cuts:
        return (whole,)
    found: list[list[Cut]] = [[]]
    left = room = limit - _own(model)
    for cut in cuts:
        left -= (alone := _cut(model, [cut]))  # cuts that share a tensor take less than their sum
        if found[-1] and left < 0:
            found.append([])
            left = room - alone
        found[-1].append(cut)
    apart = tuple(
        Part(tuple(some), tuple(drops) if not number else (), need(model, some))
        for number, some in enumerate(found)
    )
    return apart if max(part.bytes for part in apart) < size else (whole,)


def told(tried: Sequence[Part]) -> Trial | None:
    """Write down how a plan was tried.

    Args:
        tried: its parts.

    Returns:
        their number, and the memory of the largest; None where there were none.
    """
    return Trial(parts=len(tried), bytes=max(p.bytes for p in tried)) if tried else None
