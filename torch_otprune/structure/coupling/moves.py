"""What some ops that move numbers count, and so hold together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, varying
from torch_otprune.structure.coupling.forest import KEPT
from torch_otprune.structure.coupling.ledger import Ledger

__all__ = ["alone", "held", "paired"]


def held(ledger: Ledger, op: Any, field: Tensor, given: Any) -> Tensor:
    """Tie what an op counts: steps, equal parts, groups.

    Args:
        ledger: where labels are joined.
        op: one that moves numbers.
        field: compact labels of what it is given.
        given: its arguments by name.

    Returns:
        the labels, joined.
    """
    count = _COUNTS.get(op.overloadpacket.__name__)
    found = None if count is None else count(field, given)
    if found is None:
        return field
    axis, rows, together = found
    if not rows:
        ledger.object(core(field), "mix", "they are moved by a fixed number of places")
        return torch.full((), KEPT, device="cpu").expand(field.shape)
    whole = field.shape[axis] // rows * rows
    parts = field.narrow(axis, 0, whole).unflatten(axis, (-1, rows))
    tied = ledger.tie(compact(parts), [axis if together == "rows" else axis + 1])
    tail = field.narrow(axis, whole, field.shape[axis] - whole)
    return compact(torch.cat([tied.flatten(axis, axis + 1), tail], axis))


_Count = tuple[int, int, str]
"""An axis, how many neighbours are a row, and whether rows or neighbours go together."""


def _step(field: Tensor, given: Any) -> _Count | None:
    """Every second, third, ... place: what is between goes along."""
    axis, step = (given["dim"] or 0) % field.dim(), given["step"] or 1
    return (axis, step, "neighbours") if step > 1 and axis in varying(field) else None


def _parts(field: Tensor, given: Any) -> _Count | None:
    """Equal parts stay equal."""
    axis, size = (given["dim"] or 0) % field.dim(), given["split_size"]
    fits = isinstance(size, int) and 0 < size < field.shape[axis]
    even = fits and field.shape[axis] % size == 0
    return (axis, size, "rows") if even and axis in varying(field) else None


def _groups(field: Tensor, given: Any) -> _Count | None:
    """Groups of channels stay equal."""
    return (1, field.shape[1] // given["groups"], "rows") if 1 in varying(field) else None


def _turns(field: Tensor, given: Any) -> _Count | None:
    """A roll counts places, whatever is in them."""
    axes = [a % field.dim() for a in given["dims"] or range(field.dim())]
    return (axes[0], 0, "") if set(axes) & set(varying(field)) else None


_COUNTS: dict[str, Callable[[Tensor, Any], _Count | None]] = {
    "slice": _step,
    "split": _parts,
    "unsafe_split": _parts,
    "native_channel_shuffle": _groups,
    "channel_shuffle": _groups,
    "roll": _turns,
}


def alone(ledger: Ledger, op: Any, field: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Note where a number names one channel alone: it names another once some before it are gone.

    Many look at one channel for its shape only, so nothing is said before somebody uses it.

    Args:
        ledger: where that is noted.
        op: one that moves numbers.
        field: compact labels of what it is given.
        parts: what it returns, with the labels of each.
    """
    name = op.overloadpacket.__name__
    if name not in _PICKS:
        return
    single = [(made, labels) for made, labels in parts if labels.numel() and not varying(labels)]
    if not single or not varying(compact(ledger.roots(field))):
        return
    line = core(field).flatten()
    for made, labels in single:
        one = labels.flatten()[:1]
        if int(one) != KEPT:
            # pieces must make up the whole: were one before it shorter, forward would fail
            last = 0 if name.endswith("sizes") else int((line == one).nonzero().max())
            ledger.alone[made] = torch.cat([one, line[:last]])


_PICKS = frozenset(("select", "slice", "unbind", "split_with_sizes", "unsafe_split_with_sizes"))


def paired(ledger: Ledger, op: Any, given: Any, out: Any) -> None:
    """Complex numbers written as pairs, or pairs read as complex numbers: both parts go."""
    x, fields = given["self"], []
    for field in ledger.fact(x).fields:
        if out.dim() > x.dim():
            fields.append(field.unsqueeze(-1).expand(out.shape))
        elif (
            rest := ledger.without(field, [x.dim() - 1], "mix", "they are one number")
        ) is not None:
            fields.append(rest.select(-1, 0))
    ledger.put(out, fields, ledger.fact(x).source)
