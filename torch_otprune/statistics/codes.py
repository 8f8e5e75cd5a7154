"""Activation codes: one bit per unit, eight units to the byte, and how far apart two codes are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

__all__ = ["changed", "pack", "popcount", "unpack"]

_BYTE = 8


def pack(bits: Bool[Tensor, "*rows units"]) -> UInt8[Tensor, "*rows words"]:
    """Write eight bits into each byte, the first unit lowest.

    Args:
        bits: one per unit.

    Returns:
        an eighth of the memory; what the last byte has left is zero.
    """
    missing = -bits.shape[-1] % _BYTE
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, missing))
    # Not shaped by -1, which an empty code leaves open.
    rows = padded.view(*bits.shape[:-1], padded.shape[-1] // _BYTE, _BYTE)
    place = torch.arange(_BYTE, dtype=torch.uint8, device=bits.device)
    return (rows << place).sum(-1, dtype=torch.uint8)


def unpack(words: UInt8[Tensor, "*rows words"], units: int) -> Bool[Tensor, "*rows units"]:
    """Read the bits back.

    Args:
        words: as `pack` wrote them.
        units: how many there were.

    Returns:
        one bit per unit.
    """
    place = torch.arange(_BYTE, dtype=torch.uint8, device=words.device)
    bits = (words[..., None] >> place) & 1
    return bits.flatten(-2)[..., :units].bool()


def popcount(words: UInt8[Tensor, "*rows words"]) -> Int[Tensor, "*rows"]:
    """Count the bits that are set, without unpacking them.

    Args:
        words: any bytes.

    Returns:
        one count per row.

    Source: the usual sum of neighbours, pairs and halves inside a word (Warren 2012, section 5-1).
    """
    x = words - ((words >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return ((x + (x >> 4)) & 0x0F).sum(-1, dtype=torch.int64)


def changed(
    codes: Bool[Tensor, "*rows units"],
    others: Bool[Tensor, "*#rows units"],
    weights: Float[Tensor, " units"],
) -> Float[Tensor, "*rows"]:
    """Add up the weights of the units that differ.

    Args:
        codes: unpacked.
        others: the same shape, or one that broadcasts to it.
        weights: not negative.

    Returns:
        one weighted Hamming distance per row.
    """
    return (codes ^ others).to(weights.dtype) @ weights
