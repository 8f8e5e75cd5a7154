"""Where in a model a number stopped being finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.structure.forward import Call, evaluating, flat_tensors, run

__all__ = ["blame", "finite"]


def finite(tree: Any) -> bool:
    """Tell whether every floating number of a nested batch or output is finite.

    Args:
        tree: tensors, nested as they come.

    Returns:
        true where there is nothing to check.
    """
    floating = (t for t in flat_tensors(tree) if t.is_floating_point() or t.is_complex())
    return all(bool(torch.isfinite(t).all()) for t in floating)


def blame(model: nn.Module, batch: Any, seen: str) -> CalibrationError:
    """Find the first module that made NaN or infinity out of finite inputs.

    Costs one forward pass in evaluation mode.

    Args:
        model: any module; left as it was.
        batch: what led to it.
        seen: where it was noticed, as in "the input of 'fc'".

    Returns:
        the error to raise.
    """
    watch = _Watch()
    handles = [
        module.register_forward_hook(_Leave(watch, name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if watch.found is not None:
        return _of_module(*watch.found, seen)
    inputs = "" if finite(batch) else "the input holds infinity; "
    return CalibrationError(
        f"{seen} holds NaN or infinity.",
        where=f"{inputs}no single module makes it out of finite inputs",
        fix="clean the batch, or run the model in evaluation mode.",
    )


def _of_module(name: str, module: nn.Module, out: Any, seen: str) -> CalibrationError:
    full, kind = name or "the model", type(module).__name__
    for own, tensor in _tensors(module):
        if not finite(tensor):
            return CalibrationError(
                f"'{f'{name}.{own}'.lstrip('.')}' holds NaN or infinity.",
                where=f"a {tuple(tensor.shape)} tensor of {full} ({kind}); seen in {seen}",
                fix="load weights that are finite.",
            )
    shapes = ", ".join(str(tuple(t.shape)) for t in flat_tensors(out))
    return CalibrationError(
        f"the output of '{name}' holds NaN or infinity."
        if name
        else "the model's output holds NaN or infinity.",
        where=f"{full} ({kind}), a {shapes} tensor made of finite inputs; seen in {seen}",
        fix="scale the batch, or mend this module.",
    )


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class _Watch:
    """The first culprit."""

    def __init__(self) -> None:
        self.found: tuple[str, nn.Module, Any] | None = None


class _Leave:
    """The hook of one module; what is inside a module leaves before it."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if self.watch.found is None and not finite(out) and finite(Call(args, kwargs)):
            self.watch.found = (self.name, module, out)
