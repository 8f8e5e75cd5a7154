"""What a set of units costs once the consumers have been refitted."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, settle
from torch_otprune.statistics.evidence import Consumer, Evidence
from torch_otprune.statistics.moments import ridge_factor

__all__ = ["dropped", "repaired", "weighted"]

_RIDGE = 1e-3


def repaired(ranking: Ranking, evidence: Evidence) -> Ranking:
    """Price the nested sets of a ranking by what least squares would leave of them.

    With the moments' Cholesky factor `L` in the order of the ranking, the error that remains
    when only the first k units are kept and refitted is the squared norm of the later columns of
    `W L`: one factorisation prices every size.

    Args:
        ranking: nested sets.
        evidence: the group; consumers without data count nothing.

    Returns:
        the same order with the new curve.

    Source: ours; the Schur complement of a Cholesky factor (Golub & Van Loan 2013, section 4.2).
    """
    parts = [_residual(ranking.order, c) for c in evidence.consumers if c.second is not None]
    if not parts:
        return ranking
    lost = torch.stack(parts).sum(0)
    left = lost.flip(0).cumsum(0).flip(0)
    return Ranking(ranking.order, torch.cat([left, left.new_zeros(1)]))


def dropped(ranking: Ranking, evidence: Evidence) -> Ranking:
    """Price the nested sets of a ranking by what dropping the rest changes, unrepaired.

    Args:
        ranking: nested sets.
        evidence: the group; consumers without data count nothing.

    Returns:
        the same order with `E|sum of the dropped W_i h_i|^2` as its curve.
    """
    parts = [_interplay(ranking.order, c) for c in evidence.consumers if c.second is not None]
    if not parts:
        return ranking
    tails = torch.stack(parts).sum(0).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return Ranking(ranking.order, torch.cat([tails, tails.new_zeros(1)]).clamp_min(0))


def _interplay(order: Tensor, consumer: Consumer) -> Float[Tensor, "units units"]:
    """Correlate what any two units write at the consumer's output."""
    assert consumer.second is not None
    units, taps = consumer.second.shape[:2]
    weight = consumer.felt()[:, order].flatten(1)
    second = consumer.second[order][:, :, order].reshape(units * taps, units * taps)
    return ((weight.T @ weight) * second).view(units, taps, units, taps).sum((1, 3))


def _residual(order: Tensor, consumer: Consumer) -> Float[Tensor, " units"]:
    """What each unit adds to the output that the units before it cannot."""
    assert consumer.second is not None
    units, taps = consumer.second.shape[:2]
    second = consumer.second[order][:, :, order].reshape(units * taps, units * taps)
    factor = ridge_factor(second, _RIDGE)
    weight = consumer.felt()[:, order].flatten(1)
    power: Tensor = (weight @ factor).square().sum(0)
    return power.view(units, taps).sum(1)


def weighted(
    curve: Float[Tensor, " sizes"], weighting: str, power: float
) -> Float[Tensor, " sizes"]:
    """Bring a curve into the unit in which groups are compared.

    Args:
        curve: a group's cost by size.
        weighting: `output` divides by the output's power, so that a cost is a share of it;
            `uniform` divides by the cost of keeping nothing; `none` leaves the cost.
        power: the output's mean square, summed over its entries.

    Returns:
        the curve, rounded to nine digits.
    """
    scale = {"output": power, "uniform": float(curve[0]), "none": 1.0}[weighting]
    return settle(curve / scale) if scale > 0 else torch.zeros_like(curve)
