"""Which activations a rule may make linear, and what each would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from typing import NoReturn

import torch
from torch import nn

from torch_otprune.criteria.base import settle
from torch_otprune.criteria.layers.base import SiteCriterion
from torch_otprune.errors import BudgetError, CalibrationError, PolicyError, StructureError
from torch_otprune.plan.model import Refusal
from torch_otprune.policy import Linearize, Policy, match, module_classes, owner
from torch_otprune.policy.registry import LAYER_CRITERIA
from torch_otprune.statistics.depth import SiteEvidence
from torch_otprune.structure.graph import Graph, Site

__all__ = ["amount", "check_lines", "linear_rules", "owned_sites", "prices", "refuse_all"]


def check_lines(policy: Policy) -> None:
    """Refuse rules about activations that could never become a plan, before any data is seen.

    A rule with a penalty may do without an amount as long as nobody asks for a plan.

    Args:
        policy: the declaration.

    Raises:
        PolicyError: if a rule does not say how many activations go, or ranks them by what knows
            only blocks.
    """
    for index, rule in linear_rules(policy).items():
        if rule.drop is None and rule.keep is None and rule.penalty is None:
            _no_amount(index, policy)
        if isinstance(rule.criterion, SiteCriterion):
            continue
        known = [kind for kind in LAYER_CRITERIA if issubclass(LAYER_CRITERIA[kind], SiteCriterion)]
        raise PolicyError(
            f"criterion {rule.criterion.kind!r} ranks blocks, not activations.",
            where=f"Policy.rules[{index}].criterion",
            fix=f"use one of {', '.join(known)}.",
        )


def _no_amount(index: int, policy: Policy) -> NoReturn:
    said = "; a budget chooses channels and layers, but no activations" if policy.budget else ""
    raise PolicyError(
        f"rule {index} does not say how many activations go{said}.",
        where=f"Policy.rules[{index}].drop",
        fix="give the rule a `drop` or a `keep`, such as drop=2.",
    )


def linear_rules(policy: Policy) -> dict[int, Linearize]:
    """List the policy's rules about activations by their index."""
    return {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, Linearize)}


def owned_sites(model: nn.Module, policy: Policy, graph: Graph) -> dict[int, list[Site]]:
    """Assign every activation to the rule that owns it, the most specific target first.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        index of each rule about activations to what it reaches, in order of execution, whether
        it can become linear or not.

    Raises:
        TargetError: if a target matches nothing, or two rules fit equally closely.
    """
    rules, classes = linear_rules(policy), module_classes(model)
    for index, rule in rules.items():
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    found: dict[int, list[Site]] = {index: [] for index in rules}
    for site in graph.sites:
        by = owner(list(rules.values()), site.module, classes, ignore=policy.ignore)
        if by is not None:
            found[list(rules)[by]].append(site)
    return found


def prices(
    rule: Linearize, sites: Sequence[Site], evidence: Mapping[str, SiteEvidence]
) -> dict[str, float]:
    """Score activations by a rule's criterion.

    Args:
        rule: whose criterion.
        sites: what it may make linear.
        evidence: what was seen, by name.

    Returns:
        name to score: what losing it costs, 0 where it is linear already.

    Raises:
        CalibrationError: if an activation was not observed, or scores NaN or infinity.
    """
    criterion = rule.criterion
    assert isinstance(criterion, SiteCriterion)
    scores = [criterion.site(evidence[site.name]) for site in sites]
    for site, score in zip(sites, scores, strict=True):
        if not isfinite(score):
            raise CalibrationError(
                f"activation '{site.name}' scored {score}.",
                where=f"criterion {criterion.kind}",
                fix="look for NaN or infinity in the weights or the calibration data.",
            )
    settled = settle(torch.tensor(scores, dtype=torch.float64)).tolist()
    return {site.name: score for site, score in zip(sites, settled, strict=True)}


def amount(index: int, policy: Policy, sizes: Sequence[int]) -> int:
    """Choose how many activations of a rule go.

    Args:
        index: of the rule.
        policy: the declaration.
        sizes: how many can go together, ascending from 0; the last is the most.

    Returns:
        one of the sizes. A share is rounded as for layers, to a number that can go: of `drop`
        what goes is rounded down, but not to 0; of `keep` what stays is.

    Raises:
        BudgetError: if a number of activations cannot go.
        PolicyError: if the rule does not say how many.
    """
    rule = linear_rules(policy)[index]
    most = max(sizes)
    wanted = rule.dropped(most)
    if wanted is None:
        _no_amount(index, policy)
    if wanted == 0 and rule.drop is not None:
        raise BudgetError(
            f"rule {index} drops {rule.drop:.3g} of {most} activations, which is less than one.",
            where=f"Policy.rules[{index}].drop",
            fix=f"drop a whole number, or at least {ceil(100 / most)} %.",
        )
    if wanted in sizes:
        return wanted
    if isinstance(rule.drop, float):
        return max((s for s in sizes if 0 < s < wanted), default=min(s for s in sizes if s))
    if rule.keep is not None and rule.keep.relative:
        return min(s for s in sizes if s > wanted)  # `wanted` is at most the last of them
    field, asked, can = "drop", f"drops {wanted}", [str(s) for s in sizes if s]
    if rule.keep is not None:
        field, asked = "keep", f"keeps {rule.keep.value}"
        can = [str(most - s) for s in reversed(sizes) if s]
    raise BudgetError(
        f"rule {index} {asked} of {most} activations; {', '.join(can)} can "
        f"{'go' if field == 'drop' else 'stay'}.",
        where=f"Policy.rules[{index}].{field}",
        fix="choose one of these numbers, target more, or let activations go that fold nothing: "
        "unfolded='allow'.",
    )


def refuse_all(index: int, rule: Linearize, refused: Sequence[Refusal]) -> NoReturn:
    """Say why a rule reaches nothing that can become linear.

    Args:
        index: of the rule.
        rule: itself.
        refused: what it reaches.

    Raises:
        StructureError: always.
    """
    reasons = "; ".join(f"{r.group}: {r.reason}" for r in refused[:3])
    said = reasons or "there is no activation among its targets"
    fixes = Counter(refusal.fix for refusal in refused).most_common(1)
    raise StructureError(
        f"rule {index} reaches no activation that can become linear ({said}).",
        where=f"Policy.rules[{index}].targets = {', '.join(rule.targets)}",
        fix=fixes[0][0] if fixes else "target activations; `otprune doctor` lists them.",
    )
