"""A dense model that computes as if blocks were gone, while hooks are on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.structure.graph import Swap
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["muted"]


@contextmanager
def muted(model: nn.Module, swaps: Iterable[Swap]) -> Iterator[None]:
    """Hand a module's input on in place of its output, or silence it.

    The modules still compute, so that this changes nothing but their outputs.

    Args:
        model: the dense model.
        swaps: the first of each block that is to have no effect: `zero` silences a branch, all
            others hand the stream on.

    Yields:
        nothing; the hooks are gone afterwards.
    """
    handles = []
    try:
        for swap in swaps:
            hook = _Mute(silent=swap.by == "zero")
            module = model.get_submodule(swap.path)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Mute:
    """The hook behind one block."""

    silent: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        written = first_of(out)
        stream = stream_of(args, kwargs)
        assert written is not None
        assert stream is not None
        return _exchanged(out, written, torch.zeros_like(written) if self.silent else stream)


def _exchanged(out: Any, old: Tensor, new: Tensor) -> Any:
    if out is old:
        return new
    entries = (new if entry is old else entry for entry in out)
    return type(out)(*entries) if hasattr(out, "_fields") else type(out)(entries)
