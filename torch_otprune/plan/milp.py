"""The knapsack as a mixed-integer linear program, solved by HiGHS through scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_otprune.plan.knapsack import Floats, Ints, Position, Problem, State

__all__ = ["NODES", "SECONDS", "choose"]

NODES = 500  # branch-and-bound nodes: a limit that does not depend on the machine
SECONDS = 30.0  # a last resort per program; never reached where NODES does its work


def choose(
    problem: Problem, start: State, options: Sequence[Ints], *, products: bool, gap: float
) -> State | None:
    """Choose one option per group by one program around a state.

    The cost is expanded around `start`: what each move costs alone, plus, if `products`,
    what every two moves cost together. Without products of three widths that is exact.

    Args:
        problem: what is solved.
        start: the centre of the expansion; its loss is a bound that must be met.
        options: indices into the widths that may be chosen, per group.
        products: whether to model pairs of moves, at one more column per option and pair.
        gap: relative distance from the optimum at which to stop.

    Returns:
        the choice, which fits as far as the expansion is exact; None if none was found.
    """
    program = _Program(problem.at(start), options)
    if products:
        for one, two in problem.pairs:
            program.couple(*sorted((one, two), key=lambda g: (len(options[g]), g)))
    return program.solve(gap)


class _Program:
    """Columns: one indicator per option, then the products; rows: as they are added."""

    def __init__(self, position: Position, options: Sequence[Ints]) -> None:
        self.position, self.options = position, options
        self.starts = np.cumsum([0, *map(len, options)])
        self.columns = int(self.starts[-1])
        self.entries: list[tuple[Ints, Floats]] = []
        self.bounds: list[tuple[float, float]] = []
        deltas = [position.deltas(g)[:, o] for g, o in enumerate(options)]
        self.costs = [np.concatenate(rows).astype(float) for rows in zip(*deltas, strict=True)]
        for group in range(len(options)):
            block = self.block(group)
            self.add(block, np.ones(len(block)), 1.0, 1.0)

    def block(self, group: int) -> Ints:
        """List the indicator columns of one group."""
        return np.arange(self.starts[group], self.starts[group + 1])

    def add(self, columns: Ints, values: Floats, low: float, high: float) -> None:
        """Append a row."""
        self.entries.append((columns, values))
        self.bounds.append((low, high))

    def couple(self, one: int, two: int) -> None:
        """Model the product of two moves.

        With x the indicators of `one` and t in [0, 1] the place of `two` between its
        narrowest and widest option, the columns v_i = x_i t are linear: v_i <= x_i and
        sum_i v_i = t; only the v_i of the chosen option can then differ from zero.
        """
        widths = [self.position.problem.widths[g][self.options[g]] for g in (one, two)]
        low, span = int(widths[1][0]), int(widths[1][-1] - widths[1][0])
        if not span:
            return
        mine, theirs = self.block(one), self.block(two)
        fresh = np.arange(self.columns, self.columns + len(mine))
        self.columns += len(mine)
        place = (widths[1] - low) / span
        self.add(np.r_[fresh, theirs], np.r_[np.ones(len(fresh)), -place], 0.0, 0.0)
        for column, indicator in zip(fresh, mine, strict=True):
            self.add(np.array([column, indicator]), np.array([1.0, -1.0]), -np.inf, 0.0)
        self._charge(one, two, widths[0], (low, span))

    def _charge(self, one: int, two: int, widths: Ints, line: tuple[int, int]) -> None:
        kept, (low, span) = self.position.kept, line
        steps = (widths - kept[one]).astype(float)
        for m, measure in enumerate(self.position.problem.measures):
            bend = float(measure.mixed(one, two, kept))
            self.costs[m][self.block(one)] += bend * steps * (low - kept[two])
            self.costs[m] = np.r_[self.costs[m], bend * steps * span]

    def solve(self, gap: float) -> State | None:
        """Hand the program to HiGHS and read the choice.

        Presolve is off: HiGHS writes to the process's stdout when the solution of a
        presolved program has to be mended, whatever its options say.

        Returns:
            indices into the widths, or None.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        objective = self._finish()
        sizes = [len(columns) for columns, _ in self.entries]
        rows = np.repeat(np.arange(len(sizes)), sizes)
        columns, values = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(len(sizes), self.columns))
        low, high = np.array(self.bounds).T
        found = milp(
            objective,
            integrality=np.arange(self.columns) < self.starts[-1],
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={
                "mip_rel_gap": gap,
                "node_limit": NODES,
                "time_limit": SECONDS,
                "presolve": False,
            },
        )
        return None if found.x is None else self._read(found.x)

    def _finish(self) -> Floats:
        """Add limits and the bound on the loss, all scaled to numbers HiGHS is at ease with."""
        position = self.position
        for cost, slack, measure in zip(
            self.costs, position.slack, position.problem.measures, strict=True
        ):
            unit = max(measure.limit, 1) / 1e3
            used = np.flatnonzero(cost)
            # costs are integers: half a unit of room keeps rounding from excluding an exact fit
            self.add(used, cost[used] / unit, -np.inf, (slack + 0.5) / unit)
        pairs = zip(position.problem.losses, self.options, strict=True)
        loss = np.concatenate([losses[options] for losses, options in pairs])
        here = position.problem.loss(position.state)
        scale = 1e3 / (max(here, 1e-6 * float(np.abs(loss).max())) or 1.0)
        self.add(np.arange(len(loss)), loss * scale, -np.inf, here * scale)
        loss *= scale
        objective: Floats = np.zeros(self.columns)
        objective[: len(loss)] = loss
        return objective

    def _read(self, x: Floats) -> State:
        picks = [int(x[self.block(g)].argmax()) for g in range(len(self.options))]
        return tuple(int(o[i]) for o, i in zip(self.options, picks, strict=True))
