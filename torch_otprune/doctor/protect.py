"""What a policy lets go of what could be cut, and which of its words protects the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from torch_otprune.plan import owned_blocks
from torch_otprune.policy import Policy, Units, match, module_classes, owner
from torch_otprune.policy.targets import Classes, selects
from torch_otprune.structure.doctor import Finding, Ward
from torch_otprune.structure.graph import Graph, Group
from torch_otprune.structure.layers import holder

__all__ = ["Guard", "guarded", "guards", "removed"]

_RULES = {
    "channels": "otp.Channels",
    "heads": "otp.Heads",
    "hidden": "otp.Hidden",
    "experts": "otp.Experts",
}


@dataclass(frozen=True)
class Guard:
    """What a policy says about one group.

    Args:
        rule: index of the rule that may cut it; None where none may.
        reason: the words of the policy that protect it; empty where it may be cut.
        fix: what to change in them.
    """

    rule: int | None = None
    reason: str = ""
    fix: str = ""


def guards(model: nn.Module, policy: Policy, graph: Graph) -> dict[str, Guard]:
    """Say of every group whether a policy lets it be cut, and if not, why.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        group to what the policy says.

    Raises:
        TargetError: if a target matches nothing, or two rules fit a module equally closely.
    """
    classes = module_classes(model)
    for index, rule in enumerate(policy.rules):
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    return {group.name: _guard(policy, group, classes) for group in graph.groups}


def _guard(policy: Policy, group: Group, classes: Classes) -> Guard:
    rules = {
        i: r for i, r in enumerate(policy.rules) if isinstance(r, Units) and r.unit == group.kind
    }
    if not rules:
        kind = _RULES.get(group.kind, group.kind)
        return Guard(None, f"no rule {kind} in Policy.rules", f"add a rule {kind}.")
    paths = list(dict.fromkeys(holder(m.path, classes) for m in group.producers))
    places = list(rules)
    by = {p: owner(list(rules.values()), p, classes, ignore=policy.ignore) for p in paths}
    for path in (p for p, index in by.items() if index is None):
        reason, fix = _spared(policy, rules, path, classes=classes)
        return Guard(None, reason, fix)
    reached = sorted({places[i] for i in by.values() if i is not None})
    if len(reached) > 1:
        names = " and ".join(f"Policy.rules[{i}]" for i in reached)
        return Guard(None, f"its producers are under {names}", "target them by one rule.")
    rule = rules[reached[0]]
    if rule.keep is not None and rule.keep.everything:
        said = f"Policy.rules[{reached[0]}].keep is all of them"
        return Guard(None, said, "keep less, or drop the rule.")
    return Guard(reached[0])


def _spared(
    policy: Policy, rules: Mapping[int, Units], path: str, *, classes: Classes
) -> tuple[str, str]:
    """Find the words that keep a module from every rule."""
    lists = {"Policy.ignore": policy.ignore}
    lists |= {f"Policy.rules[{index}].ignore": rule.ignore for index, rule in rules.items()}
    for where, patterns in lists.items():
        for pattern in patterns:
            if selects([pattern], path, classes):
                return f"{where} = '{pattern}' spares '{path}'", f"take '{pattern}' out of {where}."
    names = ", ".join(f"Policy.rules[{index}]" for index in rules)
    return f"no target of {names} reaches '{path}'", f"target '{path}' as well."


def removed(model: nn.Module, policy: Policy, graph: Graph) -> frozenset[str]:
    """List the blocks that a policy's rules may take out whole.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        their names.

    Raises:
        TargetError: if a target matches nothing, or two rules fit a block equally closely.
    """
    owned = owned_blocks(model, policy, graph).values()
    return frozenset(block.name for blocks in owned for block in blocks)


def guarded(
    found: Sequence[Finding], wards: Sequence[Ward], *, blocks: frozenset[str]
) -> Iterator[Finding]:
    """Set apart the parameters of which a policy lets nothing go.

    Args:
        found: what could become of every parameter.
        wards: the groups, with what the policy says of each.
        blocks: names of the blocks that may go whole.

    Yields:
        the same findings; with a block that may go, a parameter goes whatever its channels do.
    """
    said = {ward.group: ward for ward in wards}
    for finding in found:
        mine = [said[name] for name in finding.groups]
        if blocks & set(finding.blocks):
            kept = {"reason": "", "fix": "", "obstacles": (), "fate": "prunable"}
            yield finding.model_copy(update=kept)
        elif finding.fate == "prunable" and all(ward.protected for ward in mine):
            reason = "; ".join(dict.fromkeys(ward.protected for ward in mine))
            fix = " ".join(dict.fromkeys(ward.fix for ward in mine))
            yield finding.model_copy(update={"fate": "protected", "reason": reason, "fix": fix})
        else:
            yield finding
