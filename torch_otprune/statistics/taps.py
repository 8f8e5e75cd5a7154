"""One run with an eye on what blocks read and write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.structure.blocks import adds_two
from torch_otprune.structure.flow import tensors
from torch_otprune.structure.graph import Block
from torch_otprune.structure.mute import exchanged
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["Taps", "flat"]


def flat(tensor: Tensor, axis: int) -> Tensor:
    """Lay a stream out.

    Args:
        tensor: samples first.
        axis: of the channels.

    Returns:
        samples x positions x channels, in float64 on the CPU.
    """
    wide = tensor.detach().double().cpu().movedim(axis, -1)
    return wide.reshape(len(wide), math.prod(wide.shape[1:-1]), wide.shape[-1])


class Taps(TorchFunctionMode):
    """Keep what every block reads and writes in one run, as points to differentiate at.

    Without gradients it keeps the values.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], writers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.blocks, self.writers = model, blocks, writers
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.fed: dict[str, Tensor] = {}
        self.joints = {b.joint[0]: (b.name, b.joint[1]) for b in blocks if b.joint}
        self.added = -1
        self.values = not torch.is_grad_enabled()  # and no points to differentiate at
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Taps:
        for block in (b for b in self.blocks if b.joint is None):
            module, hook = self.model.get_submodule(block.name), _Through(self, block.name)
            self.handles += [
                module.register_forward_pre_hook(hook.enter, with_kwargs=True),
                module.register_forward_hook(hook),
            ]
        for path in self.writers:
            module = self.model.get_submodule(path)
            self.handles.append(
                module.register_forward_pre_hook(_Fed(self, path), with_kwargs=True)
            )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {id(t): t for t in tensors((args, kwargs))}
        if not adds_two(getattr(function, "__name__", ""), len(given)):
            return function(*args, **(kwargs or {}))
        self.added += 1
        if self.added not in self.joints:
            return function(*args, **(kwargs or {}))
        name, side = self.joints[self.added]
        stream = list(given.values())[side].clone()  # an addition in place would change it
        out = function(*args, **(kwargs or {}))
        self.pairs[name] = stream, out
        return out.clone()  # what comes next may write in place


@dataclass
class _Through:
    """The hooks around a block."""

    taps: Taps
    path: str
    stream: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the stream, to which the block may add in place."""
        stream = stream_of(args, kwargs)
        self.stream = None if stream is None else stream.detach().clone()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        written = first_of(out)
        assert self.stream is not None
        assert written is not None
        # what comes next may write in place: neither the point nor its value may change
        if self.taps.values:
            self.taps.pairs[self.path] = self.stream, written.clone()
            return None
        self.taps.pairs[self.path] = self.stream, written
        # re-entrant checkpointing makes a point of what it is given, and must be noticed
        return exchanged(out, written, written.clone()) if written.requires_grad else None


@dataclass
class _Fed:
    """The hook before a linear layer that writes to the stream."""

    taps: Taps
    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = stream_of(args, kwargs)
        assert given is not None
        self.taps.fed[self.path] = given.detach()
