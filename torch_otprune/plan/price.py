"""What a set of units costs once the consumers have been refitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, settle
from torch_otprune.criteria.wide import wide_consumers
from torch_otprune.errors import CalibrationError
from torch_otprune.policy import Layers, Policy, Units
from torch_otprune.policy.registry import Setting
from torch_otprune.statistics.evidence import Consumer, Evidence
from torch_otprune.statistics.moments import WIDE, ridge_factor

__all__ = ["apart", "dropped", "foreseen", "mendable", "repaired", "weighted"]

_RIDGE = 1e-3
_BLOCK = 256  # units that are multiplied out at a time
_MENDERS = 8  # refits behind a layer, beyond which more of them correct no more


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
    if not parts:  # of rows alone, what dropping changes is known, and no more
        return dropped(ranking, evidence) if wide_consumers(evidence) else ranking
    lost = torch.stack(parts).sum(0)
    left = lost.flip(0).cumsum(0).flip(0)
    return Ranking(ranking.order, torch.cat([left, left.new_zeros(1)]))


def foreseen(evidence: Evidence, order: Sequence[str]) -> Evidence:
    """Let an error weigh less where layers behind it are refitted later, and make up for it.

    A price takes every layer alone, and a refit from front to back does not leave it alone: what
    the layers behind see of an error, they correct. So it is divided by their number, up to eight.

    Args:
        evidence: the group.
        order: all linear layers in order of execution.

    Returns:
        the same, felt less.

    Limits: a rule of thumb, measured on residual networks; layers that no repair refits count as
    well.

    Source: ours; `benchmarks/methods_prices.py` holds prices against what happens.
    """
    behind = {path: len(order) - 1 - place for place, path in enumerate(order)}
    return replace(
        evidence,
        consumers=tuple(
            replace(c, feel=c.feel / min(max(behind.get(c.path, 1), 1), _MENDERS))
            for c in evidence.consumers
        ),
    )


def dropped(ranking: Ranking, evidence: Evidence) -> Ranking:
    """Price the nested sets of a ranking by what dropping the rest changes, unrepaired.

    Args:
        ranking: nested sets.
        evidence: the group; consumers without data count nothing.

    Returns:
        the same order with `E|sum of the dropped W_i h_i|^2` as its curve.
    """
    parts = [_interplay(ranking.order, c) for c in evidence.consumers if c.second is not None]
    wide = wide_consumers(evidence)
    if wide:
        tails = torch.stack([_by_rows(ranking.order, c) for c in wide]).sum(0)
        return Ranking(ranking.order, tails)
    if not parts:
        return ranking
    tails = torch.stack(parts).sum(0).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return Ranking(ranking.order, torch.cat([tails, tails.new_zeros(1)]).clamp_min(0))


def mendable(evidence: Evidence, repairs: Sequence[Setting]) -> None:
    """Refuse to plan a repair that would not fit into memory.

    Args:
        evidence: the group.
        repairs: what its rule declares.

    Raises:
        CalibrationError: if it is so wide that no products of its units were gathered, and a
            repair refits; or if a coupling of so many units is declared.
    """
    refits = any(getattr(r, "refits", False) for r in repairs if r.kind != "coupling")
    couples = any(repair.kind == "coupling" for repair in repairs)
    if (refits and wide_consumers(evidence)) or (couples and evidence.units > WIDE):
        size, what = 8 * evidence.units**2 / 2**30, "refit" if refits else "coupling"
        raise CalibrationError(
            f"a {what} on {evidence.units:,} units would take {size:.1f} GiB.",
            where=f"group '{evidence.name}', the rule's repair",
            fix="use repair='none', 'bias' or 'norm' for this group, by a rule of its own.",
        )


def apart(policy: Policy, ranking: Ranking) -> str:
    """Warn where one budget weighs prices in different units against each other.

    Args:
        policy: the declaration.
        ranking: of one group.

    Returns:
        a note; empty where all prices compare.
    """
    priced = [rule.criterion for rule in policy.rules if isinstance(rule, Units | Layers)]
    alone = all(criterion.kind == "ntk" for criterion in priced)
    if not ranking.unit or alone or policy.budget is None:
        return ""
    return "its price, in the tangent kernel, does not compare with that of the other rules"


def _interplay(order: Tensor, consumer: Consumer) -> Float[Tensor, "units units"]:
    """Correlate what any two units write at the consumer's output."""
    assert consumer.second is not None
    units, taps = consumer.second.shape[:2]
    weight = consumer.felt()[:, order].flatten(1)
    second = consumer.second[order][:, :, order].reshape(units * taps, units * taps)
    return ((weight.T @ weight) * second).view(units, taps, units, taps).sum((1, 3))


def _by_rows(order: Tensor, consumer: Consumer) -> Float[Tensor, " sizes"]:
    """Measure what dropping the last units changes, row by row: no pair is multiplied out."""
    assert consumer.signals is not None
    rows = consumer.signals
    rows = rows - rows.mean(0) if consumer.absorbs else rows
    weight = consumer.felt().sum(2)
    total = rows.new_zeros(len(rows), len(weight))
    powers = [rows.new_zeros(1)]
    for part in order.flip(0).split(_BLOCK):
        h, w = rows[:, part], weight[:, part]
        pairs = (h.T @ h) * (w.T @ w)  # of this block alone: what its units write together
        each = 2 * (h * (total @ w)).sum(0) + 2 * pairs.tril(-1).sum(1) + pairs.diagonal()
        powers.append((total.square().sum() + each.cumsum(0)).clamp_min(0) / len(rows))
        total = total + h @ w.T
    return torch.cat(powers).flip(0)


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
