"""Which parts of a model can be taken out whole, because they only add to a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from torch_otprune.structure.flow import Flow, Visit
from torch_otprune.structure.graph import Block, Blocked, Swap
from torch_otprune.structure.layers import is_dense, lies_across
from torch_otprune.structure.levels import levelled, listed
from torch_otprune.structure.skips import fitting
from torch_otprune.structure.wiring import first_of, stream_of, wiring_of

__all__ = ["adds_two", "find_blocks", "norms_of_sums"]

_ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
# Ops through which a stream is still the same stream: one value in, its image out.
_PASSES = frozenset(
    """
    relu relu_ relu6 leaky_relu leaky_relu_ gelu silu mish elu selu prelu hardswish hardtanh
    tanh sigmoid dropout dropout1d dropout2d dropout3d layer_norm batch_norm group_norm rms_norm
    contiguous clone to float half double bfloat16 type type_as view_as detach alias
    """.split()
)
# Ops that are the work of a layer: without one of them a branch is only an activation's algebra.
_WORK = frozenset(
    """
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d addmm matmul
    __matmul__ mm bmm baddbmm einsum multi_head_attention_forward _native_multi_head_attention
    _transformer_encoder_layer_fwd scaled_dot_product_attention
    """.split()
)
_NORMS = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm"})
_AXES = {"linear": -1, "layer_norm": -1, "rms_norm": -1, "batch_norm": 1, "group_norm": 1} | {
    f"conv{kind}{axes}d": 1 for kind in ("", "_transpose") for axes in (1, 2, 3)
}  # where these ops have the channels of what they read
_NORMALISED = "it is a branch with a norm behind its addition, and the norm stays"
_NO_IDENTITY = "no addition joins its output to its unchanged input"


@dataclass(frozen=True)
class _Branch:
    """An addition of something to the stream that it was computed from."""

    number: int  # among all ops
    order: int  # among all additions of two tensors
    stream: int
    end: int
    inside: frozenset[int]  # numbers of the ops from the stream to the end


def find_blocks(model: nn.Module, notes: Flow) -> tuple[tuple[Block, ...], tuple[Blocked, ...]]:
    """Find every block and branch that could be removed, and every block that cannot.

    A branch is something added to a tensor that it was itself computed from; a block is a module
    from whose output such additions lead back to its input. Removing a branch leaves the stream,
    removing a block hands its input on.

    Args:
        model: any module; it is read, never written.
        notes: one run of it.

    Returns:
        blocks in order of execution, and refusals with reasons.
    """
    search = _Search(model, notes)
    blocks, stuck = search.modules()
    branches = search.halves(blocks)
    found = levelled(model, [*blocks, *branches])
    return tuple(search.chained(found)), tuple(stuck)


def adds_two(name: str, tensors: int) -> bool:
    """Tell an addition of two tensors from all other ops, by its name and what it reads."""
    return name in _ADDITIONS and tensors == 2


class _Search:
    """One model's branches, and the modules around them."""

    def __init__(self, model: nn.Module, notes: Flow) -> None:
        self.model, self.notes = model, notes
        self.calls = Counter(visit.path for visit in notes.visits)
        self.branches = list(self._branches())
        self.ends: dict[str, tuple[int, int]] = {}  # block or branch to its nodes, in and out

    def _branches(self) -> Iterator[_Branch]:
        notes, order = self.notes, -1
        for number, op in enumerate(notes.ops):
            if not adds_two(op.name, len(op.reads)):
                continue
            order += 1
            shapes = {notes.shapes[node] for node in (*op.reads, *op.writes)}
            if len(shapes) > 1:
                continue
            early, late = sorted(op.reads)
            inside = notes.between(late, early)
            if any(notes.ops[i].name in _WORK for i in inside):
                yield _Branch(number, order, early, late, frozenset(inside))

    def modules(self) -> tuple[list[Block], list[Blocked]]:
        """List the modules that hand their input on but for what they add to it."""
        blocks, stuck = list[Block](), list[Blocked]()
        for visit in self.notes.visits:
            if not visit.path or not self._adds(visit):
                continue
            why = self._objection(visit)
            if why is None:
                blocks.append(self._block(visit))
            elif self.calls[visit.path] == 1 or visit.path not in {b.name for b in stuck}:
                stuck.append(Blocked(visit.path, (visit.path,), *why))
        classes = {type(self.model.get_submodule(b.name)) for b in blocks} - {nn.Sequential}
        told = [b for b in stuck if b.reason != _NORMALISED and self._telling(b.name, classes)]
        return blocks, told

    def _telling(self, name: str, classes: set[type]) -> bool:
        """Leave out what nobody would take for a layer."""
        kind = type(self.model.get_submodule(name))
        return kind in classes or (kind is not nn.Sequential and listed(self.model, name))

    def _adds(self, visit: Visit) -> bool:
        """Tell whether two tensors of one shape are added inside, behind a linear layer."""
        ops = self.notes.ops[visit.first : visit.last]
        added = any(adds_two(op.name, len(op.reads)) for op in ops)
        return added and any(op.name in _WORK for op in ops)

    def _objection(self, visit: Visit) -> tuple[str, str] | None:
        """Say why a module cannot be taken out, and what would change that."""
        if self.calls[visit.path] > 1:
            return (
                f"it runs {self.calls[visit.path]} times per forward pass, with one set of weights",
                "give every repetition a module of its own, or lower the number of repetitions.",
            )
        stream, written = stream_of(visit.args, visit.kwargs), first_of(visit.output)
        if stream is None or written is None:
            return _NO_IDENTITY, "nothing."
        start, end = visit.reads[id(stream)], visit.writes[id(written)]
        if self.notes.shapes[start] != self.notes.shapes[end] or stream.dtype != written.dtype:
            shapes = f"{list(self.notes.shapes[start])[1:]} and writes "
            return (
                f"it reads {shapes}{list(self.notes.shapes[end])[1:]} per sample",
                "nothing: only a block that preserves the shape can go.",
            )
        carries = self._carries(end, start)
        if carries is None:
            return _NO_IDENTITY, "nothing: its shortcut is a layer of its own."
        if carries and len(self._mates(visit)) == 1:  # the norm behind the addition stays
            return _NORMALISED, f"target the branch inside of '{visit.path}'."
        if wiring_of(visit) is None:
            return (
                "it returns more than its stream: a side output that it computes",
                "return the stream alone, or turn the side output off.",
            )
        return self._leaks(visit)

    def _leaks(self, visit: Visit) -> tuple[str, str] | None:
        """Refuse a block whose inner tensors are used outside."""
        outputs = set(visit.writes.values())
        for number in range(visit.first, visit.last):
            for node in self.notes.ops[number].writes:
                used = [r for r in self.notes.readers.get(node, ()) if r >= visit.last]
                if node not in outputs and (used or node in self.notes.returned):
                    where = self.notes.ops[used[0]].module if used else ""
                    return (
                        f"a tensor made inside is used by {f'{where!r}' if where else 'the model'}",
                        "pass it on through the block's stream, or turn the side output off.",
                    )
        return None

    def _carries(self, end: int, start: int) -> bool | None:
        """Follow additions and passing ops from one node back to another.

        Returns:
            whether a norm was passed on the way; None where there is no such way, or it passes
            no addition.
        """
        pending, seen, found = [(end, False, False)], set(), list[bool]()
        while pending:
            node, added, normed = step = pending.pop()
            if node == start and added:
                found.append(normed)
            if node == start or step in seen or node not in self.notes.maker:
                continue
            seen.add(step)
            op = self.notes.ops[self.notes.maker[node]]
            adds = adds_two(op.name, len(op.reads))
            if adds or op.name in _PASSES:
                tracked = [n for n in op.reads if self.notes.shapes[n] == self.notes.shapes[node]]
                norm = normed or op.name in _NORMS
                pending += [(n, added or adds, norm) for n in tracked]
        return all(found) if found else None

    def _block(self, visit: Visit) -> Block:
        stream, written = stream_of(visit.args, visit.kwargs), first_of(visit.output)
        assert stream is not None
        assert written is not None
        wiring = wiring_of(visit)
        assert wiring is not None
        self.ends[visit.path] = visit.reads[id(stream)], visit.writes[id(written)]
        axis = self._axis(self.ends[visit.path][0], visit)
        swap = Swap(visit.path, "skip", wiring, stream.shape[axis], axis)
        places = prod(stream.shape[1:]) // swap.size
        return Block(visit.path, "block", "part", visit.path, 0, (swap,), swap.size, axis, places)

    def _axis(self, stream: int, inside: Visit) -> int:
        """Tell channels-first from tokens: by the first layer that reads the stream as it is."""
        readers, seen = list(self.notes.readers.get(stream, ())), set[int]()
        while readers:
            number = min(readers)
            readers.remove(number)
            if number in seen or number >= inside.last:
                continue
            seen.add(number)
            op = self.notes.ops[number]
            if op.name in _AXES:
                return _AXES[op.name]
            if op.name in _PASSES:
                readers += [r for node in op.writes for r in self.notes.readers.get(node, ())]
        names = {op.name for op in self.notes.ops[inside.first : inside.last]} & _WORK
        return 1 if all(name.startswith("conv") for name in names) else -1

    def halves(self, blocks: Sequence[Block]) -> list[Block]:
        """List the branches that are not just what a block adds."""
        spans = {v.path: v for v in self.notes.visits if v.path in {b.name for b in blocks}}
        found = []
        for branch in self.branches:
            around = [v for v in spans.values() if v.first <= branch.number < v.last]
            inner = min(around, key=lambda v: v.last - v.first, default=None)
            if inner is not None and self._mates(inner) == [branch]:
                continue
            end = self._writer(branch)
            # the name of what is found already, or of what is added to two streams, says too little
            if end is not None and end.path not in self.ends and not self._shares(branch, end):
                found += self._branch(branch, end)
        return found

    def _shares(self, branch: _Branch, end: Visit) -> bool:
        """Tell whether anything but the addition uses what the end of a branch writes."""
        pending = [end.writes[id(t)] for t in (first_of(end.output),) if t is not None]
        while pending:
            node = pending.pop()
            readers = set(self.notes.readers.get(node, ())) - {branch.number}
            if node in self.notes.returned or not branch.inside.issuperset(readers):
                return True
            pending += [made for reader in readers for made in self.notes.ops[reader].writes]
        return False

    def _mates(self, visit: Visit) -> list[_Branch]:
        return [b for b in self.branches if visit.first <= b.number < visit.last]

    def _branch(self, branch: _Branch, end: Visit) -> list[Block]:
        """Find the modules that make way when a branch is muted; none where it cannot be."""
        written = first_of(end.output)
        wiring = wiring_of(end, stream=False)
        if written is None or wiring is None:
            return []
        axis = self._axis(branch.stream, end)
        size = written.shape[axis]
        zero = Swap(end.path, "zero", wiring, size, axis, like=self._linear(branch.end) or "")
        skips = self._skips(branch, end, axis)
        self.ends[end.path] = branch.stream, self.notes.ops[branch.number].writes[0]
        channels = self.notes.shapes[branch.stream][axis]
        joint = branch.order, self.notes.ops[branch.number].reads.index(branch.stream)
        swaps = (zero, *skips)
        places = prod(self.notes.shapes[branch.stream][1:]) // channels
        found = Block(
            end.path, "branch", "part", end.path, 0, swaps, channels, axis, places, joint=joint
        )
        return [found]

    def _writer(self, branch: _Branch) -> Visit | None:
        """Find the outermost module inside a branch that wrote what is added."""
        node = branch.end
        while True:
            visits = [v for v in self._within(branch) if node in v.writes.values()]
            real = [v for v in visits if self._has_layers(v)]
            if real:
                return real[0]
            if node not in self.notes.maker:
                return None
            op = self.notes.ops[self.notes.maker[node]]
            same = [n for n in op.reads if self.notes.shapes[n] == self.notes.shapes[node]]
            if op.name not in _PASSES | {"mul", "__mul__"} or len(same) != 1:
                return None
            node = same[0]

    def _has_layers(self, visit: Visit) -> bool:
        return any(op.name in _WORK for op in self.notes.ops[visit.first : visit.last])

    def _within(self, branch: _Branch) -> Iterator[Visit]:
        """Yield the calls of modules that ran wholly inside a branch, outermost first."""
        first, last = min(branch.inside), branch.number
        for visit in self.notes.visits:
            whole = first <= visit.first and visit.last <= last and visit.first < visit.last
            if whole and visit.path and self.calls[visit.path] == 1:
                yield visit

    def _skips(self, branch: _Branch, end: Visit, axis: int) -> Iterator[Swap]:
        """Yield the modules that only work for the branch, so that their work is saved too."""
        covered: list[Visit] = [end]
        found: dict[str, Swap] = {}
        for visit in self._within(branch):
            nested = any(v.first <= visit.first and visit.last <= v.last for v in covered)
            stream, wiring = stream_of(visit.args, visit.kwargs), wiring_of(visit)
            if nested or stream is None or wiring is None or self._leaks_from(visit, branch):
                continue
            if any(True for _ in self.model.get_submodule(visit.path).parameters()):
                covered.append(visit)
                found[visit.path] = Swap(visit.path, "skip", wiring)
        fit = fitting(self.notes, covered[1:], end, axis=axis)
        yield from (found[visit.path] for visit in fit)

    def _leaks_from(self, visit: Visit, branch: _Branch) -> bool:
        for number in range(visit.first, visit.last):
            for node in self.notes.ops[number].writes:
                readers = self.notes.readers.get(node, ())
                if node in self.notes.returned or any(r > branch.number for r in readers):
                    return True
        return False

    def _added(self, node: int) -> str | None:
        """Find the linear layer whose output was added last to a stream."""
        while node in self.notes.maker:
            op = self.notes.ops[self.notes.maker[node]]
            if adds_two(op.name, len(op.reads)):
                return self._linear(max(op.reads))
            same = [n for n in op.reads if self.notes.shapes[n] == self.notes.shapes[node]]
            if op.name not in _PASSES or len(same) != 1:
                return None
            node = same[0]
        return None

    def _linear(self, node: int) -> str | None:
        """Walk from what is added back to the linear layer that wrote it."""
        while node in self.notes.maker:
            op = self.notes.ops[self.notes.maker[node]]
            layer = self.model.get_submodule(op.module)
            if op.name in _WORK or lies_across(layer):  # which reshapes what it has multiplied
                return None if list(layer.children()) else op.module
            same = [n for n in op.reads if self.notes.shapes[n] == self.notes.shapes[node]]
            if op.name not in _PASSES or len(same) != 1:
                return None
            node = same[0]
        return None

    def chained(self, blocks: Sequence[Block]) -> list[Block]:
        """Number the blocks of one level that follow one another directly."""
        ordered = sorted(blocks, key=lambda b: (self.ends[b.name][1], b.name))
        after: dict[tuple[str, str, int], Block] = {}
        found = []
        for block in ordered:
            start, end = self.ends[block.name]
            before = after.get((block.kind, block.level, start))
            block = replace(block, front=self._added(start), writer=self._added(end))  # noqa: PLW2901
            if before is None:
                found.append(block)
            else:
                found.append(replace(block, chain=before.chain, place=before.place + 1))
            after[block.kind, block.level, end] = found[-1]
        return found


def norms_of_sums(model: nn.Module, notes: Flow) -> dict[str, str]:
    """Find post-norms: a layer-norm that alone reads what a linear layer's output is added to.

    Args:
        model: any module; it is read, never written.
        notes: one run of it.

    Returns:
        linear layer to layer-norm.
    """
    norms = {v.first: v.path for v in notes.visits if _is_norm(model.get_submodule(v.path))}
    found = {}
    for visit in notes.visits:
        module = model.get_submodule(visit.path)
        if not is_dense(module) or len(visit.writes) != 1:
            continue
        node = next(iter(visit.writes.values()))
        readers = notes.readers.get(node, [])
        while len(readers) == 1 and notes.ops[readers[0]].name in _PASSES:
            readers = notes.readers.get(notes.ops[readers[0]].writes[0], [])
        if len(readers) != 1 or not adds_two(notes.ops[readers[0]].name, 2):
            continue
        after = notes.readers.get(notes.ops[readers[0]].writes[0], [])
        if len(after) == 1 and after[0] in norms:
            found[visit.path] = norms[after[0]]
    return found


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))
