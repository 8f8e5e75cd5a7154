"""Mixtures of experts: which row of a router and which experts are one unit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torch_otprune.structure.coupling import Component
from torch_otprune.structure.graph import Blocked, Group, Member
from torch_otprune.structure.layers import axis_of, bare, bare_axis, channels, is_linear
from torch_otprune.structure.routing import Route, numbered, router

__all__ = ["mixtures", "unequal", "unreached"]

_PAIR = 2
_MATRIX = 2  # axes of a router's weight; a table of experts has one more
_UP = 2  # how many modules around a router its experts are looked for in


@dataclass(frozen=True, eq=False)
class _Stretch:
    """An axis of a parameter, and which of its places each expert has."""

    path: str
    index: Tensor


@dataclass(frozen=True)
class _Experts:
    """Where the experts of one mixture are.

    Args:
        tables: parameters with one entry per expert along their first axis.
        lists: module lists with one entry per expert.
        flat: axes of parameters along which experts lie one behind the other, and the rows of each.
    """

    tables: tuple[str, ...]
    lists: tuple[str, ...]
    flat: tuple[_Stretch, ...] = ()


@dataclass(frozen=True)
class _Router:
    """A layer with one output for every expert, of which some are chosen."""

    path: str
    component: Component


def mixtures(
    model: nn.Module, found: Iterable[Component], order: Sequence[str] = ()
) -> list[Group | Blocked]:
    """Find the experts that routers choose among.

    A router is a matrix whose outputs met a softmax or were compared in the run. Its experts are
    what lies beside it with as many entries: parameters with a first axis of that length, module
    lists of that length. That a guess is right is for the trial to show: without the unit, the
    model must compute what it does if the router never chooses the expert. A classifier with as
    many classes as a list in front of it has layers is no router.

    Args:
        model: any module.
        found: its coupled channels.
        order: leaves as they ran.

    Returns:
        one group for every mixture, in order of the model's modules, or why it cannot be cut.
    """
    several = {
        experts: routers
        for experts, routers in _found(model, found).items()
        if not all(_classifies(one, experts, order) for one in routers)
    }
    return [_judged(model, experts, routers) for experts, routers in several.items()]


def _classifies(one: _Router, experts: _Experts, order: Sequence[str]) -> bool:
    """Tell whether a layer writes the output from what all entries of the lists made."""
    if "output" not in one.component.kinds or not experts.lists or one.path not in order:
        return False
    behind = order[order.index(one.path) :]
    return not any(_within(path, entries) for path in behind for entries in experts.lists)


def unreached(model: nn.Module, found: Iterable[Component], ran: Container[str]) -> list[Route]:
    """List the routers that sent nothing to some expert of a list.

    Args:
        model: any module.
        found: its coupled channels.
        ran: the leaves that ran.

    Returns:
        their routes.
    """
    return [
        Route(router(model, one.path), tuple(range(size)), size, chosen=max(one.component.least, 1))
        for experts, routers in _found(model, found).items()
        if any(_idle(model.get_submodule(path), path, ran) for path in experts.lists)
        for one in routers
        for size in [one.component.sides[one.path, "out"].numel()]
    ]


def _idle(entries: nn.Module, path: str, ran: Container[str]) -> bool:
    """Tell whether some entry of a list has no layer that ran."""
    return any(
        not any(f"{path}.{name}.{inner}".rstrip(".") in ran for inner, _ in entry.named_modules())
        for name, entry in entries.named_children()
    )


def _found(model: nn.Module, found: Iterable[Component]) -> dict[_Experts, list[_Router]]:
    several: dict[_Experts, list[_Router]] = defaultdict(list)
    stretches = list(_stretches(model, found))
    for component in found:
        for path, size in _outputs(model, component) if "route" in component.kinds else ():
            experts = _beside(model, path, size, stretches)
            if experts is not None:
                several[experts].append(_Router(path, component))
    return several


def _stretches(model: nn.Module, found: Iterable[Component]) -> Iterator[tuple[_Stretch, ...]]:
    """List the sets of many places each that only bare parameters have: maybe experts laid flat."""
    paths = _paths(model)
    for component in found:
        sides = component.sides
        wide = all(index.shape[1] > 1 for index in sides.values()) and not component.reasons
        if wide and not any(path in paths for path, _ in sides):
            first = next(iter(sides.values()))
            order = first.amin(1).argsort()
            yield tuple(_Stretch(path, index[order]) for (path, _), index in sides.items())


def unequal(entries: nn.Module) -> bool:
    """Tell whether the experts of a list have tensors of different shapes."""
    shapes = [
        {name: p.shape for name, p in entry.named_parameters()} for entry in entries.children()
    ]
    return any(shape != shapes[0] for shape in shapes)


def _outputs(model: nn.Module, component: Component) -> Iterator[tuple[str, int]]:
    """List the matrices that write all of a component's channels, with their outputs."""
    for (path, side), index in component.sides.items():
        size = _matrix(model, path) if side == "out" else None
        if size is not None and size == index.numel() > 1:
            yield path, size


def _matrix(model: nn.Module, path: str) -> int | None:
    modules = dict(model.named_modules())
    if path in modules:
        return channels(modules[path], "out") if is_linear(modules[path]) else None
    leaf = dict(model.named_parameters()).get(bare(path)[0])
    if leaf is None or leaf.dim() != _MATRIX:
        return None
    return leaf.shape[axis_of(path, leaf.shape)]


def _beside(
    model: nn.Module, router: str, size: int, stretches: Iterable[tuple[_Stretch, ...]]
) -> _Experts | None:
    """Look for as many experts in the modules around a router, nearest first."""
    own = bare(router)[0] if ":" in router or router not in _paths(model) else router
    scope = own
    for _ in range(_UP + (own != router)):
        if not scope:
            return None
        scope = scope.rpartition(".")[0]
        experts = _Experts(_tables(model, scope, own, size), _lists(model, scope, own, size))
        if experts.tables or experts.lists:
            return experts
        inside = (s for s in stretches if all(_within(bare(one.path)[0], scope) for one in s))
        if flat := next((s for s in inside if len(s[0].index) == size), None):
            return _Experts((), (), flat)
    return None


def _paths(model: nn.Module) -> set[str]:
    return {path for path, _ in model.named_modules()}


def _tables(model: nn.Module, scope: str, router: str, size: int) -> tuple[str, ...]:
    fitting = [
        (name, leaf)
        for name, leaf in model.named_parameters()
        if _within(name, scope) and name != router and leaf.dim() and leaf.shape[0] == size
    ]
    owners = {
        name.rpartition(".")[0]
        for name, leaf in fitting
        if leaf.dim() > _MATRIX
        and channels(model.get_submodule(name.rpartition(".")[0]), "out") is None
    }
    return tuple(name for name, _ in fitting if name.rpartition(".")[0] in owners)


def _lists(model: nn.Module, scope: str, router: str, size: int) -> tuple[str, ...]:
    found: list[str] = []
    for path, module in model.named_modules():
        listed = numbered(module) is not None and len(module._modules) == size
        holds = listed and _within(path, scope) and next(module.parameters(), None) is not None
        inner = any(_within(path, outer) for outer in found)
        if holds and not inner and not _within(router, path):
            found.append(path)
    return tuple(found)


def _within(path: str, scope: str) -> bool:
    return not scope or path == scope or path.startswith(f"{scope}.")


def _judged(model: nn.Module, experts: _Experts, routers: list[_Router]) -> Group | Blocked:
    members = _members(model, experts, routers)
    name = _name(experts)
    least = max(one.component.least for one in routers)
    if why := _against(model, experts, routers, least):
        return Blocked(name, tuple(m.path for m in members), *why, kind="experts")
    return Group(name, len(members[0].index), members, "experts", least)


def _name(experts: _Experts) -> str:
    """Call a mixture after the module that holds its experts, or after their first parameter."""
    first = [*experts.lists, *experts.tables, *(bare(one.path)[0] for one in experts.flat)][0]
    return first if experts.lists else first.rpartition(".")[0] or first


def _against(
    model: nn.Module, experts: _Experts, routers: list[_Router], least: int
) -> tuple[str, str] | None:
    for one in routers:
        if "output" in one.component.kinds:
            return "the router's logits reach the model's output", "do not return them."
        if len(one.component.sides[one.path, "out"]) < _PAIR:
            return "its experts are tied into one unit", "nothing: one less would break it."
    for path in experts.lists:
        if unequal(model.get_submodule(path)):
            return f"the experts of '{path}' have other shapes than one another", "make them equal."
    if least >= len(routers[0].component.sides[routers[0].path, "out"]):
        return f"the router chooses all {least} of them", "lower its top-k first."
    return None


def _members(model: nn.Module, experts: _Experts, routers: list[_Router]) -> tuple[Member, ...]:
    """List what goes with an expert: the router's rows first."""
    found: dict[tuple[str, str], Member] = {}
    for one in routers:
        sides = one.component.sides
        order = sides[one.path, "out"].amin(1).argsort()
        for (path, side), index in sides.items():
            loose = bare(path)[0] not in _paths(model)
            known = "expert" if loose and path != one.path else side
            found.setdefault(
                (path, known),
                Member(path, known, index[order].contiguous(), _size(model, path, side)),
            )
    first = found[routers[0].path, "out"]
    size, each = first.size, first.index
    for table in experts.tables:
        shape = dict(model.named_parameters())[table].shape
        path = table if bare_axis(shape) == 0 else f"{table}:0"
        found.setdefault((path, "expert"), Member(path, "expert", each, size))
    for flat in experts.flat:
        count = _size(model, flat.path, "expert")
        found[flat.path, "expert"] = Member(flat.path, "expert", flat.index.contiguous(), count)
    for path in experts.lists:
        found[path, "expert"] = Member(path, "expert", each, size)
    return tuple(sorted(found.values(), key=lambda m: m.side != "out"))


def _size(model: nn.Module, path: str, side: str) -> int:
    modules = dict(model.named_modules())
    if path in modules:
        return channels(modules[path], side) or 0  # type: ignore[arg-type]
    leaves = dict(model.named_parameters()) | dict(model.named_buffers())
    leaf = leaves[bare(path)[0]]
    return leaf.shape[axis_of(path, leaf.shape)]
