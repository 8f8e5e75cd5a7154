"""The decision: candidates of all rules under one budget."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from math import sqrt

import torch
from torch import nn

from torch_otprune.errors import BudgetError
from torch_otprune.plan.allocate import Choice, allocate
from torch_otprune.plan.model import Cost, Cut, Plan, Refusal
from torch_otprune.plan.propose import PROPOSERS, Candidate, Case
from torch_otprune.policy import Policy
from torch_otprune.statistics.observation import Observation
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.structure.graph import Graph

__all__ = ["make_plan"]

_FEW = 32  # samples below which a plan says how few they were


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
    candidates, refused = _offers(case)
    limits = _limits(policy, graph)
    choices = [Choice(c.name, c.curve, c.widths) for c in candidates]
    choices += _whole(graph, {c.name for c in candidates})
    found = allocate(choices, costs=graph.costs, limits=limits)
    cuts = [_cut(c, found.keep[c.name]) for c in candidates if found.keep[c.name] < c.units]
    if not cuts:
        raise BudgetError(
            "nothing would be removed.",
            where=_where(policy, candidates),
            fix="lower the budget or a rule's keep, or drop multiple_of and min_keep.",
        )
    after = graph.full() | {cut.group: len(cut.keep) for cut in cuts}
    costs = {
        name: Cost(before=cost.at(graph.full()), after=cost.at(after))
        for name, cost in graph.costs.items()
    }
    return Plan(
        policy=policy,
        fingerprint=fingerprint(model),
        calibration=observation.hash(),
        samples=observation.samples,
        cuts=tuple(cuts),
        refused=tuple(refused),
        params=costs["params"],
        macs=costs["macs"],
        notes=(*found.notes, *_stuck(policy, candidates), *_thin(observation)),
        versions=_versions(),
    )


def _thin(observation: Observation) -> list[str]:
    """Warn where so few samples decided that the report cannot know better."""
    if not observation.moments or observation.samples >= _FEW:
        return []
    seen = f"only {observation.samples} calibration samples were seen"
    return [f"{seen}: what holds on them may not hold on other data"]


def _stuck(policy: Policy, candidates: list[Candidate]) -> list[str]:
    """Say which groups a rule's own numbers leave whole."""
    return [
        f"group '{c.name}' stays whole: min_keep and multiple_of of rules[{c.rule}] allow "
        f"{c.units} units no smaller width"
        for c in candidates
        if c.widths == (c.units,) and not _wants_all(policy, c.rule)
    ]


def _wants_all(policy: Policy, rule: int) -> bool:
    keep = policy.rules[rule].keep
    return keep is not None and keep.everything


def _whole(graph: Graph, offered: set[str]) -> list[Choice]:
    """Keep every group that is not on offer as it is; the costs depend on it all the same."""
    rest = [g for g in graph.groups if g.name not in offered]
    return [Choice(g.name, torch.zeros(g.units + 1, dtype=torch.float64), (g.units,)) for g in rest]


def _offers(case: Case) -> tuple[list[Candidate], list[Refusal]]:
    candidates: list[Candidate] = []
    refused: list[Refusal] = []
    for kind, proposer in PROPOSERS.items():
        rules = {i: rule for i, rule in enumerate(case.policy.rules) if type(rule) is kind}
        if rules:
            offer = proposer(case, rules)
            candidates += offer.candidates
            refused += offer.refused
    return candidates, refused


def _limits(policy: Policy, graph: Graph) -> dict[str, int]:
    dense = graph.full()
    named = policy.budget.limits if policy.budget else {}
    return {name: amount.of(graph.costs[name].at(dense)) for name, amount in named.items()}


def _cut(candidate: Candidate, size: int) -> Cut:
    keep = candidate.choose(size)
    lost = float(f"{sqrt(max(float(candidate.curve[size]), 0.0)):.3e}")
    felt = f"dropping {candidate.units - size} moves {candidate.moves} by {lost:.2%}"
    return Cut(
        group=candidate.name,
        rule=candidate.rule,
        units=candidate.units,
        keep=tuple(keep.tolist()),
        criterion=candidate.criterion,
        error=lost,
        reason=f"{candidate.criterion}: {felt}",
        slices=candidate.spell(keep),
    )


def _where(policy: Policy, candidates: list[Candidate]) -> str:
    rules = "; ".join(f"rules[{i}] {r.kind}" for i, r in enumerate(policy.rules))
    return f"Policy ({rules}); groups: {', '.join(c.name for c in candidates) or 'none'}"


def _versions() -> dict[str, str]:
    names = ("torch-otprune", "torch", "torch-pruning")
    return {"python": platform.python_version(), "torch": torch.__version__} | {
        name: _version(name) for name in names if name != "torch"
    }


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
