"""Very wide groups: prices of a few likely moves instead of all, from rows instead of moments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, checked, settle
from torch_otprune.statistics.evidence import Consumer, Evidence
from torch_otprune.transport.sparse import facility_location_sparse
from torch_otprune.transport.wide import Neighbours, nearest

__all__ = ["candidate_costs", "profiles", "rank_wide", "wide_consumers"]


def wide_consumers(evidence: Evidence) -> tuple[Consumer, ...]:
    """List the consumers of which only rows are known, since moments would be too many.

    Args:
        evidence: what is known about the group.

    Returns:
        the consumers; none where moments were gathered.
    """
    if any(c.second is not None for c in evidence.consumers):
        return ()
    return tuple(c for c in evidence.consumers if c.signals is not None)


def rank_wide(evidence: Evidence, count: int) -> Ranking:
    """Solve the facility location on each unit's candidates.

    Args:
        evidence: of a group with wide consumers.
        count: candidates per unit.

    Returns:
        the ranking, with a note that says how it came about.
    """
    found, cost, null = candidate_costs(evidence, count)
    solved = facility_location_sparse(found.index, settle(cost), settle(null))
    how = "all distances" if found.exact else "random trees"
    rows = sum(len(c.signals) for c in wide_consumers(evidence) if c.signals is not None)
    note = (
        f"{evidence.units:,} units: moves are priced onto {found.index.shape[1]} candidates each, "
        f"found by {how} on {rows} rows, and no swaps are tried"
    )
    return Ranking(solved.order, solved.curve, note)


def candidate_costs(
    evidence: Evidence, count: int
) -> tuple[Neighbours, Float[Tensor, "units few"], Float[Tensor, " units"]]:
    """Price moving every unit onto those that look like it up to scale.

    Args:
        evidence: of a group with wide consumers.
        count: candidates per unit.

    Returns:
        candidates, the cost of moving onto each, and of moving onto nothing: what `ground_cost`
        says, with moments taken from the rows.
    """
    parts = profiles(evidence)
    both = torch.cat([h * weight.sqrt()[:, None] for weight, h in parts], dim=1)
    checked(both.sum(1), "unit", where=f"group '{evidence.name}', criterion transport")
    found = nearest(_shape(both).float(), count, seed=evidence.seed)
    index = found.index
    null = torch.zeros(evidence.units, dtype=torch.float64, device="cpu")
    cross = torch.zeros(index.shape, dtype=torch.float64, device="cpu")
    own = cross.clone()
    for weight, h in parts:
        power = h.square().mean(1)
        null += weight * power
        for units in torch.arange(evidence.units, device="cpu").split(4096):
            there = index[units]
            same = torch.einsum("ur,ucr->uc", h[units], h[there]) / h.shape[1]
            cross[units] += weight[units, None] * same
            own[units] += weight[units, None] * power[there]
    saved = torch.where(own > 0, cross.square() / own.clamp_min(1e-300), torch.zeros_like(own))
    return found, (null[:, None] - saved).clamp_min(0), null


def profiles(
    evidence: Evidence,
) -> list[tuple[Float[Tensor, " units"], Float[Tensor, "units rows"]]]:
    """Lay out what each consumer reads of every unit, and how much it makes of it.

    Args:
        evidence: of a group with wide consumers.

    Returns:
        per consumer: squared weights as the output feels them, and rows, about their mean where
        the consumer absorbs it.
    """
    found = []
    for consumer in wide_consumers(evidence):
        assert consumer.signals is not None
        h = consumer.signals.T.contiguous()
        h = h - h.mean(1, keepdim=True) if consumer.absorbs else h
        found.append((consumer.felt().square().sum((0, 2)), h))
    return found


def _shape(rows: Float[Tensor, "units rows"]) -> Float[Tensor, "units rows"]:
    """Bring rows to length one and one sign: what differs by a factor coincides."""
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)
    generator = torch.Generator("cpu").manual_seed(0)
    side = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype, device="cpu")
    turned: Tensor = torch.where((rows @ side < 0)[:, None], -rows, rows)
    return turned
