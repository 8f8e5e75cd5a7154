"""What a reader of a diagnosis should know about the model and the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torch_otprune.structure.doctor import Finding
from torch_otprune.structure.forward import evaluating, flat_tensors, run

__all__ = ["notes", "quoted"]

_NAMED = 3  # modules named in one note
_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def notes(model: nn.Module, example: Any, found: Sequence[Finding]) -> Iterator[str]:
    """Say what was frozen, whether the weights exist, and what the example did not reach.

    Args:
        model: any module.
        example: what it ran on.
        found: what can become of its parameters.

    Yields:
        sentences.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        yield (
            "the weights do not exist (meta device): this is read off the shapes alone, and what "
            "folds is not looked for"
        )
    with evaluating(model), torch.no_grad():
        output = run(model, example)
    if not any(t.is_floating_point() or t.is_complex() for t in flat_tensors(output)):
        yield (
            f"forward returns no floating numbers ({type(output).__name__}): no cut could be "
            "checked against the model in which the same units are muted"
        )
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        total = sum(1 for _ in model.parameters())
        yield (
            f"{len(frozen)} of {total} parameters are frozen (requires_grad=False): they can be "
            "cut all the same, and what is left of them stays frozen"
        )
    hidden = [path for path, module in model.named_modules() if _hooked(module)]
    if hidden:
        yield (
            f"a hook of torch.nn.utils computes the weight of {quoted(hidden)}, which is not "
            "followed: use the same from torch.nn.utils.parametrizations, or remove it first"
        )
    idle = list(dict.fromkeys(f.parameter.rpartition(".")[0] for f in found if _idle(f)))
    if idle:
        yield (
            f"{quoted(idle)} did not run: all of this holds for the way that the example takes "
            "through the model, and what it does not reach stays"
        )


def quoted(names: Sequence[str]) -> str:
    """Name the first few, and count the others.

    Args:
        names: of modules.

    Returns:
        part of a sentence.
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more


def _hooked(module: nn.Module) -> bool:
    """Tell a layer whose weight a hook of the old kind computes before every call."""
    hooks = (type(hook).__module__ for hook in module._forward_pre_hooks.values())
    return any(room in _HOOKS for room in hooks)


def _idle(finding: Finding) -> bool:
    return "did not run" in finding.reason
