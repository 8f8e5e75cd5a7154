"""What a model has that rules could reach, told where a rule reaches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch_otprune.policy.targets import Classes
from torch_otprune.structure.graph import Graph, Group
from torch_otprune.structure.layers import holder

__all__ = ["floors", "has", "instead", "places"]

_RULES = {
    "channels": "otp.Channels",
    "heads": "otp.Heads",
    "hidden": "otp.Hidden",
    "experts": "otp.Experts",
}
_NOUNS = {"hidden": "a stream that norms take as one"}
_NAMED = 3  # targets that are suggested


def has(graph: Graph) -> str:
    """Say what kinds of units a model has, and which rules are for them.

    Args:
        graph: the model's analysis.

    Returns:
        one clause, without a full stop.
    """
    kinds = [kind for kind in _RULES if any(group.kind == kind for group in graph.groups)]
    if not kinds and graph.blocks:
        return "this model has no units to cut, but layers that can go: use otp.Layers"
    if not kinds:
        return "nothing in this model can be cut, and `otprune doctor` says why"
    nouns, rules = [_NOUNS.get(kind, kind) for kind in kinds], [_RULES[kind] for kind in kinds]
    return f"this model has {_listed(nouns, 'and')}: use {_listed(rules, 'or')}"


def places(graph: Graph, kind: str, classes: Classes) -> list[str]:
    """List the modules that rules about one kind of units can be aimed at.

    Args:
        graph: the model's analysis.
        kind: of the units.
        classes: every module of the model, as `module_classes` lists them.

    Returns:
        for every group, the modules whose output it shortens, or that hold its experts.
    """
    wanted = (group for group in graph.groups if group.kind == kind)
    return list(dict.fromkeys(holder(p, classes) for group in wanted for p in group.owners))


def instead(graph: Graph, kind: str, classes: Classes) -> str:
    """Say what a rule that reaches nothing could do instead.

    Args:
        graph: the model's analysis.
        kind: of the units that the rule is about.
        classes: every module of the model, as `module_classes` lists them.

    Returns:
        one sentence: what to target, or what the model has in place of such units.
    """
    found = places(graph, kind, classes)
    if not found:
        return f"{has(graph)}."
    more = f", or another of {len(found)}" if len(found) > _NAMED else ""
    names = [f"'{path}'" if path else "auto" for path in found[:_NAMED]]
    return f"target {', '.join(names)}{more}, or leave targets at auto."


def floors(groups: Iterable[Group]) -> Iterator[str]:
    """Say of mixtures how many experts must stay.

    Args:
        groups: some of a model's.

    Yields:
        one clause for each mixture.
    """
    for group in groups:
        if group.kind == "experts" and group.least:
            yield (
                f"of the {group.units} experts of '{group.name}' at least {group.least} stay: the "
                f"router chooses {group.least} for every token"
            )


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
