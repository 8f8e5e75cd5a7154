"""Carry out a plan on a model whose values do not matter: shapes, classes and integers follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_otprune.fold import linearize_, refold_
from torch_otprune.plan.model import Plan
from torch_otprune.structure.fingerprint import fingerprint
from torch_otprune.surgery import check_plan, cut_, exchange_, take_out_
from torch_otprune.surgery.uniform import fit_config_

__all__ = ["carry_", "places", "replace_"]


def carry_(model: nn.Module, plan: Plan) -> None:
    """Do to a dense model what a plan says, without data: what repairs write is filled in later.

    Cuts, removed blocks, lines, folds and compacted lists, in the order in which `apply_` does
    them. Works on the meta device too; what is new is on meta then as well.

    Args:
        model: the dense model that the plan was made for, or an equal one; written in place.
        plan: what to do.

    Raises:
        PlanError: if the plan is for another model; nothing is written then if it shows in the
            layout of the tensors.
    """
    if fingerprint(model) != plan.fingerprint:
        check_plan(model, plan)
    hollow = any(tensor.is_meta for _, _, tensor in places(model))
    real = {id(tensor) for _, _, tensor in places(model) if not tensor.is_meta}
    if hollow:
        _stuff_(model, plan)
    with torch.inference_mode(mode=False), torch.no_grad():
        cut_(model, plan.cuts)
        exchange_(model, plan.drops)
        linearize_(model, plan.lines)
        refold_(model, plan.foldings)
        take_out_(model, plan.compacted)
        if plan.policy.serving == "uniform":  # its configuration was made to say the new widths
            fit_config_(model, plan.cuts)
    if hollow:
        replace_(model, lambda tensor: tensor if id(tensor) in real else tensor.to("meta"))


def places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """List every parameter and buffer of a model by its owner and its name there.

    Args:
        model: any module; a tensor that stands at several places comes several times.

    Yields:
        owner, name and tensor.
    """
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            yield from ((module, name, t) for name, t in table.items() if t is not None)


def replace_(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of each; what is tied stays tied.

    Args:
        model: written in place.
        change: gives the new tensor for an old one; the same object leaves it.
    """
    # The old tensors are kept until the end: an address that is free again is taken again.
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for owner, name, old in list(places(model)):
        if id(old) not in done:
            new = change(old)
            if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            done[id(old)] = old, new
        table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        table[name] = done[id(old)][1]


def _stuff_(model: nn.Module, plan: Plan) -> None:
    """Give values to the layers whose cutting or folding reads them: a few, and for a while."""
    paths = {line.into for line in plan.lines if line.into is not None}
    paths |= {path for folding in plan.foldings for path in folding.layers}
    for path, module in model.named_modules():
        if path in paths or is_parametrized(module):
            replace_(module, lambda t: torch.ones_like(t, device="cpu") if t.is_meta else t)
