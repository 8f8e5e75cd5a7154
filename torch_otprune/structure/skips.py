"""Which modules of a branch can hand their input on once the branch is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch_otprune.structure.flow import Flow, Op, Visit
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["fitting"]

# Ops that take any shape and keep it, if all that they read have it.
_FOLLOWS = frozenset(
    """
    relu relu_ relu6 leaky_relu leaky_relu_ gelu silu mish elu selu hardswish hardtanh tanh sigmoid
    dropout dropout1d dropout2d dropout3d contiguous clone to float half double bfloat16 type
    type_as detach alias mul mul_ __mul__ __rmul__ add add_ __add__ __radd__ sub __sub__
    """.split()
)


def fitting(notes: Flow, found: Sequence[Visit], end: Visit, *, axis: int) -> tuple[Visit, ...]:
    """Leave out the modules whose input, handed on, would not fit what reads their output.

    A layer that writes another shape than it reads may still be skipped if nothing minds up to the
    end of the branch, as between the two layers of an MLP: the end writes zeros whatever it reads.

    Args:
        notes: one run of the model.
        found: calls inside the branch, none inside another, in order.
        end: the call that ends the branch.
        axis: where its channels are.

    Returns:
        those that can be skipped together.
    """
    left = tuple(found)
    while left:
        bad = _Skipped(notes, left).misfits(end, axis)
        if not bad:
            return left
        left = tuple(visit for visit in left if visit.path not in bad)
    return left


@dataclass
class _Skipped:
    """A run in which some calls hand their input on.

    Args:
        notes: the run as it was.
        skipped: the calls.
        shapes: node to its shape where it is another one now.
        blame: such a node to the calls that made it so.
    """

    notes: Flow
    skipped: Sequence[Visit]
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    blame: dict[int, frozenset[str]] = field(default_factory=dict)

    def misfits(self, end: Visit, axis: int) -> frozenset[str]:
        """Name the calls whose skipping an op, or the end of the branch, would mind."""
        inside = {n: visit for visit in self.skipped for n in range(visit.first, visit.last)}
        for number in range(min(visit.first for visit in self.skipped), end.first):
            visit = inside.get(number)
            if visit is None:
                bad = self._pass(self.notes.ops[number])
            else:
                bad = self._skip(visit) if number == visit.last - 1 else frozenset()
            if bad:
                return bad
        return self._at(end, axis)

    def _skip(self, visit: Visit) -> frozenset[str]:
        """Hand a call's input on; its other outputs are as they were."""
        given, written = stream_of(visit.args, visit.kwargs), first_of(visit.output)
        if given is None or written is None:
            return frozenset({visit.path})
        start, end = visit.reads[id(given)], visit.writes[id(written)]
        was, now = self.notes.shapes[end], self.shapes.get(start, self.notes.shapes[start])
        if was != now:
            own = frozenset() if was == self.notes.shapes[start] else frozenset({visit.path})
            self.shapes[end], self.blame[end] = now, own | self.blame.get(start, frozenset())
        return frozenset()

    def _pass(self, op: Op) -> frozenset[str]:
        odd = [node for node in op.reads if node in self.shapes]
        if not odd:
            return frozenset()
        blame = frozenset[str]().union(*(self.blame[node] for node in odd))
        was = {self.notes.shapes[node] for node in (*op.reads, *op.writes)}
        now = {self.shapes.get(node, self.notes.shapes[node]) for node in op.reads}
        if op.name not in _FOLLOWS or len(was) > 1 or len(now) > 1:
            return blame
        for node in op.writes:
            self.shapes[node], self.blame[node] = next(iter(now)), blame
        return frozenset()

    def _at(self, end: Visit, axis: int) -> frozenset[str]:
        """Mind all but the channels of what the end reads: its zeros have the other sizes."""
        given = stream_of(end.args, end.kwargs)
        if given is None:
            return frozenset()
        start = end.reads[id(given)]
        was, now = self.notes.shapes[start], self.shapes.get(start, self.notes.shapes[start])
        same = len(was) == len(now) and _but(was, axis) == _but(now, axis)
        return frozenset() if same else self.blame[start]


def _but(shape: Sequence[int], axis: int) -> list[int]:
    left = list(shape)
    del left[axis]
    return left
