"""What a linear layer sees: its input as rows of a matrix, one row per output position."""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.structure.layers import Conv, channels, is_dense, kernel, lies_across, tensor

__all__ = [
    "columns",
    "full_weight",
    "output_rows",
    "pick",
    "positions",
    "rows",
    "supported",
    "taps",
]

_Axis = tuple[int, int, int, tuple[int, int], int]


def columns(module: nn.Module) -> int:
    """Count the columns of a layer's design matrix: input channels times taps laid out."""
    return (channels(module, "in") or 0) * taps(module)


def taps(module: nn.Module) -> int:
    """Count the columns of one channel: the kernel's size, 1 for a layer that is not unfolded."""
    return kernel(module) if supported(module) else 1


def supported(module: nn.Module) -> bool:
    """Tell whether a layer's input can be unfolded: dense, or a 1-D or 2-D convolution."""
    if is_dense(module):
        return True
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and not module.transposed


def positions(module: nn.Module, x: Tensor) -> int:
    """Count a layer's output positions per sample; input positions where it is not unfolded."""
    if is_dense(module):
        return math.prod(x.shape[1:-1])
    if not supported(module):
        return x[0, 0].numel()
    total = 1
    for size, k, s, p, d in _geometry(module, x):
        total *= (size + sum(p) - d * (k - 1) - 1) // s + 1
    return total


def _geometry(module: nn.Module, x: Tensor) -> list[_Axis]:
    """List size, kernel, stride, padding and dilation of every spatial axis."""
    assert isinstance(module, Conv)
    pads = module._reversed_padding_repeated_twice
    sides = [(pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)][::-1]
    axes = (x.shape[2:], module.kernel_size, module.stride, sides, module.dilation)
    return list(zip(*axes, strict=True))


def pick(total: int, wanted: int, path: str, seed: int) -> Tensor:
    """Choose positions once and for all: the same for every sample, batch and rank.

    Args:
        total: positions there are.
        wanted: positions to choose.
        path: the layer, so that layers differ.
        seed: the policy's seed.

    Returns:
        sorted int64 indices.
    """
    if wanted >= total:
        return torch.arange(total, device="cpu")
    # whatever the user's default device is, a generator draws the same on the CPU alone
    generator = torch.Generator("cpu").manual_seed(seed ^ zlib.crc32(path.encode()))
    drawn = torch.randperm(total, generator=generator, device="cpu")
    return drawn[:wanted].sort().values


def rows(module: nn.Module, x: Tensor, at: Tensor) -> Float[Tensor, "rows columns"]:
    """Lay a layer's input out as rows, channel by channel, tap by tap.

    Args:
        module: dense layer, or 1-D or 2-D convolution of any stride, padding and dilation; of
            any other convolution the channels are taken as they come.
        x: its input.
        at: positions to take of every sample, of the output where it is unfolded.

    Returns:
        `samples * len(at)` rows; the output of a layer that is unfolded is there
        `rows @ full_weight.T + bias`.
    """
    if not supported(module):
        return output_rows(module, x, at)
    at = at.to(x.device)
    if is_dense(module):
        return _by_position(x)[:, at].flatten(0, 1)
    assert isinstance(module, Conv)
    geometry = _geometry(module, x)
    if isinstance(module, nn.Conv1d):  # a picture one pixel high
        x, geometry = x.unsqueeze(2), [(1, 1, 1, (0, 0), 1), *geometry]
    return _conv_rows(x, at, geometry, module.padding_mode)


def _conv_rows(x: Tensor, at: Tensor, geometry: list[_Axis], mode: str) -> Tensor:
    (_, kh, sh, ph, dh), (_, kw, sw, pw, dw) = geometry
    if any((*ph, *pw)):
        x = F.pad(x, (*pw, *ph), mode="constant" if mode == "zeros" else mode)
    high, wide = (
        (x.shape[2] - dh * (kh - 1) - 1) // sh + 1,
        (x.shape[3] - dw * (kw - 1) - 1) // sw + 1,
    )
    sn, sc, sy, sx = x.stride()
    windows = x.as_strided(
        (len(x), x.shape[1], high, wide, kh, kw), (sn, sc, sy * sh, sx * sw, sy * dh, sx * dw)
    )
    taken = windows[:, :, at // wide, at % wide]  # samples, channels, positions, kh, kw
    return taken.permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)


def _by_position(x: Tensor) -> Float[Tensor, "samples positions channels"]:
    """Lay out what has channels last; there may be no samples, so no size is left open."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def output_rows(module: nn.Module, y: Tensor, at: Tensor) -> Float[Tensor, "rows out"]:
    """Lay a layer's output out like `rows` lays its input.

    Args:
        module: the layer.
        y: its output, or anything of that shape.
        at: output positions to take of every sample.

    Returns:
        `samples * len(at)` rows, one column per output channel.
    """
    at = at.to(y.device)
    if is_dense(module):
        return _by_position(y)[:, at].flatten(0, 1)
    return y.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1)


def full_weight(module: nn.Module) -> Float[Tensor, "out columns"]:
    """Write a layer's weight as one matrix, with zeros where a grouped convolution has none.

    Args:
        module: dense layer or convolution.

    Returns:
        float64.
    """
    weight = tensor(module, "weight").double()
    if lies_across(module):
        return weight.T
    if not isinstance(module, Conv) or module.groups == 1:
        if isinstance(module, Conv) and module.transposed:
            weight = weight.transpose(0, 1)
        return weight.flatten(1)
    out, each = module.out_channels, module.in_channels // module.groups
    full = weight.new_zeros(out, module.in_channels, kernel(module))
    if module.transposed:  # a row for every channel read, a column for every filter of its group
        weight = weight.unflatten(0, (module.groups, each)).transpose(1, 2).flatten(0, 1)
    for o in range(out):
        start = o // (out // module.groups) * each
        full[o, start : start + each] = weight[o].flatten(1)
    return full.flatten(1)
