"""The allocation as arrays: widths, losses, and exact costs as polynomials in the widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod

import numpy as np
import numpy.typing as npt

from torch_otprune.structure.graph import CostModel, Term

__all__ = ["Floats", "Ints", "Measure", "Problem", "State", "split"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
State = tuple[int, ...]  # one index into `Problem.widths[group]` per group
Monomial = tuple[int, ...]  # sorted group numbers, a square as a repeated number


@dataclass(frozen=True)
class _Factor:
    """One monomial seen from one of its groups: coefficient * width**power * the others."""

    power: int
    coefficient: int
    others: Monomial


@dataclass(frozen=True)
class Measure:
    """A limited cost, expanded into monomials of the kept widths.

    Args:
        name: `params` or `macs`.
        limit: the most it may be, in parts.
        monomials: coefficient of each product of widths, in parts; `()` is the constant.
        groups: how many groups there are.
        parts: into how many each unit of the cost is split, so that all numbers are whole.
    """

    name: str
    limit: int
    monomials: Mapping[Monomial, int]
    groups: int
    parts: int = 1

    @classmethod
    def expand(cls, model: CostModel, limit: int, names: Sequence[str]) -> Measure:
        """Multiply a cost model out, exactly.

        Args:
            model: the cost, in units of its measure.
            limit: the most it may be, in the same unit.
            names: the groups, in the order in which they are numbered.

        Returns:
            the same cost as a polynomial.
        """
        number = {name: index for index, name in enumerate(names)}
        total: Counter[Monomial] = Counter()
        parts = split(model)
        for term in model.terms:
            total.update(_multiply(term, number, parts))
        most = limit * parts + parts - 1  # costs are rounded down
        return cls(model.measure, most, {m: total[m] for m in sorted(total)}, len(names), parts)

    @cached_property
    def factors(self) -> tuple[tuple[_Factor, ...], ...]:
        """List, per group, the monomials that contain it."""
        found: list[list[_Factor]] = [[] for _ in range(self.groups)]
        for monomial, coefficient in self.monomials.items():
            for group, power in Counter(monomial).items():
                others = tuple(g for g in monomial if g != group)
                found[group].append(_Factor(power, coefficient, others))
        return tuple(map(tuple, found))

    def slopes(self, group: int, kept: Sequence[int]) -> dict[int, int]:
        """Fix all widths but one and read the cost as a polynomial in that one.

        Args:
            group: the free group.
            kept: the width of every group.

        Returns:
            power to coefficient, without the constant.
        """
        slopes: Counter[int] = Counter()
        for factor in self.factors[group]:
            slopes[factor.power] += factor.coefficient * prod(kept[g] for g in factor.others)
        return slopes

    def mixed(self, one: int, two: int, kept: Sequence[int]) -> int:
        """Find what one more unit in each of two groups costs beyond both alone.

        Args:
            one: a group.
            two: another group.
            kept: the width of every group.

        Returns:
            the mixed second difference at `kept`.
        """
        corners = ((one, two), (), (one,), (two,))
        values = [self.total([k + (g in up) for g, k in enumerate(kept)]) for up in corners]
        return values[0] + values[1] - values[2] - values[3]

    def total(self, kept: Sequence[int]) -> int:
        """Evaluate the cost at one width per group."""
        return sum(c * prod(kept[g] for g in m) for m, c in self.monomials.items())


def split(model: CostModel) -> int:
    """Find into how many parts a cost must be split for all its coefficients to be whole.

    Args:
        model: the cost.

    Returns:
        one where they are.
    """
    return lcm(*(term.scale.denominator for term in model.terms))


def _multiply(term: Term, number: Mapping[str, int], parts: int) -> Counter[Monomial]:
    product: Counter[Monomial] = Counter({(): int(term.scale * parts)})
    for dim in term.dims:
        places = [((), dim.fixed), *(((number[name],), width) for name, width in dim.by_group)]
        grown: Counter[Monomial] = Counter()
        for monomial, coefficient in product.items():
            for extra, factor in places:
                if factor:
                    grown[tuple(sorted(monomial + extra))] += coefficient * factor
        product = grown
    return product


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack: one width per group, least loss, every measure in its limit.

    Args:
        names: groups in alphabetical order, so that the order of the input changes nothing.
        widths: allowed widths per group, ascending.
        losses: what each width loses, non-increasing.
        measures: the limited costs.
    """

    names: tuple[str, ...]
    widths: tuple[Ints, ...]
    losses: tuple[Floats, ...]
    measures: tuple[Measure, ...]

    @cached_property
    def least(self) -> State:
        """Take the narrowest width everywhere."""
        return (0,) * len(self.names)

    @cached_property
    def most(self) -> State:
        """Take the widest width everywhere."""
        return tuple(len(w) - 1 for w in self.widths)

    @cached_property
    def neighbours(self) -> tuple[frozenset[int], ...]:
        """List, per group, the groups that share a product with it."""
        found: list[set[int]] = [set() for _ in self.names]
        for measure in self.measures:
            for group, factors in enumerate(measure.factors):
                found[group].update(*(factor.others for factor in factors))
        return tuple(map(frozenset, found))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """List every two groups that share a product."""
        return [(a, b) for a, near in enumerate(self.neighbours) for b in sorted(near) if a < b]

    def kept(self, state: State) -> list[int]:
        """Look the widths up."""
        return [int(w[i]) for w, i in zip(self.widths, state, strict=True)]

    def loss(self, state: State) -> float:
        """Sum the losses; the order of the sum is fixed, so equal states have equal sums."""
        return float(sum(float(c[i]) for c, i in zip(self.losses, state, strict=True)))

    def slack(self, state: State) -> list[int]:
        """Subtract every cost from its limit; negative where it is exceeded."""
        kept = self.kept(state)
        return [measure.limit - measure.total(kept) for measure in self.measures]

    def fits(self, state: State) -> bool:
        """Tell whether every limit holds, exactly."""
        return min(self.slack(state), default=0) >= 0

    def at(self, state: State) -> Position:
        """Stand somewhere and move from there."""
        return Position(self, list(state), self.kept(state), self.slack(state))


@dataclass
class Position:
    """A state on the move, with its exact slack kept up to date.

    Args:
        problem: what is solved.
        index: one index into the widths per group.
        kept: the widths themselves.
        slack: limit minus cost per measure; negative where it is exceeded.
    """

    problem: Problem
    index: list[int]
    kept: list[int]
    slack: list[int]

    @property
    def state(self) -> State:
        """Freeze where it stands."""
        return tuple(self.index)

    @property
    def fits(self) -> bool:
        """Tell whether every limit holds, exactly."""
        return min(self.slack, default=0) >= 0

    def deltas(self, group: int) -> Ints:
        """Cost every width of one group relative to its present one, the others fixed.

        Args:
            group: the group that moves.

        Returns:
            measures x widths, in units of each measure, ascending along the widths.
        """
        widths = self.problem.widths[group]
        rows = np.zeros((len(self.slack), len(widths)), dtype=np.int64)
        for m, measure in enumerate(self.problem.measures):
            for power, slope in measure.slopes(group, self.kept).items():
                rows[m] += slope * widths**power
        return rows - rows[:, [self.index[group]]]

    def move(self, group: int, index: int) -> None:
        """Set one group to another width.

        Args:
            group: the group that moves.
            index: where to, as an index into its widths.
        """
        width = int(self.problem.widths[group][index])
        for m, measure in enumerate(self.problem.measures):
            slopes = measure.slopes(group, self.kept).items()
            self.slack[m] -= sum(s * (width**p - self.kept[group] ** p) for p, s in slopes)
        self.index[group], self.kept[group] = index, width
