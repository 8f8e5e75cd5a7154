"""Facility location where every unit may move onto a few candidates only."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.transport.checks import refuse

__all__ = ["SparseFacility", "facility_location_sparse"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


class SparseFacility(NamedTuple):
    """Nested sets that stand in for all units, and what each set costs.

    Args:
        order: units, the most useful first.
        curve: `curve[k]` is the cost once the first k are kept.
    """

    order: Int[Tensor, " units"]
    curve: Float[Tensor, " sizes"]


def facility_location_sparse(
    candidates: Int[Tensor, "units few"],
    cost: Float[Tensor, "units few"],
    null: Float[Tensor, " units"],
) -> SparseFacility:
    """Choose nested sets that minimise the cost of moving every unit onto its nearest of them.

    As `facility_location`, with infinite costs but for each unit's candidates and itself, which
    costs nothing. Memory is that of the candidates.

    Args:
        candidates: for every unit, units that it may move onto; its own index counts for nothing.
        cost: of these moves, not below zero.
        null: cost of moving a unit onto nothing.

    Returns:
        order and curve on the CPU; equals the dense greedy where all units are candidates.

    Raises:
        TransportError: if shapes do not match, or a cost is negative or not a number.

    Source: Minoux 1978 for the lazy greedy.
    """
    costs, nothing = cost.detach().double().cpu(), null.detach().double().cpu()
    _check(candidates, costs, nothing)
    places = candidates.cpu()
    own = torch.arange(len(nothing), device="cpu")[:, None]
    costs = torch.where(places == own, torch.inf, costs)
    rows = own.expand_as(places).flatten()
    by_target = places.flatten().argsort(stable=True)
    target = places.flatten()[by_target]
    first = torch.searchsorted(target, torch.arange(len(nothing) + 1, device="cpu"))
    state = _Lazy(
        rows[by_target].numpy(), costs.flatten()[by_target].numpy(), first.numpy(), nothing.numpy()
    )
    return state.run()


def _check(candidates: Tensor, cost: Tensor, null: Tensor) -> None:
    where = "facility_location_sparse"
    refuse(
        candidates.ndim != 2 or candidates.shape != cost.shape or null.shape != cost.shape[:1],
        f"candidates {tuple(candidates.shape)}, cost {tuple(cost.shape)} and null "
        f"{tuple(null.shape)} do not match.",
        where=where,
        fix="pass units x few, units x few and units.",
    )
    bad = bool(cost.isnan().any()) or not bool(torch.isfinite(null).all())
    bad = bad or bool((cost < 0).any()) or bool((null < 0).any())
    refuse(
        bad,
        "a cost is negative or not a number, or moving onto nothing is infinite.",
        where=where,
        fix="pass non-negative costs, finite for moving onto nothing.",
    )


class _Lazy:
    """Lazy greedy: a gain only shrinks, so that a stale one is an upper bound."""

    def __init__(self, rows: _Ints, cost: _Floats, first: _Ints, null: _Floats) -> None:
        self.rows, self.cost, self.first = rows, cost, first
        self.nearest = null.copy()
        self.null = null
        self.tie = 1e-12 * float(null.sum())

    def _gain(self, unit: int) -> float:
        part = slice(self.first[unit], self.first[unit + 1])
        saved = self.nearest[self.rows[part]] - self.cost[part]
        return float(self.nearest[unit]) + float(saved[saved > 0].sum())

    def _take(self, unit: int) -> None:
        part = slice(self.first[unit], self.first[unit + 1])
        at = self.rows[part]
        self.nearest[at] = np.minimum(self.nearest[at], self.cost[part])
        self.nearest[unit] = 0.0

    def run(self) -> SparseFacility:
        """Pick all units, those that save nothing last and by what they write."""
        heap = [(-self._gain(unit), unit) for unit in range(len(self.null))]
        heapq.heapify(heap)
        order, curve, value = list[int](), [float(self.null.sum())], float(self.null.sum())
        while heap and -heap[0][0] > self.tie:
            _, unit = heapq.heappop(heap)
            gain = self._gain(unit)
            if heap and (-gain, unit) > heap[0] and gain < -heap[0][0] - self.tie:
                heapq.heappush(heap, (-gain, unit))
                continue
            self._take(unit)
            value = max(value - gain, 0.0)
            order.append(unit)
            curve.append(value)
        rest = np.setdiff1d(np.arange(len(self.null)), order)
        rest = rest[np.argsort(-self.null[rest], kind="stable")]
        picked = torch.tensor([*order, *rest.tolist()], dtype=torch.int64, device="cpu")
        whole = torch.zeros(len(self.null) + 1, dtype=torch.float64, device="cpu")
        whole[: len(curve)] = torch.tensor(curve, dtype=torch.float64, device="cpu")
        whole[-1] = 0.0
        return SparseFacility(picked, whole)
