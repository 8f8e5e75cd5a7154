"""Shared algebra: what consumers notice, from second moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import IDLE
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.evidence import Consumer, Evidence

__all__ = ["joint", "observed", "silent"]

_ROUNDING = 1e-12  # of a constant's square: what rounding may leave of its variance


def observed(evidence: Evidence, criterion: str) -> tuple[Consumer, ...]:
    """List the consumers whose input was observed.

    Args:
        evidence: what is known about the group.
        criterion: who asks, for the error.

    Returns:
        at least one consumer.

    Raises:
        CalibrationError: if no consumer's input was observed.
    """
    found = tuple(c for c in evidence.consumers if c.second is not None)
    if not found and any(c.signals is not None for c in evidence.consumers):
        raise CalibrationError(
            f"{evidence.units:,} units are too many: no products of all pairs were gathered.",
            where=f"group '{evidence.name}', criterion {criterion}",
            fix="use criterion 'transport', 'sliced_kernel' or 'magnitude' for it.",
        )
    if not found:
        raise CalibrationError(
            "no activations were gathered.",
            where=f"group '{evidence.name}', criterion {criterion}",
            fix="run calibration data through the model, or use criterion 'magnitude'.",
        )
    return found


def silent(evidence: Evidence) -> str:
    """Say so where nothing that the consumers read tells the units apart.

    Args:
        evidence: of a group with observed consumers.

    Returns:
        a note; empty as a rule.
    """
    for consumer in evidence.consumers:
        if consumer.second is not None:
            power = torch.einsum("iaia->ia", consumer.second)
            least = 0.0 if consumer.mean is None else _ROUNDING * consumer.mean.square()
            if bool((power > least).any()):
                return ""
    return f"no unit reaches what reads it; {IDLE}"


def joint(consumer: Consumer) -> tuple[Float[Tensor, "units units"], Float[Tensor, "units units"]]:
    """Measure each unit's contribution through its own weights against every other unit.

    With `M_i` the unit's taps of `W'W` weighted by what the output feels, and `H` the second
    moments of the input:

    Args:
        consumer: an observed consumer.

    Returns:
        `cross[i, j] = <M_i, H_ij>`, what unit i and a copy of j in its place have in common at
        the output, and `own[i, j] = <M_i, H_jj>`, what unit j would write through i's weights.
    """
    assert consumer.second is not None
    felt = consumer.felt()
    metric = torch.einsum("oia,oib->iab", felt, felt)
    cross = torch.einsum("iab,iajb->ij", metric, consumer.second)
    diagonal = torch.einsum("jajb->jab", consumer.second)
    own = metric.flatten(1) @ diagonal.flatten(1).T
    return cross, own
