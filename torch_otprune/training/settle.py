"""From soft masks to hard ones: the best units that every budget has room for, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torch_otprune.structure.graph import CostModel
from torch_otprune.training.pool import Pool, Seat

__all__ = ["settled"]


def settled(
    pools: Sequence[Pool],
    costs: Mapping[str, CostModel],
    limits: Mapping[str, int],
    dense: Mapping[str, int],
) -> dict[str, Tensor]:
    """Choose what stays.

    Units are taken by their logits, the largest first, over all seats of a pool, as many as
    fit; what room is left goes to the next ones that fit. Ties go to the first.

    Args:
        pools: with their logits.
        costs: one exact cost per measure.
        limits: of each measure.
        dense: widths of all groups and blocks.

    Returns:
        seat to a mask of zeros and ones.
    """
    keep = dict(dense)
    for pool in (p for p in pools if p.count is not None):
        keep |= _counted(pool)
    for pool in (p for p in pools if p.count is None):
        keep |= _budgeted(pool, costs, limits, keep)
    found: dict[str, Tensor] = {}
    for pool in pools:
        for seat, order in zip(pool.seats, _orders(pool), strict=True):
            mask = torch.zeros(seat.units, device="cpu")
            mask[order[: keep[seat.name]]] = 1.0
            found[seat.name] = mask
    return found


def _orders(pool: Pool) -> list[Tensor]:
    """Order the units of every seat, the first to keep first."""
    parts = pool.logits.cpu().split(pool.sizes)
    return [part.argsort(descending=True, stable=True) for part in parts]


def _ranked(pool: Pool) -> list[int]:
    """Order all units of a pool; name each by its seat."""
    owners = torch.arange(len(pool.seats)).repeat_interleave(torch.tensor(pool.sizes))
    order = pool.logits.cpu().argsort(descending=True, stable=True)
    ranked: list[int] = owners[order].tolist()
    return ranked


def _counted(pool: Pool) -> dict[str, int]:
    """Keep so many in all."""
    if len(pool.seats) == 1:
        return {pool.seats[0].name: pool.count or 0}
    first = _ranked(pool)[: pool.count]
    return {seat.name: first.count(i) for i, seat in enumerate(pool.seats)}


def _budgeted(
    pool: Pool,
    costs: Mapping[str, CostModel],
    limits: Mapping[str, int],
    others: Mapping[str, int],
) -> dict[str, int]:
    """Keep the first of all units that fit, then whatever else still does."""
    ranked = _ranked(pool)

    def fits(widths: Mapping[str, int]) -> bool:
        whole = {**others, **widths}
        return all(costs[measure].at(whole) <= limit for measure, limit in limits.items())

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_widths(pool, ranked[:middle])) else (low, middle - 1)
    keep = _widths(pool, ranked[:low])
    while True:
        grown = next((w for w in _steps(pool, keep) if fits(w)), None)
        if grown is None:
            return keep
        keep = grown


def _widths(pool: Pool, taken: Sequence[int]) -> dict[str, int]:
    counts = torch.bincount(torch.tensor(taken, dtype=torch.long), minlength=len(pool.seats))
    pairs = zip(pool.seats, counts.tolist(), strict=True)
    return {seat.name: _allowed(seat, count) for seat, count in pairs}


def _allowed(seat: Seat, count: int) -> int:
    """Round down to what may stay, but not below the least."""
    return max((w for w in seat.widths if w <= count), default=seat.widths[0])


def _steps(pool: Pool, keep: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Widen one seat by one step, the one whose next unit ranks highest first."""
    parts = pool.logits.cpu().split(pool.sizes)
    offers = list[tuple[float, int, str, int]]()
    for seat, order, logits in zip(pool.seats, _orders(pool), parts, strict=True):
        wider = [w for w in seat.widths if w > keep[seat.name]]
        if wider:
            following = float(logits[order[keep[seat.name]]])
            offers.append((-following, len(offers), seat.name, wider[0]))
    for _, _, name, width in sorted(offers):
        yield {**keep, name: width}
