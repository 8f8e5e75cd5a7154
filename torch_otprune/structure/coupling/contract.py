"""Products that sum over a shared axis: dense layers, attention, convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_otprune.structure.coupling.fields import compact, core, spread, varying
from torch_otprune.structure.coupling.ledger import Ledger, Source

__all__ = ["contract", "convolution", "own"]

_STIFF = "they meet a tensor that does not follow"


def contract(ledger: Ledger, operands: tuple[Tensor, Tensor], spec: str, out: Tensor) -> None:
    """Carry labels over a product written as an einsum with one summed axis.

    A unit along the summed axis goes with its partner's. Where a field varies along the summed
    axis and along a batch axis, as heads and their dimensions do, whole batch entries are units.

    Args:
        ledger: where labels are joined.
        operands: both factors.
        spec: `bmk,bkn->bmn`; one letter for each axis.
        out: the product.
    """
    inputs, made = spec.split("->")
    letters = inputs.split(",")
    (summed,) = (set(letters[0]) & set(letters[1])) - set(made)
    batch = set(letters[0]) & set(letters[1]) & set(made)
    _stiff(ledger, operands, letters, batch)
    single: list[list[Tensor]] = [[], []]
    told: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    whole = [False, False]
    for side, tensor in enumerate(operands):
        for field in ledger.fact(tensor).fields:
            vary = {letters[side][axis] for axis in varying(field)}
            ledger.play(tensor, core(field), "in" if summed in vary else "out")
            over = vary & batch or vary & {summed} or vary
            rest = _rest(ledger, field, [letters[side].index(c) for c in vary - over])
            if vary & batch:
                ledger.heads.append(core(field).flatten())
            left = "".join(letters[side][axis] for axis in varying(rest))
            whole[side] |= summed in vary and left != summed
            if left == summed:
                single[side].append(core(rest).flatten())
            elif left:
                same = told.setdefault(left, ([], []))
                same[side].append(_written(rest, letters[side], made, out))
    _sum(ledger, operands, single, whole)
    fields = [f for first, second in told.values() for f in _joined(ledger, first, second)]
    ledger.put(out, fields, _source(ledger, operands))


def _stiff(
    ledger: Ledger, operands: tuple[Tensor, Tensor], letters: list[str], batch: set[str]
) -> None:
    """Object to heads of one factor that the other has without labels of its own."""
    for side, tensor in enumerate(operands):
        other, names = operands[1 - side], letters[1 - side]
        if ledger.fact(other).source == "filler":
            continue
        told = {names[a] for f in ledger.fact(other).fields for a in varying(f)}
        full = {c for a, c in enumerate(names) if own(other, a)}
        for field in ledger.fact(tensor).fields:
            alone = {letters[side][a] for a in varying(field)} & batch & full - told
            if alone:
                ledger.object(core(field), "fixed", _STIFF)


def own(tensor: Tensor, axis: int) -> bool:
    """Tell whether a tensor has numbers of its own along an axis: not where it was expanded."""
    return tensor.shape[axis] > 1 and tensor.stride(axis) != 0


def _source(ledger: Ledger, operands: tuple[Tensor, Tensor]) -> Source:
    """A product with a filler, like a first hidden state, is as good as data."""
    found = {ledger.fact(t).source for t in operands}
    return "data" if found == {"static", "filler"} else ledger.computed(operands)


def _rest(ledger: Ledger, field: Tensor, spare: list[int]) -> Tensor:
    """Leave of several axes the batch ones, or the summed one, or what is free."""
    return ledger.tie(field, spare) if spare else field


def _written(field: Tensor, letters: str, made: str, out: Tensor) -> Tensor:
    """Write a field of an operand in the product's axes."""
    kept = core(field)
    shape = [kept.shape[letters.index(c)] if c in letters else 1 for c in made]
    order = [letters.index(c) for c in made if c in letters]
    gone = [axis for axis in range(kept.dim()) if axis not in order]
    return spread(kept.permute(*order, *gone).reshape(shape), out.shape)


def _joined(ledger: Ledger, first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Join what both factors say of an axis; what one says twice, as of a grid, stays apart."""
    if not (first and second):
        return [*first, *second]
    for field in (*first[1:], *second):
        ledger.join(*torch.broadcast_tensors(core(first[0]), core(field)))
    return first[:1]


def _sum(
    ledger: Ledger,
    operands: tuple[Tensor, Tensor],
    single: list[list[Tensor]],
    whole: list[bool],
) -> None:
    """Join both sides of the summed axis."""
    single = [_outer(ledger, single[0], single[1]), _outer(ledger, single[1], single[0])]
    both = [*single[0], *single[1]]
    if single[0] and single[1] and all(ledger.fact(t).source == "data" for t in operands):
        ledger.inner += both[:1]
    for labels in both[1:]:
        ledger.join(both[0], labels)
    if both and not (single[0] and single[1]):
        other = operands[1] if single[0] else operands[0]
        if any(whole):
            ledger.tie(compact(both[0]), [0])
        elif ledger.fact(other).source != "filler":
            ledger.object(both[0], "fixed", _STIFF)


def _outer(ledger: Ledger, mine: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Of heads and their dimensions on one axis of a weight, take those that it meets."""
    if len(mine) == 1 or len(others) != 1:
        return mine
    asked = _steps(others[0])
    fits = [labels for labels in mine if np.array_equal(_steps(labels), asked)]
    for labels in mine if len(fits) == 1 else ():
        if labels is not fits[0]:
            ledger.object(labels, "mix", "every head reads them")
    return fits if len(fits) == 1 else mine


def _steps(labels: Tensor) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = np.diff(labels.numpy()) != 0
    return found


def convolution(ledger: Ledger, op: Any, given: Any, out: Tensor) -> None:
    """Carry labels over a convolution of any kind.

    Args:
        ledger: where labels are joined.
        op: the op.
        given: its arguments by name.
        out: what it returned.
    """
    x, weight, into = given["input"], given["weight"], 0 if given["transposed"] else 1
    rows, columns = _axis(ledger, weight, 1 - into), _axis(ledger, weight, into)
    conv = _Conv(ledger, weight, _channels(ledger, x), rows, columns, given["groups"], out.shape[1])
    depthwise = conv.groups > 1 and x.shape[1] == conv.groups
    made = conv.depthwise() if depthwise else conv.dense()
    shape = [1] * out.dim()
    shape[1] = -1
    fields = [] if made is None else [spread(made.view(shape), out.shape)]
    ledger.put(out, fields, ledger.source([x, weight]))
    if given["bias"] is not None and made is not None:
        for field in ledger.fact(given["bias"]).fields:
            ledger.play(given["bias"], core(field), "through" if depthwise else "out")
            ledger.join(made, core(field).flatten())


def _channels(ledger: Ledger, x: Tensor) -> Tensor | None:
    """Read the labels of a picture's channels, all positions alike."""
    found: Tensor | None = None
    for field in ledger.fact(x).fields:
        axes = [0, *range(2, x.dim())]
        rest = ledger.without(field, axes, "mix", "their positions are mixed")
        if rest is not None and found is not None:
            ledger.join(found, core(rest).flatten())
        elif rest is not None:
            found = core(rest).flatten()
    return found


def _axis(ledger: Ledger, weight: Tensor, axis: int) -> Tensor | None:
    for field in ledger.fact(weight).fields:
        if varying(field) == (axis,):
            return core(field).flatten()
        if axis in varying(field):
            spare = [a for a in varying(field) if a != axis]
            return core(ledger.tie(field, spare)).flatten()
    return None


@dataclass(frozen=True)
class _Conv:
    """One call of a convolution.

    Args:
        ledger: where labels are joined.
        weight: its filters.
        read: labels of the channels it reads; None where there are none.
        rows: labels of its filters.
        columns: labels of what each filter reads.
        groups: as in the call.
        count: channels it writes.
    """

    ledger: Ledger
    weight: Tensor
    read: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    groups: int
    count: int

    def dense(self) -> Tensor | None:
        """Every channel of a group feeds all filters of that group."""
        if self.columns is not None:
            self.ledger.play(self.weight, self.columns, "in")
        if self.read is not None:
            self._feed(self.read)
        if self.rows is None:
            return None
        self.ledger.play(self.weight, self.rows, "out")
        if self.groups == 1:
            return self.rows
        if len(self.rows) == self.count:
            return self._alike(self.rows).reshape(-1)
        return self.rows.repeat(self.groups)

    def _feed(self, read: Tensor) -> None:
        each, columns = self._alike(read)[0], self.columns
        if columns is not None and len(columns) == len(each):
            self.ledger.join(each, columns)
        elif columns is not None:  # transposed: the weight has a row for every channel read
            self.ledger.join(read, columns)
            self._alike(columns)
        elif len(each) > 1:
            self.ledger.object(read, "fixed", _STIFF)

    def _alike(self, labels: Tensor) -> Tensor:
        """Tie the same place of every group."""
        return self.ledger.tie(compact(labels.view(self.groups, -1)), [0])

    def depthwise(self) -> Tensor | None:
        """One channel in, one or several out: they go together, with their filters."""
        if self.columns is not None and self.rows is not None:  # transposed, with several each
            for labels in (self.columns, self.rows, self.read):
                if labels is not None:
                    self.ledger.object(labels, "shape", "each feeds several of a transposed layer")
            return None
        rows = self.rows if self.rows is not None and len(self.rows) == self.count else None
        first = rows if rows is not None else self.columns
        if first is None or len(first) not in (self.groups, self.count):
            return None
        self.ledger.play(self.weight, first, "through")
        each = self.ledger.tie(compact(first.view(self.groups, -1)), [1])[:, 0]
        if self.read is not None:
            self.ledger.join(each, self.read)
        else:
            self.ledger.object(each, "fixed", _STIFF)
        return each.repeat_interleave(self.count // self.groups)
