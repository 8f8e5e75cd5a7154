"""The order in which the moves are tried: greedy first, then programs around the best."""

from __future__ import annotations

from typing import Literal

from torch_otprune.plan.fill import fill, narrow, spread, swap
from torch_otprune.plan.knapsack import Problem, State
from torch_otprune.plan.milp import choose

__all__ = ["LARGE", "even", "greedy", "improve", "solve"]

LARGE = 150  # groups beyond which only the greedy moves are worth their time
GAP = 1e-4  # relative gap of a program that only sees some of the widths
COLUMNS = {False: 2500, True: 500}  # size of such a program: without, with products
WHOLE = 1000  # columns up to which one program sees every width of every group
EXACT = 400  # columns up to which such a program is solved to the end
REPEATS = 4


def greedy(problem: Problem) -> State:
    """Narrow from the widest state: in coarse steps first, then again in fine ones.

    Args:
        problem: what is solved; its narrowest state must fit.

    Returns:
        a state that fits, to which no step can be added.
    """
    coarse = spread(problem, problem.most, 1.0)
    rough = narrow(problem, problem.most, coarse)
    above = zip(coarse, rough, strict=True)
    raised = tuple(int(o[min(o.searchsorted(i) + 1, len(o) - 1)]) for o, i in above)
    return _settle(problem, raised)


def even(problem: Problem) -> State:
    """Keep the same fraction of every group's widths: another place to start from.

    Args:
        problem: what is solved; its narrowest state must fit.

    Returns:
        a state that fits, to which no step can be added.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.fits(_share(problem, middle)) else (low, middle)
    return _settle(problem, _share(problem, low))


def _share(problem: Problem, fraction: float) -> State:
    return tuple(int(fraction * top) for top in problem.most)


def _settle(problem: Problem, state: State) -> State:
    """Make a state fit, then use up what is left."""
    everything = spread(problem, state, 1.0, most=1 << 62)
    return fill(problem, swap(problem, fill(problem, narrow(problem, state, everything))))


def improve(problem: Problem, start: State) -> State:
    """Solve programs around the best state, wide ones first, while that helps.

    Args:
        problem: what is solved.
        start: a state that fits.

    Returns:
        a state that fits and loses no more than `start`; the optimum if all widths of
        all groups make one small program.
    """
    if _columns(problem, products=True) <= WHOLE:
        return _program(problem, start, 1.0, True)
    best = start
    for products in (False, True) if problem.pairs else (False,):
        for reach in (1.0, 0.1, 0.02):
            for _ in range(REPEATS):
                better = _program(problem, best, reach, products)
                if better == best:
                    break
                best = better
    return best


def solve(problem: Problem, solver: Literal["auto", "milp", "greedy"]) -> tuple[State, str]:
    """Find the best state that the size of the problem allows.

    Args:
        problem: what is solved; its narrowest state must fit.
        solver: `greedy` does without programs, `milp` insists on them, `auto` decides.

    Returns:
        a state that fits, and the solver that found it.
    """
    best = greedy(problem)
    if solver == "greedy" or (solver == "auto" and len(best) > LARGE):
        return best, "greedy"
    if problem.pairs and len(best) <= LARGE // 3:
        best = min(best, even(problem), key=lambda state: (problem.loss(state), state))
    return improve(problem, best), "milp"


def _columns(problem: Problem, *, products: bool) -> int:
    sizes = [len(w) for w in problem.widths]
    pairs = problem.pairs if products else []
    return sum(sizes) + sum(min(sizes[a], sizes[b]) for a, b in pairs)


def _program(problem: Problem, best: State, reach: float, products: bool) -> State:
    """Solve one program and keep the better of its answer and what there was."""
    whole = products and _columns(problem, products=True) <= WHOLE
    parts = len(best) + len(problem.pairs) * products
    most = max(map(len, problem.widths)) + 1 if whole else min(64, COLUMNS[products] // parts)
    if most < 4:
        return best
    options = spread(problem, best, reach, most)
    gap = 0.0 if sum(map(len, options)) <= EXACT else GAP
    found = choose(problem, best, options, products=products, gap=gap)
    if found is None or found == best:
        return best
    found = _settle(problem, found)
    return min(best, found, key=lambda state: (problem.loss(state), state))
