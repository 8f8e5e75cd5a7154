"""What may stand where a block or a branch was: nothing, a scale, a small map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_otprune.errors import StructureError
from torch_otprune.nn.wiring import Wiring, check_wiring, streamed, wired

__all__ = ["ChannelScale", "LowRank", "Perceptron", "Skip", "Zero"]

_AXES = (-1, 1)  # tokens carry their channels last, pictures behind the batch


class Skip(nn.Module):
    """Stand for a removed block: its input is its output.

    Args:
        wiring: how the block returned its stream; see `check_wiring`.

    Example:
        >>> Skip(("x", None))(torch.ones(1, 2), attention_mask=None)
        (tensor([[1., 1.]]), None)
    """

    def __init__(self, wiring: str | Sequence[str | int | None] = "tensor") -> None:
        super().__init__()
        self.wiring: Wiring = check_wiring(wiring)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stream as it came."""
        return wired(self.wiring, streamed(args, kwargs), args, kwargs)

    def extra_repr(self) -> str:
        """Say more than the default, if it is more."""
        return _described(self.wiring)


class Zero(nn.Module):
    """Stand for a removed branch whose output was added to a stream.

    Args:
        size: the branch's output channels.
        wiring: how the branch returned its output; see `check_wiring`.
        axis: the channel axis: -1, or 1 for pictures.

    Example:
        >>> Zero(3)(torch.ones(1, 2))
        tensor([[0., 0., 0.]])

    Limits: every other axis is the input's, so no branch with a stride; `torch.fx` cannot trace
    it symbolically, since a trace has no shapes.
    """

    def __init__(
        self,
        size: int,
        wiring: str | Sequence[str | int | None] = "tensor",
        *,
        axis: int = -1,
    ) -> None:
        super().__init__()
        self.size, self.axis = _check_size("size", size), _check_axis(axis)
        self.wiring: Wiring = check_wiring(wiring)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the branch's shape."""
        x = streamed(args, kwargs)
        last = self.axis == -1
        shape = (*x.shape[:-1], self.size) if last else (x.shape[0], self.size, *x.shape[2:])
        return wired(self.wiring, x.new_zeros(shape), args, kwargs)

    def extra_repr(self) -> str:
        """Say the width, and where it is not last."""
        return _described(self.wiring, f"{self.size}", axis=self.axis)


class ChannelScale(nn.Module):
    """Stand for a block by one scale and one shift per channel: y = scale x + shift.

    It starts as the identity.

    Args:
        channels: width of the stream.
        axis: the channel axis: -1, or 1 for pictures.
        wiring: how the block returned its stream; see `check_wiring`.
    """

    def __init__(
        self,
        channels: int,
        axis: int = -1,
        *,
        wiring: str | Sequence[str | int | None] = "tensor",
    ) -> None:
        super().__init__()
        self.channels, self.axis = _check_size("channels", channels), _check_axis(axis)
        self.wiring: Wiring = check_wiring(wiring)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Scale and shift the stream."""
        x = streamed(args, kwargs)
        y = torch.addcmul(self.shift, x.movedim(self.axis, -1), self.scale)
        return wired(self.wiring, y.movedim(-1, self.axis), args, kwargs)

    def extra_repr(self) -> str:
        """Say the width, and where it is not last."""
        return _described(self.wiring, f"{self.channels}", axis=self.axis)


class LowRank(nn.Module):
    """Stand for a block by a residual map of low rank: y = x + up down x + bias.

    It starts as the identity, and trains from there: `up` is zero, `down` is not.

    Args:
        channels: width of the stream.
        rank: of the map; it costs 2 · channels · rank MACs per position.
        axis: the channel axis: -1, or 1 for pictures.
        wiring: how the block returned its stream; see `check_wiring`.
    """

    def __init__(
        self,
        channels: int,
        rank: int,
        axis: int = -1,
        *,
        wiring: str | Sequence[str | int | None] = "tensor",
    ) -> None:
        super().__init__()
        self.channels, self.rank = _check_size("channels", channels), _check_size("rank", rank)
        self.axis = _check_axis(axis)
        self.wiring: Wiring = check_wiring(wiring)
        self.up = nn.Parameter(torch.zeros(channels, rank))
        self.down = nn.Parameter(torch.empty(rank, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.normal_(self.down, std=channels**-0.5)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add the map of the stream to the stream."""
        x = streamed(args, kwargs)
        tokens = x.movedim(self.axis, -1)
        y = tokens + (tokens @ self.down.T) @ self.up.T + self.bias
        return wired(self.wiring, y.movedim(-1, self.axis), args, kwargs)

    def extra_repr(self) -> str:
        """Say width and rank, and where the channels are not last."""
        return _described(self.wiring, f"{self.channels}, rank={self.rank}", axis=self.axis)


class Perceptron(nn.Module):
    """Stand for a block by a hidden layer: y = x + up gelu(down (x + centre)) + shift.

    It starts as the identity, and trains from there: `up` is zero, `down` is not.

    Args:
        channels: width of the stream.
        hidden: units; it costs 2 · channels · hidden MACs per position.
        axis: the channel axis: -1, or 1 for pictures.
        wiring: how the block returned its stream; see `check_wiring`.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        axis: int = -1,
        *,
        wiring: str | Sequence[str | int | None] = "tensor",
    ) -> None:
        super().__init__()
        self.channels, self.hidden = (
            _check_size("channels", channels),
            _check_size("hidden", hidden),
        )
        self.axis = _check_axis(axis)
        self.wiring: Wiring = check_wiring(wiring)
        self.up = nn.Parameter(torch.zeros(channels, hidden))
        self.down = nn.Parameter(torch.empty(hidden, channels))
        self.centre = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        nn.init.normal_(self.down, std=channels**-0.5)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add what the hidden layer writes to the stream."""
        x = streamed(args, kwargs)
        tokens = x.movedim(self.axis, -1)
        bent = F.gelu((tokens + self.centre) @ self.down.T)
        y = tokens + bent @ self.up.T + self.shift
        return wired(self.wiring, y.movedim(-1, self.axis), args, kwargs)

    def extra_repr(self) -> str:
        """Say width and units, and where the channels are not last."""
        return _described(self.wiring, f"{self.channels}, hidden={self.hidden}", axis=self.axis)


def _check_axis(axis: int) -> int:
    if axis not in _AXES:
        raise StructureError(
            f"the channel axis is {axis}.", where="axis", fix="use -1 for tokens, 1 for pictures."
        )
    return axis


def _check_size(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise StructureError(
            f"{name} is {size!r}.", where=name, fix=f"give {name} as a positive whole number."
        )
    return size


def _described(wiring: Wiring, *parts: str, axis: int = -1) -> str:
    shown = [*parts]
    if axis != -1:
        shown.append(f"axis={axis}")
    if wiring != "tensor":
        shown.append(f"wiring={wiring}")
    return ", ".join(shown)
