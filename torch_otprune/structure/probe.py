"""One run of the model on an example: order, positions, and residual additions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from torch_otprune.structure.flow import Following
from torch_otprune.structure.forward import Call, batch_size, evaluating, flat_tensors, run
from torch_otprune.structure.graph import Tail
from torch_otprune.structure.layers import BatchNorm, is_dense, is_depthwise, is_linear

__all__ = ["Probe", "probe", "summands"]

_ADDITIONS = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
)
_PASSIVE = (BatchNorm, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)


@dataclass
class Probe:
    """What one forward pass showed.

    Args:
        calls: how often each leaf ran.
        order: leaves in order of their first call.
        positions: output positions per sample of each convolution or dense layer, over all calls.
        tails: linear layer to what its output passes next.
        outputs: output shape of each leaf's first call.
    """

    calls: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, other: Probe) -> None:
        """Take over what another pass showed of leaves that did not run in this one.

        Args:
            other: the notes of that pass.
        """
        missing = [name for name in other.order if name not in self.calls]
        self.order += missing
        tables = ("calls", "positions", "tails", "outputs")
        for mine, theirs in ((getattr(self, t), getattr(other, t)) for t in tables):
            mine |= {name: theirs[name] for name in missing if name in theirs}


def probe(model: nn.Module, example: Any, *, beside: Following | None = None) -> Probe:
    """Run the model once on an example and note what happens where.

    Args:
        model: any module; it is left as it was.
        example: one batch.
        beside: who else takes notes of the same run.

    Returns:
        the notes.
    """
    watch = _Watch(model, batch_size(example))
    with evaluating(model), torch.no_grad(), beside or nullcontext(), watch:
        output = run(model, example)
        watch.read(output)  # what the caller gets, the caller uses
        if beside is not None:
            beside.end(output)
    return watch.notes


def summands(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor] | None:
    """Read what an op adds, if it adds two tensors as they are.

    Args:
        function: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        both operands; None for another op, a factor `alpha`, a number or one tensor twice.
    """
    if function not in _ADDITIONS or len(args) < 2 or (kwargs or {}).get("alpha", 1) != 1:
        return None
    first, second = args[:2]
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first is second:
        return None
    return first, second


@dataclass
class _Trail:
    """One tensor on the way of a linear layer's output.

    Args:
        linear: the layer.
        passed: what it has passed.
        tensor: the tensor, kept so that its id stays its own.
        used: whether something has read it.
    """

    linear: str
    passed: tuple[str, ...]
    tensor: Tensor
    used: bool = False


class _Watch(TorchFunctionMode):
    """Follow each linear layer's output until something else than a batch-norm uses it."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.model, self.samples, self.notes = model, samples, Probe()
        self.live: dict[int, _Trail] = {}
        self.inside = 0  # layers that pass channels on are judged as a whole, not op by op
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            if not list(module.children()) or is_parametrized(module):
                self.handles.append(module.register_forward_pre_hook(_Enter(self)))
                leave = _Leave(self, name)
                self.handles.append(module.register_forward_hook(leave, with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.live.clear()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {} if self.inside else self._followed(args, kwargs)
        versions = {key: _version(t) for key, t in given.items()}
        out = function(*args, **(kwargs or {}))
        if not given:
            return out
        made = {id(t) for t in _tensors(out)}
        if not made and function is not Tensor.__setitem__:
            return out  # a shape or a type was asked for
        added = summands(function, args, kwargs) is not None
        for key, t in given.items():
            same = key in made and versions[key] is not None and versions[key] == _version(t)
            if same and not added:
                continue  # handed on as it is, like a dropout in evaluation mode
            self._use(self.live[key], added=added)
            if key in made:
                self.live.pop(key, None)  # written in place: no longer the layer's output
        return out

    def _followed(self, args: Any, kwargs: Any) -> dict[int, Tensor]:
        """List the arguments of an op that are on some trail."""
        live, found = self.live, dict[int, Tensor]()
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in live:
                found[id(value)] = value
            elif isinstance(value, (tuple, list, Mapping)):
                found |= {id(t): t for t in _tensors(value) if id(t) in live}
        return found

    def _use(self, trail: _Trail, *, added: bool = False) -> None:
        """Note who reads a tensor; two readers end the tail there."""
        second, trail.used = trail.used, True
        if not second:
            self.notes.tails[trail.linear] = Tail(trail.passed, added=added)
            return
        ends = Tail(trail.passed)
        self.notes.tails[trail.linear] = ends
        self.live = {
            key: t
            for key, t in self.live.items()
            if t.linear != trail.linear or len(t.passed) <= len(ends.modules)
        }

    def read(self, tree: Any) -> None:
        """Note that something uses these tensors.

        Args:
            tree: tensors, nested.
        """
        for tensor in flat_tensors(tree):
            if trail := self.live.get(id(tensor)):
                self._use(trail)

    def enter(self, module: nn.Module) -> None:
        """Note that a leaf is about to run."""
        self.inside += isinstance(module, _PASSIVE)

    def leave(self, name: str, module: nn.Module, call: Call, out: Any) -> None:
        """Note one leaf's call."""
        notes, given = self.notes, flat_tensors(call)
        self.inside -= isinstance(module, _PASSIVE)
        notes.calls[name] = notes.calls.get(name, 0) + 1
        if notes.calls[name] == 1:
            notes.order.append(name)
        if not isinstance(out, Tensor):
            return
        notes.outputs.setdefault(name, tuple(out.shape))
        if is_linear(module) or is_depthwise(module):
            positions = _positions(module, given[0], out) // self.samples
            notes.positions[name] = notes.positions.get(name, 0) + positions
        if is_linear(module):
            self._follow(name, (), out)
        elif isinstance(module, _PASSIVE) and given:
            self._pass(name, module, given[0], out)

    def _pass(self, name: str, module: nn.Module, given: Tensor, out: Tensor) -> None:
        """Follow an output through a layer that keeps channels apart, if that is its one reader."""
        trail = self.live.get(id(given))
        if trail is None:
            return
        alone = not trail.used and self._passes(module, trail.linear, out)
        self._use(trail)
        if alone:
            self._follow(trail.linear, (*trail.passed, name), out)

    def _passes(self, module: nn.Module, linear: str, out: Tensor) -> bool:
        """Tell whether a layer keeps channels apart; on tokens, a batch-norm has another axis."""
        dense = is_dense(self.model.get_submodule(linear))
        crossed = isinstance(module, BatchNorm) and dense and out.dim() > 2
        return not crossed

    def _follow(self, linear: str, passed: tuple[str, ...], out: Tensor) -> None:
        self.live[id(out)] = _Trail(linear, passed, out)
        self.notes.tails[linear] = Tail(passed)


def _positions(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Count how often every weight is used: per output position, per input one if transposed."""
    if is_dense(module):
        return out.numel() // out.shape[-1]
    grid = x if module.transposed else out
    return grid.numel() // grid.shape[1]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors among an op's arguments, which may hold sizes and other odd tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)
    elif isinstance(tree, Mapping):
        yield from _tensors(tuple(tree.values()))


def _version(tensor: Tensor) -> int | None:
    """Count the writes to a tensor; None where torch does not."""
    return None if tensor.is_inference() else tensor._version


class _Enter:
    """The hook before one leaf."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.watch.enter(module)


class _Leave:
    """The hook behind one leaf."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        self.watch.leave(self.name, module, Call(args, kwargs), out)
