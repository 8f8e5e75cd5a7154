"""Every way of handling channels that a forward may spell, each in a net of its own.

Sizes differ wherever they could stand in for one another, so that no wrong axis fits by luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.net import Net, Shelf, conv, tokens

ENTRIES = Shelf("pattern")


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Draw numbers for an example of several tensors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pooled(x: Tensor) -> Tensor:
    """Take the mean over a picture."""
    return x.mean((2, 3))


# --- pictures, flattened and reshaped ---------------------------------------------------------


@ENTRIES(3, 5, 7)
def flatten_channels_first() -> nn.Module:
    return Net(lambda m, x: m.c(F.relu(m.a(x)).flatten(1)), a=conv(3, 8), c=nn.Linear(280, 4))


@ENTRIES(3, 5, 7)
def flatten_channels_last() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.a(x)).permute(0, 2, 3, 1).reshape(len(x), -1))

    return Net(forward, a=conv(3, 8), c=nn.Linear(280, 4))


@ENTRIES(3, 6, 10)
def flatten_pooled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(F.max_pool2d(F.relu(m.b(F.relu(m.a(x)))), 2).flatten(1))

    return Net(forward, a=conv(3, 8), b=conv(8, 10), c=nn.Linear(150, 4))


@ENTRIES(3, 5, 7)
def view_by_sizes() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.c(y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)))

    return Net(forward, a=conv(3, 8), c=nn.Linear(280, 4))


@ENTRIES(3, 5, 7)
def view_by_literals() -> nn.Module:
    return Net(
        lambda m, x: m.c(F.relu(m.a(x)).view(len(x), 280)), a=conv(3, 8), c=nn.Linear(280, 4)
    )


@ENTRIES(3, 5, 7)
def channel_shuffle() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        y = y.view(len(y), 2, -1, 5, 7).transpose(1, 2).reshape(len(y), -1, 5, 7)
        return pooled(m.b(y))

    return Net(forward, a=conv(3, 12), b=conv(12, 4))


@ENTRIES(3, 5, 7)
def channel_shuffle_op() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.b(F.channel_shuffle(F.relu(m.a(x)), 3))), a=conv(3, 12), b=conv(12, 4)
    )


@ENTRIES(3, 5, 7)
def channel_shuffle_grouped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.c(F.relu(m.b(F.channel_shuffle(F.relu(m.a(x)), 3)))))

    return Net(forward, a=conv(3, 12), b=conv(12, 15, groups=3), c=conv(15, 4))


@ENTRIES(3, 5, 7)
def channel_flip() -> nn.Module:
    return Net(lambda m, x: pooled(m.b(F.relu(m.a(x)).flip(1))), a=conv(3, 8), b=conv(8, 4))


@ENTRIES(3, 5, 7, refused="they are moved by a fixed number of places (op roll at patterns.py")
def channel_roll() -> nn.Module:
    return Net(lambda m, x: pooled(m.b(F.relu(m.a(x)).roll(3, 1))), a=conv(3, 8), b=conv(8, 4))


@ENTRIES(3, 5, 7)
def channel_slice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return pooled(m.b(y[:, :5]) + m.c(y[:, 3:]))

    return Net(forward, a=conv(3, 9), b=conv(5, 4), c=conv(6, 4))


@ENTRIES(3, 5, 7)
def channel_stride() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return pooled(m.b(y[:, ::2]) + m.c(y[:, 1::2]))

    return Net(forward, a=conv(3, 9), b=conv(5, 4), c=conv(4, 4))


@ENTRIES(3, 5, 7)
def index_select() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        return pooled(m.c(y.index_select(1, torch.tensor([0, 2, 3, 7]))))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), c=conv(4, 5))


@ENTRIES(3, 5, 7)
def narrow_and_repeat() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.b(F.relu(m.a(x)).repeat(1, 2, 1, 1)))

    return Net(forward, a=conv(3, 8), b=conv(16, 5))


@ENTRIES(3, 5, 7)
def repeat_interleave() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.b(F.relu(m.a(x)).repeat_interleave(3, 1)))

    return Net(forward, a=conv(3, 8), b=conv(24, 5))


@ENTRIES(3, 5, 7)
def pixel_shuffle() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(F.pixel_shuffle(m.b(F.relu(m.a(x))), 2)))),
        a=conv(3, 9), b=conv(9, 20), c=conv(5, 4),
    )  # fmt: skip


@ENTRIES(3, 6, 10)
def pixel_unshuffle() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.b(F.pixel_unshuffle(F.relu(m.a(x)), 2))), a=conv(3, 5), b=conv(20, 4)
    )


@ENTRIES(3, 6, 10)
def space_to_depth() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        parts = [y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]]
        return pooled(m.b(torch.cat(parts, 1)))

    return Net(forward, a=conv(3, 5), b=conv(20, 4))


@ENTRIES(3, 5, 7)
def channels_last_linear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.gelu(m.a(x)).permute(0, 2, 3, 1))
        return pooled(m.c(F.gelu(y).permute(0, 3, 1, 2)))

    return Net(forward, a=conv(3, 8), b=nn.Linear(8, 11), c=conv(11, 4))


# --- concatenation, split, gates ---------------------------------------------------------------


@ENTRIES(3, 5, 7)
def csp_split_concat() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = F.silu(m.a(x)).split([4, 6], 1)
        return pooled(m.d(torch.cat([first, m.c(F.silu(m.b(second))), second], 1)))

    return Net(forward, a=conv(3, 10), b=conv(6, 7), c=conv(7, 5), d=conv(15, 4))


@ENTRIES(3, 5, 7)
def csp_chunk_residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = list(F.silu(m.a(x)).chunk(2, 1))
        parts.append(parts[-1] + m.c(F.silu(m.b(parts[-1]))))
        return pooled(m.d(torch.cat(parts, 1)))

    return Net(forward, a=conv(3, 10), b=conv(5, 7), c=conv(7, 5), d=conv(15, 4))


@ENTRIES(3, 5, 7)
def dense_concat() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        for layer in (m.b, m.c):
            y = torch.cat([y, F.relu(layer(y))], 1)
        return pooled(m.d(y))

    return Net(forward, a=conv(3, 6), b=conv(6, 5), c=conv(11, 7), d=conv(18, 4))


@ENTRIES(3, 5, 7)
def concat_with_input() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.b(torch.cat([x, F.relu(m.a(x))], 1))), a=conv(3, 6), b=conv(9, 4)
    )


@ENTRIES(3, 5, 7)
def stack_and_sum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1).relu()))

    return Net(forward, a=conv(3, 6), b=conv(3, 6), c=conv(6, 4))


@ENTRIES(3, 5, 7)
def stack_and_flatten() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.c(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)))

    return Net(forward, a=conv(3, 6), b=conv(3, 6), c=conv(12, 4))


def gated(x: Tensor, axis: int) -> Tensor:
    """Let one half of an axis gate the other."""
    value, gate = x.chunk(2, axis)
    return value * torch.sigmoid(gate)


@ENTRIES(3, 5, 7)
def glu_chunk_channels() -> nn.Module:
    return Net(lambda m, x: pooled(m.b(gated(m.a(x), 1))), a=conv(3, 14), b=conv(7, 4))


@ENTRIES(5, 6)
def glu_chunk_last() -> nn.Module:
    return Net(lambda m, x: m.b(gated(m.a(x), 2)), a=nn.Linear(6, 14), b=nn.Linear(7, 4))


@ENTRIES(5, 6)
def glu_chunk_minus_one() -> nn.Module:
    return Net(lambda m, x: m.b(gated(m.a(x), -1)), a=nn.Linear(6, 14), b=nn.Linear(7, 4))


@ENTRIES(5, 6)
def glu_interleaved() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y[..., ::2] * torch.sigmoid(y[..., 1::2]))

    return Net(forward, a=nn.Linear(6, 14), b=nn.Linear(7, 4))


@ENTRIES(3, 5, 7)
def glu_functional_channels() -> nn.Module:
    return Net(lambda m, x: pooled(m.b(F.glu(m.a(x), 1))), a=conv(3, 14), b=conv(7, 4))


@ENTRIES(5, 6)
def glu_functional_last() -> nn.Module:
    return Net(lambda m, x: m.b(m.g(m.a(x))), a=nn.Linear(6, 14), g=nn.GLU(), b=nn.Linear(7, 4))


@ENTRIES(5, 6)
def gate_of_another_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(F.silu(m.a(x)) * m.b(x))

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(6, 9), c=nn.Linear(9, 4))


@ENTRIES(3, 5, 7)
def squeeze_excite() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        gate = torch.sigmoid(m.c(F.relu(m.b(y.mean((2, 3), keepdim=True)))))
        return pooled(m.d(y * gate))

    return Net(forward, a=conv(3, 10), b=conv(10, 5, 1), c=conv(5, 10, 1), d=conv(10, 4))


@ENTRIES(3, 5, 7)
def spatial_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return pooled(m.c(y * torch.sigmoid(m.b(y))))

    return Net(forward, a=conv(3, 10), b=conv(10, 1), c=conv(10, 4))


@ENTRIES(3, 5, 7)
def cbam_pooled_over_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return pooled(m.d(y * torch.sigmoid(m.c(maps))))

    return Net(forward, a=conv(3, 9), b=conv(9, 10), c=conv(2, 1), d=conv(10, 4))


# --- kinds of convolution ---------------------------------------------------------------------


@ENTRIES(3, 5, 7)
def grouped() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 12), b=conv(12, 15, groups=3), c=conv(15, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def grouped_transposed() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 12), b=nn.ConvTranspose2d(12, 15, 3, 2, groups=3), c=conv(15, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def transposed() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 10), b=nn.ConvTranspose2d(10, 7, 3, 2), c=conv(7, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def depthwise() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 9), b=conv(9, 9, groups=9), c=conv(9, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def depthwise_multiplier() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.n(m.b(F.relu(m.a(x))))))),
        a=conv(3, 9), b=conv(9, 18, groups=9), n=nn.BatchNorm2d(18), c=conv(18, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def depthwise_multiplier_three() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 7), b=conv(7, 21, groups=7, bias=False), c=conv(21, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def depthwise_transposed() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 9), b=nn.ConvTranspose2d(9, 9, 4, 2, groups=9), c=conv(9, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7, refused="each feeds several of a transposed layer")
def depthwise_transposed_multiplier() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.b(F.relu(m.a(x)))))),
        a=conv(3, 7), b=nn.ConvTranspose2d(7, 14, 3, 2, groups=7), c=conv(14, 4),
    )  # fmt: skip


@ENTRIES(1, 5, 7, refused="no layer writes them")
def grouped_from_one_channel() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.b(F.relu(m.a(x.expand(-1, 6, -1, -1))))),
        a=conv(6, 12, groups=6), b=conv(12, 5),
    )  # fmt: skip


@ENTRIES(4, 17)
def conv1d_causal() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(F.pad(x, (4, 0))))).mean(-1)

    return Net(forward, a=nn.Conv1d(4, 9, 3, dilation=2), b=nn.Conv1d(9, 5, 1))


@ENTRIES(2, 5, 6, 7)
def conv3d() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.relu(m.n(m.a(x)))).mean((2, 3, 4)),
        a=nn.Conv3d(2, 9, 3), n=nn.BatchNorm3d(9), b=nn.Conv3d(9, 4, 2),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def conv_as_unfold() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        columns = F.unfold(y, 3, padding=1).transpose(1, 2)
        return m.b(columns).mean(1)

    return Net(forward, a=conv(3, 8), b=nn.Linear(72, 5))


@ENTRIES(3, 5, 7)
def functional_conv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m.b(F.relu(F.conv2d(x, m.weight, m.bias, padding=1))))

    return Net(
        forward,
        weight=nn.Parameter(torch.randn(8, 3, 3, 3)),
        bias=nn.Parameter(torch.randn(8)),
        b=conv(8, 4),
    )


@ENTRIES(3, 9, 9)
def dynamic_kernel_conv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return pooled(m.b(y) * m.c(y.mean((2, 3), keepdim=True)))

    return Net(forward, a=conv(3, 8), b=conv(8, 5), c=conv(8, 5, 1))


# --- products ----------------------------------------------------------------------------------


@ENTRIES(6)
def linear_with_own_weight() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.relu(F.linear(x, m.weight, m.bias))),
        weight=nn.Parameter(torch.randn(11, 6)), bias=nn.Parameter(torch.randn(11)),
        b=nn.Linear(11, 4),
    )  # fmt: skip


@ENTRIES(6)
def matmul_with_own_weights() -> nn.Module:
    return Net(
        lambda m, x: F.relu(x @ m.up + m.shift) @ m.down,
        up=nn.Parameter(torch.randn(6, 11)), shift=nn.Parameter(torch.randn(11)),
        down=nn.Parameter(torch.randn(11, 4)),
    )  # fmt: skip


@ENTRIES(5, 6)
def einsum_with_own_weights() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("btf,fo->bto", F.relu(torch.einsum("btd,df->btf", x, m.up)), m.down)

    return Net(forward, up=nn.Parameter(torch.randn(6, 11)), down=nn.Parameter(torch.randn(11, 4)))


@ENTRIES(6)
def linear_of_another_linear() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.relu(F.linear(x, m.a.weight, m.a.bias))),
        a=nn.Linear(6, 11), b=nn.Linear(11, 4),
    )  # fmt: skip


@ENTRIES(6, refused="transposed, is tied to read them")
def tied_autoencoder() -> nn.Module:
    return Net(
        lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()), a=nn.Linear(6, 11, bias=False)
    )


@ENTRIES(5)
def outer_product() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        outer = m.a(x).unsqueeze(2) * m.b(x).unsqueeze(1)
        return m.c(outer.flatten(1))

    return Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 7), c=nn.Linear(42, 4))


@ENTRIES(example=lambda: (normal(2, 5), normal(2, 6, seed=2)))
def bilinear() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.d(F.relu(m.c(F.relu(m.a(x)), F.relu(m.b(y)))))

    return Net(
        forward, a=nn.Linear(5, 7), b=nn.Linear(6, 8), c=nn.Bilinear(7, 8, 9), d=nn.Linear(9, 4)
    )


@ENTRIES(5, 6, refused="they only meet in a product")
def inner_products() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) @ m.b(x).transpose(1, 2)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(6, 9))


@ENTRIES(6)
def cosine_head() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.normalize(F.relu(m.b(F.relu(m.a(x))))), F.normalize(m.c.weight))

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 10), c=nn.Linear(10, 4))


@ENTRIES(6, 5, 4)
def complex_spectrum_of_pictures() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(F.relu(m.a(x)))
        y = y * torch.view_as_complex(m.filter)
        return pooled(m.b(torch.fft.irfft2(y, s=(5, 4))))

    return Net(forward, a=conv(6, 8), filter=nn.Parameter(torch.randn(8, 5, 3, 2)), b=conv(8, 7))


@ENTRIES(5, 6)
def complex_spectrum_mixing_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.gelu(m.b(F.gelu(m.a(x))))
        return m.c(torch.fft.fft(torch.fft.fft(y, dim=-1), dim=-2).real)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 10), c=nn.Linear(10, 4))


@ENTRIES(5, 6)
def complex_pairs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(m.a(x).unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None]).to(pairs)
        return m.b(torch.view_as_real(turned).flatten(-2))

    return Net(forward, a=nn.Linear(6, 10), b=nn.Linear(10, 4))


# --- norms and scales --------------------------------------------------------------------------


@ENTRIES(3, 5, 7)
def batch_norms() -> nn.Module:
    return nn.Sequential(
        conv(3, 9), nn.BatchNorm2d(9), nn.ReLU(), conv(9, 8), nn.BatchNorm2d(8, affine=False),
        nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def instance_norms() -> nn.Module:
    return nn.Sequential(
        conv(3, 9), nn.InstanceNorm2d(9, affine=True), nn.ReLU(), conv(9, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LeakyReLU(), conv(8, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def instance_norm_bare() -> nn.Module:
    return nn.Sequential(conv(3, 9), nn.InstanceNorm2d(9), nn.ReLU(), conv(9, 4))


@ENTRIES(3, 5, 7)
def group_norms() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 10), nn.GroupNorm(1, 10), nn.ReLU(),
        conv(10, 7), nn.GroupNorm(7, 7), conv(7, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def layer_norm_over_pictures() -> nn.Module:
    return nn.Sequential(
        conv(3, 9), nn.ReLU(), conv(9, 8), nn.LayerNorm([8, 5, 7]), nn.ReLU(), conv(8, 4)
    )


@ENTRIES(5, 6)
def layer_norm_residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.c(F.gelu(m.b(m.n(y))))
        return m.d(m.o(y))

    return Net(
        forward, a=nn.Linear(6, 10), n=nn.LayerNorm(10), b=nn.Linear(10, 13), c=nn.Linear(13, 10),
        o=nn.LayerNorm(10), d=nn.Linear(10, 4),
    )  # fmt: skip


@ENTRIES(5, 6)
def rms_norm_residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.c(F.gelu(m.b(m.n(y))))
        return m.d(m.o(y))

    return Net(
        forward, a=nn.Linear(6, 10), n=nn.RMSNorm(10), b=nn.Linear(10, 13), c=nn.Linear(13, 10),
        o=nn.RMSNorm(10), d=nn.Linear(10, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def layer_norm_of_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.n(F.gelu(m.b(F.gelu(m.a(x)))).permute(0, 2, 3, 1))
        return pooled(m.c(y.permute(0, 3, 1, 2)))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), n=nn.LayerNorm(8), c=conv(8, 4))


@ENTRIES(3, 5, 7)
def layer_scale() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.gamma * m.c(F.gelu(m.b(y)))
        return pooled(m.d(y))

    return Net(
        forward, a=conv(3, 8), b=conv(8, 11, 1), c=conv(11, 8, 1), d=conv(8, 4),
        gamma=nn.Parameter(torch.rand(8, 1, 1)),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(conv(3, 9)), nn.ReLU(),
        parametrizations.weight_norm(conv(9, 8), dim=1), nn.ReLU(),
        parametrizations.weight_norm(conv(8, 4)),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def spectral_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(conv(3, 9)), nn.ReLU(),
        parametrizations.spectral_norm(conv(9, 8)), nn.ReLU(), conv(8, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def standardised_weights() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.b.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return pooled(m.c(F.relu(F.conv2d(F.relu(m.a(x)), w, m.b.bias, padding=1))))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), c=conv(8, 4))


# --- attention ---------------------------------------------------------------------------------


def by_heads(x: Tensor, heads: int) -> Tensor:
    """Write tokens by heads."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@ENTRIES(5, 7)
def attention_einsum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 5, -1, 4) for p in (m.q, m.k, m.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return m.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    return Net(
        forward, q=nn.Linear(7, 12), k=nn.Linear(7, 12), v=nn.Linear(7, 12), o=nn.Linear(12, 6)
    )


@ENTRIES(5, 7)
def attention_fused_qkv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 5, 3, -1, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return m.o((weights @ v).transpose(1, 2).reshape(2, 5, -1))

    return Net(forward, qkv=nn.Linear(7, 36), o=nn.Linear(12, 6))


@ENTRIES(5, 7)
def attention_fused_interleaved() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 5, -1, 3, 4).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.o(y.transpose(1, 2).reshape(2, 5, -1))

    return Net(forward, qkv=nn.Linear(7, 36), o=nn.Linear(12, 6))


@ENTRIES(5, 7)
def attention_one_head() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        weights = (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1)
        return m.o(weights @ m.v(x))

    return Net(
        forward, q=nn.Linear(7, 9), k=nn.Linear(7, 9), v=nn.Linear(7, 11), o=nn.Linear(11, 6)
    )


@ENTRIES(5, 7)
def attention_grouped_queries() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            by_heads(m.q(x), m.q.out_features // 3),
            *(by_heads(p(x), p.out_features // 3) for p in (m.k, m.v)),
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.o(y.transpose(1, 2).flatten(2))

    return Net(
        forward, q=nn.Linear(7, 24), k=nn.Linear(7, 12), v=nn.Linear(7, 12), o=nn.Linear(24, 5)
    )


@ENTRIES(5, 7)
def attention_repeated_keys() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q = by_heads(m.q(x), m.q.out_features // 3)
        k, v = (
            by_heads(p(x), p.out_features // 3)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
            for p in (m.k, m.v)
        )
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return m.o(y.transpose(1, 2).flatten(2))

    return Net(
        forward, q=nn.Linear(7, 24), k=nn.Linear(7, 12), v=nn.Linear(7, 12), o=nn.Linear(24, 5)
    )


@ENTRIES(5, 7)
def attention_linear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
        state = torch.einsum("btd,bte->bde", k, v)
        return m.o(torch.einsum("btd,bde->bte", q, state))

    return Net(
        forward, q=nn.Linear(7, 9), k=nn.Linear(7, 9), v=nn.Linear(7, 11), o=nn.Linear(11, 6)
    )


@ENTRIES(5, 12)
def multihead_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.mha(x, x, x)[0])

    return Net(forward, mha=nn.MultiheadAttention(12, 4, batch_first=True), o=nn.Linear(12, 5))


@ENTRIES(5, 12)
def multihead_attention_sequence_first() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.mha(x, x, x, need_weights=False)[0])

    return Net(forward, mha=nn.MultiheadAttention(12, 4, bias=False), o=nn.Linear(12, 5))


@ENTRIES(example=lambda: (normal(2, 5, 12), normal(2, 6, 7, seed=2)))
def multihead_attention_kdim() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.o(m.mha(x, y, y)[0])

    mha = nn.MultiheadAttention(12, 4, kdim=7, vdim=7, batch_first=True)
    return Net(forward, mha=mha, o=nn.Linear(12, 5))


@ENTRIES(5, 12)
def multihead_attention_bias_kv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.mha(x, x, x)[0])

    mha = nn.MultiheadAttention(12, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    return Net(forward, mha=mha, o=nn.Linear(12, 5))


@ENTRIES(5, 12)
def multihead_attention_masked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        return m.o(m.mha(m.i(x), m.i(x), m.i(x), attn_mask=mask, average_attn_weights=False)[0])

    return Net(
        forward, i=nn.Linear(12, 8), mha=nn.MultiheadAttention(8, 2, batch_first=True),
        o=nn.Linear(8, 5),
    )  # fmt: skip


@ENTRIES(5, 12)
def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, 17, batch_first=True)
    return Net(lambda m, x: m.o(m.e(x)), e=nn.TransformerEncoder(layer, 2), o=nn.Linear(12, 5))


@ENTRIES(5, 12)
def transformer_encoder_norm_first() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 17, activation="gelu", norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
    return Net(lambda m, x: m.o(m.e(x)), e=encoder, o=nn.Linear(12, 5))


@ENTRIES(example=lambda: (normal(2, 5, 12), normal(2, 6, 12, seed=2)))
def transformer_decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(12, 4, 17, batch_first=True)
    return Net(
        lambda m, x, y: m.o(m.d(x, y)), d=nn.TransformerDecoder(layer, 2), o=nn.Linear(12, 5)
    )


@ENTRIES(example=lambda: (normal(2, 5, 12), normal(2, 6, 12, seed=2)))
def transformer() -> nn.Module:
    model = nn.Transformer(12, 4, 1, 1, 17, batch_first=True)
    return Net(lambda m, x, y: m.o(m.t(x, y)), t=model, o=nn.Linear(12, 5))


@ENTRIES(example=lambda: tokens(23, 2, 6))
def transformer_of_tokens() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.e(m.t(x) + m.p[:, : x.shape[1]]))

    return Net(
        forward, t=nn.Embedding(23, 12), p=nn.Parameter(torch.randn(1, 9, 12)),
        e=nn.TransformerEncoderLayer(12, 4, 17, batch_first=True), o=nn.Linear(12, 5),
    )  # fmt: skip


@ENTRIES(example=lambda: tokens(23, 2, 6))
def class_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.token.expand(len(x), -1, -1), m.t(x)], 1)
        return m.o(m.b(F.relu(m.a(y)))[:, 0])

    return Net(
        forward, t=nn.Embedding(23, 12), token=nn.Parameter(torch.randn(1, 1, 12)),
        a=nn.Linear(12, 17), b=nn.Linear(17, 9), o=nn.Linear(9, 5),
    )  # fmt: skip


# --- lookups, writes, routes -------------------------------------------------------------------


@ENTRIES(example=lambda: tokens(23, 2, 6))
def embedding_bag() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.relu(m.a(m.t(x)))),
        t=nn.EmbeddingBag(23, 9, mode="mean"), a=nn.Linear(9, 8), b=nn.Linear(8, 4),
    )  # fmt: skip


@ENTRIES(5, 6)
def experts_by_index() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        flat = F.relu(m.a(x)).flatten(0, 1)
        choice, out = m.router(flat).argmax(-1), torch.zeros(10, 4, dtype=x.dtype)
        for number, (up, down) in enumerate(zip(m.ups, m.downs, strict=True)):
            rows = (choice == number).nonzero().flatten()
            out.index_add_(0, rows, down(F.gelu(up(flat[rows]))))
        return out.view(2, 5, 4)

    return Net(
        forward, a=nn.Linear(6, 9), router=nn.Linear(9, 3),
        ups=nn.ModuleList(nn.Linear(9, 7 + i) for i in range(3)),
        downs=nn.ModuleList(nn.Linear(7 + i, 4) for i in range(3)),
    )  # fmt: skip


@ENTRIES(5, 6)
def experts_by_weight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        gates = m.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("btd,edf->betf", x, m.up))
        return torch.einsum("betf,efo,bte->bto", hidden, m.down, gates)

    return Net(
        forward, router=nn.Linear(6, 3), up=nn.Parameter(torch.randn(3, 6, 11)),
        down=nn.Parameter(torch.randn(3, 11, 4)),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def write_into_slices() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 11, 5, 7, dtype=x.dtype)
        out[:, :6] = F.relu(m.a(x))
        out[:, 6:] = F.relu(m.b(x))
        return pooled(m.c(out))

    return Net(forward, a=conv(3, 6), b=conv(3, 5), c=conv(11, 4))


@ENTRIES(3, 5, 7)
def write_into_new_slices() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = F.relu(m.a(x)), F.relu(m.b(x))
        cut = first.shape[1]
        out = x.new_empty(len(x), cut + second.shape[1], 5, 7)
        out[:, :cut] = first
        out[:, cut:].copy_(second)
        return pooled(m.c(out))

    return Net(forward, a=conv(3, 6), b=conv(3, 5), c=conv(11, 4))


@ENTRIES(3, 5, 7)
def write_over_a_part() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x)).clone()
        y[:, 2:6] = m.b(x)
        return pooled(m.c(y))

    return Net(forward, a=conv(3, 9), b=conv(3, 4), c=conv(9, 5))


@ENTRIES(3, 5, 7)
def write_through_a_view() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 3:7].add_(m.b(x))
        y[:, :, 0] = 0.5
        y.flatten(2).relu_()
        return pooled(m.c(y))

    return Net(forward, a=conv(3, 9), b=conv(3, 4), c=conv(9, 5))


@ENTRIES(3, 5, 7)
def shift_of_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, fold = F.relu(m.a(x)), 3
        out = torch.zeros_like(y)
        out[:, :fold, 1:] = y[:, :fold, :-1]
        out[:, fold:] = y[:, fold:]
        return pooled(m.b(out))

    return Net(forward, a=conv(3, 9), b=conv(9, 5))


@ENTRIES(5, 6)
def scatter_over_tokens() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        sums = torch.zeros(2, 3, y.shape[-1], dtype=x.dtype)
        places = torch.tensor([0, 2, 1, 0, 2])[None, :, None].expand_as(y)
        return m.b(sums.scatter_add(1, places, y))

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 4))


@ENTRIES(5, 6)
def graph_convolution() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        tails, heads = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 3])
        y = F.relu(m.a(x))
        y = torch.zeros_like(y).index_add(1, heads, y[:, tails]) + y
        return m.b(y).mean(1)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 4))


@ENTRIES(5, 6)
def gather_tokens() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        best = m.s(y).squeeze(-1).topk(2, 1).indices
        return m.b(y.gather(1, best[..., None].expand(-1, -1, y.shape[-1])))

    return Net(forward, a=nn.Linear(6, 9), s=nn.Linear(9, 1), b=nn.Linear(9, 4))


@ENTRIES(5, 6)
def masked() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = torch.where(y > 0, y, 0.1 * y).masked_fill(x[..., :1] > 1, 0.3)
        return m.b(y)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 4))


@ENTRIES(5, 6)
def fixed_mask_buffer() -> nn.Module:
    model = Net(lambda m, x: m.b(F.relu(m.a(x)) * m.mask), a=nn.Linear(6, 9), b=nn.Linear(9, 4))
    model.register_buffer("mask", torch.rand(9))
    return model


@ENTRIES(5, 6)
def data_dependent_branch() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y) if x.sum() > 1e9 else m.c(y)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 4), c=nn.Linear(9, 4))


@ENTRIES(6)
def sorted_features() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(F.relu(m.a(x))).sort(-1).values)

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 8), c=nn.Linear(8, 4))


@ENTRIES(6)
def softmax_over_features() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(F.relu(m.a(x))).softmax(-1))

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 8), c=nn.Linear(8, 4))


@ENTRIES(6)
def maxout() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x).unflatten(1, (-1, 3)).amax(2))

    return Net(forward, a=nn.Linear(6, 21), b=nn.Linear(7, 4))


@ENTRIES(6)
def sum_of_pieces() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x)).view(2, 3, 7).sum(1))

    return Net(forward, a=nn.Linear(6, 21), b=nn.Linear(7, 4))


# --- inputs, outputs, sharing ------------------------------------------------------------------


@ENTRIES(example=lambda: {"image": normal(2, 3, 5, 7), "words": tokens(23, 2, 6)})
def inputs_by_name() -> nn.Module:
    def forward(m: Any, image: Tensor, words: Tensor) -> dict[str, Any]:
        seen, read = pooled(F.relu(m.a(image))), F.relu(m.b(m.t(words))).mean(1)
        both = torch.cat([seen, read], 1)
        return {"label": m.c(both), "box": (m.d(seen), [m.e(read)])}

    return Net(
        forward, a=conv(3, 9), t=nn.Embedding(23, 8), b=nn.Linear(8, 7), c=nn.Linear(16, 4),
        d=nn.Linear(9, 5), e=nn.Linear(7, 2),
    )  # fmt: skip


@dataclass
class Answer:
    """What a model may return."""

    first: Tensor
    second: Tensor | None


@ENTRIES(6)
def output_dataclass() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Answer:
        y = F.relu(m.a(x))
        return Answer(m.b(F.relu(m.c(y))), m.d(y))

    return Net(forward, a=nn.Linear(6, 9), c=nn.Linear(9, 8), b=nn.Linear(8, 4), d=nn.Linear(9, 3))


@ENTRIES(3, 5, 7)
def output_features() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(m.b(F.relu(m.a(x))))
        return y, pooled(m.c(y))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), c=conv(8, 4))


@ENTRIES(3, 5, 7)
def frozen_trunk() -> nn.Module:
    trunk = nn.Sequential(conv(3, 9), nn.BatchNorm2d(9), nn.ReLU(), conv(9, 8)).requires_grad_(
        False
    )
    return Net(lambda m, x: pooled(m.c(F.relu(m.t(x)))), t=trunk, c=conv(8, 4))


@ENTRIES(6)
def one_layer_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.c(F.relu(m.b(F.relu(m.b(y)))))

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 9), c=nn.Linear(9, 4))


@ENTRIES(example=lambda: (normal(2, 6), normal(2, 6, seed=2)))
def siamese() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        first, second = (m.b(F.relu(m.a(t))) for t in (x, y))
        return m.c((first - second).abs())

    return Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 8), c=nn.Linear(8, 4))


@ENTRIES(3, 5, 7)
def pad_shortcut() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return pooled(m.c(F.relu(m.b(y) + F.pad(y, (0, 0, 0, 0, 2, 3)))))

    return Net(forward, a=conv(3, 6), b=conv(6, 11), c=conv(11, 4))


@ENTRIES(3, 5, 7)
def broadcast_of_one_channel() -> nn.Module:
    return Net(
        lambda m, x: pooled(m.c(F.relu(m.a(x) * m.b(x)))),
        a=conv(3, 9), b=conv(3, 1), c=conv(9, 4),
    )  # fmt: skip


@ENTRIES(3, 5, 7)
def constant_table_added() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        return pooled(m.c(y + torch.linspace(0, 1, 8, dtype=x.dtype)[:, None, None]))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), c=conv(8, 4))


@ENTRIES(3, 6, 10)
def upsampled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.avg_pool2d(F.relu(m.a(x)), 2)
        y = F.interpolate(F.relu(m.b(y)), scale_factor=2, mode="bilinear", align_corners=False)
        return pooled(m.c(torch.cat([y, x], 1)))

    return Net(forward, a=conv(3, 9), b=conv(9, 8), c=conv(11, 4))


@ENTRIES(3, 5, 7)
def sampled_at_a_grid() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        theta = m.t(pooled(y)).view(2, 2, 3)
        grid = F.affine_grid(theta, [2, 1, 5, 7], align_corners=False)
        return pooled(m.b(F.grid_sample(y, grid, align_corners=False)))

    return Net(forward, a=conv(3, 9), t=nn.Linear(9, 6), b=conv(9, 4))


@ENTRIES(6, refused="they reach the model's output")
def nothing_inside() -> nn.Module:
    return Net(lambda m, x: m.a(x), a=nn.Linear(6, 9))
