"""Scales and shifts per channel: into the layer before them, or into the one behind."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.certificate import Certificate, Folded
from torch_otprune.fold.geometry import follow
from torch_otprune.fold.modules import describe, is_weighted, read, why_not, write
from torch_otprune.fold.stencil import diagonal, exact, joined
from torch_otprune.plan.model import Cost
from torch_otprune.structure.layers import BatchNorm, Conv, tensor

__all__ = [
    "TOKEN_NORMS",
    "absorbed",
    "bare",
    "count",
    "has_line",
    "norm_line",
    "rescaled",
    "unscaled",
]

TOKEN_NORMS = (nn.LayerNorm, nn.RMSNorm)
_SCALED_NORMS = (BatchNorm, nn.GroupNorm, *TOKEN_NORMS)


def count(*modules: nn.Module) -> int:
    """Count the elements of the modules' parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def rescaled(
    layer: nn.Module, scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"]
) -> nn.Module:
    """Fold a scale and a shift of a layer's output into the layer: y becomes scale y + shift.

    That is where an activation's best line `a z + c` goes once the activation is dropped.
    Exact for every stride, padding and kernel, transposed convolutions included.

    Args:
        layer: dense layer, convolution or norm; left as it was.
        scale: one factor per output channel.
        shift: one summand per output channel, in the unit of the output.

    Returns:
        a new layer of the same kind; a norm without scale and shift gets them.

    Raises:
        StructureError: if the layer is none of these, or its channels are not as many.

    Source: layer-folding of batch-norm, with any line in place of the normalisation's.
    """
    if is_weighted(layer):
        stencil = read(layer, describe(layer))
        _check_channels(layer, stencil.geometry.out, scale, shift)
        return write(joined(stencil, diagonal(scale, shift, stencil.geometry.axes)), layer)
    if not isinstance(layer, _SCALED_NORMS) or why_not(layer):
        raise StructureError(
            f"a {type(layer).__name__} takes up no scale: "
            f"{why_not(layer) or 'it is no dense layer, convolution or norm'}.",
            where=repr(layer),
            fix="keep the activation behind it.",
        )
    return _rescaled_norm(layer, scale, shift)


def _rescaled_norm(
    norm: nn.Module, scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"]
) -> nn.Module:
    _check_channels(norm, _channels(norm), scale, shift)
    if isinstance(norm, nn.RMSNorm) and shift.any():
        raise StructureError(
            "an RMSNorm has no shift to take up this one.",
            where=repr(norm),
            fix="fold the scale alone, and the shift into the layer behind.",
        )
    old, new = dict(norm.named_parameters()), copy.deepcopy(norm)
    like = (*norm.parameters(), *norm.buffers(), scale)[0]
    line = {"weight": exact(scale), "bias": exact(shift)}
    if "weight" in old:
        line["weight"] = exact(old["weight"]) * line["weight"]
    if "bias" in old:
        line["bias"] = exact(old["bias"]) * exact(scale) + line["bias"]
    for name in ("weight",) if isinstance(norm, nn.RMSNorm) else ("weight", "bias"):
        setattr(new, name, nn.Parameter(line[name].to(like)))
    setattr(new, "elementwise_affine" if isinstance(norm, TOKEN_NORMS) else "affine", True)
    return new


def _channels(norm: nn.Module) -> int:
    if isinstance(norm, TOKEN_NORMS):
        if len(norm.normalized_shape) > 1:
            raise StructureError(
                f"a {type(norm).__name__} over {len(norm.normalized_shape)} axes has no channels.",
                where=repr(norm),
                fix="leave it as it is.",
            )
        return norm.normalized_shape[0]
    assert isinstance(norm, (BatchNorm, nn.GroupNorm))
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features


def _check_channels(layer: nn.Module, channels: int, *values: Tensor) -> None:
    if any(value.shape != (channels,) for value in values):
        raise StructureError(
            f"scale and shift have shapes {', '.join(str(tuple(v.shape)) for v in values)}; "
            f"the layer has {channels} channels.",
            where=repr(layer),
            fix="give one number per channel.",
        )


def absorbed(
    layer: nn.Linear | Conv, scale: Float[Tensor, " channels"], shift: Float[Tensor, " channels"]
) -> nn.Linear | Conv:
    """Fold a scale and a shift of a layer's input into the layer: it reads scale x + shift.

    A removed branch that always gave the same constant goes this way, with a scale of one.

    Args:
        layer: dense layer or convolution; left as it was.
        scale: one factor per input channel.
        shift: one summand per input channel, in the unit of the input.

    Returns:
        a new layer.

    Raises:
        StructureError: if the layer pads with zeros and the shift is not zero, so that only the
            interior would be right, or the channels are not as many.
    """
    geometry = describe(layer)
    _check_channels(layer, geometry.into, scale, shift)
    line = diagonal(scale, shift, geometry.axes)
    step = follow(line.geometry, geometry)
    if step.kind != "exact":
        raise StructureError(
            f"the layer takes up no shift exactly: {step.reason}.",
            where=repr(layer),
            fix="move its padding to the front of the segment first, with reorder_padding.",
        )
    return write(joined(line, read(layer, geometry)), layer)


def unscaled(norm: nn.LayerNorm | nn.RMSNorm, layer: nn.Linear) -> Folded:
    """Fold a norm's scale and shift into the dense layer behind it; the normalisation stays.

    Args:
        norm: layer norm or RMS norm over the last axis; left as it was.
        layer: the one reader of its output; left as it was.

    Returns:
        a norm without parameters, and a new dense layer.

    Raises:
        StructureError: if the norm runs over several axes or holds no parameters.
    """
    scale, shift = norm_line(norm)
    new = (bare(norm), absorbed(layer, scale, shift))
    params = Cost(before=count(norm, layer), after=count(*new))
    reason = "a dense layer pads with nothing"
    return Folded(new, Certificate(kind="exact", reason=reason, params=params))


def has_line(norm: nn.Module) -> TypeGuard[nn.LayerNorm | nn.RMSNorm]:
    """Tell whether a norm has a scale along the last axis, and that axis alone."""
    if not isinstance(norm, TOKEN_NORMS):
        return False
    return len(norm.normalized_shape) == 1 and bool(norm.elementwise_affine)


def norm_line(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Read a norm's scale and shift.

    Args:
        norm: layer norm or RMS norm over the last axis.

    Returns:
        both in float64; the shift of a norm without one is zero.

    Raises:
        StructureError: if it is none of these, runs over several axes, or has no scale.
    """
    if not has_line(norm) or why_not(norm):
        why = why_not(norm) or "it is no layer norm or RMS norm with a scale along the last axis"
        raise StructureError(
            f"a {type(norm).__name__} has no scale and shift to fold: {why}.",
            where=repr(norm),
            fix="leave it as it is.",
        )
    scale = exact(norm.weight)
    shifted = isinstance(norm, nn.LayerNorm) and norm.bias is not None
    return scale, exact(tensor(norm, "bias")) if shifted else torch.zeros_like(scale)


def bare(norm: nn.Module) -> nn.Module:
    """Copy a norm without its scale and shift.

    Args:
        norm: layer norm or RMS norm; left as it was.

    Returns:
        a module without parameters.
    """
    assert isinstance(norm, TOKEN_NORMS)
    new = copy.deepcopy(norm)
    new.elementwise_affine = False
    for name in ("weight", "bias") if isinstance(norm, nn.LayerNorm) else ("weight",):
        new.register_parameter(name, None)
    return new
