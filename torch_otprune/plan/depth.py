"""Which blocks a rule offers, in what order they would go, and at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import NoReturn

import torch
from torch import nn

from torch_otprune.criteria.layers.base import LayerCriterion
from torch_otprune.criteria.layers.look import Look
from torch_otprune.criteria.masks import UNTRAINED
from torch_otprune.errors import BudgetError, PolicyError, StructureError
from torch_otprune.plan.model import Drop, Plan, Refusal
from torch_otprune.plan.propose import Candidate, Case, Offer, felt, proposes
from torch_otprune.plan.replacement import Replacement
from torch_otprune.policy import Layers, Policy, match, module_classes, owner
from torch_otprune.policy.targets import Classes
from torch_otprune.statistics.evidence import Learnt
from torch_otprune.statistics.stream import runs
from torch_otprune.structure.graph import Block, Graph

__all__ = ["offered", "owned_blocks", "propose_layers", "reached", "stand_ins", "standing"]

_BANNED = "`ignore` it, or let the model use and return nothing of it but its stream."


@proposes(Layers)
def propose_layers(case: Case, rules: Mapping[int, Layers]) -> Offer:
    """Offer every block that a rule reaches.

    Args:
        case: the model and what is known.
        rules: the policy's layer rules by index.

    Returns:
        one candidate per block, and refusals.

    Raises:
        BudgetError: if a rule drops more blocks than it reaches.
        PolicyError: if prices of layers and of channels cannot be compared.
        StructureError: if a rule reaches no block that can go.
        TargetError: if a target matches nothing.
    """
    owned, refused = offered(case, rules)
    candidates: list[Candidate] = []
    for index, rule in rules.items():
        if not owned[index]:
            _refuse(index, rule, refused)
        candidates += _candidates(case, index, rule, owned[index])
    blocks = tuple(block for found in owned.values() for block in found)
    stand_ins = {b.name: standing(rules[i]).costs(b) for i in rules for b in owned[i]}
    return Offer(tuple(candidates), tuple(refused), blocks, stand_ins)


def stand_ins(plan: Plan, graph: Graph) -> dict[str, dict[str, int]]:
    """Count what a plan puts in the place of removed blocks.

    Args:
        plan: the decisions.
        graph: the dense model's analysis.

    Returns:
        measure to block to cost.
    """
    found: dict[str, dict[str, int]] = {name: {} for name in graph.costs}
    for drop in plan.drops:
        rule = plan.policy.rules[drop.rule]
        assert isinstance(rule, Layers)
        for measure, cost in standing(rule).costs(graph.block(drop.block)).items():
            found[measure][drop.block] = cost
    return found


def standing(rule: Layers) -> Replacement:
    """Tell what stands in for what a rule removes."""
    assert isinstance(rule.replace, Replacement)
    return rule.replace


def owned_blocks(model: nn.Module, policy: Policy, graph: Graph) -> dict[int, list[Block]]:
    """Assign every block that can go to the rule that owns it, the most specific target first.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.

    Returns:
        index of each layer rule to its blocks, in order of execution.

    Raises:
        TargetError: if a target matches nothing, or two rules fit a block equally closely.
    """
    rules = {i: rule for i, rule in enumerate(policy.rules) if isinstance(rule, Layers)}
    classes, ignore = module_classes(model), policy.ignore
    found: dict[int, list[Block]] = {index: [] for index in rules}
    wanted = set()
    for index, rule in rules.items():
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
        wanted |= {b.name for b in reached(graph.blocks, rule, classes, ignore)}
    for block in (b for b in graph.blocks if b.name in wanted):
        by = owner(list(rules.values()), block.name, classes, ignore=ignore)
        if by is not None:
            found[list(rules)[by]].append(block)
    return found


def reached(
    blocks: Sequence[Block], rule: Layers, classes: Classes, ignore: Sequence[str]
) -> list[Block]:
    """List the blocks that a rule means.

    A target stands for the layers at or below it. Where it reaches none, it stands for the
    outermost of the finer blocks that it names, such as the halves of a transformer layer.

    Args:
        blocks: all that can go.
        rule: the rule.
        classes: every module of the model, as `module_classes` lists them.
        ignore: patterns that no rule may reach.

    Returns:
        blocks in order of execution, of one target none inside another.
    """
    meant: set[str] = set()
    for target in rule.targets:
        alone = rule.model_copy(update={"targets": (target,)})
        hit = [b for b in blocks if owner([alone], b.name, classes, ignore=ignore) is not None]
        layers = [b for b in hit if b.level == "layer"]
        outermost = (b for b in hit if not any(o is not b and o.holds(b.name) for o in hit))
        meant |= {b.name for b in layers or outermost}
    return [b for b in blocks if b.name in meant]


def offered(
    case: Case, rules: Mapping[int, Layers]
) -> tuple[dict[int, list[Block]], list[Refusal]]:
    """Assign blocks to rules, and leave out what cannot go after all, with the reason.

    Args:
        case: the model and what is known.
        rules: the policy's layer rules by index.

    Returns:
        blocks of each rule, and refusals.
    """
    owned = owned_blocks(case.model, case.policy, case.graph)
    classes, ignore = module_classes(case.model), case.policy.ignore
    refused = [  # whole layers first: what is inside of them comes next
        Refusal(group=stuck.name, reason=stuck.reason, fix=stuck.fix)
        for stuck in case.graph.stuck
        if owner(list(rules.values()), stuck.name, classes, ignore=ignore) is not None
    ]
    every = [block for blocks in owned.values() for block in blocks]
    for blocks in owned.values():
        for block in list(blocks):
            if why := _objection(case, block, every):
                refused.append(Refusal(group=block.name, reason=why[0], fix=why[1]))
                blocks.remove(block)
    return owned, refused


def _objection(case: Case, block: Block, every: Sequence[Block]) -> tuple[str, str] | None:
    if block.name in case.banned:
        return case.banned[block.name], _BANNED
    if outer := [b.name for b in every if b is not block and b.holds(block.name)]:
        return f"it is part of '{outer[0]}', which is on offer", "target one of the two."
    inside = {path for path in case.ties if block.holds(path)}
    if inside:
        return f"'{min(inside)}' shares a tensor with another layer", "untie the weights."
    return None


def _refuse(index: int, rule: Layers, refused: Sequence[Refusal]) -> NoReturn:
    reasons = "; ".join(f"{r.group}: {r.reason}" for r in refused[:3])
    raise StructureError(
        f"rule {index} reaches no layer that can go ({reasons or 'no residual block among them'}).",
        where=f"Policy.rules[{index}].targets = {', '.join(rule.targets)}",
        fix=refused[0].fix if refused else "target residual blocks; `otprune doctor` lists them.",
    )


def _candidates(case: Case, index: int, rule: Layers, blocks: Sequence[Block]) -> list[Candidate]:
    assert isinstance(rule.criterion, LayerCriterion)
    _check_unit(case, index, rule.criterion)
    criterion = rule.criterion.following(standing(rule).kind)
    count = rule.dropped(len(blocks))
    if count is not None:
        _check_count(case, index, rule, going=count, reached=len(blocks))
    learnt = case.observation.learnt
    if blocks and all(block.name in learnt for block in blocks):
        return [_settled_by(index, rule, block, learnt[block.name]) for block in blocks]
    if count == 0:  # nothing was watched for a rule that keeps all
        return [_candidate(index, rule, block, 0.0, (1,)) for block in blocks]
    chains = [case.observation.chain([b.name for b in run]) for run in runs(blocks)]
    prices, notes = criterion.told(chains, look=_look(case, blocks), count=count)
    widths = _settled(prices, count)
    found = [
        _candidate(index, rule, block, prices[block.name], widths.get(block.name, (0, 1)))
        for block in blocks
    ]
    found = [replace(one, note=notes.get(one.name, "")) for one in found]
    if criterion.learns:
        found[0] = replace(found[0], note=UNTRAINED)
    return found


def _settled_by(index: int, rule: Layers, block: Block, learnt: Learnt) -> Candidate:
    """Offer what training decided."""
    stays = bool(learnt.keep[0])
    found = _candidate(index, rule, block, 0.0, (int(stays),))

    def decide(size: int) -> Drop:
        drop = found.decide(size)
        assert isinstance(drop, Drop)
        said = f"{drop.criterion}: training has ended without it"
        return drop.model_copy(update={"reason": said, "silent": True})

    return replace(found, decide=decide, note=learnt.note, settled=True)


def _look(case: Case, blocks: Sequence[Block]) -> Look | None:
    """Find what tries sets of a rule's blocks; any of its chains offers it for all of them."""
    found = (c.mended for c in case.observation.chains.values() if blocks[0].name in c.blocks)
    look = next(found, None)
    return look if isinstance(look, Look) else None


def _settled(prices: Mapping[str, float], count: int | None) -> dict[str, tuple[int, ...]]:
    """Carry out what a rule's own `drop` or `keep` says, cheapest first."""
    if count is None:
        return {}
    order = sorted(prices, key=lambda name: (prices[name], name))
    return {name: (0,) if place < count else (1,) for place, name in enumerate(order)}


def _check_count(case: Case, index: int, rule: Layers, *, going: int, reached: int) -> None:
    """Refuse to drop more than there is, or a share that comes to nothing."""
    if going > reached:
        stuck = [*((s.name, s.reason) for s in case.graph.stuck), *case.banned.items()]
        said = "; ".join(f"{name}: {reason}" for name, reason in stuck[:3])
        raise BudgetError(
            f"rule {index} drops {going} layers, and {reached} can go.",
            where=f"Policy.rules[{index}].drop{f' ({said})' if said else ''}",
            fix=f"drop at most {reached}, or target more layers.",
        )
    if going == 0 and rule.drop is not None:
        raise BudgetError(
            f"rule {index} drops {rule.drop:.3g} of {reached} layers, which is less than one.",
            where=f"Policy.rules[{index}].drop",
            fix=f"drop a whole number, or at least {ceil(100 / reached)} %.",
        )


def _check_unit(case: Case, index: int, criterion: LayerCriterion) -> None:
    """Refuse to trade what has no common unit."""
    if case.observation.learnt:
        return  # nothing is traded any more
    limits = case.policy.budget.limits if case.policy.budget else {}
    shared = {"params", "macs"} & set(limits)
    others = [r for r in case.policy.rules if not isinstance(r, Layers) and not r.asks]
    if criterion.priced or not shared or not others or case.policy.rules[index].asks:
        return
    raise PolicyError(
        f"criterion {criterion.kind!r} ranks layers, but does not price them in the unit of "
        "channels.",
        where=f"Policy.rules[{index}].criterion, with a budget of {' and '.join(sorted(shared))}",
        fix="use criterion 'transport' or 'loss_delta', or give the rule a `drop` of its own.",
    )


def _candidate(
    index: int, rule: Layers, block: Block, price: float, widths: tuple[int, ...]
) -> Candidate:
    criterion, instead = rule.criterion, standing(rule)
    assert isinstance(criterion, LayerCriterion)
    curve = torch.tensor([price, 0.0], dtype=torch.float64, device="cpu")

    def decide(size: int) -> Drop:
        lost = felt(curve, size) if criterion.priced else float(f"{price:.3e}")
        said = f"dropping it moves the output by {lost:.2%}" if criterion.priced else f"{lost:.3g}"
        return Drop(
            block=block.name,
            rule=index,
            criterion=criterion.kind,
            replace=instead.kind,
            error=lost,
            reason=f"{criterion.kind}: {said}",
            swaps=instead.swaps(block),
        )

    return Candidate(block.name, index, 1, curve, widths, decide)
