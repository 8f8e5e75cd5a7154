"""A dense model that computes as if blocks were gone, while hooks are on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.structure.forward import map_tensors
from torch_otprune.structure.graph import Swap
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["exchanged", "muted"]


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
            handles.append(module.register_forward_pre_hook(hook.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Mute:
    """The hooks around one block."""

    silent: bool
    stream: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the stream, to which the block may add in place."""
        if not self.silent:
            stream = stream_of(args, kwargs)
            self.stream = None if stream is None else stream.clone()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        written = first_of(out)
        assert written is not None
        new, self.stream = torch.zeros_like(written) if self.silent else self.stream, None
        assert new is not None
        return exchanged(out, written, new)


def exchanged(out: Any, old: Tensor, new: Tensor) -> Any:
    """Put one tensor in another's place in what a module returned.

    Args:
        out: a tensor, or nested tuples, named ones too, lists and mappings of several things.
        old: one of its tensors.
        new: what takes its place.

    Returns:
        the same structure.
    """
    return map_tensors(out, lambda tensor: new if tensor is old else tensor)
