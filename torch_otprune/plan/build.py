"""The decision: candidates of all rules under one budget."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import NoReturn

import torch
from torch import nn

from torch_otprune.errors import BudgetError
from torch_otprune.plan.allocate import Choice, allocate
from torch_otprune.plan.model import Cost, Cut, Drop, Plan
from torch_otprune.plan.propose import PROPOSERS, Candidate, Case, Offer
from torch_otprune.plan.reach import floors
from torch_otprune.plan.ties import kinds, sayable
from torch_otprune.policy import Layers, Linearize, Policy, Units, Weights
from torch_otprune.statistics.observation import Observation
from torch_otprune.structure.costs import uncounted, unsteady
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.structure.graph import CostModel, Dim, Graph, Term

__all__ = ["costs_of", "limits_of", "make_plan"]

_FEW = 32  # samples below which a plan says how few they were


_LESS_WIDTH = "lower the budget or a rule's keep, or drop multiple_of and min_keep."
_LESS_DEPTH = "lower the budget or a rule's keep, or give it a drop."


def _depth(policy: Policy) -> bool:
    return all(isinstance(rule, Layers) for rule in policy.rules)


def make_plan(
    model: nn.Module,
    policy: Policy,
    graph: Graph,
    observation: Observation,
    *,
    banned: Mapping[str, str] | None = None,
) -> Plan:
    """Decide what to remove. The model is read, never written.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        observation: what calibration found.
        banned: groups that failed the check on the real model, with the reason.

    Returns:
        the plan; it removes at least one unit.

    Raises:
        BudgetError: if the budget cannot be met, or nothing would be removed.
    """
    weighting = policy.budget.weighting if policy.budget else "uniform"
    case = Case(model, policy, graph, observation, weighting, banned or {})
    offer = _offers(case)
    candidates = offer.candidates
    costs, dense = costs_of(graph, offer)
    choices = [Choice(c.name, c.curve, c.widths) for c in candidates]
    choices += _whole(graph, {c.name for c in candidates})
    alike = kinds(model, graph.groups) if policy.serving == "uniform" else {}
    if alike:
        choices = sayable(model, graph.groups, choices)
    limits = limits_of(policy, costs, dense)
    found = allocate(choices, costs=costs, limits=limits, kind=alike)
    made = [c.decide(found.keep[c.name]) for c in candidates if found.keep[c.name] < c.units]
    if not made and not any(isinstance(rule, (Linearize, Weights)) for rule in policy.rules):
        _nothing(policy, candidates)
    drops = tuple(d for d in made if isinstance(d, Drop))
    plan = Plan(
        policy=policy,
        fingerprint=fingerprint(model),
        calibration=observation.hash(),
        samples=observation.samples,
        cuts=tuple(c for c in made if isinstance(c, Cut)),
        drops=drops,
        refused=offer.refused,
        params=Cost(before=0, after=0),
        macs=Cost(before=0, after=0),
        notes=(*found.notes, *_told(case, candidates)),
        versions=_versions(),
    )
    after = dense | plan.keep()
    counted = {m: Cost(before=c.at(dense), after=c.at(after)) for m, c in costs.items()}
    return plan.model_copy(update=counted)


def _nothing(policy: Policy, candidates: Sequence[Candidate]) -> NoReturn:
    whole = "; ".join([*_stuck(policy, candidates), *_kept(policy, candidates)][:3])
    enough = [c for c in candidates if c.widths == (c.units,) and _asked(policy, c)]
    most = max((c.units for c in enough), default=0)
    less = _LESS_DEPTH if _depth(policy) else _LESS_WIDTH
    raise BudgetError(
        f"nothing would be removed{f': {whole}' if whole else ''}.",
        where=_where(policy, candidates),
        fix=f"keep fewer than {most}." if enough else less,
    )


def costs_of(graph: Graph, offer: Offer) -> tuple[dict[str, CostModel], dict[str, int]]:
    """Add the blocks on offer to the costs, and a measure that counts them.

    Args:
        graph: the model's analysis.
        offer: what rules bring.

    Returns:
        one cost per measure, and the dense widths of all groups and blocks.
    """
    instead, widths = offer.stand_ins, graph.widths(offer.blocks)
    costs = {
        name: cost.gated(offer.blocks, {b: c.get(name, 0) for b, c in instead.items()}, widths)
        for name, cost in graph.costs.items()
    }
    count = tuple(Term(b.name, 1, (Dim(0, ((b.name, 1),)),)) for b in offer.blocks)
    costs["layers"] = CostModel("layers", count)
    return costs, graph.full() | {block.name: 1 for block in offer.blocks}


def _told(case: Case, candidates: Sequence[Candidate]) -> list[str]:
    """Say what a reader of the plan should know beside what it decides."""
    names = {candidate.name for candidate in candidates}
    least = floors(group for group in case.graph.groups if group.name in names)
    few = (*uncounted(case.graph.costs["macs"]), *unsteady(case.graph))
    ranked = [f"group '{c.name}': {c.note}" for c in candidates if c.note]
    stuck, thin = _stuck(case.policy, candidates), _thin(case.observation)
    return [*stuck, *ranked, *least, *few, *thin]


def _thin(observation: Observation) -> list[str]:
    """Warn where so few samples decided that the report cannot know better."""
    found = (observation.tangents, observation.sensitivity)
    seen = observation.moments or observation.signals or any(one is not None for one in found)
    if not seen or observation.samples >= _FEW:
        return []
    few = f"only {observation.samples} calibration samples were seen"
    return [f"{few}: what holds on them may not hold on other data"]


def _stuck(policy: Policy, candidates: Sequence[Candidate]) -> list[str]:
    """Say which groups a rule's own numbers leave whole."""
    return [
        f"group '{c.name}' stays whole: {_asked(policy, c) or _fits(c)}"
        for c in candidates
        if c.widths == (c.units,)
        and c.units > 1
        and not c.settled
        and not _wants_all(policy, c.rule)
    ]


def _kept(policy: Policy, candidates: Sequence[Candidate]) -> Iterator[str]:
    """Say which rules about layers keep as many as they reach."""
    for index, rule in enumerate(policy.rules):
        reached = sum(c.rule == index for c in candidates)
        if isinstance(rule, Layers) and rule.dropped(reached) == 0:
            yield f"rules[{index}] keeps {rule.keep} of the layers it reaches, which are {reached}"


def _fits(candidate: Candidate) -> str:
    return (
        f"min_keep and multiple_of of rules[{candidate.rule}] allow {candidate.units} units no "
        "smaller width"
    )


def _asked(policy: Policy, candidate: Candidate) -> str:
    """Say that a rule asks for no less than there is; nothing where it asks for less."""
    rule = policy.rules[candidate.rule]
    if not isinstance(rule, Units) or rule.keep is None or rule.keep.relative:
        return ""
    if rule.keep.value < candidate.units:
        return ""
    return f"rules[{candidate.rule}] keeps {rule.keep} {rule.unit}, and it has {candidate.units}"


def _wants_all(policy: Policy, rule: int) -> bool:
    keep = policy.rules[rule].keep
    return keep is not None and keep.everything


def _whole(graph: Graph, offered: set[str]) -> list[Choice]:
    """Keep every group that is not on offer as it is; the costs depend on it all the same."""
    rest = [g for g in graph.groups if g.name not in offered]
    return [
        Choice(g.name, torch.zeros(g.units + 1, dtype=torch.float64, device="cpu"), (g.units,))
        for g in rest
    ]


def _offers(case: Case) -> Offer:
    found = Offer(())
    for kind, proposer in PROPOSERS.items():
        rules = {i: rule for i, rule in enumerate(case.policy.rules) if type(rule) is kind}
        if rules:
            more = proposer(case, rules)
            found = Offer(
                (*found.candidates, *more.candidates),
                (*found.refused, *more.refused),
                (*found.blocks, *more.blocks),
                {**found.stand_ins, **more.stand_ins},
            )
    return found


def limits_of(
    policy: Policy, costs: Mapping[str, CostModel], dense: Mapping[str, int]
) -> dict[str, int]:
    """Count what the budget leaves of each measure.

    Args:
        policy: the declaration.
        costs: by measure.
        dense: widths of all groups and blocks.

    Returns:
        the most by measure; empty without a budget.
    """
    named = policy.budget.limits if policy.budget else {}
    return {name: amount.of(costs[name].at(dense)) for name, amount in named.items()}


def _where(policy: Policy, candidates: Sequence[Candidate]) -> str:
    rules = "; ".join(f"rules[{i}] {r.kind}" for i, r in enumerate(policy.rules))
    return f"Policy ({rules}); groups: {', '.join(c.name for c in candidates) or 'none'}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {"torch-otprune": _version("torch-otprune")}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
