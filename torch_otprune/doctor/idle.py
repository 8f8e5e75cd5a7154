"""Rules of a policy that reach nothing, and what they could reach."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from torch_otprune.doctor.notes import quoted
from torch_otprune.plan import owned_blocks, owned_sites
from torch_otprune.plan.reach import instead
from torch_otprune.policy import Layers, Linearize, Policy, Units, module_classes, owner
from torch_otprune.policy.targets import Classes
from torch_otprune.structure.doctor import Ward
from torch_otprune.structure.graph import Blocked, Graph
from torch_otprune.structure.layers import holder

__all__ = ["idle"]

_UNITS = {
    "channels": "are no channels",
    "heads": "are no heads",
    "hidden": "is no stream that norms take as one",
    "experts": "are no experts",
}


def idle(
    model: nn.Module, policy: Policy, graph: Graph, *, groups: Sequence[Ward], free: Collection[str]
) -> Iterator[str]:
    """Say which rules of a policy reach nothing that can go, and what would.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        groups: with what the policy says of each.
        free: names of the blocks that can go.

    Yields:
        one sentence for each rule; none for one that keeps everything.
    """
    busy = {ward.rule for ward in groups}
    blocks = owned_blocks(model, policy, graph)
    sites = owned_sites(model, policy, graph)
    classes = module_classes(model)
    for index, rule in enumerate(policy.rules):
        said = ""
        if rule.keep is not None and rule.keep.everything:
            continue
        if isinstance(rule, Units) and index not in busy:
            said = _units(policy, index, graph, classes=classes)
        elif isinstance(rule, Layers) and not any(b.name in free for b in blocks[index]):
            said = _layers(sorted(free), [b.name for b in blocks[index]])
        elif isinstance(rule, Linearize) and all(site.reason for site in sites[index]):
            said = _sites([s.name for s in graph.sites if not s.reason], len(sites[index]))
        if said:
            aim = ", ".join(rule.targets)
            yield f"Policy.rules[{index}] ({rule.kind}, targets: {aim}) removes nothing: {said}"


def _units(policy: Policy, index: int, graph: Graph, *, classes: Classes) -> str:
    rule = policy.rules[index]
    assert isinstance(rule, Units)
    tied = _tied(policy, index, graph, classes=classes)
    if tied:
        return tied
    stuck = [b for b in graph.blocked if b.kind == rule.unit and _aimed(policy, index, b, classes)]
    free = any(group.kind == rule.unit for group in graph.groups)
    fix = instead(graph, rule.unit, classes)
    if stuck:
        return f"'{stuck[0].name}': {stuck[0].reason}; {fix if free else stuck[0].fix}".rstrip(".")
    where = "among its targets" if free else "to cut"
    return f"there {_UNITS[rule.unit]} {where}; {fix.rstrip('.')}"


def _aimed(policy: Policy, index: int, blocked: Blocked, classes: Classes) -> bool:
    path = holder(blocked.name, classes)
    return owner([policy.rules[index]], path, classes, ignore=policy.ignore) is not None


def _tied(policy: Policy, index: int, graph: Graph, *, classes: Classes) -> str:
    """Name a group of which the rule reaches some producers only; nothing without one."""
    rule = policy.rules[index]
    assert isinstance(rule, Units)
    for group in (g for g in graph.groups if g.kind == rule.unit):
        paths = list(dict.fromkeys(holder(path, classes) for path in group.owners))
        hit = [p for p in paths if owner([rule], p, classes, ignore=policy.ignore) is not None]
        if hit and len(hit) < len(paths):
            missed = quoted([path for path in paths if path not in hit])
            return f"'{hit[0]}' is tied to {missed}, which it leaves out; target {missed} as well"
    return ""


def _layers(free: Sequence[str], owned: Sequence[str]) -> str:
    if owned:
        return f"{quoted(owned)} cannot go, as the table of what stays whole says"
    if free:
        return f"no layer that can go is among its targets; {quoted(free)} can"
    return "the model has no layer that can go"


def _sites(free: Sequence[str], owned: int) -> str:
    if owned:
        return "none of its activations can become linear, as their table says"
    if free:
        return f"no activation is among its targets; {quoted(free)} can become linear"
    return "the model has no activation that can become linear"
