"""Greedy moves: narrow at the least loss per cost, widen at the most gain per cost, swap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappushpop

import numpy as np

from torch_otprune.plan.knapsack import Floats, Ints, Position, Problem, State

__all__ = ["fill", "narrow", "spread", "swap"]

_Step = tuple[float, int, int]  # what it costs per unit, group, index to go to
_Best = Callable[[Position, int], _Step | None]


def spread(problem: Problem, state: State, reach: float, most: int = 64) -> list[Ints]:
    """Choose a few widths per group: its own, both ends of a window, and evenly between.

    Args:
        problem: what is solved.
        state: the middle of the window.
        reach: half the window, as a fraction of the group's widths; 1 is all of them.
        most: how many widths at most.

    Returns:
        ascending indices into the widths, per group.
    """
    chosen = []
    for here, widths in zip(state, problem.widths, strict=True):
        half = max(1, round(reach * (len(widths) - 1)))
        low, high = max(0, here - half), min(len(widths) - 1, here + half)
        even = np.linspace(low, high, min(most - 1, high - low + 1)).round().astype(np.int64)
        chosen.append(np.union1d(even, [here]))
    return chosen


def narrow(problem: Problem, start: State, options: Sequence[Ints]) -> State:
    """Narrow groups one step at a time until every limit holds.

    The step taken loses least per cost saved, both exact where it stands. A step may skip
    widths, so a curve that is not convex is followed along its lower hull.

    Args:
        problem: what is solved.
        start: where to start, usually too expensive.
        options: indices that may be stepped on, per group.

    Returns:
        a state that fits, unless the options run out first.
    """
    position = problem.at(start)

    def best(position: Position, group: int) -> _Step | None:
        here = position.index[group]
        steps = options[group][options[group] < here][::-1]
        saved = _weigh(-position.deltas(group)[:, steps], position, over=True)
        loss = problem.losses[group][steps] - problem.losses[group][here]
        return _pick(loss, saved, group, steps)

    _descend(position, best, until_fit=True)
    return position.state


def fill(problem: Problem, start: State) -> State:
    """Widen groups one step at a time until nothing fits any more.

    Args:
        problem: what is solved.
        start: a state that fits.

    Returns:
        a state that fits, no narrower anywhere, to which no step can be added.
    """
    position = problem.at(start)

    def best(position: Position, group: int) -> _Step | None:
        here, deltas = position.index[group], position.deltas(group)
        top = _widest(deltas, position.slack)
        if top <= here:
            return None
        steps = np.arange(here + 1, top + 1)
        gain = problem.losses[group][here] - problem.losses[group][steps]
        if gain[-1] <= 0:
            return 0.0, group, top
        price = _weigh(deltas[:, steps], position, over=False)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(gain > 0, np.where(price > 0, gain / price, np.inf), 0.0)
        pick = int(rate.argmax())
        return -float(rate[pick]), group, int(steps[pick])

    _descend(position, best, until_fit=False)
    return position.state


def _pick(loss: Floats, saved: Floats, group: int, steps: Ints) -> _Step | None:
    if not (saved > 0).any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(saved > 0, loss / saved, np.inf)
    pick = int(rate.argmin())
    return float(rate[pick]), group, int(steps[pick])


def _weigh(costs: Ints, position: Position, *, over: bool) -> Floats:
    """Add the measures up, each in fractions of its limit; only exceeded ones if `over`."""
    total = np.zeros(costs.shape[1])
    for cost, measure, slack in zip(costs, position.problem.measures, position.slack, strict=True):
        if slack < 0 or not over:
            total += cost / max(measure.limit, 1)
    return total


def _widest(deltas: Ints, slack: Sequence[int]) -> int:
    """Find the widest width whose cost fits every slack; -1 if none does."""
    # No search: a block may cost less than what would stand in for it, then costs fall.
    (fits,) = (deltas <= np.array(slack, dtype=np.int64)[:, None]).all(axis=0).nonzero()
    return int(fits[-1]) if len(fits) else -1


def _descend(position: Position, best: _Best, *, until_fit: bool) -> None:
    """Take the cheapest step again and again.

    A step only gets dearer while others are taken (narrower neighbours save less, wider
    ones cost more), so a stale heap entry is a lower bound: re-rate the top, no more.
    """
    rated = (best(position, group) for group in range(len(position.index)))
    heap = [step for step in rated if step is not None]
    heapify(heap)
    while heap and not (until_fit and position.fits):
        fresh = best(position, heap[0][1])
        if fresh is None or fresh > heap[0]:
            heappop(heap) if fresh is None else heappushpop(heap, fresh)
            continue
        position.move(fresh[1], fresh[2])


def swap(problem: Problem, start: State, tries: int = 64, pairs: int = 60_000) -> State:
    """Narrow one group and widen another by what that frees, while the sum of losses falls.

    Args:
        problem: what is solved.
        start: a state that fits.
        tries: how many narrower widths of each group are tried at most.
        pairs: how many pairs of groups are looked at, counting repeats, before it stops.

    Returns:
        a state that fits and loses no more than `start`.
    """
    position = problem.at(start)
    deltas = [position.deltas(group) for group in range(len(start))]
    quiet, giver = 0, 0  # done when nobody has had anything to give for a whole round
    while quiet < len(start) and pairs > 0:
        pairs -= len(start)
        found = _best_swap(position, deltas, giver, tries)
        quiet = 0 if found else quiet + 1
        giver = giver if found else (giver + 1) % len(start)
        for group, index in found:
            position.move(group, index)
        for group in {near for moved, _ in found for near in (moved, *problem.neighbours[moved])}:
            deltas[group] = position.deltas(group)
    return position.state


def _best_swap(
    position: Position, deltas: Sequence[Ints], giver: int, tries: int
) -> tuple[tuple[int, int], ...]:
    """Find what one group should give, and to whom: two moves, or none that helps."""
    here, losses = position.index[giver], position.problem.losses
    steps = np.unique(np.linspace(0, here - 1, min(tries, here)).round().astype(np.int64))
    found: tuple[tuple[int, int], ...] = ()
    best = -1e-12 * abs(position.problem.loss(position.state))  # rounding is no improvement
    for taker in range(len(deltas)):
        if taker == giver or not len(steps):
            continue
        tops = _tops(position, deltas, giver, steps, taker)
        change = losses[giver][steps] - losses[giver][here] + losses[taker][tops]
        change = np.where(tops < 0, np.inf, change - losses[taker][position.index[taker]])
        pick = int(change.argmin())
        if change[pick] < best:
            best, found = float(change[pick]), ((giver, int(steps[pick])), (taker, int(tops[pick])))
    return found


def _tops(position: Position, deltas: Sequence[Ints], giver: int, steps: Ints, taker: int) -> Ints:
    """Find how wide the taker can be for each step of the giver; exact for products too."""
    slack = np.array(position.slack)[:, None] - deltas[giver][:, steps]
    alone = taker not in position.problem.neighbours[giver]
    if alone and bool((np.diff(deltas[taker]) >= 0).all()):
        rows = zip(deltas[taker], slack, strict=True)
        fits: Ints = np.min([row.searchsorted(s, side="right") for row, s in rows], axis=0)
        return fits - 1
    tops, back = [], position.index[giver]
    for step, left in zip(steps.tolist(), slack.T.tolist(), strict=True):
        position.move(giver, step)
        tops.append(_widest(position.deltas(taker), left))
    position.move(giver, back)
    return np.array(tops)
