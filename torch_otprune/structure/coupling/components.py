"""From one labelled run to the sets of channels that live or die together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torch_otprune.structure.coupling.fields import compact, core, varying
from torch_otprune.structure.coupling.ledger import Ledger, Role, parametrised
from torch_otprune.structure.coupling.rules import Named, flat, unknown
from torch_otprune.structure.coupling.table import rule_of
from torch_otprune.structure.coupling.writes import seen, written
from torch_otprune.structure.forward import evaluating, flat_tensors, run
from torch_otprune.structure.graph import Side
from torch_otprune.structure.layers import Conv, axes, bare_axis, channels, is_depthwise, is_linear

__all__ = ["Atom", "Component", "components"]

_LOG = logging.getLogger(__name__)

Atom = tuple[str, Side, int]


@dataclass
class Component:
    """Channels that live or die together.

    Args:
        atoms: module path, side and channel.
        reasons: why they cannot go; empty where they can.
        kinds: of the objections.
        head: whether they are the channels of whole heads.
    """

    atoms: set[Atom] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    head: bool = False


def components(model: nn.Module, example: Any) -> list[Component]:
    """Find every set of coupled channels of a model.

    Args:
        model: any module; it is left as it was.
        example: one batch.

    Returns:
        one component per coupled set, those that cannot be cut with their reasons.
    """
    with parametrize.cached(), evaluating(model), torch.no_grad(), _plain():
        leaves = [
            *parametrised(model),
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(),
        ]
        ledger = Ledger(leaves)
        with _Watch(ledger):
            output = run(model, example)
        for tensor in flat_tensors(output):
            for labels in ledger.fact(tensor).fields:
                ledger.forest.object(core(labels), "output", "they reach the model's output")
    _square(ledger)
    return _collect(model, ledger)


@contextmanager
def _plain() -> Iterator[None]:
    """Run every layer op by op: no fused recurrent layers, no fast path of attention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(TorchDispatchMode):
    """Carry labels along with every op."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        made = list(flat(out))
        if not made and not function._schema.is_mutable:
            return out
        ledger, name = self.ledger, function.overloadpacket.__name__
        ledger.op = name.strip("_")
        given = _named(function, args, kwargs or {})
        with torch.device("cpu"):
            seen(ledger, list(flat(given)))
            before = [(t, ledger.fact(t)) for t in _targets(function, given)]
            self._follow(function, given, out)
            for tensor, fact in before:
                written(ledger, tensor, fact)
        return out

    def _follow(self, function: Any, given: Named, out: Any) -> None:
        name = function.overloadpacket.__name__
        rule = rule_of(function, name, frozenset(t.name for t in function.tags))
        try:
            rule(self.ledger, function, given, out)
        except Exception:  # a call that a rule cannot follow must not end the analysis
            _LOG.debug("the rule of %s failed", function, exc_info=True)
            unknown(self.ledger, function, given, out)


def _targets(function: Any, given: Named) -> Iterator[Tensor]:
    """List the tensors that an op writes to."""
    for argument in function._schema.arguments if function._schema.is_mutable else ():
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from flat(given[argument.name])


def _named(function: Any, args: Any, kwargs: Any) -> Named:
    names = [a.name for a in function._schema.arguments]
    return Named([*zip(names, args, strict=False), *kwargs.items()])


def _square(ledger: Ledger) -> None:
    """Tie what a tensor's shape holds together: what is left of it must be a box."""
    again = True
    while again:
        again = False
        for sheet in ledger.sheets:
            labels = ledger.forest.roots(sheet)
            vary = varying(compact(labels))
            if len(vary) < 2:
                continue
            best = max(vary, key=lambda axis: labels.shape[axis])
            again |= ledger.tied(compact(labels), [axis for axis in vary if axis != best])


def _collect(model: nn.Module, ledger: Ledger) -> list[Component]:
    forest = ledger.forest
    found: dict[int, Component] = defaultdict(Component)
    modules = dict(model.named_modules())
    for name in ledger.leaves:
        for axis in range(ledger.leaves[name].dim()):
            labels = ledger.labels(name, axis)
            if labels is None:
                continue
            roles = ledger.roles.get((name, axis), set())
            for alias in ledger.aliases[name]:
                sides = list(_sides(modules, alias, ledger.leaves[name], axis, roles=roles))
                for place, root in enumerate(forest.roots(labels).tolist()):
                    for path, side, at in sides:
                        found[root].atoms.update((path, side, i) for i in at(place))
    for owned, why in forest.objections:
        for root in torch.unique(forest.roots(owned)).tolist():
            if root in found:
                found[root].reasons.add(why.said)
                found[root].kinds.add(why.kind)
    for labels in ledger.heads:
        for root in torch.unique(forest.roots(labels)).tolist():
            if root in found:
                found[root].head = True
    return [c for c in found.values() if c.atoms]


def _sides(
    modules: dict[str, nn.Module], name: str, leaf: Tensor, axis: int, *, roles: set[Role]
) -> Iterator[tuple[str, Side, Callable[[int], Iterable[int]]]]:
    """Tell under which paths and sides one axis of a tensor is known, and at which channels."""
    path, _, tensor = name.rpartition(".")
    module = modules.get(path)
    if module is not None and channels(module, "out") is not None:
        for side in _known(module):
            if channels(module, side) is not None and (tensor, axis) in axes(module, side):
                yield path, side, _places(module, side)
        return  # the taps of a kernel have no side
    plain = leaf.dim() and axis == bare_axis(leaf.shape)
    for role in sorted(roles) or ("through",):  # a table that is only looked up
        yield name if plain else f"{name}:{axis}", role, lambda place: (place,)


def _known(module: nn.Module) -> tuple[Side, ...]:
    if not (is_linear(module) or isinstance(module, nn.Embedding)):
        return ("through",)
    return ("out", "in")


def _places(module: nn.Module, side: Side) -> Callable[[int], Iterable[int]]:
    """A filter of a grouped convolution has one row for a channel of each group."""
    if isinstance(module, Conv) and module.groups > 1 and not is_depthwise(module):
        size = channels(module, side) or 0
        shared: Side = "out" if module.transposed else "in"
        if side == shared:
            return lambda place: range(place, size, size // module.groups)
    return lambda place: (place,)
