"""One run of the model as a graph of ops: which tensor was made from which, and in which module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.structure.forward import evaluating, run

__all__ = ["Enter", "Flow", "Following", "Leave", "Op", "Visit", "flow", "tensors"]


@dataclass(frozen=True)
class Op:
    """One op. Nodes are numbered in order of execution; writing in place makes a new node.

    An op that returns its input untouched, like a dropout in evaluation mode, is none.

    Args:
        name: the function's name.
        reads: nodes it was given.
        writes: nodes it returned.
        module: path of the innermost module that was running.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    module: str


@dataclass
class Visit:
    """One call of one module.

    Args:
        path: the module.
        first: number of the first op inside.
        last: number of the first op behind it.
        args: positional arguments.
        kwargs: keyword arguments.
        reads: node of every tensor it was given, by identity.
        output: what it returned.
        writes: node of every tensor it returned, by identity.
    """

    path: str
    first: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: dict[int, int]
    last: int = 0
    output: Any = None
    writes: dict[int, int] = field(default_factory=dict)


@dataclass
class Flow:
    """What one forward pass was made of.

    Args:
        ops: in order of execution.
        maker: node to the number of the op that wrote it; inputs and parameters have none.
        readers: node to the numbers of the ops that read it.
        shapes: node to shape.
        visits: module calls in order of their start.
        returned: nodes that the model returned.
    """

    ops: list[Op] = field(default_factory=list)
    maker: dict[int, int] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    returned: frozenset[int] = frozenset()

    def between(self, end: int, start: int) -> set[int]:
        """Find the ops on the ways from one node to a later one.

        Args:
            end: the later node.
            start: the earlier node.

        Returns:
            numbers of ops; empty where `end` was not computed from `start`.
        """
        first = min(self.readers.get(start, ()), default=len(self.ops))
        behind: set[int] = set()
        pending = [self.maker[end]] if end in self.maker else []
        while pending:
            number = pending.pop()
            if number < first or number in behind:
                continue
            behind.add(number)
            pending += [self.maker[node] for node in self.ops[number].reads if node in self.maker]
        return self._reached(start, behind)

    def _reached(self, start: int, within: set[int]) -> set[int]:
        found: set[int] = set()
        nodes = {start}
        for number in sorted(within):
            if nodes.intersection(self.ops[number].reads):
                found.add(number)
                nodes.update(self.ops[number].writes)
        return found


def flow(model: nn.Module, example: Any) -> Flow:
    """Run the model once and note every op.

    Args:
        model: any module; it is left as it was.
        example: one batch; every tensor of the run stays alive until the notes are complete.

    Returns:
        the notes.
    """
    watch = Following(model)
    with evaluating(model), torch.no_grad(), watch:
        watch.end(run(model, example))
    return watch.notes


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments or outputs; odd objects are looked into once."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors(value)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif hasattr(tree, "__dataclass_fields__"):
        for value in vars(tree).values():
            yield from tensors(value)


def _given(args: Any, kwargs: Any) -> list[Tensor]:
    """List what an op is given; most arguments are tensors or numbers as they are."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, _PLAIN):
            found += tensors(value)
    return found


_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


class Following(TorchFunctionMode):
    """Number tensors and ops as they come by.

    Args:
        model: what will run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.notes = model, Flow()
        self.nodes: dict[int, int] = {}
        self.alive: list[Tensor] = []  # an id is only a name while its tensor lives
        self.open: list[Visit] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Following:
        for name, module in self.model.named_modules():
            self.handles += [
                module.register_forward_pre_hook(Enter(self, name), with_kwargs=True),
                module.register_forward_hook(Leave(self), always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.alive.clear()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = _given(args, kwargs)
        reads = tuple(dict.fromkeys([self.node(t) for t in given]))
        before = {id(t): _version(t) for t in given}
        out = function(*args, **(kwargs or {}))
        made = [out] if isinstance(out, Tensor) else list(tensors(out))
        if getattr(function, "__name__", "") == "__setitem__":
            made = given[:1]
        if made and any(before.get(id(t)) != _version(t) for t in made):
            self._note(function, reads, made)
        return out

    def _note(self, function: Any, reads: tuple[int, ...], made: list[Tensor]) -> None:
        notes, number = self.notes, len(self.notes.ops)
        writes = tuple(self._fresh(t) for t in made)
        where = self.open[-1].path if self.open else ""
        name = getattr(function, "__name__", str(function))
        notes.ops.append(Op(name, reads, writes, where))
        notes.maker.update(dict.fromkeys(writes, number))
        for node in reads:
            notes.readers.setdefault(node, []).append(number)

    def end(self, output: Any) -> None:
        """Note what the model returned.

        Args:
            output: of the run; not over yet, so that every tensor still has its number.
        """
        self.notes.returned = frozenset(self.node(t) for t in tensors(output))

    def node(self, tensor: Tensor) -> int:
        """Number a tensor as it is now."""
        found = self.nodes.get(id(tensor))
        return self._fresh(tensor) if found is None else found

    def _fresh(self, tensor: Tensor) -> int:
        number = len(self.notes.shapes)
        self.nodes[id(tensor)] = number
        self.notes.shapes[number] = tuple(tensor.shape)
        self.alive.append(tensor)
        return number

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is about to run."""
        reads = {id(t): self.node(t) for t in tensors((args, kwargs))}
        visit = Visit(path, len(self.notes.ops), args, kwargs, reads)
        self.notes.visits.append(visit)
        self.open.append(visit)

    def leave(self, output: Any) -> None:
        """Note that the innermost module is done."""
        visit = self.open.pop()
        visit.last, visit.output = len(self.notes.ops), output
        visit.writes = {id(t): self.node(t) for t in tensors(output)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Watch(Protocol):
    """Whoever wants to know which modules run."""

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is about to run."""

    def leave(self, output: Any) -> None:
        """Note that the innermost module is done."""


@dataclass
class Enter:
    """The hook before a module."""

    watch: Watch
    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the watch."""
        self.watch.enter(self.path, args, kwargs)


@dataclass
class Leave:
    """The hook behind a module."""

    watch: Watch

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Tell the watch."""
        self.watch.leave(output)
