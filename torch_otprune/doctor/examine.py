"""From a model and an example to its diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

from torch import nn

from torch_otprune.doctor.idle import idle
from torch_otprune.doctor.model import Activation, Diagnosis, Removable
from torch_otprune.doctor.notes import notes
from torch_otprune.doctor.protect import Guard, guarded, guards, removed
from torch_otprune.doctor.ticks import Progress, ticking
from torch_otprune.doctor.trial import tried
from torch_otprune.doctor.unwritten import unwritten
from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.fold.segments import Segment, segments
from torch_otprune.plan.model import Cost, Drop
from torch_otprune.plan.reach import floors
from torch_otprune.policy import Policy, Rule
from torch_otprune.structure.costs import uncounted
from torch_otprune.structure.doctor import Finding, Ward, ailments, findings, wards
from torch_otprune.structure.eager import check, check_example
from torch_otprune.structure.forward import batch_size, head
from torch_otprune.structure.graph import Block, Blocked, Graph, Site
from torch_otprune.structure.layers import shared
from torch_otprune.structure.probe import probe
from torch_otprune.structure.trace import trace
from torch_otprune.surgery.oracle import compared

__all__ = ["doctor"]

_EXAMPLE = 2  # samples of the example that the trace runs on
_TRIED = 3  # blocks of one kind that are taken out, if none of them can be
_USED = "leave it, or let the model use and return nothing of it but its stream."
_INSTEAD = {
    "block": "nothing: its input is handed on",
    "branch": "nothing: the stream goes on without it",
}


def _quiet(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def doctor(
    model: nn.Module,
    example: Any,
    *,
    policy: Policy | None = None,
    progress: Progress = _quiet,
) -> Diagnosis:
    """Explain what can go from a model: channels, whole blocks, activations; and what stays, why.

    A parameter is prunable if a group cuts any of its axes, blocked if none does and one could
    if the model were changed, and fixed otherwise. With a policy, what its rules do not reach is
    protected, and named after the words that protect it.

    Args:
        model: any module with parameters; it is read, never written.
        example: one batch, as the model takes it.
        policy: a declaration to hold against the model.
        progress: told the stage, the steps done and the steps in all.

    Returns:
        the diagnosis.

    Raises:
        StructureError: if the model cannot be analysed, or does not run on the example.
        PolicyError: if the policy is something else.
        TargetError: if a target of the policy matches nothing, or two tie.

    Limits: groups are cut by half on a copy, those that differ in numbers alone once. Blocks are
        taken out of a copy until one of each kind can go, by the classes of the module and of the
        one around it; the first three and the last stand for all. The plan tries them all, and
        every cut, and may refuse what is listed here. What stands in for a block may cost
        something; that depends on the rule's `replace`.
    """
    check(model, weights=False)
    _check_policy(policy)
    with unwritten(model):
        return _diagnosed(model, example, policy, progress=progress)


def _diagnosed(
    model: nn.Module, example: Any, policy: Policy | None, *, progress: Progress
) -> Diagnosis:
    with ticking(model, progress):
        graph, some = _seen(model, example)
        seen = probe(model, some)
    graph, ran = tried(model, graph, some), seen.calls
    untied, tied = _untied(graph.blocks, shared(model))
    free, used = _unused(model, untied, some, progress=progress)
    placed = list(_placed(findings(model, graph, ran), free))
    prices = _Prices(graph)
    groups, told = wards(graph), list[str]()
    if policy is not None:
        groups = _watched(groups, guards(model, policy, graph))
        placed = list(guarded(placed, groups, blocks=removed(model, policy, graph)))
        told += idle(model, policy, graph, groups=groups, free=[block.name for block in free])
    return Diagnosis(
        model=type(model).__name__,
        rules=() if policy is None else tuple(rule.kind for rule in policy.rules),
        notes=(
            *told,
            *notes(model, some, placed),
            *floors(graph.groups),
            *uncounted(graph.costs["macs"]),
        ),
        params=prices.total["params"],
        macs=prices.total["macs"],
        findings=tuple(placed),
        groups=groups,
        ailments=ailments(graph.blocked),
        blocks=tuple(_removable(prices, block) for block in free),
        stuck=ailments((*graph.stuck, *tied, *used)),
        activations=tuple(map(_activation, graph.sites)),
        segments=_foldable(model, some, graph.sites),
    )


def _check_policy(policy: object) -> None:
    if policy is None or isinstance(policy, Policy):
        return
    read = "read it: otp.Policy.from_yaml(path)." if isinstance(policy, (str, Path)) else ""
    wrap = "wrap it: otp.Policy(rules=...)." if isinstance(policy, Rule) else "pass an otp.Policy."
    raise PolicyError(
        f"the policy is of type {type(policy).__name__}.", where="doctor(policy=)", fix=read or wrap
    )


def _watched(groups: Sequence[Ward], said: Mapping[str, Guard]) -> tuple[Ward, ...]:
    """Write into every group what the policy says of it."""
    return tuple(
        ward.model_copy(update={"rule": by.rule, "protected": by.reason, "fix": by.fix})
        for ward in groups
        for by in (said[ward.group],)
    )


def _seen(model: nn.Module, example: Any) -> tuple[Graph, Any]:
    """Trace on a few samples; on all where that fails, so that errors name the user's shapes."""
    check_example(model, example, on=False)
    some = head(example, _EXAMPLE)
    try:
        return _traced(model, some), some
    except StructureError:
        if batch_size(example) <= _EXAMPLE:
            raise
        return _traced(model, example), example


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
    model: nn.Module, blocks: Sequence[Block], example: Any, *, progress: Progress
) -> tuple[list[Block], list[Blocked]]:
    """Set apart the blocks that the model looks into: it does not run once they are gone."""
    kinds: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        kinds.setdefault(_kind(model, block), []).append(block)
    refused: dict[str, str] = {}
    for done, alike in enumerate(kinds.values()):
        progress("try without", done, len(kinds))
        refused |= _refused(model, alike, example)
    progress("try without", len(kinds), len(kinds))
    used = [Blocked(b.name, (b.name,), refused[b.name], _USED) for b in blocks if b.name in refused]
    return [block for block in blocks if block.name not in refused], used


def _refused(model: nn.Module, alike: Sequence[Block], example: Any) -> dict[str, str]:
    """Try blocks of one kind until one can go: the first few and the last stand for all."""
    said: dict[str, str] = {}
    for block in dict.fromkeys([*alike[:_TRIED], alike[-1]]):
        far, why = _without_it(model, block, example)
        if far < float("inf"):
            return said
        said[block.name] = why
    return {block.name: said.get(block.name, said[alike[0].name]) for block in alike}


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


def _placed(found: Iterable[Finding], blocks: Sequence[Block]) -> Iterator[Finding]:
    """Name for every parameter the blocks that it goes with."""
    holders: dict[str, list[str]] = {}
    for block in blocks:
        for swap in block.swaps:
            holders.setdefault(swap.path, []).append(block.name)
    rank = {block.name: place for place, block in enumerate(blocks)}
    for finding in found:
        inside = {n for path in _lineage(finding.parameter) for n in holders.get(path, ())}
        yield finding.model_copy(update={"blocks": tuple(sorted(inside, key=rank.__getitem__))})


def _lineage(path: str) -> Iterator[str]:
    """Yield a path and all that it lies in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


class _Prices:
    """What the model costs without a block: one sum for every module, made once."""

    def __init__(self, graph: Graph) -> None:
        full = graph.full()
        self.total = {name: cost.at(full) for name, cost in graph.costs.items()}
        self.inside: dict[tuple[str, str], int | Fraction] = {}
        for measure, cost in graph.costs.items():
            for term in cost.terms:
                value = term.at(full)
                for path in _lineage(term.owner):
                    self.inside[measure, path] = self.inside.get((measure, path), 0) + value

    def without(self, block: Block, measure: str) -> Cost:
        """Compare the model with and without a block."""
        total = self.total[measure]
        gone = floor(sum(self.inside.get((measure, swap.path), 0) for swap in block.swaps))
        return Cost(before=total, after=total - gone)


def _removable(prices: _Prices, block: Block) -> Removable:
    costs = {name: prices.without(block, name) for name in ("params", "macs")}
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
    if any(parameter.is_meta for parameter in model.parameters()):
        return ()  # what folds depends on the numbers
    found = segments(model, example)
    stuck = {site.module for site in sites if site.reason}
    wanted = set(_activations(found))
    if not wanted & stuck:
        return found
    return segments(model, example, linear=wanted - stuck)


def _activations(found: Sequence[Segment]) -> Iterator[str]:
    for segment in found:
        yield from segment.activations
