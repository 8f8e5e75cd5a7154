"""Random nets, written as lists of ops: any list is a net, so failures shrink to a few ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Chain", "nets"]

Op = tuple[Any, ...]
Forward = Callable[[Tensor], Tensor]


class Chain(nn.Module):
    """A net that carries a list of ops out, one after the other.

    A picture has shape batch, channels, height, width; tokens have batch, tokens, channels.

    Args:
        ops: each a name and its settings; settings that do not fit a width are rounded to it.
        width: channels that come in.
        grid: height and width; None for tokens.
    """

    def __init__(self, ops: list[Op], width: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.ops, self.width, self.grid = ops, width, grid
        self.parts = nn.ModuleList()
        table = TOKENS if grid is None else PICTURES
        self.steps = [table[op[0]](self, *op[1:]) for op in ops]

    def part(self, module: nn.Module) -> nn.Module:
        """Own a module."""
        self.parts.append(module)
        return module

    def inner(self, ops: list[Op], width: int | None = None) -> Chain:
        """Own a chain that keeps the grid."""
        chain = Chain(ops, width or self.width, self.grid)
        self.parts.append(chain)
        return chain

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x


Step = Callable[[Chain, Tensor], Tensor]


def through(net: Chain, module: nn.Module, width: int | None = None) -> Step:
    """Make a step of one module."""
    net.part(module)
    place, net.width = len(net.parts) - 1, width or net.width
    return lambda m, x: m.parts[place](x)


def divisor(width: int, wish: int) -> int:
    """Find the largest divisor that is no larger than a wish."""
    return next(n for n in range(min(wish, width), 0, -1) if width % n == 0)


# --- pictures --------------------------------------------------------------------------------


def conv(net: Chain, out: int, kernel: int) -> Step:
    return through(net, nn.Conv2d(net.width, out, kernel, padding=kernel // 2), out)


def grouped(net: Chain, out: int, wish: int) -> Step:
    groups = divisor(net.width, wish)
    out = groups * max(1, out // groups)
    return through(net, nn.Conv2d(net.width, out, 3, padding=1, groups=groups), out)


def depthwise(net: Chain, times: int) -> Step:
    width = net.width
    module = nn.Conv2d(width, times * width, 3, padding=1, groups=width, bias=times > 1)
    return through(net, module, times * width)


def transposed(net: Chain, out: int) -> Step:
    return through(net, nn.ConvTranspose2d(net.width, out, 3, padding=1), out)


def weight_normed(net: Chain, out: int) -> Step:
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(net.width, out, 1))
    return through(net, module, out)


def batch_norm(net: Chain) -> Step:
    return through(net, nn.BatchNorm2d(net.width))


def group_norm(net: Chain, wish: int) -> Step:
    return through(net, nn.GroupNorm(divisor(net.width, wish), net.width))


def instance_norm(net: Chain) -> Step:
    return through(net, nn.InstanceNorm2d(net.width, affine=True, track_running_stats=True))


def prelu(net: Chain) -> Step:
    return through(net, nn.PReLU(net.width))


def activation(net: Chain, name: str) -> Step:
    function = getattr(F, name)
    return lambda m, x: function(x)


def residual(net: Chain, ops: list[Op]) -> Step:
    branch = net.inner(ops)
    short = nn.Identity() if branch.width == net.width else _mixer(net, branch.width)
    net.part(short)
    net.width, place = branch.width, len(net.parts) - 2
    return lambda m, x: m.parts[place](x) + m.parts[place + 1](x)


def _mixer(net: Chain, out: int) -> nn.Module:
    return nn.Linear(net.width, out) if net.grid is None else nn.Conv2d(net.width, out, 1)


def channel_axis(net: Chain) -> int:
    return -1 if net.grid is None else 1


def concat(net: Chain, first: list[Op], second: list[Op]) -> Step:
    one, two, axis = net.inner(first), net.inner(second), channel_axis(net)
    net.width, place = one.width + two.width, len(net.parts) - 2
    return lambda m, x: torch.cat([m.parts[place](x), m.parts[place + 1](x)], axis)


def dense(net: Chain, ops: list[Op]) -> Step:
    branch, axis = net.inner(ops), channel_axis(net)
    net.width, place = net.width + branch.width, len(net.parts) - 1
    return lambda m, x: torch.cat([x, m.parts[place](x)], axis)


def split(net: Chain, first: list[Op], second: list[Op]) -> Step:
    """Two halves on ways of their own; a width that is odd is made even first."""
    axis, half = channel_axis(net), (net.width + 1) // 2
    net.part(_mixer(net, 2 * half))
    one, two = net.inner(first, half), net.inner(second, half)
    net.width, place = one.width + two.width, len(net.parts) - 3

    def step(m: Chain, x: Tensor) -> Tensor:
        a, b = m.parts[place](x).chunk(2, axis)
        return torch.cat([m.parts[place + 1](a), m.parts[place + 2](b)], axis)

    return step


def gate(net: Chain, interleaved: bool) -> Step:
    axis, out = channel_axis(net), net.width
    net.part(_mixer(net, 2 * out))
    place = len(net.parts) - 1

    def step(m: Chain, x: Tensor) -> Tensor:
        y = m.parts[place](x)
        if interleaved:
            value, door = y.unflatten(axis, (-1, 2)).unbind(axis if axis < 0 else 2)
            return value * torch.sigmoid(door)
        return F.glu(y, axis)

    return step


def squeeze(net: Chain, inner: int) -> Step:
    net.part(nn.Conv2d(net.width, inner, 1))
    net.part(nn.Conv2d(inner, net.width, 1))
    place = len(net.parts) - 2

    def step(m: Chain, x: Tensor) -> Tensor:
        y = F.relu(m.parts[place](x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(m.parts[place + 1](y))

    return step


def shuffle(net: Chain, wish: int) -> Step:
    groups = divisor(net.width, wish)
    groups = 1 if groups == net.width else groups  # a group of one says nothing of its size
    return lambda m, x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def flip(net: Chain) -> Step:
    return lambda m, x: x.flip(channel_axis(net))


def pool(net: Chain) -> Step:
    return lambda m, x: F.max_pool2d(x, 3, 1, 1)


def zoom(net: Chain) -> Step:
    return lambda m, x: F.avg_pool2d(F.interpolate(x, scale_factor=2), 2)


def pixels(net: Chain) -> Step:
    """Channels to positions and back."""
    out = net.width
    net.part(nn.Conv2d(out, 4 * out, 1))
    place = len(net.parts) - 1
    return lambda m, x: F.avg_pool2d(F.pixel_shuffle(m.parts[place](x), 2), 2)


def halves(net: Chain) -> Step:
    """Write both halves of a new tensor in place."""

    def step(m: Chain, x: Tensor) -> Tensor:
        count = x.shape[1]
        out = x.new_zeros(x.shape[0], 2 * count, *x.shape[2:])
        out[:, :count] = x
        out[:, count:] = x.tanh()
        return out

    net.width *= 2
    return step


def norm_of_channels(net: Chain) -> Step:
    net.part(nn.LayerNorm(net.width))
    place = len(net.parts) - 1
    return lambda m, x: m.parts[place](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def as_tokens(net: Chain, ops: list[Op]) -> Step:
    chain = Chain(ops, net.width, None)
    net.parts.append(chain)
    net.width, place = chain.width, len(net.parts) - 1

    def step(m: Chain, x: Tensor) -> Tensor:
        y = m.parts[place](x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    return step


# --- tokens ----------------------------------------------------------------------------------


def linear(net: Chain, out: int) -> Step:
    return through(net, nn.Linear(net.width, out), out)


def layer_norm(net: Chain) -> Step:
    return through(net, nn.LayerNorm(net.width))


def rms_norm(net: Chain) -> Step:
    return through(net, nn.RMSNorm(net.width))


def recurrent(net: Chain, kind: str, size: int, both: bool) -> Step:
    module = getattr(nn, kind)(net.width, size, batch_first=True, bidirectional=both)
    net.part(module)
    net.width, place = size * (1 + both), len(net.parts) - 1
    return lambda m, x: m.parts[place](x)[0]


def attention(net: Chain, heads: int, size: int, fused: bool) -> Step:
    inner, width = heads * size, net.width
    shapes = [3 * inner] if fused else [inner] * 3
    for out in shapes:
        net.part(nn.Linear(width, out))
    net.part(nn.Linear(inner, width))
    place = len(net.parts) - 1 - len(shapes)

    def step(m: Chain, x: Tensor) -> Tensor:
        made = [m.parts[place + i](x) for i in range(len(shapes))]
        q, k, v = made[0].chunk(3, -1) if fused else made
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return m.parts[place + len(shapes)](y.transpose(1, 2).flatten(2))

    return step


def multihead(net: Chain, heads: int, size: int) -> Step:
    net.part(nn.Linear(net.width, heads * size))
    net.part(nn.MultiheadAttention(heads * size, heads, batch_first=True))
    net.width, place = heads * size, len(net.parts) - 2

    def step(m: Chain, x: Tensor) -> Tensor:
        y = m.parts[place](x)
        return m.parts[place + 1](y, y, y, need_weights=False)[0]

    return step


PICTURES: dict[str, Callable[..., Step]] = {
    f.__name__: f
    for f in (
        conv, grouped, depthwise, transposed, weight_normed, batch_norm, group_norm, instance_norm,
        prelu, activation, residual, concat, dense, split, gate, squeeze, shuffle, flip, pool, zoom,
        pixels, halves, norm_of_channels, as_tokens,
    )
}  # fmt: skip
TOKENS: dict[str, Callable[..., Step]] = {
    f.__name__: f
    for f in (
        linear, layer_norm, rms_norm, recurrent, attention, multihead, activation, residual, concat,
        dense, split, gate, flip,
    )
}  # fmt: skip

_widths = st.integers(2, 9)
_flags = st.booleans()
_small = st.integers(1, 4)
_names = st.sampled_from(["relu", "gelu", "tanh", "silu"])


def _ops(*, tokens: bool, depth: int) -> st.SearchStrategy[list[Op]]:
    """Lists of ops; with depth, some hold lists themselves."""
    just, of = st.just, st.tuples
    found = [of(just("activation"), _names), of(just("gate"), _flags), of(just("flip"))]
    if tokens:
        found += [
            of(just("linear"), _widths),
            of(just("layer_norm")),
            of(just("rms_norm")),
            of(just("recurrent"), st.sampled_from(["LSTM", "GRU", "RNN"]), _widths, _flags),
            of(just("attention"), st.integers(2, 3), st.integers(2, 3), _flags),
            of(just("multihead"), st.integers(2, 3), st.integers(2, 3)),
        ]
    else:
        found += [
            of(just("conv"), _widths, st.sampled_from([1, 3])),
            of(just("grouped"), _widths, _small),
            of(just("depthwise"), st.integers(1, 3)),
            of(just("transposed"), _widths),
            of(just("weight_normed"), _widths),
            of(just("group_norm"), _small),
            of(just("squeeze"), _widths),
            of(just("shuffle"), _small),
            *(
                of(just(name))
                for name in (
                    "batch_norm", "instance_norm", "prelu", "pool", "zoom", "pixels", "halves",
                    "norm_of_channels",
                )
            ),
        ]  # fmt: skip
    if depth:
        inner = _ops(tokens=tokens, depth=depth - 1)
        found += [of(just(name), inner) for name in ("residual", "dense")]
        found += [of(just(name), inner, inner) for name in ("concat", "split")]
        if not tokens:
            found.append(of(just("as_tokens"), _ops(tokens=True, depth=depth - 1)))
    return st.lists(st.one_of(found), max_size=5 if depth else 3)


def nets() -> st.SearchStrategy[list[Op]]:
    """Ops of a net from three channels to a pooled head."""
    return _ops(tokens=False, depth=2)
