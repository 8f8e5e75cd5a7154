"""Put a policy on a module, and run calibration data through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from torch_otprune.attach.handle import LIVE, Attached
from torch_otprune.attach.masked import check_learning
from torch_otprune.attach.needs import by_shapes
from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.plan import check_lines, check_weights
from torch_otprune.policy import Layers, Linearize, Policy, Rule, match, module_classes, policy_of
from torch_otprune.statistics import collect
from torch_otprune.statistics.reduce import share
from torch_otprune.structure import evaluating
from torch_otprune.structure.forward import outside_inference, run_checked
from torch_otprune.structure.trace import check

__all__ = ["attach", "check_unattached", "observe"]


def attach(
    model: nn.Module, policy: Policy | None = None, *, example: Any = None, data: Any = None
) -> Attached:
    """Put a policy on a model: forward hooks and nothing else.

    Use it as a context manager, or call `remove` yourself. Run data through the model in any
    mode; then ask for the plan. A policy given here wins over one declared on the class. Where
    all that runs is calibration, no `nn.TransformerEncoder` packs padded texts until `remove`.

    Args:
        model: the dense model.
        policy: the declaration; by default the one that `@prunable` put on the class.
        example: one batch to analyse the model on; by default the first that comes by.
        data: what the rounds of a schedule decide and repair on: batches, or a function that runs
            the model. By default the inputs that it was trained on last, of which up to
            `calibration.samples` are then kept in memory.

    Returns:
        the handle.

    Raises:
        PolicyError: if there is no policy, or a rule about activations makes no sense.
        StructureError: if the model cannot be pruned, or it, a part of it or what it is a part of
            has a policy attached already.
        TargetError: if a target matches nothing.
    """
    check(model, weights=False)
    _check_whole(model)
    found = _policy(model, policy)
    check(model, weights=not by_shapes(found))
    check_unattached(model)
    classes = module_classes(model)
    for index, rule in enumerate(found.rules):
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    check_lines(found)
    check_weights(found)
    check_learning(found)
    _check_example(found, example)
    return Attached(model, found, example, data=data)


def _check_whole(model: nn.Module) -> None:
    """Refuse a wrapper or adapter that knows a model by what it was when that was made."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise StructureError(
            f"the model is wrapped in {type(model).__name__}, which would not follow a pruning.",
            where="attach",
            fix="attach to model.module, and wrap the model anew after every pruning.",
        )
    for path, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise StructureError(
                f"the model holds adapters of PEFT: {path or 'the model'} is a "
                f"{type(module).__name__}.",
                where=f"attach({type(model).__name__})",
                fix="prune the plain model first, then add adapters.",
            )


def _check_example(policy: Policy, example: Any) -> None:
    """Penalties watch blocks from the first step on: the model must be analysed before."""
    for index, rule in enumerate(policy.rules):
        if isinstance(rule, (Layers, Linearize)) and rule.penalty is not None and example is None:
            raise PolicyError(
                "a penalty needs an example to find its blocks before training starts.",
                where=f"attach, Policy.rules[{index}].penalty",
                fix="pass example=, one batch as the model takes it.",
            )


def _policy(model: nn.Module, given: object) -> Policy:
    found = policy_of(model) if given is None else given
    where = f"attach({type(model).__name__})"
    if found is None:
        raise PolicyError(
            "there is no policy for this model.",
            where=where,
            fix="pass a Policy, or declare one with @otp.prunable on the class.",
        )
    if not isinstance(found, Policy):
        wrap = "wrap it: Policy(rules=...)" if isinstance(found, Rule) else "pass a Policy"
        raise PolicyError(
            f"the policy is of type {type(found).__name__}.", where=where, fix=f"{wrap}."
        )
    return found


def check_unattached(model: nn.Module) -> None:
    """Refuse a model that is being watched: its hooks would watch the work on it.

    Nor may a part of it be watched, or what it is a part of: they share modules.

    Args:
        model: any module.

    Raises:
        StructureError: if a policy is attached.
    """
    own = set(model.modules())
    for other in (attached.model for attached in LIVE):
        if own.isdisjoint(other.modules()):
            continue
        what = "this model" if other is model else f"a {type(other).__name__} that shares modules"
        raise StructureError(
            f"a policy is attached to {what} already.",
            where=type(model).__name__,
            fix="remove the first attachment, or leave its `with` block.",
        )


def observe(attached: Attached, data: Iterable[Any] | Callable[[nn.Module], Any]) -> Attached:
    """Run calibration data through an attached model, in evaluation mode, without gradients.

    Args:
        attached: the handle.
        data: batches (tensor, tuple, mapping, Transformers batch), or a function that runs the
            model it is given.

    Returns:
        the same handle.

    Raises:
        CalibrationError: if there is no batch, one holds NaN, or the model makes NaN or infinity.
    """
    model = attached.model
    with attached.unwatched():  # a callable runs the model to show its batches
        batches = collect(model, data, share(attached.policy.calibration.samples))
    with outside_inference(), evaluating(model), torch.no_grad(), attached.listening():
        for index, batch in enumerate(batches):
            run_checked(model, batch, index)
    return attached
