"""From a model and an example to its diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torch_otprune.doctor.model import Activation, Diagnosis, Removable
from torch_otprune.errors import StructureError
from torch_otprune.fold.segments import Segment, segments
from torch_otprune.plan.model import Cost, Drop
from torch_otprune.structure.doctor import Finding, ailments, findings, wards
from torch_otprune.structure.forward import head
from torch_otprune.structure.graph import Block, Blocked, Graph, Site
from torch_otprune.structure.layers import shared
from torch_otprune.structure.probe import probe
from torch_otprune.structure.trace import trace
from torch_otprune.surgery.oracle import compared

__all__ = ["doctor"]

_EXAMPLE = 2  # samples of the example that the trace runs on
_USED = "leave it, or let the model use and return nothing of it but its stream."
_INSTEAD = {
    "block": "nothing: its input is handed on",
    "branch": "nothing: the stream goes on without it",
}


def doctor(model: nn.Module, example: Any) -> Diagnosis:
    """Explain what can go from a model: channels, whole blocks, activations; and what stays, why.

    A parameter is prunable if a group cuts any of its axes, blocked if none does and one could
    if the model were changed, and fixed otherwise.

    Args:
        model: any module with parameters; it is read, never written.
        example: one batch, as the model takes it.

    Returns:
        the diagnosis.

    Raises:
        StructureError: if the model cannot be analysed, or does not run on the example.

    Limits: blocks are taken out of a copy to see whether the model runs without, until one of each
        kind can be, by the classes of the module and of the one around it. The plan tries them
        all, and every cut, and may refuse what is listed here. What stands in for a block may cost
        something; that depends on the rule's `replace`.
    """
    some = head(example, _EXAMPLE)
    graph, ran = _traced(model, some), probe(model, some).calls
    full = graph.full()
    untied, tied = _untied(graph.blocks, shared(model))
    free, used = _unused(model, untied, some)
    return Diagnosis(
        model=type(model).__name__,
        params=graph.costs["params"].at(full),
        macs=graph.costs["macs"].at(full),
        findings=tuple(_placed(f, free) for f in findings(model, graph, ran)),
        groups=wards(graph),
        ailments=ailments(graph.blocked),
        blocks=tuple(_removable(graph, block) for block in free),
        stuck=ailments((*graph.stuck, *tied, *used)),
        activations=tuple(map(_activation, graph.sites)),
        segments=_foldable(model, some, graph.sites),
    )


def _traced(model: nn.Module, example: Any) -> Graph:
    """Trace channels and blocks; where channels cannot be followed, blocks alone."""
    try:
        return trace(model, example)
    except StructureError as error:
        graph = trace(model, example, channels=False)  # fails likewise where that is not why
        paths = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
        why = error.problem.rstrip(".")
        blocked = Blocked(next(iter(paths)), tuple(paths), why, error.fix)
        return replace(graph, blocked=(blocked,))


def _untied(blocks: Sequence[Block], ties: frozenset[str]) -> tuple[list[Block], list[Blocked]]:
    """Set apart the blocks that would take a tensor along which another layer needs."""
    free, tied = list[Block](), list[Blocked]()
    for block in blocks:
        inside = sorted(path for path in ties if block.holds(path))
        if inside:
            said = f"'{inside[0]}' shares a tensor with another layer"
            tied.append(Blocked(block.name, tuple(inside), said, "untie the weights."))
        else:
            free.append(block)
    return free, tied


def _unused(
    model: nn.Module, blocks: Sequence[Block], example: Any
) -> tuple[list[Block], list[Blocked]]:
    """Set apart the blocks that the model looks into: it does not run once they are gone."""
    fine = set[tuple[object, ...]]()
    free, used = list[Block](), list[Blocked]()
    for block in blocks:
        kind = _kind(model, block)
        far, said = (0.0, "") if kind in fine else _without_it(model, block, example)
        if far < float("inf"):
            fine.add(kind)
            free.append(block)
        else:
            used.append(Blocked(block.name, (block.name,), said, _USED))
    return free, used


def _kind(model: nn.Module, block: Block) -> tuple[object, ...]:
    """Tell blocks apart that the model may treat differently."""
    around, _, name = block.name.rpartition(".")
    classes = (type(model.get_submodule(path)) for path in (block.name, around))
    return (block.kind, block.level, "" if name.isdecimal() else name, *classes)


def _without_it(model: nn.Module, block: Block, example: Any) -> tuple[float, str]:
    """Take a block out of a copy, and run it beside the model in which the block is muted."""
    drop = Drop(
        block=block.name,
        rule=0,
        criterion="",
        replace="identity",
        reason="",
        error=0.0,
        swaps=block.swaps,
    )
    return compared(model, [], example, drops=[drop])


def _placed(finding: Finding, blocks: Sequence[Block]) -> Finding:
    inside = tuple(block.name for block in blocks if block.holds(finding.parameter))
    return finding.model_copy(update={"blocks": inside})


def _removable(graph: Graph, block: Block) -> Removable:
    costs = {name: _without(graph, block, name) for name in ("params", "macs")}
    return Removable(
        block=block.name,
        kind=block.kind,
        level=block.level,
        chain=block.chain,
        place=block.place,
        channels=block.channels,
        modules=tuple(swap.path for swap in block.swaps),
        instead=_INSTEAD[block.kind],
        **costs,
    )


def _without(graph: Graph, block: Block, measure: str) -> Cost:
    cost, full = graph.costs[measure].gated([block]), graph.full()
    return Cost(before=cost.at({**full, block.name: 1}), after=cost.at({**full, block.name: 0}))


def _activation(site: Site) -> Activation:
    around = () if site.others else tuple(filter(None, (site.producer, *site.readers)))
    return Activation(
        name=site.name,
        function=site.function,
        functional=site.functional,
        channels=site.channels,
        between=around if site.producer and site.readers else (),
        reason=site.reason,
        fix=site.fix,
    )


def _foldable(model: nn.Module, example: Any, sites: Sequence[Site]) -> tuple[Segment, ...]:
    """List what folds, taking for linear only the activations that can be made so."""
    found = segments(model, example)
    stuck = {site.module for site in sites if site.reason}
    wanted = set(_activations(found))
    if not wanted & stuck:
        return found
    return segments(model, example, linear=wanted - stuck)


def _activations(found: Sequence[Segment]) -> Iterator[str]:
    for segment in found:
        yield from segment.activations
