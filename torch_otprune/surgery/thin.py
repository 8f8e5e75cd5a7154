"""Plans that ask for zeros: what they ask of every layer, and whether it has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_otprune.errors import BudgetError, PlanError, VerificationError
from torch_otprune.plan.model import Plan, Thinning
from torch_otprune.plan.weights import shape_of, thinnings, weight_rules
from torch_otprune.policy import Pattern
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import Conv, is_dense, lies_across, tensor
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_

__all__ = ["check_thinned", "check_zeros", "laid", "matrices", "shaped", "thinned"]

_COUNTED = (
    "zeros are parameters: params and MACs count them, and nothing runs faster by them but on "
    "kernels that skip them"
)


def thinned(model: nn.Module, plan: Plan, graph: Graph) -> Plan:
    """Complete a plan by what its policy's rules about weights ask for.

    Args:
        model: the dense model; left as it was.
        plan: what is cut besides.
        graph: the model's analysis.

    Returns:
        the plan with how many weights stay in which layers; the same where no rule asks.

    Raises:
        BudgetError: if nothing would be removed.
        StructureError: if a rule reaches no layer, or names one that cannot be pruned.
    """
    if not weight_rules(plan.policy):
        return plan
    small = model
    if plan.cuts:
        small = copied(model)
        cut_(small, plan.cuts)
    found, refused = thinnings(small, plan.policy, graph)
    if not (found or plan.cuts):
        raise BudgetError(
            "nothing would be removed: every weight stays.",
            where=f"Policy.rules[{min(weight_rules(plan.policy))}].keep",
            fix="lower keep.",
        )
    update = {
        "thinned": tuple(found),
        "refused": (*plan.refused, *refused),
        "notes": (*plan.notes, _COUNTED) if found else plan.notes,
    }
    return plan.model_copy(update=update)


def check_thinned(model: nn.Module, plan: Plan) -> None:
    """Make sure that what a plan says about weights fits a model and its rules.

    Args:
        model: the dense model.
        plan: what is about to be carried out.

    Raises:
        _misfit: a `PlanError`, if a layer is not there, or an entry was edited.
    """
    modules, rules = dict(model.named_modules()), weight_rules(plan.policy)
    for entry in plan.thinned:
        module = modules.get(entry.layer)
        fits = module is not None and (is_dense(module) or isinstance(module, Conv))
        rule = rules.get(entry.rule)
        if not fits or rule is None:
            raise _misfit(entry, "is no layer with weights that the model and the policy know")
        told = (rule.criterion.kind, rule.pattern, rule.budgeted)
        if told != (entry.criterion, entry.pattern, entry.keep is None):
            raise _misfit(entry, "is not pruned as its rule says")
        if entry.keep is not None and entry.keep > entry.weights:
            raise _misfit(entry, "keeps more weights than it has")


def _misfit(entry: Thinning, what: str) -> PlanError:
    return PlanError(
        f"'{entry.layer}' {what}.",
        where="Plan.thinned",
        fix="apply the plan as attached.plan() made it, to the model it was made for.",
    )


def check_zeros(model: nn.Module, entries: Sequence[Thinning]) -> None:
    """Hold a model to the zeros that its plan asks for.

    Args:
        model: the pruned model.
        entries: of the plan.

    Raises:
        VerificationError: if a layer has too many weights, or out of its pattern.
    """
    for entry in entries:
        module = model.get_submodule(entry.layer)
        weight, pattern = matrices(module), Pattern.read(entry.pattern)
        left = int((weight != 0).sum())
        if weight.numel() != entry.weights or (entry.keep is not None and left > entry.keep):
            raise VerificationError(
                f"'{entry.layer}' has {left:,} weights of {weight.numel():,}; the plan predicted "
                f"{entry.weights:,}, of which {'any' if entry.keep is None else entry.keep} stay.",
                where="Plan.thinned",
                fix="apply the plan as attached.plan() made it; if you did, report the model.",
            )
        near = (weight != 0).reshape(-1, pattern.m).sum(1) if not pattern.free else None
        if near is not None and int(near.max()) > pattern.n:
            raise VerificationError(
                f"'{entry.layer}' breaks its pattern {entry.pattern}.",
                where="Plan.thinned",
                fix="report the model.",
            )


def matrices(module: nn.Module) -> Tensor:
    """Lay a layer's weight out so that the neighbours of a pattern lie side by side.

    Args:
        module: dense layer or convolution.

    Returns:
        groups x outputs x (taps times input channels), in its own type.
    """
    return laid(module, tensor(module, "weight"))


def laid(module: nn.Module, values: Tensor) -> Tensor:
    """Lay one number per weight out as `matrices` lays the weights.

    Args:
        module: dense layer or convolution.
        values: of the shape of its weight.

    Returns:
        groups x outputs x (taps times input channels).
    """
    groups, out, width, taps = shape_of(module)
    values = values.T if lies_across(module) else values
    return values.reshape(groups, out, width, taps).transpose(2, 3).flatten(2)


def shaped(module: nn.Module, found: Tensor) -> Tensor:
    """Bring matrices back into the shape of a layer's weight.

    Args:
        module: the layer.
        found: what `matrices` returned, with other values.

    Returns:
        the weight.
    """
    groups, out, width, taps = shape_of(module)
    flat = found.reshape(groups, out, taps, width).transpose(2, 3)
    if lies_across(module):
        return flat.reshape(out, width).T.contiguous()
    return torch.reshape(flat, tensor(module, "weight").shape)
