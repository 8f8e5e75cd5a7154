"""Outputs that are images, small enough to travel in a report."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from torch_otprune.structure.forward import flat_tensors

__all__ = ["Images", "images_of"]

_MOST, _SIDE = 8, 64  # images, and pixels along their longer side
_LEAST = 8  # pixels: what is smaller is a map of features


class Images(BaseModel):
    """The same few outputs of several models, side by side.

    Limits: eight images of at most 64 x 64 pixels, of 256 shades; larger ones are averaged down.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, int, int, int] = Field(description="samples, rows, columns, colours")
    rows: dict[str, str] = Field(description="model to its pixels: bytes, deflated, in base64")

    def pixels(self, row: str) -> UInt8[Tensor, "samples rows columns colours"]:
        """Read the images of one model.

        Args:
            row: a key of `rows`.

        Returns:
            shades from 0 to 255.
        """
        data = bytearray(zlib.decompress(base64.b64decode(self.rows[row])))
        return torch.frombuffer(data, dtype=torch.uint8).view(self.shape)


def images_of(outputs: Mapping[str, Sequence[Any]]) -> Images | None:
    """Keep the first few outputs of several models, if they look like images.

    They do where the output is one floating tensor of shape samples x 1 or 3 x rows x columns with
    at least 8 rows and columns. All are shown on the scale of the first model's.

    Args:
        outputs: model to what it put out, one entry per batch; the first sets the scale.

    Returns:
        the images; None where there are none to show.
    """
    found = {name: _first(batches) for name, batches in outputs.items()}
    if any(images is None for images in found.values()):
        return None
    some = {name: images for name, images in found.items() if images is not None}
    if len({images.shape for images in some.values()}) != 1:
        return None
    scale = next(iter(some.values()))
    scale = scale[scale.isfinite()]
    if not len(scale):
        return None
    low, high = float(scale.min()), float(scale.max())
    shown = {name: _shades(images, low, high) for name, images in some.items()}
    samples, rows, columns, colours = next(iter(shown.values())).shape
    return Images(
        shape=(samples, rows, columns, colours),
        rows={name: _written(pixels) for name, pixels in shown.items()},
    )


def _first(batches: Sequence[Any]) -> Float[Tensor, "samples colours rows columns"] | None:
    """Take the first few images of the first batch; None where they are none."""
    tensors = flat_tensors(batches[0]) if batches else []
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].dim() != 4:
        return None
    images = tensors[0]
    if not len(images) or images.shape[1] not in (1, 3) or min(images.shape[2:]) < _LEAST:
        return None
    return images[:_MOST].detach().float().cpu()


def _shades(images: Tensor, low: float, high: float) -> Tensor:
    side = max(images.shape[2:])
    if side > _SIDE:
        height, width = (max(1, round(_SIDE * size / side)) for size in images.shape[2:])
        images = F.adaptive_avg_pool2d(images, (height, width))
    span = high - low if high > low else 1.0
    shares = ((images - low) / span).nan_to_num(0.0).clamp(0, 1)
    return (255 * shares).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _written(pixels: Tensor) -> str:
    data = bytes(pixels.flatten().tolist())
    return base64.b64encode(zlib.compress(data, 9)).decode()
