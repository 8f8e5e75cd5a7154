"""One round of a schedule as a policy of its own: what is kept of the dense model by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil, floor, prod

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.plan.depth import owned_blocks
from torch_otprune.plan.model import Cut, Plan
from torch_otprune.policy import (
    Amount,
    Layers,
    Linearize,
    Policy,
    Rule,
    Schedule,
    Units,
    module_classes,
    owner,
)
from torch_otprune.structure.graph import Graph, Group
from torch_otprune.structure.layers import holder

__all__ = ["Dense", "dense_of", "round_policy"]

_DIGITS = 10**9  # of a share that is written into a policy
_ALL = Amount(1.0)


class Dense(BaseModel):
    """The sizes that all rounds refer to: those before the first one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: dict[str, int] = Field(description="of every group")
    blocks: dict[int, int] = Field(description="that each layer rule may remove")
    costs: dict[str, int] = Field(description="by measure")


def dense_of(model: nn.Module, policy: Policy, graph: Graph) -> Dense:
    """Measure a model before its first round.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        its sizes.
    """
    blocks = {index: len(found) for index, found in owned_blocks(model, policy, graph).items()}
    costs = _costs(graph) | {"layers": sum(blocks.values())}
    return Dense(units=graph.full(), blocks=blocks, costs=costs)


def _costs(graph: Graph) -> dict[str, int]:
    return {name: cost.at(graph.full()) for name, cost in graph.costs.items()}


def round_policy(
    model: nn.Module,
    policy: Policy,
    graph: Graph,
    *,
    dense: Dense,
    before: Plan | None,
    done: int,
) -> tuple[Policy, tuple[int, ...]] | None:
    """Say what one round removes from the model as it is now.

    Args:
        model: as it is now.
        policy: with a schedule.
        graph: the analysis of the model as it is now.
        dense: the sizes before the first round.
        before: what led from there to here; None in the first round.
        done: number of the round, from 1.

    Returns:
        a policy in numbers of the model as it is now, and the rule that each of its rules stands
        for; None where nothing is to go in this round.
    """
    schedule = policy.schedule
    assert schedule is not None
    owned, cuts = _owned_groups(model, policy, graph), before.cuts if before else ()
    gone = Counter(drop.rule for drop in before.drops) if before else Counter()
    made: list[tuple[int, Rule]] = []
    extra: list[tuple[int, Rule]] = []
    for index, rule in enumerate(policy.rules):
        found = owned.get(index, [])
        if isinstance(rule, Units) and rule.keep is not None and found:
            wanted = [_wanted(rule, g, schedule, done, dense=dense, cuts=cuts) for g in found]
            first, *others = _split(model, rule, found, wanted)
            made.append((index, first))
            extra += [(index, other) for other in others]
        elif isinstance(rule, Units):
            made += [(index, rule)] if found or done == 1 else []
        else:
            total, lost = dense.blocks.get(index, 0), gone[index]
            made += [(index, r) for r in _layers(rule, schedule, done, total=total, gone=lost)]
    every = (*made, *extra)
    now = _costs(graph) | {"layers": dense.costs["layers"] - sum(gone.values())}
    limits = _limits(policy, schedule, done, dense=dense)
    within = all(limit.value >= now[name] for name, limit in limits.items())
    if within and not any(rule.asks for _, rule in every):
        return None
    update = {
        "rules": tuple(rule for _, rule in every),
        "budget": policy.budget and policy.budget.model_copy(update=limits),
        "schedule": None,
    }
    return policy.model_copy(update=update), tuple(index for index, _ in every)


def _limits(policy: Policy, schedule: Schedule, done: int, *, dense: Dense) -> dict[str, Amount]:
    """Say how much of each measure may be left, as a count."""
    found = {}
    for name, amount in (policy.budget.limits if policy.budget else {}).items():
        total = dense.costs[name]
        final = amount.of(total)
        share = schedule.kept(final / total, done) * total if total else 0.0
        share = ceil(share - 1e-9) if name == "layers" else floor(share)
        last = done == len(schedule.steps)
        found[name] = Amount(final if last else max(final, share))
    return found


def _layers(rule: Rule, schedule: Schedule, done: int, *, total: int, gone: int) -> list[Rule]:
    """Say how many layers, or activations, go in this round; no rule where none is left."""
    last, bare = done == len(schedule.steps), {"penalty": None}
    if isinstance(rule, Linearize):
        return [rule.model_copy(update=bare)] if last else []
    if not isinstance(rule, Layers) or (total and total <= gone):
        return [] if isinstance(rule, Layers) else [rule]
    final = rule.dropped(total)
    if final is None:  # the budget decides
        return [rule.model_copy(update=bare)]
    going = final if last else floor(final * (1 - schedule.kept(0.0, done)) + 1e-9)
    now = max(0, going - gone)
    amount = {"keep": None, "drop": now} if now else {"keep": _ALL, "drop": None}
    return [rule.model_copy(update={**bare, **amount})]


def _wanted(
    rule: Units, group: Group, schedule: Schedule, done: int, *, dense: Dense, cuts: Sequence[Cut]
) -> int:
    """Say how many units a group keeps after this round."""
    assert rule.keep is not None
    units = dense.units.get(group.name, group.units)
    share = schedule.kept(rule.keep.of(units) / units, done)
    then = rule.keep if done == len(schedule.steps) else Amount(min(1.0, share))
    width = rule.model_copy(update={"keep": then}).widths(units)[0]
    own = [cut for cut in cuts if cut.group == group.name]
    if len(own) < 2 and group.units == (len(own[0].keep) if own else units):
        return min(group.units, width)
    # The units are others than they were, as heads where one key is left: go by what is left.
    left = prod(len(cut.keep) / cut.units for cut in own)
    return min(group.units, max(1, ceil(width / units / left * group.units - 1e-9)))


def _split(
    model: nn.Module, rule: Units, groups: Sequence[Group], wanted: Sequence[int]
) -> list[Units]:
    """Find shares that leave exactly the wanted units; where one will not do, several rules."""
    buckets: list[list[int]] = []
    for i in sorted(range(len(groups)), key=lambda i: wanted[i] / groups[i].units):
        if buckets and _share([*buckets[-1], i], groups, wanted) is not None:
            buckets[-1].append(i)
        else:
            buckets.append([i])
    classes = module_classes(model)
    paths = [
        tuple({holder(path, classes): None for i in bucket for path in groups[i].owners})
        for bucket in buckets
    ]
    apart = tuple(path for found in paths[1:] for path in found)
    made: list[Units] = []
    for bucket, targets in zip(buckets, paths, strict=True):
        keep = Amount(_share(bucket, groups, wanted) or 1.0)
        own = {"ignore": (*rule.ignore, *apart)} if not made else {"targets": targets, "ignore": ()}
        made.append(rule.model_copy(update={"keep": keep, **own}))
    return made or [rule.model_copy(update={"keep": _ALL})]


def _share(bucket: Sequence[int], groups: Sequence[Group], wanted: Sequence[int]) -> float | None:
    """Find one share of the present units that leaves each group what it should keep."""
    lowest = max(wanted[i] / groups[i].units for i in bucket)
    share = min(1.0, ceil(lowest * _DIGITS) / _DIGITS)
    fits = all(Amount(share).of(groups[i].units) == wanted[i] for i in bucket)
    return share if fits else None


def _owned_groups(model: nn.Module, policy: Policy, graph: Graph) -> dict[int, list[Group]]:
    """Assign groups to the rules about units that own them whole."""
    classes = module_classes(model)
    found: dict[int, list[Group]] = {}
    for unit in {rule.unit for rule in policy.rules if isinstance(rule, Units)}:
        rules = {
            index: rule
            for index, rule in enumerate(policy.rules)
            if isinstance(rule, Units) and rule.unit == unit
        }
        for group in (g for g in graph.groups if g.kind == unit):
            paths = [holder(path, classes) for path in group.owners]
            every = list(rules.values())
            by = {owner(every, path, classes, ignore=policy.ignore) for path in paths}
            if len(by) == 1 and (only := by.pop()) is not None:
                found.setdefault(list(rules)[only], []).append(group)
    return found
