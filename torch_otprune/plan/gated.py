"""What masks may reach before there is a plan: units and blocks on offer, and their budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from torch_otprune.plan.build import costs_of, limits_of
from torch_otprune.plan.depth import offered, standing
from torch_otprune.plan.propose import Case, Offer, owned_groups
from torch_otprune.plan.weights import thinnings
from torch_otprune.policy import Layers, Policy, Units, Weights
from torch_otprune.statistics.observation import Observation
from torch_otprune.structure.graph import Block, CostModel, Graph, Group

__all__ = ["Gated", "gated", "learning"]


@dataclass(frozen=True)
class Gated:
    """What rules with a criterion that learns reach.

    Args:
        groups: of each rule, in order of execution.
        blocks: of each rule.
        layers: of rules about weights: layer to how many of its weights stay.
        costs: one exact cost per measure, in the widths of groups and blocks.
        limits: what the budget leaves of each measure.
        widths: dense widths of all groups and blocks.
    """

    groups: Mapping[int, list[Group]]
    blocks: Mapping[int, list[Block]]
    layers: Mapping[str, int]
    costs: Mapping[str, CostModel]
    limits: Mapping[str, int]
    widths: Mapping[str, int]


def learning(policy: Policy) -> list[int]:
    """List the rules whose criterion learns while the user trains."""
    rules = enumerate(policy.rules)
    return [i for i, rule in rules if getattr(getattr(rule, "criterion", None), "learns", False)]


def gated(
    model: nn.Module, policy: Policy, graph: Graph, *, banned: Mapping[str, str] | None = None
) -> Gated:
    """Find what a policy's masks reach.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        banned: groups and blocks that failed a trial on the real model, with the reason.

    Returns:
        groups and blocks by rule, and what they cost.

    Raises:
        StructureError: if a rule reaches nothing that can be cut.
        TargetError: if a target matches nothing.
    """
    case = Case(model, policy, graph, Observation({}, None, 0), "none", banned or {})
    rules = {i: policy.rules[i] for i in learning(policy)}
    layers = {i: rule for i, rule in rules.items() if isinstance(rule, Layers)}
    blocks = offered(case, layers)[0] if layers else {}
    every = [block for found in blocks.values() for block in found]
    stand_ins = {b.name: standing(rule).costs(b) for i, rule in layers.items() for b in blocks[i]}
    costs, widths = costs_of(graph, Offer((), (), tuple(every), stand_ins))
    groups = _groups(case, {i: rule for i, rule in rules.items() if isinstance(rule, Units)})
    weights = _weights(model, policy, graph)
    return Gated(groups, blocks, weights, costs, limits_of(policy, costs, widths), widths)


def _weights(model: nn.Module, policy: Policy, graph: Graph) -> dict[str, int]:
    learns = learning(policy)
    if not any(isinstance(policy.rules[index], Weights) for index in learns):
        return {}
    found = thinnings(model, policy, graph)[0]
    return {t.layer: t.keep for t in found if t.rule in learns and t.keep is not None}


def _groups(case: Case, rules: Mapping[int, Units]) -> dict[int, list[Group]]:
    """Assign groups to rules, kind by kind as the plan does."""
    found: dict[int, list[Group]] = {index: [] for index in rules}
    for unit in dict.fromkeys(rule.unit for rule in rules.values()):
        # rules that learn nothing own their groups all the same
        alike = {
            i: rule
            for i, rule in enumerate(case.policy.rules)
            if isinstance(rule, Units) and rule.unit == unit
        }
        for name, index in owned_groups(case, alike)[0].items():
            if index in found:
                found[index].append(case.graph.group(name))
    return found
