"""Which modules are affine layers, and their stencils: read off and written back."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.geometry import Geometry
from torch_otprune.fold.stencil import Stencil, exact
from torch_otprune.structure.layers import BatchNorm, Conv, tensor

__all__ = [
    "ACTIVATIONS",
    "AFFINE",
    "DROPOUTS",
    "POOLS",
    "describe",
    "identical",
    "is_weighted",
    "read",
    "scale_shift",
    "why_not",
    "write",
]

POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_AXES = {kind: axes for kinds in (_CONVS, _TRANSPOSED, POOLS) for axes, kind in enumerate(kinds, 1)}
AFFINE = (nn.Linear, *_CONVS, *_TRANSPOSED, *_NORMS, *POOLS)
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU,
    nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_PICTURE = 4


def is_weighted(module: nn.Module) -> TypeGuard[nn.Linear | Conv]:
    """Tell whether a module is a dense layer or a convolution."""
    return isinstance(module, (nn.Linear, Conv))


def why_not(module: nn.Module) -> str | None:
    """Tell why a module's weights alone do not say what it computes.

    Args:
        module: any module.

    Returns:
        one clause; None for a module of torch as torch made it.
    """
    kind = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weights are parametrised"
    if kind.__module__.split(".")[0] != "torch" or "forward" in vars(module):
        return f"{kind.__name__} has a forward of its own"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return "it carries hooks"
    if isinstance(module, BatchNorm) and module.running_mean is None:
        return "it normalises with the statistics of each batch"
    if isinstance(module, POOLS) and (module.ceil_mode or _averages_fewer(module)):
        return "its averages at the border are over fewer positions"
    return None


def _averages_fewer(pool: nn.Module) -> bool:
    return not pool.count_include_pad and any(_each(pool.padding, 1))


def describe(module: nn.Module, *, channels: int = 0, axes: int = 0) -> Geometry:
    """Read how an affine layer slides.

    Args:
        module: one of `AFFINE`.
        channels: of its input; only average pooling needs it.
        axes: spatial axes of its input; only batch-norm needs it.

    Returns:
        its geometry.

    Raises:
        StructureError: if the module is none of them, or not as torch made it.
    """
    why = why_not(module)
    if why is None and type(module) not in AFFINE:
        why = "it is no dense layer, convolution, batch-norm or average pooling"
    if why is not None:
        raise StructureError(
            f"a {type(module).__name__} does not fold: {why}.",
            where=repr(module),
            fix="leave it as it is.",
        )
    if isinstance(module, Conv):
        return _described(module)
    if isinstance(module, POOLS):
        return _pooled(module, channels)
    if isinstance(module, BatchNorm):
        ones, size = (1,) * axes, module.num_features
        shifts = bool(scale_shift(module)[1].any())
        return Geometry(
            size, size, ones, ones, ones, (0,) * axes, groups=size, bias=True, shifts=shifts
        )
    assert isinstance(module, nn.Linear)
    return Geometry(module.in_features, module.out_features, **_biased(module))


def _described(conv: Conv) -> Geometry:
    extent = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    padding, mode = conv.padding, str(conv.padding_mode)
    if isinstance(padding, str):
        uneven = padding == "same" and any(n % 2 for n in extent)
        mode = "uneven" if uneven else mode
        padding = tuple(n // 2 if padding == "same" else 0 for n in extent)
    padded = any(padding) or mode == "uneven"
    return Geometry(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.dilation,
        conv.stride,
        padding,
        groups=conv.groups,
        mode=mode if padded else "zeros",
        transposed=conv.transposed,
        **_biased(conv),
    )


def _biased(module: nn.Linear | Conv) -> dict[str, Any]:
    return {
        "bias": module.bias is not None,
        "shifts": module.bias is not None and bool(module.bias.any()),
    }


def _pooled(pool: nn.Module, channels: int) -> Geometry:
    axes = _AXES[type(pool)]
    taps, stride, padding = (_each(n, axes) for n in (pool.kernel_size, pool.stride, pool.padding))
    return Geometry(channels, channels, taps, (1,) * axes, stride, padding, groups=channels)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Write a batch-norm in evaluation mode as a scale and a shift per channel.

    Args:
        norm: with running statistics.

    Returns:
        both in float64.
    """
    assert isinstance(norm, BatchNorm)
    mean, var = (exact(tensor(norm, name)) for name in ("running_mean", "running_var"))
    scale = (var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * exact(norm.weight)
        return scale, exact(norm.bias) - mean * scale
    return scale, -mean * scale


def read(module: nn.Module, geometry: Geometry) -> Stencil:
    """Take an affine layer's numbers.

    Args:
        module: the layer.
        geometry: what `describe` says of it.

    Returns:
        its stencil.
    """
    g = geometry
    if isinstance(module, BatchNorm):
        scale, shift = scale_shift(module)
        return Stencil(g, scale.view(-1, 1, *g.taps), shift)
    if isinstance(module, POOLS):
        divisor = None if isinstance(module, nn.AvgPool1d) else module.divisor_override
        share = torch.full((g.out, 1, *g.taps), 1 / (divisor or prod(g.taps)), dtype=torch.float64)
        return Stencil(g, share, torch.zeros(g.out, dtype=torch.float64))
    weight = exact(tensor(module, "weight"))
    if g.transposed:
        weight = weight.unflatten(0, (g.groups, -1)).transpose(1, 2).flatten(0, 1)
    bias = exact(tensor(module, "bias")) if g.bias else weight.new_zeros(g.out)
    return Stencil(g, weight, bias)


def write(stencil: Stencil, like: nn.Linear | Conv) -> nn.Linear | Conv:
    """Make an ordinary module of a stencil.

    Args:
        stencil: the layer.
        like: one of the layers that it stands for; the new one gets its dtype, device and mode.

    Returns:
        a module that shares nothing with `like`.
    """
    g, old, weight = stencil.geometry, like.weight, stencil.weight
    if g.transposed:
        weight = weight.unflatten(0, (g.groups, -1)).transpose(1, 2).flatten(0, 1)
    weight = weight.to(old)
    if old.dim() == weight.dim() == _PICTURE and not old.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    new = copy.deepcopy(like) if identical(describe(like), g) else _shell(g)
    new.weight = nn.Parameter(weight.detach().clone(), requires_grad=old.requires_grad)
    bias = stencil.bias.to(old).detach().clone()
    new.bias = nn.Parameter(bias, requires_grad=old.requires_grad) if g.bias else None
    new.train(like.training)
    return new


def identical(first: Geometry, second: Geometry) -> bool:
    """Tell whether two layers slide alike, whatever their biases."""
    return replace(first, bias=second.bias, shifts=second.shifts) == second


def _shell(g: Geometry) -> nn.Linear | Conv:
    """Build a layer without numbers."""
    if not g.axes:
        return nn.Linear(g.into, g.out, device="meta")
    kind: Any = _CONVS[g.axes - 1]
    shell: Conv = kind(
        g.into,
        g.out,
        g.taps,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        padding_mode=g.mode,
        device="meta",
    )
    return shell
