"""What the criteria of activations share: data that is there, and the entropy of states."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import SiteEvidence

__all__ = ["affine_residual", "entropy_bits", "observed"]


def observed(evidence: SiteEvidence, criterion: str) -> SiteEvidence:
    """Refuse an activation that no data went through.

    Args:
        evidence: what is known about it.
        criterion: who asks, for the error.

    Returns:
        the same evidence.

    Raises:
        CalibrationError: if nothing was counted.
    """
    if not evidence.count:
        raise CalibrationError(
            f"activation '{evidence.name}' was not observed.",
            where=f"criterion {criterion}, function {evidence.function}",
            fix="run calibration data through the model before planning.",
        )
    return evidence


def entropy_bits(*shares: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    """Measure how uncertain a channel's state is.

    Args:
        shares: of each state but one, which has the rest.

    Returns:
        bits, from 0 to log2 of the number of states; exactly 0 where one state has it all.
    """
    rest = 1 - torch.stack(shares).sum(0)
    states = torch.stack([*shares, rest])
    # A sum of shares misses one by rounding; NaN stays NaN, for the caller to refuse.
    settled = torch.where(states.abs() < 1e-12, 0.0, states)
    nats: Tensor = torch.special.entr(settled).sum(0).clamp_min(0)
    return nats / math.log(2)


def affine_residual(evidence: SiteEvidence) -> float:
    """Measure what the best line per channel misses, as a share of the output's root mean square.

    Args:
        evidence: of the activation.

    Returns:
        from 0 to 1; 0 where there is no output.
    """
    varies = evidence.var > 0
    slope = torch.where(varies, evidence.cov / torch.where(varies, evidence.var, 1.0), 0.0)
    power = evidence.out_var.clamp_min(0)
    left = torch.minimum((power - slope * evidence.cov).clamp_min(0), power)
    left = torch.where(varies, left, 0.0)
    total = float((power + evidence.out_mean.square()).sum())
    return (float(left.sum()) / total) ** 0.5 if total > 0 else 0.0
