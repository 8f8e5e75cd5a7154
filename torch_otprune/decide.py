"""The decision, checked on the real model before anybody sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torch_otprune.errors import PlanError, VerificationError
from torch_otprune.plan import Plan, make_plan
from torch_otprune.plan.ties import kinds
from torch_otprune.policy import Policy
from torch_otprune.statistics import Observation
from torch_otprune.structure import Graph, evaluating, flat_tensors, run
from torch_otprune.surgery import (
    baked,
    compact_,
    compared,
    copied,
    cut_,
    disagreement,
    exchange_,
    gap,
    parts,
    thinned,
    told,
    tolerance,
    unlike_config,
    unsaid,
)
from torch_otprune.surgery.carried import Hosted
from torch_otprune.surgery.idle import unreached
from torch_otprune.surgery.trial import Part

__all__ = ["decide"]

_GIB = 2**30


def decide(
    model: nn.Module, policy: Policy, graph: Graph, observation: Observation, example: Any
) -> Plan:
    """Plan, and check on the real model that every cut computes what masking would.

    A group that fails is refused with the measured difference and the first op that differs, and
    the plan is made anew without it. Where nothing fails this costs two forward passes, and beside
    the model the memory that `Plan.trial` quotes: what is cut is held shortened and masked, all
    else is shared. Where that is more than `Calibration.memory`, groups are tried in as many parts
    as it takes, two passes each. `verify="off"` costs nothing, and the plan then notes that.

    Args:
        model: the dense model; left as it was.
        policy: the declaration.
        graph: the model's analysis.
        observation: what calibration found.
        example: one batch.

    Returns:
        a plan whose cuts all passed.

    Raises:
        PlanError: if the policy asks for a uniform model and the configuration cannot say it.
        VerificationError: if cuts pass one by one and fail together, or the output is random.
    """
    banned: dict[str, str] = {}
    while True:
        plan = make_plan(model, policy, graph, observation, banned=banned)
        tried = _parts(model, plan)
        if all(_passes(model, part, example) for part in tried):
            plan, small = _compacted(model, plan, example)
            unsayable = _unsayable(model, small, graph, plan)
            if not unsayable:
                more = (*baked(model, plan.cuts), *unreached(model, graph, example))
                notes = (*plan.notes, *more, *_unchecked(plan))
                done = plan.model_copy(update={"notes": notes, "trial": told(tried)})
                return thinned(model, done, graph)
            banned |= unsayable
            continue
        _check_steady(model, example)
        failed = _failures(model, plan, example)
        if not failed:
            raise VerificationError(
                "the cuts are right one by one, but not together.",
                where=", ".join(plan.keep()),
                fix="ignore one of these, and report the model.",
            )
        banned |= failed


def _parts(model: nn.Module, plan: Plan) -> tuple[Part, ...]:
    if plan.policy.verify == "off":
        return ()
    limit = plan.policy.calibration.memory * _GIB
    return parts(model, plan.cuts, plan.drops, limit=limit)


def _passes(model: nn.Module, part: Part, example: Any) -> bool:
    return disagreement(model, part.cuts, example, drops=part.drops) <= tolerance(model)


def _unchecked(plan: Plan) -> tuple[str, ...]:
    said = (
        "not checked on the model, as Policy.verify = 'off' asks: a cut may compute another thing"
    )
    return (said,) if plan.policy.verify == "off" else ()


def _check_steady(model: nn.Module, example: Any) -> None:
    """Refuse a model whose output is random: nothing can be compared with it."""
    with evaluating(model), torch.no_grad():
        first, second = (flat_tensors(run(model, example)) for _ in range(2))
    if gap(first, second) > tolerance(model):
        raise VerificationError(
            "the model's output is random: two runs on one batch differ.",
            where=type(model).__name__,
            fix="make forward deterministic in evaluation mode.",
        )


def _failures(model: nn.Module, plan: Plan, example: Any) -> dict[str, str]:
    off = {cut.group: compared(model, [cut], example) for cut in plan.cuts}
    off |= {drop.block: compared(model, [], example, drops=[drop]) for drop in plan.drops}
    return {name: said for name, (far, said) in off.items() if far > tolerance(model)}


def _compacted(model: nn.Module, plan: Plan, example: Any) -> tuple[Plan, nn.Module]:
    """Find out, on a copy, which removed blocks can leave their lists without a trace."""
    small = model
    if plan.drops or plan.policy.serving == "uniform":
        small = copied(model, shared=True)
        cut_(small, plan.cuts)
        exchange_(small, plan.drops)
    if plan.drops:
        compacted = compact_(small, example)
        told = [f"{line}: save it with otp.save" for line in unlike_config(small)[:3]]
        if plan.policy.serving != "plain" and isinstance(model, Hosted):
            told = []  # the configuration will carry the plan, or the plan will not do
        notes = (*plan.notes, *told)
        plan = plan.model_copy(update={"compacted": compacted, "notes": notes})
    return plan, small


def _unsayable(model: nn.Module, small: nn.Module, graph: Graph, plan: Plan) -> dict[str, str]:
    """List groups whose width no field of the configuration can say, where one must.

    Returns:
        group to reason.

    Raises:
        PlanError: if it is not the width of single kinds of layers.
    """
    if plan.policy.serving != "uniform" or not (left := unsaid(small, plan.cuts)):
        return {}
    kind = kinds(model, graph.groups)
    found: dict[str, str] = {}
    for first in {kind[cut.group]: None for cut in plan.cuts}:
        alike = [cut for cut in plan.cuts if kind[cut.group] == first]
        alone = copied(model, shared=True)
        cut_(alone, alike)
        if said := unsaid(alone, alike):
            reason = f"the configuration cannot say that {len(alike[0].keep)} of them are left"
            found |= {cut.group: f"{reason}: {said[0].rstrip('.')}" for cut in alike}
    if not found:
        raise PlanError(
            f"the configuration cannot say what would be left of the model: {left[0]}",
            where="Policy.serving = 'uniform'",
            fix="remove whole layers without a stand-in, or ask for serving='registered'.",
        )
    if found.keys() >= {cut.group for cut in plan.cuts}:
        _check_company(graph, plan, left)
    return found


def _check_company(graph: Graph, plan: Plan, left: Sequence[str]) -> None:
    """Name the groups that one number of the configuration ties to those that were cut."""
    cut = {cut.group for cut in plan.cuts}
    whole = [g.name for g in graph.groups if g.name not in cut]
    held = {name: line for name in whole for line in left if line.startswith(f"'{name}' ")}
    if held:
        first, line = next(iter(held.items()))
        raise PlanError(
            f"the configuration has one number for what is cut and for '{first}', which keeps its "
            f"width: {line}",
            where="Policy.serving = 'uniform'"
            + (f"; {len(held)} such groups" if len(held) > 1 else ""),
            fix=f"add Channels(targets=['{first}']) with the same share to the rules, or ask for "
            "serving='registered'.",
        )
