"""From rules to candidates: whatever kind a rule is, what it offers the allocation looks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.criteria.base import Criterion, Ranking
from torch_otprune.errors import StructureError, TargetError
from torch_otprune.plan.model import Cut, Drop, Refusal
from torch_otprune.plan.price import apart, dropped, foreseen, mendable, repaired, weighted
from torch_otprune.plan.reach import instead, places
from torch_otprune.plan.slices import slices
from torch_otprune.plan.widths import allowed_widths
from torch_otprune.policy import (
    Channels,
    Experts,
    Heads,
    Hidden,
    Policy,
    Rule,
    Units,
    match,
    module_classes,
    owner,
)
from torch_otprune.policy.targets import Classes
from torch_otprune.statistics.evidence import Evidence, gather
from torch_otprune.statistics.observation import Observation
from torch_otprune.structure.graph import Block, Blocked, Graph, Group
from torch_otprune.structure.layers import holder, shared
from torch_otprune.structure.remedies import counted

__all__ = ["PROPOSERS", "Candidate", "Case", "Offer", "felt", "owned_groups", "proposes"]


@dataclass(frozen=True)
class Case:
    """Everything a proposer may look at.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        observation: what calibration found.
        weighting: the unit in which curves are compared.
        banned: groups that failed the check on the real model, with the reason.
    """

    model: nn.Module
    policy: Policy
    graph: Graph
    observation: Observation
    weighting: str
    banned: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shapes_only(self) -> bool:
        """Tell whether the model has no values to look at."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @cached_property
    def ties(self) -> frozenset[str]:
        """List the modules that share tensors with others."""
        return shared(self.model)


@dataclass(frozen=True)
class Candidate:
    """One group on offer.

    Args:
        name: the group.
        rule: index of the rule that owns it.
        units: how many it has.
        curve: predicted cost by number of units kept.
        widths: allowed numbers, ascending.
        decide: the decision for a number of kept units.
        note: what a reader of the plan should know about the ranking; empty as a rule.
        settled: whether training decided how many stay.
    """

    name: str
    rule: int
    units: int
    curve: Float[Tensor, " sizes"]
    widths: tuple[int, ...]
    decide: Callable[[int], Cut | Drop]
    note: str = ""
    settled: bool = False


@dataclass(frozen=True)
class Offer:
    """What a kind of rule brings to the allocation.

    Args:
        candidates: what may be made smaller.
        refused: what may not, with reasons.
        blocks: whole blocks among the candidates: what is inside costs nothing once they go.
        stand_ins: block to what stands in for it costs, by measure.
    """

    candidates: tuple[Candidate, ...]
    refused: tuple[Refusal, ...] = ()
    blocks: tuple[Block, ...] = ()
    stand_ins: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


_MOVES = {"output": "the output", "uniform": "its consumers", "none": "its consumers (unscaled)"}

_UNSEEN = "; how much that changes is unknown, since what reads them saw no data"

Proposer = Callable[[Case, Mapping[int, Any]], Offer]
PROPOSERS: dict[type[Rule], Proposer] = {}


def proposes(kind: type[Rule]) -> Callable[[Proposer], Proposer]:
    """Register how a kind of rule turns into candidates."""

    def add(proposer: Proposer) -> Proposer:
        PROPOSERS[kind] = proposer
        return proposer

    return add


@proposes(Channels)
@proposes(Heads)
@proposes(Hidden)
@proposes(Experts)
def propose_units(case: Case, rules: Mapping[int, Units]) -> Offer:
    """Offer every group of one kind that a rule owns whole.

    Args:
        case: the model and what is known.
        rules: the policy's rules about that kind of units, by index.

    Returns:
        candidates and refusals.

    Raises:
        StructureError: if a rule reaches no group that can be cut.
        TargetError: if a target matches nothing.
    """
    owned, refused = owned_groups(case, rules)
    candidates = [
        _candidate(case, case.graph.group(name), index, rules[index])
        for name, index in owned.items()
    ]
    return Offer(tuple(candidates), tuple(refused))


def owned_groups(case: Case, rules: Mapping[int, Units]) -> tuple[dict[str, int], list[Refusal]]:
    """Assign the groups of one kind to the rules that own them whole.

    Args:
        case: the model and what is known.
        rules: the policy's rules about that kind of units, by index.

    Returns:
        group to index of the rule, and what may not be cut.

    Raises:
        StructureError: if a rule reaches no group that can be cut.
        TargetError: if a target matches nothing.
    """
    classes = module_classes(case.model)
    for index, rule in rules.items():
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    owned, refused = _owned(case, rules, classes)
    for index, rule in rules.items():
        if index not in owned.values():
            _nothing(case, index, rule, refused, classes=classes)
    return owned, refused


def _owned(
    case: Case, rules: Mapping[int, Units], classes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, int], list[Refusal]]:
    """Assign groups to rules; a group that no rule owns whole stays."""
    indices = list(rules)
    owned: dict[str, int] = {}
    refused: list[Refusal] = []
    ignore = case.policy.ignore
    unit = next(iter(rules.values())).unit
    for group in _considered(case, unit):
        members = group.owners if isinstance(group, Group) else (group.name,)
        paths = [holder(path, classes) for path in members]
        found = {p: owner(list(rules.values()), p, classes, ignore=ignore) for p in paths}
        reached = {indices[i] for i in found.values() if i is not None}
        if len(reached) > 1:
            raise TargetError(
                f"group {group.name!r} has producers under different rules.",
                where=" and ".join(f"Policy.rules[{i}]" for i in sorted(reached)),
                fix=f"target {', '.join(paths)} by one rule, or ignore them.",
            )
        if not reached:
            continue
        if why := _objection(case, group, [p for p in paths if found[p] is None], unit):
            refused.append(Refusal(group=group.name, reason=why[0], fix=why[1]))
        else:
            owned[group.name] = reached.pop()
    return owned, refused


def _considered(case: Case, unit: str) -> Iterator[Group | Blocked]:
    """List what rules about one kind of units look at; others' groups have rules of their own."""
    others = {rule.unit for rule in case.policy.rules if isinstance(rule, Units)} - {unit}
    for group in case.graph.groups:
        if group.kind == unit or (unit == "channels" and group.kind not in others):
            yield group
    if unit == "channels":
        yield from (b for b in case.graph.blocked if b.kind == unit or b.kind not in others)
    else:
        yield from (b for b in case.graph.blocked if b.kind == unit)


_OTHER = {
    "heads": ("they are heads of an attention", "cut them by a rule otp.Heads."),
    "experts": ("they are experts of a mixture", "cut them by a rule otp.Experts."),
    "hidden": ("a norm takes all of them together", "cut the stream's width by a rule otp.Hidden."),
}


def _objection(
    case: Case, group: Group | Blocked, missed: Sequence[str], unit: str
) -> tuple[str, str] | None:
    if isinstance(group, Blocked):
        return group.reason, group.fix
    if group.kind != unit:
        return _OTHER[group.kind]
    if group.name in case.banned:
        said = case.banned[group.name]
        if said.startswith("the configuration"):
            return said, "ask for serving='registered', or leave these out."
        return said, counted(said, (group.units, *(member.size for member in group.members)))
    if why := _inside(case, group):
        return why
    if missed:
        names = ", ".join(map(repr, missed))
        return (
            f"its channels are tied to those of {names}, which no rule targets",
            f"target {names} as well, or leave '{group.name}' out.",
        )
    return None


def _touched(group: Group, path: str) -> int:
    """Count the entries of a list that lose channels with a group."""
    inside = (m.path[len(path) + 1 :] for m in group.members if m.path.startswith(f"{path}."))
    return len({name.partition(".")[0] for name in inside})


def _inside(case: Case, group: Group) -> tuple[str, str] | None:
    """Object to the width of a single expert where it may go whole, or was never seen."""
    lists = {m.path: m.size for g in case.graph.groups for m in g.members if m.side == "expert"}
    held = [path for path, size in lists.items() if 0 < _touched(group, path) < size]
    if group.kind != "channels" or not held:
        return None
    if any(isinstance(rule, Experts) for rule in case.policy.rules):
        return (
            f"the experts of '{held[0]}' may go whole, and differ in width if these go",
            "cut widths by a second policy, before or after.",
        )
    asked = [
        r.criterion for r in case.policy.rules if isinstance(r, Units) and r.unit == "channels"
    ]
    blind = not any(m.path in case.observation.moments for m in group.consumers)
    if blind and any(isinstance(c, Criterion) and "moments" in c.needs for c in asked):
        return (
            "no calibration data was sent to this expert",
            "calibrate on more data, or choose criterion='magnitude'.",
        )
    return None


_NONE = {
    "channels": "no linear layer among the targets",
    "experts": "no router with experts beside it among the targets",
    "heads": "no attention with several heads among the targets",
    "hidden": "no stream that a norm takes as one among the targets",
}


def _nothing(
    case: Case, index: int, rule: Units, refused: Sequence[Refusal], *, classes: Classes
) -> None:
    # first what was tried and failed: a change of the rule or of the model would free it
    refused = sorted(refused, key=lambda r: r.group not in case.banned)
    reasons = (
        "; ".join(f"{r.group or 'the model'}: {r.reason}" for r in refused[:3]) or _NONE[rule.unit]
    )
    fix = refused[0].fix if refused else ""
    if not fix or (fix.startswith("nothing") and places(case.graph, rule.unit, classes)):
        fix = instead(case.graph, rule.unit, classes)
    raise StructureError(
        f"rule {index} reaches nothing that can be cut ({reasons}).",
        where=f"Policy.rules[{index}].targets = {', '.join(rule.targets)}",
        fix=fix,
    )


def _candidate(case: Case, group: Group, index: int, rule: Units) -> Candidate:
    criterion = rule.criterion
    assert isinstance(criterion, Criterion)
    evidence = _evidence(case, group)
    ranking = criterion.rank(evidence)
    refits = any(getattr(repair, "refits", False) for repair in rule.repair)
    mendable(evidence, rule.repair)
    curve, unit = _price(case, ranking, evidence, refits=refits)

    def decide(size: int) -> Cut:
        nested = ranking.order[:size]
        refines = type(criterion).refine is not Criterion.refine
        if refines and size < group.units:  # the evidence of all groups at once is large
            nested = criterion.refine(_evidence(case, group), nested)
        keep = nested.sort().values
        lost = felt(curve, size) if unit in _MOVES else None
        moves = _UNSEEN if lost is None else f" moves {_MOVES[unit]} by {lost:.2%}"
        if unit == "learnt":
            lost, moves = 0.0, " moves nothing: training has silenced them"
        if unit == "kernel":
            moves = f" costs {float(curve[size]):.3g} nats of the tangent kernel"
        moved = f"dropping {group.units - size}{moves}"
        if type(criterion).certify is not Criterion.certify and size < group.units:
            moved = f"{moved}; {criterion.certify(_evidence(case, group), keep)}"
        return Cut(
            group=group.name,
            rule=index,
            units=group.units,
            keep=tuple(keep.tolist()),
            criterion=criterion.kind,
            error=lost,
            reason=f"{criterion.kind}: {moved}",
            slices=slices(group, keep),
        )

    widths = allowed_widths(group, index, rule) if ranking.size is None else (ranking.size,)
    note = "; ".join(filter(None, (ranking.note, apart(case.policy, ranking))))
    settled = ranking.size is not None
    return Candidate(group.name, index, group.units, curve, widths, decide, note, settled)


def felt(curve: Tensor, size: int) -> float:
    """Read a predicted change off a curve of squares, to four digits."""
    return float(f"{sqrt(max(float(curve[size]), 0.0)):.3e}")


def _evidence(case: Case, group: Group) -> Evidence:
    if case.shapes_only:
        nothing = torch.zeros(group.units, 1, dtype=torch.float64, device="cpu")
        return Evidence(group.name, group.units, nothing, None, (), None, case.policy.seed)
    found = gather(
        case.model,
        case.graph,
        group,
        moments=dict(case.observation.moments),
        sensitivity=case.observation.sensitivity,
        feel=case.weighting == "output",
        ties=case.ties,
        signals=case.observation.signals,
        tangents=case.observation.tangents,
        seed=case.policy.seed,
    )
    return replace(found, learnt=case.observation.learnt.get(group.name))


def _price(case: Case, ranking: Ranking, evidence: Evidence, *, refits: bool) -> tuple[Tensor, str]:
    """Price a ranking by what its repair leaves, in the unit that all groups share."""
    if ranking.size is not None:  # there is no choice left to price
        return ranking.curve, "learnt"
    if ranking.unit:  # in a unit of its own, which all groups share
        return ranking.curve, ranking.unit
    felt = case.observation.sensitivity
    if refits and case.policy.budget is not None and case.policy.budget.foresee:
        evidence = foreseen(evidence, case.graph.order)
    priced = (repaired if refits else dropped)(ranking, evidence)
    if priced is ranking:  # no consumer was seen: what is lost there is anybody's guess
        return weighted(priced.curve, "uniform", 0.0), ""
    blind = case.weighting == "output" and felt is None
    unit = "uniform" if blind else case.weighting
    return weighted(priced.curve, unit, felt.mean_power if felt else 0.0), unit
