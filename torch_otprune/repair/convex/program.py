"""The convex program of a rectified pair over given activation patterns and output directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torch_otprune.repair.convex.loss import Loss

__all__ = ["Pair", "Program", "Solved", "answers", "objective", "solve"]

_EVERY = 20  # rounds between two looks at objective, bound and residuals
_BALANCE = 5.0  # ratio of residuals at which the penalty is moved
_SETTLES = 600  # rounds after which the penalty stays
_RELAXED = 1.6
_FIRST, _RANGE = (
    0.5,
    10.0,
)  # penalty of the split, of a loss of curvature 1, and how far it may move


@dataclass(frozen=True)
class Pair:
    """A rectified pair in balanced form: what a unit weighs stands in its input weights.

    Args:
        units: input weights, one column per unit; the last row is the bias.
        ways: what a unit adds to the answers, one row of length 1 per unit.
        offset: what is added to all answers.
    """

    units: Float[Tensor, "columns units"]
    ways: Float[Tensor, "units outputs"]
    offset: Float[Tensor, " outputs"]


@dataclass(frozen=True)
class Program:
    """Minimise a mean loss plus a group penalty, each unit inside the cone of its pattern.

    Args:
        x: inputs; the last column is one.
        target: answers, or one-hot labels.
        on: where a unit is to be active.
        ways: output direction of each unit, of length 1.
        loss: of one row.
        penalty: weight of the summed lengths of all units and of the offset.
    """

    x: Float[Tensor, "rows columns"]
    target: Float[Tensor, "rows outputs"]
    on: Bool[Tensor, "rows units"]
    ways: Float[Tensor, "units outputs"]
    loss: Loss
    penalty: float


@dataclass(frozen=True)
class Solved:
    """What the solver found.

    Args:
        pair: the best rectified pair that it met.
        objective: of that pair, its true rectifier in place.
        bound: no point of the program has an objective below it.
        rounds: taken.
    """

    pair: Pair
    objective: float
    bound: float
    rounds: int

    @property
    def gap(self) -> float:
        """Bound how far the pair is above the least objective over the program's patterns.

        Negative where the pair, free to leave the patterns, does better than all that keep them.
        """
        return self.objective - self.bound


def answers(pair: Pair, x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows outputs"]:
    """Compute what the pair answers."""
    return (x @ pair.units).relu() @ pair.ways + pair.offset


def objective(program: Program, pair: Pair) -> float:
    """Measure the mean loss of a pair, with its true rectifier, plus its penalty."""
    loss = program.loss.each(answers(pair, program.x), program.target).mean()
    return float(loss + program.penalty * (pair.units.norm(dim=0).sum() + pair.offset.norm()))


@dataclass
class _State:
    """Where alternating directions stand; duals are scaled by the penalty of the split."""

    units: Tensor
    group: Tensor
    cone: Tensor
    part: Tensor
    offset: Tensor
    shrunk: Tensor
    each: Tensor
    slope: Tensor
    push: Tensor
    keep: Tensor
    pull: Tensor
    push_offset: Tensor
    pull_offset: Tensor


def solve(program: Program, start: Pair, *, rounds: int = 1000, tolerance: float = 1e-3) -> Solved:
    """Solve by alternating directions; one Cholesky factor serves all units.

    Args:
        program: what to solve.
        start: a pair that is known; of the program's patterns and directions, unit by unit, or
            with fewer units than these. What comes out is never worse.
        rounds: at most.
        tolerance: of the gap, as a share of the objective.

    Returns:
        the best pair met, and a lower bound of the program.

    Source: the program is Pilanci & Ergen's 2020, its splitting follows Bai, Gautam & Sojoudi
    2022; given output directions for several outputs, the split by sample that serves all three
    losses, the bound and the best pair under the true rectifier are ours.
    """
    walk = _Walk(program)
    state = walk.begin(start)
    best, low = (objective(program, start), start), -torch.inf
    turn = 0
    while turn < rounds:
        turn += 1
        old, state = state, walk.step(state)
        if turn % _EVERY and turn < rounds:
            continue
        copies = (state.group, state.shrunk), (state.units, state.offset)
        pairs = [Pair(units, program.ways, offset) for units, offset in copies]
        best = min(best, *[(objective(program, p), p) for p in pairs], key=lambda found: found[0])
        low = max(low, walk.bound(state))
        # the pair itself may be below the bound already, and get better still
        if abs(walk.value(pairs[0]) - low) <= tolerance * max(abs(low), 1e-300):
            break
        if turn <= _SETTLES:
            state = walk.balanced(old, state)
    return Solved(best[1], best[0], low, turn)


class _Walk:
    """Alternating directions for one program, whose objective is summed, not averaged."""

    def __init__(self, program: Program) -> None:
        self.p, self.rho = program, 1.0
        rows, outputs = program.target.shape
        self.mask, self.weight = program.on.to(program.x), program.penalty * rows
        gram = 2 * program.x.T @ program.x
        gram.diagonal().add_(1.0)
        self.factor = torch.linalg.cholesky(gram)
        outer = (program.ways[:, :, None] * program.ways[:, None]).flatten(1)
        reach = (self.mask @ outer).reshape(rows, outputs, outputs)
        reach.diagonal(dim1=1, dim2=2).add_(1.0)
        self.reach = reach
        self.flip = 2 * self.mask - 1
        self.rho = _FIRST
        self.range = self.rho / _RANGE, self.rho * _RANGE

    def begin(self, start: Pair) -> _State:
        """Start from a pair; units beyond it are zero."""
        x, more = self.p.x, self.p.on.shape[1] - start.units.shape[1]
        units = torch.nn.functional.pad(start.units, (0, more))
        seen, flat = x @ units, torch.zeros_like(self.mask)
        each = start.offset.expand_as(self.p.target)
        answer = (self.mask * seen) @ self.p.ways + each
        none, offset = torch.zeros_like(self.p.target), start.offset
        slope = self.p.loss.slope(answer, self.p.target)
        pull = self.mask * (slope @ self.p.ways.T) / self.rho
        return _State(
            units, units, seen, seen, offset, offset, each, slope,
            torch.zeros_like(units), flat, pull, torch.zeros_like(offset), none,
        )  # fmt: skip

    def step(self, s: _State) -> _State:
        """Take one round."""
        p, rows = self.p, len(self.p.x)
        right = s.group - s.push + p.x.T @ (s.cone - s.keep + s.part - s.pull)
        units = torch.cholesky_solve(right, self.factor)
        offset = (s.shrunk - s.push_offset + (s.each - s.pull_offset).sum(0)) / (1 + rows)
        seen = p.x @ units
        # over-relaxed: the copies look a little ahead of where the units are
        ahead_units = _RELAXED * units + (1 - _RELAXED) * s.group
        ahead_cone = _RELAXED * seen + (1 - _RELAXED) * s.cone
        ahead_part = _RELAXED * seen + (1 - _RELAXED) * s.part
        ahead_shrunk = _RELAXED * offset + (1 - _RELAXED) * s.shrunk
        ahead_each = _RELAXED * offset + (1 - _RELAXED) * s.each
        group = _shrink(ahead_units + s.push, self.weight / self.rho)
        shrunk = _shrink((ahead_shrunk + s.push_offset)[:, None], self.weight / self.rho)[:, 0]
        cone = self.flip * (self.flip * (ahead_cone + s.keep)).clamp_min(0)
        free, free_each = ahead_part + s.pull, ahead_each + s.pull_offset
        given = (self.mask * free) @ p.ways + free_each
        slope = p.loss.near(given, self.reach / self.rho, p.target, s.slope)
        part = free - self.mask * (slope @ p.ways.T) / self.rho
        each = free_each - slope / self.rho
        return _State(
            units, group, cone, part, offset, shrunk, each, slope,
            s.push + ahead_units - group, s.keep + ahead_cone - cone, s.pull + ahead_part - part,
            s.push_offset + ahead_shrunk - shrunk, s.pull_offset + ahead_each - each,
        )  # fmt: skip

    def value(self, pair: Pair) -> float:
        """Measure the program's own objective, patterns in place of the rectifier."""
        p = self.p
        answer = (self.mask * (p.x @ pair.units)) @ p.ways + pair.offset
        size = pair.units.norm(dim=0).sum() + pair.offset.norm()
        return float(p.loss.each(answer, p.target).mean() + p.penalty * size)

    def bound(self, s: _State) -> float:
        """Bound the program from below by a dual point.

        With R the slopes and w >= 0 the duals of the cones, the dual is `-sum l*(R)` where every
        `|X'(D R c + (I - 2D) w)|`, with a unit's pattern D and direction c, and the summed slopes
        stay within the penalty. Both are shrunk until they do.

        Returns:
            a bound of the mean, in the unit of the loss.
        """
        p = self.p
        spill = p.x.T @ (self.mask * (s.slope @ p.ways.T) + self.rho * s.keep)
        most = torch.cat([spill.norm(dim=0), s.slope.sum(0).norm()[None]]).max()
        share = (self.weight / most.clamp_min(1e-300)).clamp_max(1.0)
        return float(-p.loss.conjugate(share * s.slope, p.target).mean())

    def balanced(self, old: _State, s: _State) -> _State:
        """Move the penalty of the split so that both residuals shrink alike."""
        seen = self.p.x @ s.units
        first = _size(s.units - s.group, seen - s.cone, seen - s.part)
        first = first / max(_size(s.units, seen, seen), 1e-300)
        moved = s.group - old.group + self.p.x.T @ (s.cone - old.cone + s.part - old.part)
        second = _size(moved) / max(_size(s.push), 1e-300)
        factor = 2.0 if first > _BALANCE * second else 0.5 if second > _BALANCE * first else 1.0
        if not self.range[0] <= self.rho * factor <= self.range[1]:
            return s
        self.rho *= factor
        return replace(
            s,
            push=s.push / factor,
            keep=s.keep / factor,
            pull=s.pull / factor,
            push_offset=s.push_offset / factor,
            pull_offset=s.pull_offset / factor,
        )


def _size(*parts: Tensor) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())


def _shrink(value: Tensor, by: float) -> Tensor:
    """Shorten every column, to nothing where it is short."""
    length = value.norm(dim=0, keepdim=True)
    share: Tensor = (1 - by / length.clamp_min(1e-300)).clamp_min(0)
    return value * share
