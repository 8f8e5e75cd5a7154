"""The hooks on the root of an attached model: they see every batch, and what comes out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn

from torch_otprune.structure import Call
from torch_otprune.structure.forward import unpacked

__all__ = ["Leave", "Watch", "Watches", "hooked"]


class Watches(Protocol):
    """What the hooks report to."""

    def see(self, batch: Call) -> None:
        """Take notice of a batch that is calibration."""

    def train(self, batch: Call) -> None:
        """Take notice of a batch that the model trains on."""

    def leave(self, output: Any) -> None:
        """Take notice of what came out."""

    @property
    def listens(self) -> bool:
        """Tell whether passes that do not train are calibration."""

    @property
    def trains(self) -> bool:
        """Tell whether passes that train are none."""


class Watch:
    """The hook in front: it sees every batch before the model does.

    Args:
        attached: whom it tells; None for a copy.
    """

    def __init__(self, attached: Watches | None) -> None:
        self.attached = attached
        self.busy = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell."""
        if torch.compiler.is_compiling() or self.attached is None or self.busy:
            return  # the analysis runs the model itself
        if self.attached.trains and module.training and torch.is_grad_enabled():
            self.attached.train(Call(args, kwargs))  # moving weights are no calibration
            return
        if not self.attached.listens:
            return
        self.busy = True
        try:
            self.attached.see(Call(args, kwargs))
        finally:
            self.busy = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the handle: a copy of the model is not attached."""
        return Watch, (None,)


class Leave:
    """The hook behind.

    Args:
        watch: the one in front.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        """Tell."""
        if torch.compiler.is_compiling() or self.watch.attached is None or self.watch.busy:
            return
        self.watch.attached.leave(out)


def hooked(model: nn.Module, watch: Watch, *, calibrates: bool) -> ExitStack:
    """Put both hooks on the root of a model.

    Args:
        model: to be watched.
        watch: the hook in front.
        calibrates: whether whatever runs is calibration: then padded texts must have a shape, and
            encoders that pack them stop doing so for as long.

    Returns:
        what takes it all off when it is closed.
    """
    hooks = ExitStack()
    if calibrates:
        hooks.enter_context(unpacked(model))
    hooks.callback(model.register_forward_pre_hook(watch, with_kwargs=True).remove)
    hooks.callback(model.register_forward_hook(Leave(watch)).remove)
    return hooks
