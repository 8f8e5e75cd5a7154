"""Masks that a policy's rules train while somebody trains the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_otprune.criteria.base import ScoreCriterion
from torch_otprune.criteria.masks import MaskSetting
from torch_otprune.errors import PolicyError
from torch_otprune.plan.depth import standing
from torch_otprune.plan.gated import Gated, gated, learning
from torch_otprune.plan.model import Cut, Drop
from torch_otprune.plan.slices import slices
from torch_otprune.plan.widths import allowed_widths
from torch_otprune.policy import Layers, Policy, Units, Weights
from torch_otprune.statistics import Learnt, Observation, gather
from torch_otprune.structure import Graph
from torch_otprune.structure.graph import Group
from torch_otprune.structure.layers import shared as tied
from torch_otprune.surgery import compared, tolerance
from torch_otprune.training.gates import Gates
from torch_otprune.training.linearised import Linearised
from torch_otprune.training.pool import Pool, Seat
from torch_otprune.training.search import Search

__all__ = ["Masked", "check_learning"]


def check_learning(policy: Policy) -> None:
    """Refuse what contradicts masks that are trained.

    Args:
        policy: the declaration.

    Raises:
        PolicyError: if there are rounds as well, if two rules train masks differently, or if one
            budget covers rules that train masks and rules that do not.
    """
    learns = learning(policy)
    if not learns:
        return
    where = f"Policy.rules[{learns[0]}].criterion = 'dtp'"
    if policy.schedule is not None:
        raise PolicyError(
            "the schedule prunes in rounds, and dtp finds one set of masks over all steps.",
            where=where,
            fix="drop the schedule; say how long with the criterion's `steps`.",
        )
    shared = set(MaskSetting.model_fields) - {"kind"}
    settings = [_setting(policy, i).model_dump(include=shared) for i in learns]
    if any(setting != settings[0] for setting in settings):
        raise PolicyError(
            "the rules train masks differently, and all masks move together.",
            where=where,
            fix="give all rules with criterion 'dtp' the same settings.",
        )
    _check_weights(policy, learns, where)
    others = [i for i in range(len(policy.rules)) if i not in learns and not policy.rules[i].asks]
    if policy.budget is not None and others:
        raise PolicyError(
            f"rules[{others[0]}] trains no masks, and shares a budget with rules that do.",
            where=where,
            fix="give that rule a `keep` or `drop` of its own, or criterion 'dtp' as well.",
        )


def _check_weights(policy: Policy, learns: list[int], where: str) -> None:
    rules = [policy.rules[i] for i in learns]
    weights = [rule for rule in rules if isinstance(rule, Weights)]
    if weights and len(weights) < len(policy.rules):
        raise PolicyError(
            "masks of single weights and other rules do not go together: what is cut has none.",
            where=where,
            fix="cut first, then train masks of weights by a policy of their own.",
        )
    if any(not rule.neighbours.free for rule in weights):
        raise PolicyError(
            "criterion 'dtp' masks weights wherever they are, not n of every m.",
            where=where,
            fix="write pattern='unstructured' and a `keep`, or choose another criterion.",
        )


def _setting(policy: Policy, index: int) -> MaskSetting:
    setting = policy.rules[index].criterion  # type: ignore[attr-defined]
    assert isinstance(setting, MaskSetting)
    return setting


class Masked:
    """The masks of one training: who is masked, how masks move, and what they come to.

    Args:
        model: that is trained.
        policy: with a rule whose criterion learns.
        graph: the model's analysis.
        example: what it ran on.

    Raises:
        OTPruneError: if a rule reaches nothing, or the budget cannot be met.
    """

    def __init__(self, model: nn.Module, policy: Policy, graph: Graph, example: Any) -> None:
        self.model = model
        found, refused = _tried(model, policy, graph, example)
        found, idle = _asked(policy, found)
        self.refused = refused | idle
        self._units = graph.full()
        setting = _setting(policy, learning(policy)[0])
        pools = _pools(model, policy, graph, found)
        budgeted = any(pool.count is None for pool in pools)
        limits = found.limits if budgeted else {}
        self.search = Search(setting, pools, costs=found.costs, limits=limits, widths=found.widths)
        groups = [group for members in found.groups.values() for group in members]
        blocks = [block for members in found.blocks.values() for block in members]
        self.gates = Gates(model, groups, blocks, self.search.masks, layers=found.layers)
        self._decides = {group.name for group in groups} | {block.name for block in blocks}

    @property
    def open(self) -> bool:
        """Tell whether masks were trained and are soft yet."""
        return self.search.taken > 0 and not self.search.hard

    def step(self) -> None:
        """End one step of training; once masks are hard, keep what they silence at zero."""
        seen, self.gates.passes = self.gates.passes > 0, 0
        self.search.step(seen=seen)
        if self.search.hard:
            self.gates.bake_()

    def harden(self) -> None:
        """End the search now."""
        self.search.harden()
        self.gates.bake_()

    def told(self, observation: Observation) -> Observation:
        """Add what training decided.

        Args:
            observation: what calibration found.

        Returns:
            both; the same where no step was taken.

        Raises:
            PolicyError: if the masks are soft yet.
        """
        search = self.search
        if self.open:
            raise PolicyError(
                f"the masks are soft: the search is at step {search.taken} of "
                f"{search.setting.steps}.",
                where=f"Attached.plan, {type(self.model).__name__}",
                fix="train on, or call attached.harden() first; next time, lower `steps`.",
            )
        if not search.hard:
            return observation
        whole = {
            name: Learnt(torch.zeros(n), torch.ones(n, dtype=torch.bool), f"stays whole: {said}")
            for name, said in self.refused.items()
            for n in [self._units.get(name, 1)]
        }
        return replace(observation, learnt=whole | search.learnt(self._decides))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the model without masks: hard ones are in its weights.

        Yields:
            nothing.
        """
        with self.gates.off():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Write what training needs to go on."""
        return self.search.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote."""
        self.search.load_state_dict(state)


def _tried(
    model: nn.Module, policy: Policy, graph: Graph, example: Any
) -> tuple[Gated, dict[str, str]]:
    """Find what can be masked: only what the model does without once it is cut."""
    ties, banned = tied(model), dict[str, str]()
    for group in graph.groups:  # zeros in one place would be zeros in the other
        scaled = {member.path for member in group.consumers or group.producers}
        if held := sorted(ties & scaled):
            banned[group.name] = f"'{held[0]}' shares a tensor with another layer"
    while True:
        found = gated(model, policy, graph, banned=banned)
        cuts, drops = _cuts(policy, found), _drops(policy, found)
        together = compared(model, cuts, example, drops=drops)[0]
        if policy.verify == "off" or together <= tolerance(model):
            return found, banned
        off = {cut.group: compared(model, [cut], example) for cut in cuts}
        off |= {drop.block: compared(model, [], example, drops=[drop]) for drop in drops}
        failed = {name: said for name, (far, said) in off.items() if far > tolerance(model)}
        if not failed:  # the plan will say so, if it comes to that
            return found, banned
        banned |= failed


def _asked(policy: Policy, found: Gated) -> tuple[Gated, dict[str, str]]:
    """Leave out what no budget asks for, such as channels where only layers are counted."""
    dense = {name: float(width) for name, width in found.widths.items()}
    slopes = [Linearised(found.costs[measure]).at(dense)[1] for measure in found.limits]

    def idle(index: int, name: str) -> bool:
        return not policy.rules[index].asks and not any(slope[name] > 0 for slope in slopes)

    left = {i: [g for g in own if not idle(i, g.name)] for i, own in found.groups.items()}
    gone = [g.name for i, own in found.groups.items() for g in own if idle(i, g.name)]
    return replace(found, groups=left), dict.fromkeys(gone, "no budget asks it to go")


def _cuts(policy: Policy, found: Gated) -> list[Cut]:
    """Cut every group a little."""
    cuts = []
    for index, groups in found.groups.items():
        rule = policy.rules[index]
        assert isinstance(rule, Units)
        for group in groups:
            size = ([w for w in allowed_widths(group, index, rule) if w < group.units] or [0])[-1]
            if size:
                cuts.append(_cut(group, index, size))
    return cuts


def _cut(group: Group, rule: int, size: int) -> Cut:
    keep = torch.arange(size, device="cpu")
    return Cut(
        group=group.name,
        rule=rule,
        units=group.units,
        keep=tuple(range(size)),
        criterion="",
        reason="",
        error=None,
        slices=slices(group, keep),
    )


def _drops(policy: Policy, found: Gated) -> list[Drop]:
    drops = []
    for index, blocks in found.blocks.items():
        rule = policy.rules[index]
        assert isinstance(rule, Layers)
        for block in blocks:
            swaps, kind = standing(rule).swaps(block), standing(rule).kind
            more = {"criterion": "", "reason": "", "error": 0.0, "swaps": swaps, "replace": kind}
            drops.append(Drop(block=block.name, rule=index, **more))
    return drops


def _pools(model: nn.Module, policy: Policy, graph: Graph, found: Gated) -> list[Pool]:
    """Let units share a threshold: those of a group that keeps a share, all others one budget."""
    counted: list[tuple[list[Seat], int]] = []
    budgeted: list[Seat] = []
    for index, groups in found.groups.items():
        rule = policy.rules[index]
        assert isinstance(rule, Units)
        for group in groups:
            start = _start(model, graph, group, policy, rule)
            seat = Seat(group.name, start, allowed_widths(group, index, rule))
            if rule.keep is None:
                budgeted.append(seat)
            else:
                counted.append(([seat], seat.widths[-1]))
    for index, blocks in found.blocks.items():
        layers = policy.rules[index]
        assert isinstance(layers, Layers)
        seats = [Seat(block.name, torch.zeros(1), (0, 1)) for block in blocks]
        dropped = layers.dropped(len(blocks))
        if dropped is None:
            budgeted += seats
        else:
            counted.append((seats, len(blocks) - dropped))
    for path, keep in found.layers.items():
        size = model.get_parameter(f"{path}.weight").detach().abs().flatten()
        counted.append(([Seat(path, size, (keep,))], keep))
    device = next(model.parameters()).device
    pools = [Pool(seats, count, device) for seats, count in counted if seats]
    return pools + ([Pool(budgeted, None, device)] if budgeted else [])


def _start(
    model: nn.Module, graph: Graph, group: Group, policy: Policy, rule: Units
) -> torch.Tensor:
    """Score units by the size of their weights: where training starts."""
    assert isinstance(rule.criterion, ScoreCriterion)
    ties = tied(model)
    known = gather(model, graph, group, moments={}, sensitivity=None, ties=ties, seed=policy.seed)
    return rule.criterion.score(known)
