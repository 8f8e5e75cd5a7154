"""What a criterion asks of the stream before it measures anything on it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["centred", "finite", "folds_of", "relative", "stream"]


def stream(evidence: ChainEvidence) -> Float[Tensor, "points rows channels"]:
    """Return the stream, and refuse one that is empty or not finite.

    Args:
        evidence: what is known about the chain.

    Returns:
        its points, as they are.

    Raises:
        CalibrationError: if there is no row, or an entry is NaN or infinite.
    """
    if not evidence.points.shape[1]:
        raise CalibrationError(
            "no rows of the stream were gathered.",
            where=f"chain '{evidence.name}'",
            fix="run calibration data through the model before planning.",
        )
    return finite(evidence.points, "the stream", evidence.name)


def finite(values: Tensor, noun: str, chain: str) -> Tensor:
    """Return values as they are if all are finite.

    Args:
        values: any numbers.
        noun: what they are, for the error.
        chain: name of the chain, for the error.

    Returns:
        the same tensor.

    Raises:
        CalibrationError: if an entry is NaN or infinite.
    """
    if bad := int((~torch.isfinite(values)).sum()):
        raise CalibrationError(
            f"{bad} of {values.numel()} entries of {noun} are NaN or infinite.",
            where=f"chain '{chain}', shape {tuple(values.shape)}",
            fix="look for NaN or infinity in the weights or the calibration data.",
        )
    return values


def centred(x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
    """Subtract the mean row; equal rows leave exact zeros, without the rounding of their mean."""
    apart = x - x[0]
    return apart - apart.mean(0)


def folds_of(evidence: ChainEvidence, count: int) -> Int[Tensor, " rows"]:
    """Deal the samples into folds; all rows of a sample share one, for they resemble each other.

    Args:
        evidence: what is known about the chain.
        count: folds; fewer where there are fewer samples.

    Returns:
        the fold of each row, from 0.

    Raises:
        CalibrationError: if all rows come from one sample.
    """
    names, place = evidence.sample.unique(return_inverse=True)
    if len(names) < 2:
        raise CalibrationError(
            f"{len(names)} calibration sample cannot be split to hold some out.",
            where=f"chain '{evidence.name}', criterion transport",
            fix="calibrate with more samples, or use replace='identity', which fits nothing.",
        )
    # By chance, as data sets come sorted or periodic.
    generator = torch.Generator().manual_seed(evidence.seed)
    deal = torch.randperm(len(names), generator=generator, device="cpu").to(place.device)
    return deal[place] % min(count, len(names))


def relative(distance: float, spread: float, evidence: ChainEvidence, block: int) -> float:
    """Divide a distance by the spread of what a block reads.

    Args:
        distance: in the unit of the stream.
        spread: a standard deviation in the same unit.
        evidence: names the block in the error.
        block: its number.

    Returns:
        the ratio; 0 where nothing moves.

    Raises:
        CalibrationError: if the block moves a stream that does not vary at all.
    """
    if distance == 0:
        return 0.0
    if spread == 0:
        raise CalibrationError(
            "the stream in front does not vary, so that no distance is large or small.",
            where=f"block '{evidence.blocks[block]}', {len(evidence.sample)} calibration rows",
            fix="calibrate with more samples, or use criterion 'block_influence'.",
        )
    return distance / spread
