"""All padding in front: what makes a row of convolutions fold exactly, at a measured price."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.modules import ACTIVATIONS, DROPOUTS, POOLS, describe
from torch_otprune.structure.forward import evaluating
from torch_otprune.structure.layers import BatchNorm, Conv

__all__ = ["Reordered", "reorder_padding"]


@dataclass(frozen=True)
class Reordered:
    """A row of layers whose first convolution does all the padding.

    Args:
        layers: new layers, in the same order; the output keeps its size.
        change: root-mean-square change of the output, as a share of its root mean square.
    """

    layers: tuple[nn.Module, ...]
    change: float


def reorder_padding(layers: Sequence[nn.Module], x: Tensor) -> Reordered:
    """Move all padding of a row of layers to its first convolution: P = p1 + p2 s1 + p3 s1 s2.

    The layers then fold exactly once nothing nonlinear is left between them. The output changes
    near the border, and all of a small picture is border: so this is an edit of its own, whose
    price is measured. Train, or repair, the edited row before folding it.

    Args:
        layers: in order of execution, activations and norms included; left as they were.
        x: inputs of the first layer to measure on.

    Returns:
        the edited layers and how far their output moved.

    Raises:
        StructureError: if there are no two convolutions, one pads with something else than zeros
            or is transposed, or a pool pads.

    Source: DepthShrinker (Fu et al. 2022) and Kim et al. 2023 reorder before fine-tuning.
    """
    _check(layers)
    new = copy.deepcopy(list(layers))
    first = next(layer for layer in new if isinstance(layer, Conv))
    axes = describe(first).axes
    padding, strides = (0,) * axes, (1,) * axes
    for layer in new[new.index(first) :]:
        if isinstance(layer, (Conv, *POOLS)):
            g = describe(layer)
            padding = tuple(p + q * s for p, q, s in zip(padding, g.padding, strides, strict=True))
            strides = tuple(a * b for a, b in zip(strides, g.stride, strict=True))
        if isinstance(layer, Conv):
            layer.padding = (0,) * axes
    first.padding = padding
    return Reordered(tuple(new), _change(layers, new, x))


def _check(layers: Sequence[nn.Module]) -> None:
    convs = [layer for layer in layers if isinstance(layer, Conv)]
    stuck = [layer for layer in layers if not _moves(layer)]
    if stuck or len(convs) < 2:
        raise StructureError(
            f"padding does not move past {stuck[0]!r}."
            if stuck
            else "there is no padding to move.",
            where=", ".join(type(layer).__name__ for layer in layers),
            fix="pass two or more convolutions that pad with zeros, with only batch-norms, "
            "activations and pools without padding between them.",
        )


def _moves(layer: nn.Module) -> bool:
    """Tell whether a layer treats all positions alike, once its padding is taken from it."""
    if isinstance(layer, POOLS):
        return not any(describe(layer).padding)
    if isinstance(layer, Conv):
        g = describe(layer)
        return g.mode == "zeros" and not g.transposed
    return isinstance(layer, (BatchNorm, nn.Identity, *ACTIVATIONS, *DROPOUTS))


def _change(old: Sequence[nn.Module], new: Sequence[nn.Module], x: Tensor) -> float:
    nets = nn.Sequential(*old), nn.Sequential(*new)
    with evaluating(nets[0]), evaluating(nets[1]), torch.no_grad():
        before, after = (
            net(x.clone()).double() for net in nets
        )  # an activation may write in place
    return float((after - before).norm() / before.norm())
