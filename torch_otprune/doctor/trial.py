"""The groups, tried on a copy: what cannot be cut for a number in forward is found here."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_otprune.doctor.text import pattern
from torch_otprune.plan.model import Cut
from torch_otprune.plan.slices import slices
from torch_otprune.structure.forward import evaluating, flat_tensors, run
from torch_otprune.structure.graph import Blocked, Graph, Group
from torch_otprune.structure.remedies import counted
from torch_otprune.surgery import compared, gap, tolerance

__all__ = ["tried"]

_STOPS = "without it the model does not run"


def tried(model: nn.Module, graph: Graph, example: Any) -> Graph:
    """Cut half of every group's units on a copy, and set apart the groups for which it fails.

    All are cut at once; only where that fails, they are taken apart. Groups that differ in the
    numbers of their modules alone stand for one another.

    Args:
        model: the dense model.
        graph: its analysis.
        example: one batch.

    Returns:
        the analysis, with the groups that failed among what is blocked. A model without weights,
        or one whose output is random, is taken as the analysis has it.
    """
    if any(p.is_meta for p in model.parameters()) or not graph.groups:
        return graph
    said = dict(_failing(model, graph.groups, example))
    if not said or not _steady(model, example):
        return graph
    makes = {_make(graph.group(name)): why for name, why in said.items()}
    groups = tuple(group for group in graph.groups if _make(group) not in makes)
    blocked = [_blocked(g, makes[_make(g)]) for g in graph.groups if _make(g) in makes]
    full = {g.name: g.units for g in graph.groups if _make(g) in makes}
    costs = {measure: cost.held(full) for measure, cost in graph.costs.items()}
    return replace(graph, groups=groups, blocked=(*graph.blocked, *blocked), costs=costs)


def _make(group: Group) -> Hashable:
    """Describe a group so that those that differ in the numbers of their modules are equal."""
    members = tuple((pattern(m.path), m.side, tuple(m.index.shape)) for m in group.members)
    return pattern(group.name), group.name.partition("#")[2], group.kind, members


def _blocked(group: Group, why: str) -> Blocked:
    said = why.replace(_STOPS, "once they are cut the model does not run").replace("; ", ", ")
    paths = tuple(member.path for member in group.members)
    sizes = (group.units, *(member.size for member in group.members))
    return Blocked(group.name, paths, said, counted(said, sizes), group.kind)


def _failing(model: nn.Module, groups: Sequence[Group], example: Any) -> Iterator[tuple[str, str]]:
    """Find the groups that fail, by halves; of those alike, one is enough."""
    far, why = compared(model, [_half(group) for group in groups], example)
    if far <= tolerance(model):
        return
    if len(groups) == 1:
        yield groups[0].name, why
        return
    first = list({_make(group): group for group in reversed(groups)}.values())[::-1]
    middle = len(first) // 2
    for part in (first[:middle], first[middle:]):
        if part:
            yield from _failing(model, part, example)


def _half(group: Group) -> Cut:
    keep = torch.arange(0, group.units, 2, device="cpu")
    return Cut(
        group=group.name,
        rule=0,
        units=group.units,
        keep=tuple(keep.tolist()),
        criterion="",
        error=0.0,
        reason="",
        slices=slices(group, keep),
    )


def _steady(model: nn.Module, example: Any) -> bool:
    with evaluating(model), torch.no_grad():
        first, second = (flat_tensors(run(model, example)) for _ in range(2))
    return gap(first, second) <= tolerance(model)
