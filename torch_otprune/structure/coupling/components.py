"""From one labelled run to the sets of channels that live or die together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torch_otprune.structure.coupling.asked import Asked
from torch_otprune.structure.coupling.fields import compact, core, varying
from torch_otprune.structure.coupling.forest import KEPT
from torch_otprune.structure.coupling.ledger import Ledger, Role, parametrised
from torch_otprune.structure.coupling.rules import Named, Rule, flat, tensors, unknown
from torch_otprune.structure.coupling.steps import tie_steps
from torch_otprune.structure.coupling.table import rule_of
from torch_otprune.structure.coupling.writes import seen, written
from torch_otprune.structure.forward import evaluating, flat_tensors, run
from torch_otprune.structure.graph import Side
from torch_otprune.structure.layers import (
    NORMS,
    Conv,
    axes,
    bare_axis,
    channels,
    is_depthwise,
    is_linear,
    is_token_norm,
)
from torch_otprune.structure.products import composed, plain
from torch_otprune.structure.routing import Visits
from torch_otprune.structure.tally import Tally

__all__ = ["Component", "Sides", "components"]

_LOG = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]
Sides = dict[tuple[str, Side], Tensor]
"""Module path and side to int64, sets x width: the channels of each set."""

_At = Callable[[int], Iterable[int]]


@dataclass
class Component:
    """Sets of one make; the channels of a set live or die together.

    Args:
        sides: what belongs to each set: the same sides, and as many channels of each.
        reasons: why they cannot go; empty where they can. That a norm takes them is none.
        kinds: of the objections.
        head: whether they are the channels of whole heads.
        inner: whether two activations are multiplied along them.
        twice: weights that write them and, transposed, read them.
        least: how many of them an op chooses at once.
        roots: one label for each set.
    """

    sides: Sides = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    head: bool = False
    inner: bool = False
    twice: set[str] = field(default_factory=set)
    least: int = 0
    roots: Places = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def components(
    model: nn.Module,
    example: Any,
    *,
    idle: Collection[str] = (),
    visits: Visits | None = None,
    tally: Tally | None = None,
) -> list[Component]:
    """Find every set of coupled channels of a model.

    Args:
        model: any module; it is left as it was.
        example: one batch.
        idle: modules that others run: their tensors are known by their own names.
        visits: of experts that the example alone does not reach.
        tally: told what the run multiplies, without visits.

    Returns:
        coupled sets, all of one make together; those that cannot be cut with their reasons.
    """
    tally = tally or Tally(model, 1)
    tally.clear()
    with parametrize.cached(), evaluating(model), torch.no_grad(), plain():
        leaves = [
            *parametrised(model),
            *_parameters(model),
            *model.named_buffers(),
        ]
        ledger = Ledger(leaves)
        with _marked(model, ledger), Asked(ledger), _Watch(ledger, tally):
            with tally.watching():
                output = [run(model, example)]
            if visits is not None:
                output += visits.runs(lambda: run(model, example))
        tie_steps(model, ledger)
        _answer(ledger, output)
    _square(ledger)
    tally.roots = ledger.forest.roots(torch.arange(ledger.forest.size, device="cpu")).numpy()
    return _collect(model, ledger, idle)


def _answer(ledger: Ledger, outputs: list[Any]) -> None:
    """Keep what a caller reads; of several named outputs, say which."""
    for tensor in flat_tensors(outputs):
        for labels in ledger.fact(tensor).fields:
            ledger.forest.object(core(labels), "output", "they reach the model's output")
    for name, value in (pair for output in outputs for pair in _entries(output)):
        for tensor in flat_tensors(value):
            for labels in ledger.fact(tensor).fields:
                ledger.forest.object(core(labels), "output", f"they are its '{name}'")


def _entries(output: Any) -> list[tuple[str, Any]]:
    """List the outputs of a model that names several."""
    named = list(output.items()) if isinstance(output, Mapping) else []
    return named if sum(bool(flat_tensors(value)) for _, value in named) > 1 else []


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List parameters under the names of each module that holds them; a module has one name."""
    for path, module in model.named_modules():
        yield from module.named_parameters(prefix=path, recurse=False)


@contextmanager
def _marked(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Note what reaches norms without tensors, whose widths must follow all the same."""

    def mark(path: str, axis: int) -> Any:
        return lambda module, args, out: ledger.mark(path, out, axis)

    bare = [
        module.register_forward_hook(mark(path, -1 if is_token_norm(module) else 1))
        for path, module in model.named_modules()
        if _is_bare(module)
    ]
    try:
        yield
    finally:
        for handle in bare:
            handle.remove()


def _is_bare(module: nn.Module) -> bool:
    """Tell a norm none of whose tensors could tell its width."""
    if is_token_norm(module):
        return not any(True for _ in module.parameters())
    return isinstance(module, NORMS) and not any(True for _ in module.state_dict())


class _Watch(TorchDispatchMode):
    """Carry labels along with every op."""

    def __init__(self, ledger: Ledger, tally: Tally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self.tally = ledger, tally

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every op: a compiled model is refused before it gets here."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = composed(self, function, args, kwargs or {})
        if out is not NotImplemented:
            return out
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) or _written(function) or any(True for _ in flat(out)):
            self._note(function, _named(function, args, kwargs or {}), out)
        return out

    def _note(self, function: Any, given: Named, out: Any) -> None:
        ledger = self.ledger
        ledger.op = function.overloadpacket.__name__.strip("_")
        seen(ledger, tensors(given))
        if self.tally.listening:
            self.tally.note(function, given, out, ledger.told)
        before = [(t, ledger.fact(t)) for t in _targets(function, given)]
        self._follow(function, given, out)
        for tensor, fact in before:
            written(ledger, tensor, fact)
        ledger.near.clear()

    def _follow(self, function: Any, given: Named, out: Any) -> None:
        try:
            _rule(function)(self.ledger, function, given, out)
        except Exception:  # noqa: BLE001  # a call that a rule cannot follow must not end the analysis
            _LOG.debug("the rule of %s failed", function, exc_info=True)
            unknown(self.ledger, function, given, out)


@cache
def _rule(function: Any) -> Rule:
    name = function.overloadpacket.__name__
    return rule_of(function, name, frozenset(t.name for t in function.tags))


def _targets(function: Any, given: Named) -> Iterator[Tensor]:
    """List the tensors that an op writes to."""
    for name in _written(function):
        yield from flat(given[name])


@cache
def _written(function: Any) -> tuple[str, ...]:
    """Name the arguments that an op writes to."""
    arguments = function._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _named(function: Any, args: Any, kwargs: Any) -> Named:
    return Named([*zip(_names(function), args, strict=False), *kwargs.items()])


@cache
def _names(function: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in function._schema.arguments)


def _square(ledger: Ledger) -> None:
    """Tie what a tensor's shape holds together: what is left of it must be a box."""
    for sheet, free in ledger.asks:
        labels = compact(ledger.forest.roots(sheet))
        heads = ledger.forest.roots(torch.cat([*ledger.heads, torch.zeros(0, dtype=torch.int64)]))
        # the open axis counts; where it is tied up, what forward spells out stays, unless heads
        if free in varying(labels) or not bool(torch.isin(core(labels), heads).any()):
            ledger.tie(labels, [axis for axis in varying(labels) if axis != free])
    again = True
    while again:
        again, known = False, set[tuple[tuple[int, ...], bytes]]()
        for sheet in ledger.sheets:
            labels = ledger.forest.roots(sheet)
            drawn = tuple(labels.shape), labels.numpy().tobytes()
            if drawn in known:
                continue
            known.add(drawn)
            vary = [axis for axis in varying(compact(labels)) if _differ(labels, axis)]
            if len(vary) < 2:
                continue
            best = max(vary, key=lambda axis: labels.shape[axis])
            again |= ledger.tied(compact(labels), [axis for axis in vary if axis != best])


def _differ(labels: Tensor, axis: int) -> bool:
    """Tell whether units differ along an axis; a place that stays is none."""
    first = labels.amax(axis, keepdim=True)
    return not bool(((labels == first) | (labels == KEPT)).all())


def _collect(model: nn.Module, ledger: Ledger, idle: Collection[str]) -> list[Component]:
    owned = _owned(model, ledger, idle)
    if not owned:
        return []
    numbers = np.repeat(np.arange(len(owned)), [len(roots) for roots, _ in owned.values()])
    roots, places = (np.concatenate(each) for each in zip(*owned.values(), strict=True))
    order = np.lexsort((places, numbers, roots))
    roots, numbers, places = roots[order], numbers[order], places[order]
    named, whose, made = list(owned), np.full(ledger.forest.size, -1), list[Component]()
    for key, starts in _makes(roots, numbers).items():
        of = np.frombuffer(key, dtype=numbers.dtype)
        table = torch.from_numpy(places[starts[:, None] + np.arange(len(of))])
        whose[roots[starts]] = len(made)
        sides = {named[n]: table[:, of == n] for n in np.unique(of).tolist()}
        made.append(Component(sides, roots=roots[starts]))
    _objected(ledger, made, whose)
    return made


def _makes(roots: Places, numbers: Places) -> dict[bytes, Places]:
    """Find the sets of one make: the same sides, as often each."""
    starts = np.flatnonzero(np.diff(roots, prepend=-1))
    found: dict[bytes, list[int]] = defaultdict(list)
    for start, stop in pairwise([*starts.tolist(), len(roots)]):
        found[numbers[start:stop].tobytes()].append(start)
    return {key: np.array(several) for key, several in found.items()}


def _objected(ledger: Ledger, made: list[Component], whose: Places) -> None:
    """Tell every component what was objected to it, and which are heads."""

    def met(labels: Tensor) -> Iterator[Component]:
        found = np.unique(whose[np.unique(ledger.forest.roots(labels).numpy())])
        return (made[number] for number in found.tolist() if number >= 0)

    for owned, why in ledger.forest.objections:
        for component in met(owned):
            component.kinds.add(why.kind)
            if why.kind != "norm":  # that alone keeps no stream from being made narrower
                component.reasons.add(why.said)
    for labels in ledger.heads:
        for component in met(labels[labels >= 0]):
            component.head = True
    for labels in ledger.inner:
        for component in met(labels[labels >= 0]):
            component.inner = True
    for (name, axis), roles in ledger.roles.items():
        both = ledger.labels(name, axis) if name and roles >= {"out", "in"} else None
        for component in met(both) if both is not None else ():
            component.twice.add(name)
    for labels, count in ledger.chosen:
        for component in met(labels[labels >= 0]):
            sets = len(next(iter(component.sides.values())))
            component.least = max(component.least, -(-count * sets // len(labels)))


def _owned(
    model: nn.Module, ledger: Ledger, idle: Collection[str]
) -> dict[tuple[str, Side], tuple[Places, Places]]:
    """List for every side the sets that its channels are in: roots and channels."""
    pairs: dict[tuple[str, Side], list[Places]] = defaultdict(list)
    modules = {path: m for path, m in model.named_modules() if path not in idle}
    for name, leaf in ledger.leaves.items():
        for axis in range(leaf.dim()):
            labels = ledger.labels(name, axis)
            if labels is None:
                continue
            roots, roles = ledger.forest.roots(labels), ledger.roles.get((name, axis), set())
            for alias in ledger.aliases[name]:
                for path, side, at in _sides(modules, alias, leaf, axis, roles=roles):
                    pairs[path, side].append(_pairs(roots.numpy(), at))
    known = np.unique(np.concatenate([p[0] for several in pairs.values() for p in several] or [[]]))
    for path, labels in ledger.marks.items():
        found = _pairs(ledger.forest.roots(labels).numpy(), None)
        pairs[path, "through"].append(found[:, np.isin(found[0], known)])
    return {key: _merged(several) for key, several in pairs.items()}


def _merged(pairs: list[Places]) -> tuple[Places, Places]:
    """Write once what a weight and its bias both tell of a channel."""
    roots, places = pairs[0] if len(pairs) == 1 else np.unique(np.concatenate(pairs, 1), axis=1)
    return roots, places


def _pairs(roots: Places, at: _At | None) -> Places:
    if at is None:
        return np.stack([roots, np.arange(len(roots))])
    each = [(root, i) for place, root in enumerate(roots.tolist()) for i in at(place)]
    return np.array([*zip(*each, strict=True)], dtype=np.int64).reshape(2, -1)


def _sides(
    modules: dict[str, nn.Module], name: str, leaf: Tensor, axis: int, *, roles: set[Role]
) -> Iterator[tuple[str, Side, _At | None]]:
    """Tell under which paths and sides an axis of a tensor is known; None: index is channel."""
    path, _, tensor = name.rpartition(".")
    module = modules.get(path)
    if module is not None and channels(module, "out") is not None:
        for side in _known(module):
            if channels(module, side) is not None and (tensor, axis) in axes(module, side):
                yield path, side, _places(module, side)
        return  # the taps of a kernel have no side
    plain = leaf.dim() and axis == bare_axis(leaf.shape)
    order: tuple[Role, ...] = ("out", "in", "through")  # one: an axis is cut once
    role: Role = next((role for role in order if role in roles), "through")
    yield name if plain else f"{name}:{axis}", role, None


def _known(module: nn.Module) -> tuple[Side, ...]:
    if not (is_linear(module) or isinstance(module, nn.Embedding)):
        return ("through",)
    return ("out", "in")


def _places(module: nn.Module, side: Side) -> _At | None:
    """A filter of a grouped convolution has one row for a channel of each group."""
    if isinstance(module, Conv) and module.groups > 1 and not is_depthwise(module):
        size = channels(module, side) or 0
        shared: Side = "out" if module.transposed else "in"
        if side == shared:
            return lambda place: range(place, size, size // module.groups)
    return None
