"""Multiply an affine map into the layer before it or behind it."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import RepairError
from torch_otprune.statistics.patches import full_weight, supported
from torch_otprune.structure.layers import BatchNorm, Conv, channels, kernel, lies_across, tensor
from torch_otprune.surgery.cut import put_

__all__ = ["fold_", "known_side", "mapped_before", "mapped_behind"]


def fold_(
    layer: nn.Module,
    matrix: Float[Tensor, "to frm"],
    shift: Float[Tensor, " to"],
    *,
    side: Literal["out", "in"] = "out",
    norm: nn.Module | None = None,
) -> None:
    """Write an affine map into a layer, in float64 and cast back.

    Args:
        layer: a linear layer or a convolution.
        matrix: of the map.
        shift: its constant.
        side: `out` maps what the layer writes; `in` maps what it reads: the channels, or all taps
            of a patch at once where the matrix has as many rows as the layer has columns.
        norm: batch-norm behind the layer, which takes up the constant of a layer without bias.

    Raises:
        RepairError: if the map does not fit, or nothing takes up the constant; nothing is written.
    """
    matrix, shift = matrix.double(), shift.double()
    known_side(side, "fold_into")
    if not supported(layer) or (isinstance(layer, Conv) and layer.groups > 1):
        raise RepairError(
            "a map cannot be multiplied into this layer.",
            where=f"{type(layer).__name__}",
            fix="fold into a linear layer or an ungrouped convolution, or use `module()`.",
        )
    weigh = mapped_behind if side == "out" else mapped_before
    weight, moved = weigh(layer, matrix, shift)
    bias, running = getattr(layer, "bias", None), _running(norm)
    if bias is None and running is None and bool((moved != 0).any()):
        raise RepairError(
            "nothing takes up the constant of the map.",
            where=f"{type(layer).__name__} without a bias",
            fix="pass the batch-norm behind it as `norm`, or give the layer a bias.",
        )
    if bias is None and running is not None and running.shape != moved.shape:
        raise RepairError(
            f"a norm of {len(running)} channels takes up no constant of {len(moved)}.",
            where=f"{type(layer).__name__} without a bias, argument norm",
            fix="pass the batch-norm that reads this layer.",
        )
    put_(layer, "weight", weight)
    if bias is not None:
        put_(layer, "bias", bias.detach().double() + moved)
    elif running is not None and norm is not None:
        put_(norm, "running_mean", running.double() - moved)


def known_side(side: str, where: str) -> None:
    """Refuse a side that a layer does not have.

    Args:
        side: what was asked for.
        where: who asks.

    Raises:
        RepairError: for anything but `out` and `in`.
    """
    if side not in ("out", "in"):
        raise RepairError(
            f"{side!r} is no side of a layer.",
            where=f"{where}, argument side",
            fix="use 'out' for what the layer writes, or 'in' for what it reads.",
        )


def _running(norm: nn.Module | None) -> Tensor | None:
    return norm.running_mean if isinstance(norm, BatchNorm) else None


def mapped_behind(layer: nn.Module, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Map what a layer writes; its own bias is mapped as well.

    Args:
        layer: a linear layer or an ungrouped convolution.
        matrix: of the map.
        shift: its constant.

    Returns:
        the new weight in the shape of the old one, and what its output moves by besides.
    """
    old, width = full_weight(layer), channels(layer, "out") or 0
    _fitting(matrix, (width, width), "out")
    matrix, shift = matrix.to(old), shift.to(old)
    bias = getattr(layer, "bias", None)
    own = old.new_zeros(width) if bias is None else bias.detach().to(old)
    return _shaped(layer, matrix @ old), matrix @ own + shift - own


def mapped_before(layer: nn.Module, matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Map what a layer reads: its channels, or whole patches.

    Args:
        layer: a linear layer or an ungrouped convolution.
        matrix: of the map; as many rows as the layer has columns where it maps patches.
        shift: its constant.

    Returns:
        the new weight in the shape of the old one, and what its output moves by besides.

    Raises:
        RepairError: if it does not fit, or the padding would miss the constant.
    """
    old, width = full_weight(layer), channels(layer, "in") or 0
    matrix, shift = matrix.to(old), shift.to(old)
    if matrix.shape == (old.shape[1], old.shape[1]):
        return _shaped(layer, old @ matrix), old @ shift
    _fitting(matrix, (width, width), "in")
    if _padded(layer) and bool((shift != 0).any()):
        raise RepairError(
            "the constant of the map would be missing from the zeros of the padding.",
            where=f"{type(layer).__name__}, side in",
            fix="fold on side 'out', or fit the map on whole patches.",
        )
    by_tap = old.unflatten(1, (width, kernel(layer)))
    new = torch.einsum("oct,cd->odt", by_tap, matrix).flatten(1)
    return _shaped(layer, new), by_tap.sum(2) @ shift


def _padded(layer: nn.Module) -> bool:
    return isinstance(layer, Conv) and any(layer._reversed_padding_repeated_twice)


def _shaped(layer: nn.Module, full: Tensor) -> Tensor:
    weight = full.T if lies_across(layer) else full
    return weight.reshape(tensor(layer, "weight").shape)


def _fitting(matrix: Tensor, wanted: tuple[int, int], side: str) -> None:
    if tuple(matrix.shape) != wanted:
        raise RepairError(
            f"a map of {matrix.shape[1]} onto {matrix.shape[0]} channels does not fit.",
            where=f"a layer with {wanted[0]} channels on side {side}",
            fix="fit the map on the channels of that side.",
        )
