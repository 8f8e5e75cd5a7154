"""Which statistics a policy asks for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torch_otprune.criteria import Transport
from torch_otprune.criteria.base import Criterion
from torch_otprune.criteria.layers.base import LayerCriterion
from torch_otprune.policy import Layers, Linearize, Policy, Units, module_classes
from torch_otprune.policy.targets import selects
from torch_otprune.repair.base import Repair
from torch_otprune.statistics.moments import WIDE
from torch_otprune.structure import Graph
from torch_otprune.structure.layers import channels, holder, is_dense

__all__ = ["PROBED", "by_shapes", "looks_at_channels", "needs_of", "wide_of"]

PROBED = frozenset({"sensitivity", "chains", "lines", "signals", "tangents", "rows"})
"""Statistics for which some samples are kept and run again."""


def by_shapes(policy: Policy) -> bool:
    """Tell whether a plan for a policy needs neither weights nor data, so that shapes will do."""
    chance = (isinstance(r, Units) and r.criterion.kind == "random" for r in policy.rules)
    return not needs_of(policy) and all(chance)


def looks_at_channels(policy: Policy) -> bool:
    """Tell whether a policy has anything to do with channels."""
    return any(isinstance(rule, Units) for rule in policy.rules)


def needs_of(policy: Policy) -> frozenset[str]:
    """Collect the statistics that the chosen criteria, repairs and weighting ask for."""
    layers = [rule.criterion for rule in policy.rules if isinstance(rule, Layers)]
    lines = [rule.criterion for rule in policy.rules if isinstance(rule, Linearize)]
    needs: set[str] = {"chains"} if layers else set()
    needs |= {need for c in layers if isinstance(c, LayerCriterion) for need in c.needs}
    needs |= {"lines"} if lines else set()
    needs |= {n for c in lines if isinstance(c, LayerCriterion) for n in c.needs & {"folds"}}
    # masks that training made hard are priced no more
    units = [
        rule
        for rule in policy.rules
        if isinstance(rule, Units) and not getattr(rule.criterion, "learns", False)
    ]
    for rule in units:
        needs |= rule.criterion.needs if isinstance(rule.criterion, Criterion) else set()
        for repair in rule.repair:
            needs |= repair.needs if isinstance(repair, Repair) else set()
    if units and policy.budget is not None and policy.budget.weighting == "output":
        needs |= {"moments", "sensitivity"}
    return frozenset(needs)


def reached(model: nn.Module, policy: Policy, graph: Graph) -> list[str]:
    """List the groups that some rule reaches.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        names of groups.
    """
    classes = module_classes(model)
    rules = [rule for rule in policy.rules if isinstance(rule, Units)]
    return [
        group.name
        for group in graph.groups
        for path in (holder(path, classes) for path in group.owners)
        if not selects(policy.ignore, path, classes)
        and any(
            selects(r.targets, path, classes) and not selects(r.ignore, path, classes)
            for r in rules
            if r.unit == group.kind
        )
    ]


def wide_of(model: nn.Module, policy: Policy, paths: Iterable[str]) -> tuple[str, ...]:
    """List the layers that read so many channels that products of all pairs would not fit.

    Args:
        model: the dense model.
        policy: the declaration; the least `wide` of its criteria counts.
        paths: layers that read units.

    Returns:
        dense layers among them.
    """
    asked = [
        rule.criterion.wide
        for rule in policy.rules
        if isinstance(rule, Units) and isinstance(rule.criterion, Transport)
    ]
    limit = min([WIDE, *asked])
    modules = dict(model.named_modules())
    dense = [p for p in paths if p in modules and is_dense(modules[p])]
    return tuple(p for p in dense if (channels(modules[p], "in") or 0) > limit)
