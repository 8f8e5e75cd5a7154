"""From a model and an example to the graph of what can be cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.structure.blocks import find_blocks, norms_of_sums
from torch_otprune.structure.costs import cost_models
from torch_otprune.structure.coupling import Component, Sides, components
from torch_otprune.structure.eager import check, check_example
from torch_otprune.structure.experts import mixtures, unreached
from torch_otprune.structure.flow import Following
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    failing_line,
    first_line,
    flat_tensors,
    head,
    map_tensors,
    outside_inference,
    run,
    shapes,
    uncollected,
)
from torch_otprune.structure.graph import Blocked, Graph, Group, Kind, Member
from torch_otprune.structure.layers import axes, axis_of, bare, channels, is_depthwise, is_linear
from torch_otprune.structure.probe import Probe, probe
from torch_otprune.structure.remedies import NAMED, remedy
from torch_otprune.structure.routing import Visits
from torch_otprune.structure.sites import find_sites
from torch_otprune.structure.tally import Tally, tallied

__all__ = ["check", "check_counts", "trace", "trace_head"]


def trace(model: nn.Module, example: Any, *, channels: bool = True) -> Graph:
    """Find what can be cut from a model, what cannot and why, and what each width costs.

    Args:
        model: any module with parameters; it is read, never written.
        example: one batch, as the model takes it.
        channels: whether channels are looked for; whole blocks always are.

    Returns:
        the graph.

    Raises:
        StructureError: if the model has no parameters, is quantised,
            sharded, scripted or compiled, or does not run on the example.
    """
    check(model, weights=False)
    with uncollected(), outside_inference():
        return _traced(model, example, channels=channels)


def _traced(model: nn.Module, example: Any, *, channels: bool) -> Graph:
    example = map_tensors(example, lambda t: t.clone() if t.is_inference() else t)
    before = _objects(model)
    ops = Following(model)
    notes = _probe(model, example, beside=ops)
    _check_unchanged(model, before)
    tally = Tally(model, batch_size(example)) if channels else tallied(model, example)
    look = partial(components, model, example, tally=tally)
    found = look(idle=_idle(model, notes)) if channels else []
    if routes := unreached(model, found, notes.calls):
        for more in Visits(routes).runs(lambda: _probe(model, example)):
            notes.add(more)
        found = look(idle=_idle(model, notes), visits=Visits(routes))
    blocks, stuck = find_blocks(model, ops.notes)
    groups, blocked = _assemble(model, found, notes, taken={block.name for block in blocks})
    costs = cost_models(model, groups, found, tally)
    linear = tuple(n for n in notes.order if n in notes.positions)
    repeated = frozenset(n for n, calls in notes.calls.items() if calls > 1)
    return Graph(
        tuple(groups),
        tuple(blocked),
        notes.tails,
        linear,
        repeated,
        costs,
        blocks=blocks,
        stuck=stuck,
        norms=norms_of_sums(model, ops.notes),
        sites=find_sites(model, ops.notes),
    )


def trace_head(
    model: nn.Module, batch: Any, samples: int, *, channels: bool = True
) -> tuple[Graph, Any]:
    """Trace a model on the first samples of a batch, and on all of it where that fails.

    A model may insist on the size of its batch; and an error should name the user's own shapes.

    Args:
        model: any module with parameters; it is read, never written.
        batch: as the model takes it.
        samples: how many are enough.
        channels: as for `trace`.

    Returns:
        the graph, and what the model ran on.

    Raises:
        StructureError: as `trace` raises it.
    """
    check_example(model, batch, on=False)
    some = _own(head(batch, samples))
    try:
        return trace(model, some, channels=channels), some
    except StructureError:
        if batch_size(batch) <= samples:
            raise
    every = _own(batch)
    return trace(model, every, channels=channels), every


def check_counts(model: nn.Module, batch: Any, samples: int) -> None:
    """Refuse a forward that counts samples by a number: statistics need other batches as well.

    Args:
        model: any module; it is left as it was.
        batch: as the user gives it; where the model does not run on it either, nothing is said.
        samples: another number of them.

    Raises:
        StructureError: naming the line.
    """
    error = _failure(model, head(batch, samples))
    if error is None or batch_size(batch) <= samples or _failure(model, batch) is not None:
        return
    where = " at ".join(filter(None, (type(model).__name__, failing_line(error))))
    raise StructureError(
        f"the model runs on {batch_size(batch)} samples, but not on {samples} of them: "
        f"{first_line(error)}.",
        where=f"{where}, batch of shape {shapes(batch)}",
        fix="write -1 or x.shape[0] where forward gives the size of the batch as a number.",
    ) from error


def _failure(model: nn.Module, batch: Any) -> Exception | None:
    try:
        with evaluating(model), torch.no_grad():
            run(model, batch)
    except Exception as error:  # noqa: BLE001  # forward is the user's: it may raise anything
        return error
    return None


def _own(batch: Any) -> Any:
    with outside_inference():
        return map_tensors(batch, lambda t: t.detach().clone())


def _objects(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_modules()) | dict(model.named_parameters())


def _check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _objects(model)
    if changed := sorted(n for n in before | after if before.get(n) is not after.get(n)):
        names = ", ".join(changed[:3])
        raise StructureError(
            f"forward adds or removes modules or parameters, or replaces them: {names}.",
            where=type(model).__name__,
            fix="build every module and parameter in __init__.",
        )


def _probe(model: nn.Module, example: Any, *, beside: Following | None = None) -> Probe:
    try:
        return probe(model, example, beside=beside)
    except OTPruneError:  # it has said it better
        raise
    except Exception as error:  # forward is the user's: it may raise anything
        check_example(model, example)
        one = " " if flat_tensors(example) else " of tensors, such as next(iter(loader)), "
        raise StructureError(
            f"the model does not run on the example: {first_line(error)}",
            where=f"{type(model).__name__}, example of shape {shapes(example)}",
            fix=f"pass a batch{one}as the model's forward takes it{_asked(model, error)}.",
        ) from error


def _asked(model: nn.Module, error: Exception) -> str:
    """Name what forward takes, where it was not called with that."""
    if not isinstance(error, TypeError) or not first_line(error).startswith(type(model).__name__):
        return ""
    called = signature(model.forward)
    bare = [p.replace(annotation=p.empty) for p in called.parameters.values()]
    return f": forward{called.replace(parameters=bare, return_annotation=called.empty)}"


def _assemble(
    model: nn.Module, found: Sequence[Component], notes: Probe, *, taken: Collection[str]
) -> tuple[list[Group], list[Blocked]]:
    leaves = (
        model.named_modules(),
        model.named_buffers(remove_duplicate=False),  # a tied tensor has every name it is known by
        model.named_parameters(remove_duplicate=False),
    )
    modules: dict[str, Any] = {name: leaf for named in leaves for name, leaf in named}
    rank = {name: i for i, name in enumerate(notes.order)}
    groups, blocked, shared = [], [], _tied(model)
    for component in found:
        if not any(side == "out" for _, side in component.sides):
            blocked += _unwritten(modules, component)
            continue
        members = _members(modules, component.sides, rank)
        name, paths, units = _name(members), tuple(m.path for m in members), len(members[0].index)
        why = _telling(_against(component) | _halves(modules, members, shared))
        if why:
            told = "; ".join(why), remedy(why), _sort(component)
            blocked.append(Blocked(name, paths, *told))
        elif units > 1:
            # a PReLU with one slope for all carries channels but has none to cut
            sized = tuple(m for m in members if m.size)
            groups.append(Group(name, units, sized, _kind(component)))
        else:
            said = "all channels are tied into one unit"
            blocked.append(Blocked(name, paths, said, remedy([said])))
    groups, blocked = _mixed(groups, blocked, mixtures(model, found, notes.order))
    last = len(rank)
    groups.sort(key=lambda g: (rank.get(g.name, last), g.members[0].index[0, 0].item()))
    return _unique(groups, taken), blocked


def _unwritten(modules: Mapping[str, Any], component: Component) -> list[Blocked]:
    """Say of depthwise layers on the input's own channels why these cannot go."""
    paths = [path for path, side in component.sides if side == "through"]
    deep = [path for path in paths if is_depthwise(modules[bare(path)[0]])]
    if not deep:
        return []
    told = "; ".join(_telling(component.reasons | {_GIVEN}))
    every = tuple(dict.fromkeys(path for path, _ in component.sides))
    return [Blocked(deep[0], every, told, "put a convolution before it, whose channels can go.")]


_GIVEN = "no layer writes them: they are the input's channels, or copies of these"


def _mixed(
    groups: list[Group], blocked: list[Blocked], experts: Iterable[Group | Blocked]
) -> tuple[list[Group], list[Blocked]]:
    """Add mixtures of experts, in place of what their routers alone were found to be."""
    for one in experts:
        paths = {m.path for m in one.members} if isinstance(one, Group) else {*one.modules}
        blocked = [b for b in blocked if not paths >= set(b.modules)]
        groups = [g for g in groups if not paths >= {m.path for m in g.members}]
        (groups if isinstance(one, Group) else blocked).append(one)  # type: ignore[arg-type]
    return groups, blocked


def _telling(reasons: set[str]) -> list[str]:
    """Leave out what only follows from another reason: that nothing is left to read them."""
    causes = sorted(r for r in reasons if not r.startswith("no layer consumes"))
    return causes or sorted(reasons)[:1]


def _unique(groups: list[Group], taken: Collection[str]) -> list[Group]:
    """Tell groups of one producer apart, and from a block of its name: `a`, `a#2`, `a#3`."""
    seen: dict[str, int] = defaultdict(int, dict.fromkeys(taken, 1))
    named = []
    for group in groups:
        seen[group.name] += 1
        suffix = f"#{seen[group.name]}" if seen[group.name] > 1 else ""
        named.append(replace(group, name=group.name + suffix))
    return named


def _sort(component: Component) -> Kind:
    """Tell which kind of rule asks for channels that cannot go."""
    if component.head:
        return "heads"
    return "hidden" if "norm" in component.kinds else "channels"


def _kind(component: Component) -> Kind:
    if component.head:
        return "heads"
    return "hidden" if component.kinds == {"norm"} else "channels"


def _against(component: Component) -> set[str]:
    """Read the reasons, and whether anybody reads the channels at all."""
    if any(side == "in" for _, side in component.sides):
        return component.reasons
    reasons = {said for said in component.reasons if not said.startswith(NAMED)}
    if component.twice and not reasons & {_ANSWER}:
        names = " and ".join(map(repr, sorted(component.twice)))
        return reasons | {f"{names} writes them and, transposed, is tied to read them"}
    if component.inner:
        return reasons | {"they only meet in a product of two activations"}
    return reasons | {"no layer consumes them before the model's output"}


_ANSWER = "they reach the model's output"


def _idle(model: nn.Module, notes: Probe) -> set[str]:
    """List the layers that others run, reading their weights: nobody sees what they are given."""
    modules = dict(model.named_modules())
    return {
        path
        for path, module in modules.items()
        if is_linear(module)
        and path not in notes.calls
        and not _run_by_another(modules, path, notes)
    }


def _run_by_another(modules: Mapping[str, Any], path: str, notes: Probe) -> bool:
    """Tell whether all tensors of a module ran under other names: as a tied embedding does."""
    mine = {id(t) for t in modules[path].parameters()}
    others = (modules[other] for other in notes.calls if isinstance(modules.get(other), nn.Module))
    return bool(mine) and any(mine <= {id(t) for t in m.parameters(recurse=False)} for m in others)


def _members(
    modules: Mapping[str, Any], sides: Sides, rank: Mapping[str, int]
) -> tuple[Member, ...]:
    first = min(path for path, side in sides if side == "out")
    order = sides[first, "out"].amin(1).argsort()
    members = []
    for (path, side), places in sides.items():
        index = places[order].contiguous()
        module = modules[bare(path)[0]]
        loose = isinstance(module, Tensor)
        size = module.shape[axis_of(path, module.shape)] if loose else channels(module, side)
        members.append(Member(path, side, index, int(size or 0)))
    last = len(rank)
    return tuple(sorted(members, key=lambda m: (rank.get(m.path, last), m.path, m.side)))


def _name(members: tuple[Member, ...]) -> str:
    return next(m.path for m in members if m.side == "out")


def _tied(model: nn.Module) -> list[list[str]]:
    """List the names of every tensor that has several."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return [names for names in owners.values() if len(names) > 1]


def _halves(
    modules: Mapping[str, Any], members: Iterable[Member], shared: Iterable[list[str]]
) -> set[str]:
    """Object to a tensor that only some of those who share it would lose channels of."""
    cut = {name for m in members for name in _tensors(modules, m)}
    return {
        f"{' and '.join(map(repr, names))} are one tensor"
        for names in shared
        if 0 < len(cut & set(names)) < len(names)
    }


def _tensors(modules: Mapping[str, Any], member: Member) -> list[str]:
    module = modules[bare(member.path)[0]]
    if isinstance(module, Tensor):
        return [bare(member.path)[0]]
    return [f"{member.path}.{name}" for name, _ in axes(module, member.side)]
