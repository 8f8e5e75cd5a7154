"""The convex program of Net-Trim: least l1 norm within a radius, behind a rectifier."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torch_otprune.criteria.weights.base import Samples

__all__ = ["Program", "Solved", "behind", "solve"]

_SCALE = 0.3  # of the root of the largest entry of X'X: brings problems to one size
_TYPICAL = 1 / 16  # size of a weight at which the first penalty converges well
_BALANCE = 10.0  # ratio of residuals at which the penalty is moved
_EVERY = 10  # rounds between two looks at the residuals
_SWINGS = 100  # rounds in which the penalty moves at every look; then where their number doubles


@dataclass(frozen=True)
class Program:
    """Minimise `|U|_1` such that active answers stay near and inactive ones stay below a roof.

    Every group, and with a radius for each output every output, is a problem of its own: batches
    are solved as if one by one.

    Args:
        x: inputs.
        target: answers.
        active: where the answer must be near; elsewhere it must not exceed the roof.
        roof: the bound there.
        radius: of the summed squares of active errors; the last axis has size 1 where all outputs
            share one radius.
        free: whether the last column is left out of the norm, as a bias.
    """

    x: Float[Tensor, "groups rows columns"]
    target: Float[Tensor, "groups rows out"]
    active: Bool[Tensor, "groups rows out"]
    roof: Float[Tensor, "groups rows out"]
    radius: Float[Tensor, "groups 1 radii"]
    free: bool = False

    @property
    def shared(self) -> bool:
        """Tell whether outputs share a radius."""
        return self.radius.shape[2] == 1

    def to(self, dtype: torch.dtype) -> Program:
        """Write the same problem in another precision."""
        return replace(
            self,
            x=self.x.to(dtype),
            target=self.target.to(dtype),
            roof=self.roof.to(dtype),
            radius=self.radius.to(dtype),
        )

    def unit(self) -> Tensor:
        """Guess how large weights are, so that one penalty suits small ones and large ones."""
        power = self.x.square().sum((1, 2), keepdim=True).sqrt()
        outputs = self.target.shape[2] if self.shared else 1
        guess = self.size(self.target * self.active) / power.clamp_min(1e-150) / outputs**0.5
        return torch.where(guess > 0, guess / _TYPICAL, 1.0)

    def size(self, value: Tensor) -> Tensor:
        """Measure each problem's share of rows x outputs, or columns x outputs."""
        along = (1, 2) if self.shared else (1,)
        return value.square().sum(along, keepdim=True).sqrt()

    def most(self, value: Tensor) -> Tensor:
        """Find each problem's largest entry."""
        return value.amax((1, 2) if self.shared else (1,), keepdim=True)

    def total(self, value: Tensor) -> Tensor:
        """Sum up each problem's entries."""
        return value.sum((1, 2) if self.shared else (1,), keepdim=True)

    def norm(self, weight: Float[Tensor, "groups columns out"]) -> Tensor:
        """Measure the l1 norm, the free column aside."""
        return self.total((weight[:, :-1] if self.free else weight).abs())


@dataclass(frozen=True)
class Solved:
    """What the solver found; one number per problem, shaped like the radius.

    Args:
        weight: columns x outputs, exact zeros.
        spent: root of the summed squares of active errors, over the radius.
        over: root of the summed squares of what inactive answers exceed their roof by.
        gap: share of the norm that may be above the least one; NaN where no dual point was found.
        iterations: rounds.
        state: what a solve of a nearby problem may start from, in units of its own.
    """

    weight: Float[Tensor, "groups columns out"]
    spent: Tensor
    over: Tensor
    gap: Tensor
    iterations: int
    state: State


@dataclass
class State:
    """Where alternating directions stand; answers and duals are of the scaled problem.

    Args:
        answer: of the weights.
        near: split copy of the answers.
        sparse: split copy of the weights.
        dense: the weights.
        pull: scaled dual of the answers.
        push: scaled dual of the weights.
        penalty: of each problem.
    """

    answer: Tensor
    near: Tensor
    sparse: Tensor
    dense: Tensor
    pull: Tensor
    push: Tensor
    penalty: Tensor


def behind(
    program: Program | Samples, weight: Float[Tensor, "groups columns out"]
) -> tuple[Float[Tensor, "groups rows out"], Float[Tensor, "groups rows out"]]:
    """Say what a weight does behind the rectifier.

    Args:
        program: the problem, or the rows that it is about.
        weight: columns x outputs, in the unit of the rows.

    Returns:
        errors of active answers and excess of inactive ones, each zero where the other counts.
    """
    answer = program.x @ weight
    near = (answer - program.target) * program.active
    return near, (answer - program.roof).clamp_min(0) * ~program.active


def solve(
    program: Program, *, rounds: int = 2000, tolerance: float = 1e-4, start: State | None = None
) -> Solved:
    """Solve by alternating directions; one Cholesky factor serves all rounds and outputs.

    Args:
        program: what to solve.
        rounds: at most.
        tolerance: relative size of both residuals at which a problem is done and moves no more.
        start: the state of a problem that differs in its radius alone.

    Returns:
        the sparse copy of the weights, and how good it is.

    Source: Aghasi, Abdi & Romberg 2020, "Fast convex pruning of deep neural networks", section 3;
    the balance of the penalty by residuals, problems side by side, the free column and the gap
    are ours.
    """
    entry = (program.x.square().sum(1, keepdim=True)).amax(2, keepdim=True)
    scale = _SCALE * entry.sqrt().clamp_min(1e-150)
    unit = program.unit()
    small = replace(
        program,
        x=program.x / scale,
        target=program.target / (scale * unit),
        roof=program.roof / (scale * unit),
        radius=program.radius / (scale * unit),
    )
    walk = _Walk(small)
    state = start or walk.begin()
    done, turn = torch.zeros_like(state.penalty, dtype=torch.bool), 0
    while turn < rounds and not bool(done.all()):
        turn += 1
        look = turn % _EVERY == 0
        # ever more rarely, or the penalty may swing for good
        balance = look and (turn <= _SWINGS or (turn // _SWINGS).bit_count() == 1)
        state, done = walk.step(state, done, look=look, balance=balance, tolerance=tolerance)
    weight = state.sparse * unit
    near, over = behind(program, weight)
    floor = program.radius.clamp_min(1e-300)
    return Solved(
        weight,
        program.size(near) / floor,
        program.size(over),
        walk.gap(state),
        turn,
        state,
    )


class _Walk:
    """Alternating directions for a scaled problem."""

    def __init__(self, program: Program) -> None:
        self.program = program
        gram = program.x.mT @ program.x
        gram.diagonal(dim1=1, dim2=2).add_(1.0)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double())).to(gram)
        self.known = program.active * program.target

    def begin(self) -> State:
        p = self.program
        zeros = p.x.new_zeros(p.x.shape[0], p.x.shape[2], p.target.shape[2])
        flat = torch.zeros_like(p.target)
        penalty = torch.full_like(p.radius, 100.0)
        return State(flat, flat, zeros, zeros, flat, zeros, penalty)

    def step(
        self, state: State, done: Tensor, *, look: bool, balance: bool, tolerance: float
    ) -> tuple[State, Tensor]:
        """Take one round; problems that are done stay where they are."""
        p = self.program
        free = state.answer - state.pull
        error = (free - p.target) * p.active
        share = p.radius / torch.maximum(p.size(error), p.radius).clamp_min(1e-300)
        near = self.known + share * error + torch.minimum(free, p.roof) * ~p.active
        sparse = self._soft(state.dense - state.push, 1 / state.penalty)
        right = p.x.mT @ (near + state.pull) + sparse + state.push
        dense = self.inverse @ right
        answer = p.x @ dense
        pull, push = state.pull + near - answer, state.push + sparse - dense
        new = State(answer, near, sparse, dense, pull, push, state.penalty)
        kept = _frozen(state, new, done)
        if not look:
            return kept, done
        first = torch.maximum(
            p.size(near - answer) / p.size(answer).clamp_min(1e-300),
            p.size(sparse - dense) / p.size(dense).clamp_min(1e-300),
        )
        moved = p.size(p.x.mT @ (near - state.near) + sparse - state.sparse)
        second = moved / p.size(push).clamp_min(1e-300)
        ready = done | ((first < tolerance) & (second < tolerance))
        return (self._balanced(kept, first, second, ready) if balance else kept), ready

    def _soft(self, value: Tensor, by: Tensor) -> Tensor:
        shrunk = value.sign() * (value.abs() - by).clamp_min(0)
        if self.program.free:
            shrunk[:, -1] = value[:, -1]
        return shrunk

    def _balanced(self, state: State, first: Tensor, second: Tensor, done: Tensor) -> State:
        """Double or halve penalties so that both residuals shrink alike."""
        factor = torch.ones_like(state.penalty)
        factor = torch.where(first > _BALANCE * second, 2.0, factor)
        factor = torch.where(second > _BALANCE * first, 0.5, factor)
        factor = torch.where(done, 1.0, factor)
        return replace(
            state,
            pull=state.pull / factor,
            push=state.push / factor,
            penalty=state.penalty * factor,
        )

    def gap(self, state: State) -> Tensor:
        """Bound from above how far the norm is from the least one, by a dual point.

        The dual is to maximise `<L, Y>` on active answers less `radius |L|` there, plus `<L, roof>`
        on the others, over L that is not positive on these, with `|X'L|` at most 1, and 0 on the
        free column.

        Returns:
            share of the norm; NaN where the dual point cannot be made feasible.
        """
        p = self.program.to(torch.float64)
        dual = (state.penalty * state.pull).double()
        dual = torch.where(p.active, dual, dual.clamp_max(0))
        if p.free:
            ones = p.x[:, :, -1:] * p.active
            power = ones.square().sum(1, keepdim=True)
            spill = (p.x[:, :, -1:] * dual).sum(1, keepdim=True)
            dual = dual - _ratio(spill, power) * ones
        slopes = p.x.mT @ dual
        tied = slopes[:, :-1] if p.free else slopes
        dual = dual / p.most(tied.abs()).clamp_min(1.0)
        on = dual * p.active
        value = p.total(on * p.target) - p.radius * p.size(on)
        value = value + p.total(dual * ~p.active * p.roof)
        norm = p.norm(state.sparse.double())
        found = torch.where(norm > 0, (norm - value) / norm.clamp_min(1e-300), 0.0)
        if not p.free:
            return found
        left = p.most((p.x[:, :, -1:].mT @ dual).abs())  # of outputs without an active answer
        return torch.where(left > 1e-9, torch.nan, found)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp_min(1e-300), 0.0)


def _frozen(old: State, new: State, done: Tensor) -> State:
    if not bool(done.any()):
        return new
    return State(
        torch.where(done, old.answer, new.answer),
        torch.where(done, old.near, new.near),
        torch.where(done, old.sparse, new.sparse),
        torch.where(done, old.dense, new.dense),
        torch.where(done, old.pull, new.pull),
        torch.where(done, old.push, new.push),
        new.penalty,
    )
