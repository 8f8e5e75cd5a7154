"""How far an analysis has come, told from the layers that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Progress", "ticking"]

Progress = Callable[[str, int, int], None]
_RUNS = 4  # of the model: order and positions, couplings, ops, and what ran


@contextmanager
def ticking(model: nn.Module, progress: Progress) -> Iterator[None]:
    """Tell how many calls of layers are done while the block runs, of all that are expected.

    Args:
        model: any module; its hooks are gone afterwards.
        progress: told the stage, the steps done and the steps in all.

    Yields:
        nothing.
    """
    leaves = [
        module
        for module in model.modules()  # a scripted one takes no hook; the analysis refuses it
        if not list(module.children()) and not isinstance(module, torch.jit.ScriptModule)
    ]
    tick = _Tick(progress, _RUNS * len(leaves))
    handles = [module.register_forward_pre_hook(tick) for module in leaves]
    try:
        progress("analyse", 0, tick.total)
        yield
        progress("analyse", tick.total, tick.total)
    finally:
        for handle in handles:
            handle.remove()


class _Tick:
    """The hook before a layer."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.done = min(self.done + 1, self.total)  # a layer may run more than once
        self.progress("analyse", self.done, self.total)
