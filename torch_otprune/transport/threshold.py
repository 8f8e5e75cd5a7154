"""The threshold at which logistic masks meet a budget, in few passes over their entries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_otprune.transport.checks import refuse

__all__ = ["BINS", "PASSES", "Threshold", "fill_", "threshold"]

PASSES = 8  # reads of every entry, the one that writes the mask included
BINS = 2**14
_NARROW = 0.1  # width of a bin, in units of eps, from which Newton's steps double their digits
_TAIL = 40.0  # beyond it a logistic is 0 or 1 to the last digit of float64
_CHUNKS = {"cpu": 2**16, "cuda": 2**22}  # fits the cache, so that a pass reads memory once
_ALIKE = 1e-15  # scores that differ by less share a bin
_STEPS = 60  # of a bisection over the bins: down to the last digit


@dataclass(frozen=True)
class Threshold:
    """Where masks meet their budget.

    Args:
        at: the threshold, in the unit of the scores.
        passes: how often the entries were read to find it.
        missed: budget minus what the masks sum up to at the last pass, in its unit.
    """

    at: float
    passes: int
    missed: float


def threshold(
    parts: Sequence[Tensor],
    budget: float,
    *,
    eps: float = 1.0,
    costs: Sequence[Tensor | float] | None = None,
) -> Threshold:
    """Find t with sum(costs x logistic((scores - t) / eps)) = budget over all parts.

    A histogram of the scores brackets t by the width of one bin, whatever the scores are; a
    second and third one, around the bracket, follow where that is coarse. Newton's steps, kept
    inside the bracket, do the rest. Sums are taken in float64, chunk by chunk, so that memory is
    read once per pass.

    Args:
        parts: scores, any shapes, float32 or float64, all on one device.
        budget: strictly between nothing and the sum of all costs.
        eps: softness, in the unit of the scores; above 0.
        costs: of each part, one positive number or one per entry; None is 1 everywhere.

    Returns:
        the threshold, after at most `PASSES` - 1 reads of every entry; writing the mask is one.

    Raises:
        TransportError: if a score is NaN or infinite, or the budget, eps or a cost is out of range.

    Source: ours; logistic masks are the entropic transport plan onto {0, 1} (Xie et al. 2020).
    """
    entries = _Entries(parts, costs or [1.0] * len(parts), eps)
    low, high, total = entries.range()
    refuse(
        not 0 < budget < total,
        f"a budget of {budget:g} is not strictly between 0 and {total:g}.",
        where=f"threshold of {entries.count} scores, argument budget",
        fix="ask for less than everything and more than nothing.",
    )
    spread = math.log(budget) - math.log(total - budget)
    ends = low - spread, high - spread
    reach = low, high
    while True:
        bins = entries.histogram(*reach)
        start, width = _bracket(bins, reach, budget)
        ends = max(ends[0], start - width / 2), min(ends[1], start + 1.5 * width)
        if width <= _NARROW or entries.passes >= PASSES - 4:
            break
        reach = ends[0] - _TAIL, ends[1] + _TAIL
    at, missed = _newton(entries, budget, total, ends, _middle(bins, reach, budget))
    return Threshold(at * eps, entries.passes, missed)


def fill_(mask: Tensor, scores: Tensor, at: float, eps: float) -> Tensor:
    """Write logistic((scores - at) / eps), reading and writing memory once.

    Args:
        mask: written; contiguous, of the shape and type of the scores.
        scores: what is masked.
        at: the threshold.
        eps: softness.

    Returns:
        the mask.
    """
    size = _chunk(scores)
    target, flat = mask.view(-1), scores.reshape(-1)
    for i in range(0, len(flat), size):
        _logistic(flat[i : i + size], at, eps, out=target[i : i + size])
    return mask


def _logistic(scores: Tensor, at: float, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Compute logistic((scores - at) / eps) as if the threshold were not rounded to the scores."""
    coarse = float(torch.tensor(at, dtype=scores.dtype, device="cpu"))
    near = torch.sub(scores, coarse, out=out)  # exact for the scores that matter
    return near.sub_(at - coarse).div_(eps).sigmoid_()


def _chunk(tensor: Tensor) -> int:
    return _CHUNKS.get(tensor.device.type, _CHUNKS["cpu"])


class _Entries:
    """All scores, in units of eps; counts how often they are read."""

    def __init__(self, parts: Sequence[Tensor], costs: Sequence[Tensor | float], eps: float):
        self.parts = [part.detach().reshape(-1) for part in parts if part.numel()]
        given = [c for c, part in zip(costs, parts, strict=True) if part.numel()]
        self.costs = [c.detach().reshape(-1) if isinstance(c, Tensor) else float(c) for c in given]
        self.eps, self.passes = eps, 0
        refuse(
            not 0 < eps < math.inf,
            f"a softness of {eps} is not above 0 and finite.",
            where="threshold, argument eps",
            fix="pass a positive number, in the unit of the scores.",
        )
        self.count = sum(part.numel() for part in self.parts)
        refuse(
            not self.count,
            "there is nothing to choose from.",
            where="threshold, argument parts",
            fix="pass at least one score.",
        )

    def _sweep(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Show every chunk once, with its costs."""
        self.passes += 1
        for part, cost in zip(self.parts, self.costs, strict=True):
            size = _chunk(part)
            for i in range(0, len(part), size):
                yield part[i : i + size], cost[i : i + size] if isinstance(cost, Tensor) else cost

    def range(self) -> tuple[float, float, float]:
        """Return the least and the largest score, in units of eps, and the sum of all costs."""
        seen = []
        for scores, cost in self._sweep():
            ends = torch.stack(torch.aminmax(scores)).double()
            paid = torch.as_tensor(cost, dtype=ends.dtype, device=ends.device)
            whole = paid.sum() if paid.dim() else paid * len(scores)
            seen.append(torch.cat([ends, torch.stack([whole, paid.amin()])]))
        found = torch.stack(seen).cpu()
        low, high = float(found[:, 0].min()), float(found[:, 1].max())
        refuse(
            not (math.isfinite(low) and math.isfinite(high)),
            "a score is NaN or infinite.",
            where=f"threshold of {self.count} scores, argument parts",
            fix="look for NaN or infinity in the gradients that made them.",
        )
        refuse(
            not float(found[:, 3].min()) > 0,
            "a cost is not above 0.",
            where=f"threshold of {self.count} scores, argument costs",
            fix="leave out what costs nothing: it stays.",
        )
        return low / self.eps, high / self.eps, float(found[:, 2].sum())

    def histogram(self, low: float, high: float) -> Tensor:
        """Add costs up between two ends, in units of eps; what lies outside counts at the ends."""
        scale = BINS / max(high - low, _ALIKE * max(abs(low), 1.0))

        bins = torch.zeros(BINS, dtype=torch.float64, device=self.parts[0].device)
        for scores, cost in self._sweep():
            # in float64: a bin must hold what its ends say, or it brackets nothing
            place = (scores.double() - low * self.eps).mul_(scale / self.eps)
            at = place.clamp_(0, BINS - 1).long()
            if isinstance(cost, Tensor):
                bins += torch.bincount(at, weights=cost.double(), minlength=BINS)
            else:
                bins += torch.bincount(at, minlength=BINS).double() * cost
        return bins.cpu()

    def spent(self, t: float) -> tuple[float, float]:
        """Return the budget spent at a threshold, and minus its derivative, in units of eps."""
        seen = []
        for scores, cost in self._sweep():
            mask = _logistic(scores, t * self.eps, self.eps)
            paid = mask * cost if isinstance(cost, Tensor) else mask
            slope = (paid - paid * mask).sum(dtype=torch.float64)
            both = torch.stack([paid.sum(dtype=torch.float64), slope])
            seen.append(both if isinstance(cost, Tensor) else both * cost)
        value, down = torch.stack(seen).sum(0).tolist()
        return value, down


def _bracket(bins: Tensor, reach: tuple[float, float], budget: float) -> tuple[float, float]:
    """Find where the budget is met if every score lay at the lower end of its bin."""
    # every score lies at most one bin above, and so does the threshold
    width = (reach[1] - reach[0]) / len(bins)
    return _solve(bins, reach[0], width, budget), width


def _middle(bins: Tensor, reach: tuple[float, float], budget: float) -> float:
    """Find where it is met if every score lay in the middle of its bin."""
    width = (reach[1] - reach[0]) / len(bins)
    return _solve(bins, reach[0] + width / 2, width, budget)


def _solve(bins: Tensor, first: float, width: float, budget: float) -> float:
    """Bisect over the bins that hold anything."""
    some = bins.nonzero().flatten()
    mass, places = bins[some], first + width * some.double()
    spread = math.log(budget) - math.log(max(float(mass.sum()) - budget, 1e-300))
    low, high = float(places[0]) - spread, float(places[-1]) - spread
    for _ in range(_STEPS):
        t = (low + high) / 2
        value = float(torch.dot(mass, torch.sigmoid(places - t)))
        low, high = (t, high) if value > budget else (low, t)
    return low


def _newton(
    entries: _Entries, budget: float, total: float, ends: tuple[float, float], start: float
) -> tuple[float, float]:
    """Walk from a good start to the threshold; stop at rounding, or where the passes are used."""
    unit = torch.finfo(entries.parts[0].dtype).eps
    room = _ALIKE * max(abs(ends[0]), abs(ends[1]), 1.0)
    low, high, t = ends[0] - room, ends[1] + room, start  # the root may be an end
    near = unit * min(budget, total - budget)
    while True:
        value, slope = entries.spent(t)
        missed = budget - value
        low, high = (t, high) if missed < 0 else (low, t)
        if abs(missed) <= near or high - low <= room or entries.passes >= PASSES - 1:
            return t, missed
        step = t - missed / slope if slope > 0 else low - 1
        t, last = (step if low <= step <= high else (low + high) / 2), t
        if abs(t - last) <= room:  # the mask cannot tell the two apart
            return last, missed
