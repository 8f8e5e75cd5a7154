"""Which statistics a policy asks for."""

from __future__ import annotations

from torch_otprune.criteria.base import Criterion
from torch_otprune.criteria.layers.base import LayerCriterion
from torch_otprune.policy import Layers, Linearize, Policy, Units
from torch_otprune.repair.base import Repair

__all__ = ["looks_at_channels", "needs_of"]


def looks_at_channels(policy: Policy) -> bool:
    """Tell whether a policy has anything to do with channels."""
    return any(isinstance(rule, Units) for rule in policy.rules)


def needs_of(policy: Policy) -> frozenset[str]:
    """Collect the statistics that the chosen criteria, repairs and weighting ask for."""
    layers = [rule.criterion for rule in policy.rules if isinstance(rule, Layers)]
    needs: set[str] = {"chains"} if layers else set()
    needs |= {need for c in layers if isinstance(c, LayerCriterion) for need in c.needs}
    needs |= {"lines"} if any(isinstance(rule, Linearize) for rule in policy.rules) else set()
    for rule in (rule for rule in policy.rules if isinstance(rule, Units)):
        needs |= rule.criterion.needs if isinstance(rule.criterion, Criterion) else set()
        for repair in rule.repair:
            needs |= repair.needs if isinstance(repair, Repair) else set()
    if (
        looks_at_channels(policy)
        and policy.budget is not None
        and policy.budget.weighting == "output"
    ):
        needs |= {"moments", "sensitivity"}
    return frozenset(needs)
