"""The only door to torch-pruning: which channels it says are coupled.

Of torch-pruning we take the traced nodes, their dependencies and the index mappings, nothing
else. Its own group search walks every root anew and may not terminate; here every channel of
every layer is an atom, every mapped dependency merges two atoms, and one union-find over all
of them gives the coupled sets in time linear in the number of channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.structure.forward import (
    evaluating,
    first_tensor,
    flat_tensors,
    map_tensors,
    run,
)
from torch_otprune.structure.graph import Side
from torch_otprune.structure.layers import Conv, channels, is_depthwise

__all__ = ["Atom", "Component", "components"]

Atom = tuple[str, Side, int]

# Ops that carry channels one to one, as autograd names them. All others block what they touch.
_CARRIERS = frozenset(
    """
    abs add alias asstrided celu clamp clampmax clampmin clone copyslices div elu exp fuseddropout
    gelu hardshrink hardsigmoid hardswish hardtanh leakyrelu log logsigmoid maximum mean minimum
    mish mul nativedropout neg permute pow prelu relu reshapealias rsqrt rsub selu sigmoid silu
    softplus softshrink sqrt squeeze sub sum t tanh threshold tocopy transpose unsafeview unsqueeze
    adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d adaptivemaxpool2d adaptivemaxpool3d
    avgpool1d avgpool2d avgpool3d maxpool1d maxpool2dwithindices maxpool3dwithindices
    upsamplebicubic2d upsamplebilinear2d upsamplelinear1d upsamplenearest1d upsamplenearest2d
    upsamplenearest3d upsampletrilinear3d reflectionpad1d reflectionpad2d reflectionpad3d
    replicationpad1d replicationpad2d replicationpad3d
    """.split()
)


@dataclass
class Component:
    """Channels that live or die together.

    Args:
        atoms: module path, side and channel.
        reasons: why they cannot go; empty where they can.
    """

    atoms: set[Atom] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)


class _Forest:
    """Union-find over hashable keys."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, key: Any) -> Any:
        root = key
        while (above := self.parent.setdefault(root, root)) is not root:
            root = above
        while key is not root:
            self.parent[key], key = root, self.parent[key]
        return root

    def union(self, a: Any, b: Any) -> None:
        self.parent[self.find(a)] = self.find(b)


def components(model: nn.Module, example: Any) -> list[Component]:
    """Find every set of coupled channels of a model.

    Args:
        model: any module; it is left as it was.
        example: one batch.

    Returns:
        one component per coupled set, those that cannot be cut with their reasons.

    Raises:
        StructureError: if torch-pruning cannot trace the model.
    """
    inner = _Inner()
    with evaluating(model), _differentiable(model), _watched(model, inner):
        # what was made in inference mode cannot be followed, but its copy can
        graph, outputs = _trace(model, map_tensors(example, torch.clone))
    return _Walk(model, graph, outputs, inner.nodes).components()


class _Inner:
    """A hook that notes the ops a dense layer is made of: on 3-D inputs they are several."""

    def __init__(self) -> None:
        self.nodes: set[Any] = set()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.grad_fn is not None and out.grad_fn is not None:
            self.nodes |= _between(out.grad_fn, x.grad_fn)


def _between(end: Any, start: Any) -> set[Any]:
    """Find the ops on the ways from one to another, each visited once."""
    users: dict[Any, list[Any]] = {}
    seen, open_nodes = {start}, [end]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        for before in (f for f, _ in node.next_functions if f is not None):
            users.setdefault(before, []).append(node)
            open_nodes.append(before)
    found: set[Any] = set()
    open_nodes = [start]
    while open_nodes:
        fresh = [user for user in users.get(open_nodes.pop(), ()) if user not in found]
        found.update(fresh)
        open_nodes += fresh
    return found


@contextmanager
def _watched(model: nn.Module, hook: _Inner) -> Iterator[None]:
    dense = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in dense]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Trace frozen layers too: torch-pruning follows the autograd graph."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _trace(model: nn.Module, example: Any) -> tuple[Any, list[Tensor]]:
    from torch_pruning import DependencyGraph

    outputs: list[Tensor] = []

    def forward(module: nn.Module, batch: Any) -> list[Tensor]:
        outputs.extend(t for t in flat_tensors(run(module, batch)) if t.grad_fn is not None)
        return outputs

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = DependencyGraph().build_dependency(
                model, example, forward_fn=forward, verbose=False
            )
    except (
        AttributeError,
        AssertionError,
        IndexError,
        KeyError,
        RecursionError,
        TypeError,
    ) as error:
        raise StructureError(
            f"the dependency trace failed: {type(error).__name__}: {error}.",
            where=type(model).__name__,
            fix="declare rules on a submodule that traces, or report the model.",
        ) from error
    return graph, outputs


class _Walk:
    """One pass over all dependencies of a traced graph."""

    def __init__(
        self, model: nn.Module, graph: Any, outputs: list[Tensor], inner: set[Any]
    ) -> None:
        self.graph, self.inner = graph, inner
        self.names = {module: name for name, module in model.named_modules()}
        self.names |= {parameter: name for name, parameter in model.named_parameters()}
        self.forest = _Forest()
        self.seen: dict[tuple[int, Side], set[int]] = {}
        self.reasons: list[tuple[Any, str]] = []
        self.nodes = {id(node): node for node in graph.module2node.values()}
        self.ends = {id(t.grad_fn) for t in outputs}
        sides: tuple[Side, ...] = ("in", "out")
        widths = [channels(m, side) or 0 for m in model.modules() for side in sides]
        self.limit = 4 * max(widths, default=1)  # an op may join a few layers

    def components(self) -> list[Component]:
        work = [item for node in self.nodes.values() for item in self._start(node)]
        while work:
            node, side, fresh = work.pop()
            work.extend(self._spread(node, side, fresh))
        for node in self.nodes.values():
            self._judge(node)
        return self._collect()

    def _side(self, node: Any, function: Any) -> Side:
        """Read which side of a node a pruning function of torch-pruning cuts."""
        pruner = self.graph.get_pruner_of_module(node.module)
        if isinstance(node.module, nn.Embedding):
            return "out"
        if pruner.prune_out_channels == pruner.prune_in_channels:
            return "through"
        return "out" if function == pruner.prune_out_channels else "in"

    def _size(self, node: Any, side: Side) -> int | None:
        if isinstance(node.module, nn.Parameter):
            return int(node.module.shape[node.pruning_dim])
        return channels(node.module, side)

    def _start(self, node: Any) -> Iterator[tuple[Any, Side, list[int]]]:
        pruner = self.graph.get_pruner_of_module(node.module)
        for function in {pruner.prune_out_channels, pruner.prune_in_channels}:
            side = self._side(node, function)
            size = self._size(node, side)
            if size is not None and self._enter(node, side, list(range(size))):
                yield node, side, list(range(size))

    def _enter(self, node: Any, side: Side, indices: list[int]) -> list[int]:
        seen = self.seen.setdefault((id(node), side), set())
        fresh = [i for i in indices if i not in seen]
        seen.update(fresh)
        return fresh

    def _spread(
        self, node: Any, side: Side, fresh: list[int]
    ) -> Iterator[tuple[Any, Side, list[int]]]:
        for dependency in node.dependencies:
            if self._side(node, dependency.trigger) != side:
                continue
            target = dependency.target
            to = self._side(target, dependency.handler)
            reached = self._inside(node, side, self._map(dependency, node, side, fresh))
            for source, image in reached:
                self.forest.union((id(node), side, source), (id(target), to, image))
            if more := self._enter(target, to, [image for _, image in reached]):
                yield target, to, more

    def _inside(self, node: Any, side: Side, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Drop what is mapped beyond every layer: shifted once more on each way round, for ever."""
        inside = [(source, image) for source, image in pairs if 0 <= image < self.limit]
        if len(inside) < len(pairs):
            self._blame(node, side, "channels are mapped out of range by an op that shifts them")
        return inside

    def _map(
        self, dependency: Any, node: Any, side: Side, fresh: list[int]
    ) -> list[tuple[int, int]]:
        from torch_pruning._helpers import _HybridIndex

        indices = [_HybridIndex(idx=i, root_idx=i) for i in fresh]
        try:
            for mapping in dependency.index_mapping:
                indices = mapping(indices) if mapping is not None else indices
        except (ArithmeticError, LookupError, TypeError):
            self._blame(node, side, "torch-pruning cannot follow them through a change of shape")
            return []
        if any(i.root_idx is None for i in indices):
            self._blame(node, side, "torch-pruning cannot say which channels an expand repeats")
            return []
        return [(i.root_idx, i.idx) for i in indices]

    def _blame(self, node: Any, side: Side, reason: str) -> None:
        self.reasons.extend(((id(node), side, i), reason) for i in self.seen[id(node), side])

    def _judge(self, node: Any) -> None:
        """Say why channels on this node cannot go, or tie those that must go together."""
        sides: tuple[Side, ...] = ("out", "in", "through")
        for side in (s for s in sides if (id(node), s) in self.seen):
            for reason in self._objections(node, side):
                self._blame(node, side, reason)
            self._tie(node, side)

    def _objections(self, node: Any, side: Side) -> Iterator[str]:
        module, kind = node.module, type(node.module).__name__
        size = self._size(node, side)
        if size is not None and any(not 0 <= i < size for i in self.seen[id(node), side]):
            yield f"channels are mapped out of range at '{self.names.get(module, kind)}'"
        if kind == "_OutputOp" or (id(node.grad_fn) in self.ends and side != "in"):
            yield "they reach the model's output"
        if kind == "_ElementWiseOp" and node.grad_fn not in self.inner:
            yield from _foreign(node)
        if size is None and module in self.names and not isinstance(module, nn.PReLU):
            yield f"'{self.names[module]}' ({kind}) mixes all of them"
        if isinstance(module, Conv) and module.transposed and module.groups > 1:
            yield f"'{self.names[module]}' is a grouped transposed convolution"

    def _tie(self, node: Any, side: Side) -> None:
        """Tie the channels that one tensor axis or one normalisation group holds together."""
        module = node.module
        if isinstance(module, nn.GroupNorm):
            each = module.num_channels // module.num_groups
            self._merge(node, side, lambda i: i // each)
        elif isinstance(module, Conv) and module.groups > 1 and not is_depthwise(module):
            each = (channels(module, side) or 1) // module.groups
            self._merge(node, side, lambda i: i % each)

    def _merge(self, node: Any, side: Side, key: Any) -> None:
        first: dict[int, int] = {}
        for i in sorted(self.seen[id(node), side]):
            other = first.setdefault(key(i), i)
            self.forest.union((id(node), side, other), (id(node), side, i))

    def _collect(self) -> list[Component]:
        found: dict[Any, Component] = {}
        for (key, side), indices in self.seen.items():
            name = self.names.get(self.nodes[key].module)
            if name is None:
                continue
            for i in indices:
                component = found.setdefault(self.forest.find((key, side, i)), Component())
                component.atoms.add((name, side, i))
        for atom, reason in self.reasons:
            if component := found.get(self.forest.find(atom)):  # type: ignore[assignment]
                component.reasons.add(reason)
        return list(found.values())


def _foreign(node: Any) -> Iterator[str]:
    """Object to ops that do not carry channels one to one."""
    name = str(node.module._grad_fn)
    bare = name.lower().removesuffix("0").removesuffix("1").removesuffix("2")
    bare = bare.removesuffix("backward")
    if bare == "constantpadnd":
        pad = getattr(node.grad_fn, "_saved_pad", ())
        if len(pad) > 4 and any(pad[4:6]):
            yield "a padding adds channels (op pad)"
    elif bare not in _CARRIERS:
        yield f"the op {name} may mix channels"
