"""Models that cannot be analysed or cut at all: refused at the door, with what to pass instead."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from torch_otprune.errors import StructureError
from torch_otprune.structure.forward import batch_size, flat_tensors, shapes

__all__ = ["check", "check_example", "is_optimised"]


def check(model: nn.Module, *, weights: bool = True) -> None:
    """Refuse models that cannot be cut at all.

    Args:
        model: any module.
        weights: whether their values are needed; an analysis by shapes needs none.

    Raises:
        StructureError: with the reason.
    """
    where = type(model).__name__
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"the model is of type {where}.", where="model", fix="pass a torch.nn.Module."
        )
    for name, module in model.named_modules():
        _check_eager(f"'{name}'" if name else "the model", module, where)
        _check_filled(f"'{name}'" if name else "the model", module, where)
    parameters = list(model.parameters())
    if not parameters:
        raise StructureError(
            "the model has no parameters.", where=where, fix="pass the trained module."
        )
    if weights and any(p.is_meta for p in parameters):
        raise StructureError(
            "the model is on the meta device: its weights do not exist.",
            where=where,
            fix="materialise it with model.to_empty(device='cpu') and load its weights; shapes are "
            "enough for otp.doctor, and for a plan with criterion='random' and repair='none'.",
        )
    if any(p.is_inference() for p in parameters):
        raise StructureError(
            "the model was built under torch.inference_mode().",
            where=where,
            fix="build it outside: such parameters can be neither analysed nor trained.",
        )


def check_example(model: nn.Module, example: Any, *, on: bool = True) -> None:
    """Refuse an example that is empty or nested, or that has no device in common with the model.

    Args:
        model: any module.
        example: one batch.
        on: whether the device matters; an example that the model runs on may be anywhere.

    Raises:
        StructureError: with the reason.
    """
    found, name = flat_tensors(example), type(model).__name__
    if any(tensor.is_nested for tensor in found):
        raise StructureError(
            "the example is a nested tensor.", where=name, fix="pass a padded one, and a mask."
        )
    if batch_size(example) == 0:
        raise StructureError(
            "the example holds no sample.",
            where=f"{name}, example of shape {shapes(example)}",
            fix="pass a batch of at least one sample.",
        )
    here = sorted({str(p.device) for p in model.parameters()})
    there = sorted({str(t.device) for t in found})
    if on and there and set(here).isdisjoint(there):
        empty = there == ["meta"]
        raise StructureError(
            f"the model is on {', '.join(here)} and the example on {', '.join(there)}.",
            where=f"{name}, example of shape {shapes(example)}",
            fix="pass a batch that holds numbers."
            if empty
            else f"move the example to the model's device: batch.to('{here[0]}').",
        )


def _check_filled(name: str, module: nn.Module, where: str) -> None:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        raise StructureError(
            f"{name} is lazy: its weights have no shape yet.",
            where=where,
            fix="run one batch through the model first.",
        )


def _check_eager(name: str, module: nn.Module, where: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise StructureError(
            f"{name} is scripted.", where=where, fix="prune the eager model, then script it."
        )
    if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
        raise StructureError(
            f"{name} is exported: its modes are fixed.",
            where=where,
            fix="prune the eager model, then export it.",
        )
    # a forward that was compiled by itself runs no hook inside
    alone = "_torchdynamo_orig_callable" in getattr(module.forward, "__dict__", {})
    if alone or module._compiled_call_impl is not None or is_optimised(module):
        raise StructureError(
            f"{name} is compiled.", where=where, fix="prune the eager model, then compile it."
        )
    if _is_quantised(module):
        raise StructureError(
            f"{name} is a quantised {type(module).__name__}.",
            where=where,
            fix="prune the float model, then quantise it.",
        )
    if _is_sharded(module):
        raise StructureError(
            f"{name} is sharded: this process holds a part of its weights only.",
            where=where,
            fix="prune the whole model before FSDP or fully_shard wraps it, then shard that.",
        )


_SHARDED = ("torch.distributed.fsdp", "torch.distributed.tensor")
_QUANTISERS = frozenset("auto_gptq awq bitsandbytes gptqmodel hqq quanto torchao".split())


def _is_quantised(module: nn.Module) -> bool:
    """Tell layers and weights that hold integers, torch's or another library's."""
    rooms = [kind.__module__ for kind in (type(module), *map(type, module._parameters.values()))]
    return any("quantized" in room or room.split(".")[0] in _QUANTISERS for room in rooms)


def _is_sharded(module: nn.Module) -> bool:
    own = (type(p) for p in module._parameters.values())
    rooms = [kind.__module__ for kind in (*type(module).__mro__, *own)]
    return any(room.startswith(_SHARDED) for room in rooms)


def is_optimised(module: nn.Module) -> bool:
    """Tell what `torch.compile` returns; it cannot exist before its package was imported.

    Args:
        module: any module.

    Returns:
        whether it is the wrapper itself.
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)
