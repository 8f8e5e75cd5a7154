"""The sparsest layer within a radius, by a convex program that knows the rectifier behind it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import exp, log, sqrt
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.criteria.weights.base import (
    Certificate,
    Mode,
    Samples,
    Thinned,
    WeightCase,
    WeightCriterion,
    WeightNeed,
    largest,
    register,
)
from torch_otprune.criteria.weights.refit import damped, refit
from torch_otprune.criteria.weights.trim import Program, Solved, behind, solve
from torch_otprune.errors import CalibrationError
from torch_otprune.policy.base import problem

__all__ = ["NetTrim"]

_WIDE = 1 << 20  # entries of x times outputs from which single precision does the solving
_SOLVES = 6  # radii that are tried to reach a number of weights
_ROUGH = 120  # rounds for each of them: only the support is wanted
_TURNS = 10  # rounds in which inactive targets follow the refit
_ROOM = 1e-3  # of a radius: what rounding may add to it
_TRIED = 0.1  # radius for a pattern, as a share of the answers
_NEAR = 1.05  # times as many weights as asked are near enough
_LEAST, _MOST = 1e-3, 0.9  # radii, as a share of the answers, between which to look


@register
class NetTrim(WeightCriterion):
    """Solve for the least l1 norm whose answers stay within a radius of the dense ones.

    Where a rectifier is all that reads a layer, answers that it switches off need only stay off.
    The radius is declared in one of two ways: `w2`, an absolute budget for the 2-Wasserstein
    distance between the layer's dense and pruned answers, which the radius bounds since answers
    are paired; or `radius`, a share of the size of the dense answers. The density is the outcome
    then. With neither, the rule says how many weights stay, and the radius is searched for.

    The solution shrinks what it keeps. So it decides which weights stay, and these are refitted
    behind the rectifier, which can only bring the answers nearer. Where the solver stops outside
    of a declared radius and the refit does not come back into it, all weights stay.

    Limits: the gap is about the solution before its refit. Takes time in proportion to the rows,
    and rows of at least twice the columns; with fewer, the note says that zeros fit noise. At one
    density, `alps` is nearer as a rule.

    Source: Aghasi, Abdi, Nguyen & Romberg 2017, "Net-Trim: convex pruning of deep neural networks
    with performance guarantee", equation 6, and Aghasi, Abdi & Romberg 2020 for parallel and
    cascade; the free bias, the slack behind a batch-norm or a stream, the refit and the search
    are ours.
    """

    kind: Literal["net_trim"] = "net_trim"
    w2: float | None = Field(
        default=None,
        gt=0,
        description="budget of every layer: root mean squared distance of its answers, all "
        "outputs together, from the dense ones",
    )
    radius: float | None = Field(
        default=None, gt=0, lt=1, description="the same as a share of the dense answers' size"
    )
    mode: Literal["parallel", "cascade"] = Field(
        default="cascade",
        description="`parallel`: every layer is given dense inputs, and errors add up; `cascade`: "
        "inputs from the layers already pruned, with slack so that the dense weight would do",
    )
    gamma: float = Field(
        default=1.1,
        gt=0,
        description="in a cascade where the dense weight needs more than `radius`: the factor of "
        "its squared error that is allowed; below 1 there may be no solution",
    )
    per_neuron: bool = Field(
        default=False,
        description="divide the radius among the outputs by the size of their answers",
    )
    refit: bool = Field(default=True, description="fit the weights that stay behind the rectifier")
    damping: float = Field(
        default=1e-3, gt=0, description="share of the mean squared input that a fit adds to each"
    )
    rounds: int = Field(default=1000, ge=1, description="rounds of the solver per radius, at most")
    tolerance: float = Field(default=1e-4, gt=0, description="of the solver, relative")

    @model_validator(mode="after")
    def _one_radius(self) -> Self:
        if self.w2 is not None and self.radius is not None:
            raise problem("w2 and radius say the same thing twice.", fix="give one of them.")
        return self

    @property
    def budgeted(self) -> bool:
        """Tell whether a radius is declared."""
        return self.w2 is not None or self.radius is not None

    @property
    def needs(self) -> frozenset[WeightNeed]:
        """Ask for the rows themselves: what a rectifier lets through shows there alone."""
        return frozenset({"moments", "rows"})

    @property
    def refits(self) -> bool:
        """Tell that weights that stay change their values."""
        return True

    @property
    def reads(self) -> Mode:
        """Tell which inputs and answers the layer is fitted to."""
        return self.mode

    def thin(self, case: WeightCase) -> Thinned:
        """Solve for the support, then fit behind the rectifier."""
        assert case.samples is not None
        work = _Work(self, case, case.samples)
        return work.declared() if self.budgeted else work.searched()


class _Work:
    """One layer's programs, in the unit of what the rectifier sees; weights are columns x out.

    Args:
        setting: the criterion.
        case: the layer.
        told: its rows.
    """

    def __init__(self, setting: NetTrim, case: WeightCase, told: Samples) -> None:
        self.one = 1.0  # what stands in the column of ones: of the size of the inputs
        if told.shifts:
            inputs, ones = told.x[:, :, :-1], told.x[:, :, -1:]
            self.one = float(inputs.square().mean().sqrt()) or 1.0
            told = replace(told, x=torch.cat([inputs, ones * self.one], 2))
        self.setting, self.case, self.told = setting, case, told
        self.rows = told.x.shape[1]
        self.gram = told.x.mT @ told.x
        self.lifted, _ = damped(self.gram, setting.damping)
        whole = Program(
            told.x,
            told.target,
            told.active,
            told.roof,
            told.x.new_zeros(len(told.x), 1, 1),
            told.shifts,
        )
        self.whole = whole
        self.dense = self._whole_of(case.weight, told.own)
        self.aim = self._whole_of(case.aim, told.target)

    def _whole_of(self, weight: Tensor, answers: Tensor) -> Tensor:
        """Bring a weight into the unit of the rows, with the intercept that suits the answers."""
        scaled = (weight * self.told.scale[:, :, None]).mT
        if not self.told.shifts:
            return scaled
        left = answers - self.told.x[:, :, :-1] @ scaled
        return torch.cat([scaled, left.mean(1, keepdim=True) / self.one], dim=1)

    def cost(self, weight: Tensor) -> float:
        """Sum the squared errors behind the rectifier."""
        near, over = behind(self.whole, weight)
        return float(near.square().sum() + over.square().sum())

    def declared(self) -> Thinned:
        """Solve within the declared radius; how many weights stay is the outcome."""
        radius, growth = self._radius()
        anchor = self._anchor(radius)
        near, over = behind(self.whole, anchor)
        room = radius**2 - float(over.square().sum() + near.square().sum())
        own, size = near.square().sum(1, keepdim=True), self._power()
        squares = own + max(room, 0.0) * size / size.sum().clamp_min(1e-300)
        if not self.setting.per_neuron:
            squares = squares.sum(2, keepdim=True)
        roof = torch.maximum(self.told.roof, self.told.x @ anchor)
        solved = self._solve(replace(self.whole, roof=roof, radius=squares.sqrt()))
        mask = self._matrix(solved.weight) != 0
        weight, note = self._within(solved.weight.double(), mask, anchor, radius)
        root = sqrt(self.rows)
        if growth is not None:
            wider = (
                f"what went in front costs more than radius {self.setting.radius:g}, so W2 "
                f"{radius / root:.3g} is what is kept to"
            )
            note = "; ".join(filter(None, (wider, note)))
        proof = Certificate(
            radius / root, sqrt(self.cost(weight)) / root, _worst(solved.gap), growth
        )
        return self._thinned(weight, proof, note)

    def _within(
        self, weight: Tensor, mask: Tensor, anchor: Tensor, radius: float
    ) -> tuple[Tensor, str]:
        """Refit, and keep the radius even where the solver stopped outside of it."""
        most = (radius * (1 + _ROOM)) ** 2
        if self.setting.refit or self.cost(weight) > most:
            weight = self._behind(self._with_intercept(mask), weight)
        spent = self.cost(weight)
        if spent <= most:
            return weight, ""
        root = sqrt(self.rows)
        return anchor, (
            f"the solver stopped outside of its radius, {sqrt(spent) / root:.3g} of "
            f"{radius / root:.3g}, so all weights stay; raise rounds"
        )

    def _power(self) -> Tensor:
        return (self.told.target * self.told.active).square().sum(1, keepdim=True)

    def _radius(self) -> tuple[float, float | None]:
        """Say how far answers may be, root of the summed squares, and what an error may grow by."""
        setting, root = self.setting, sqrt(self.rows)
        if setting.w2 is not None:
            return setting.w2 * root, None
        assert setting.radius is not None
        declared = setting.radius * sqrt(float(self._power().sum()))
        near = (self.told.own - self.told.target) * self.told.active
        over = (self.told.own - self.told.roof).clamp_min(0) * ~self.told.active
        needed = sqrt(setting.gamma * float(near.square().sum()) + float(over.square().sum()))
        if setting.mode == "parallel" or needed <= declared:
            return declared, None
        return needed, sqrt(max(setting.gamma, 1.0))

    def _anchor(self, radius: float) -> Tensor:
        """Find a weight within the radius: the dense one, or the best there is."""
        if self.cost(self.dense) <= radius**2:
            return self.dense
        best = self._behind(torch.ones_like(self.dense, dtype=torch.bool), self.aim)
        least = sqrt(self.cost(best) / self.rows)
        if least > radius / sqrt(self.rows) * (1 + _ROOM):
            raise CalibrationError(
                f"no weight keeps the answers of '{self.case.path}' within W2 = "
                f"{radius / sqrt(self.rows):.3g}: layers in front have moved its inputs so far "
                f"that {least:.3g} is the least.",
                where=f"layer '{self.case.path}', criterion net_trim, {self.rows} rows",
                fix=f"{self._wider(least)}, or choose mode='parallel'.",
            )
        return best

    def _wider(self, least: float) -> str:
        if self.setting.w2 is not None:
            return f"give a w2 of at least {least * 1.05:.2g}"
        return "raise gamma to 1 or more"

    def _solve(
        self, program: Program, start: Solved | None = None, *, rounds: int = sys.maxsize
    ) -> Solved:
        """Solve in single precision where the problem is large."""
        large = program.x.numel() * program.target.shape[2] > _WIDE
        return solve(
            program.to(torch.float32 if large else torch.float64),
            rounds=min(self.setting.rounds, rounds),
            tolerance=self.setting.tolerance,
            start=None if start is None else start.state,
        )

    def searched(self) -> Thinned:
        """Search for a radius that leaves about as many weights as asked; keep the largest."""
        assert self.case.amount is not None
        roof = torch.maximum(self.told.roof, self.told.x @ self.aim)
        program = replace(self.whole, target=self.told.x @ self.aim, roof=roof)
        own = (program.target * self.told.active).square().sum(1, keepdim=True)
        free = self.case.pattern.free
        low, high = log(_LEAST), log(_MOST)
        last: Solved | None = None
        found: Tensor | None = None
        for _ in range(_SOLVES if free else 1):
            middle = (low + high) / 2 if free else log(_TRIED)
            squares = own if self.setting.per_neuron else own.sum((1, 2), keepdim=True)
            last = self._solve(
                replace(program, radius=exp(middle) * squares.sqrt()), last, rounds=_ROUGH
            )
            count = int((self._matrix(last.weight) != 0).sum())
            if count >= self.case.amount:
                found, low = last.weight, middle
            else:
                high = middle
            if self.case.amount <= count <= self.case.amount * _NEAR:
                break
        assert last is not None
        chosen, mask = self._largest(last.weight if found is None else found)
        if self.setting.refit:
            chosen = self._behind(self._with_intercept(mask), chosen)
        return self._thinned(chosen, None, "")

    def _matrix(self, weight: Tensor) -> Tensor:
        """Leave the intercept out."""
        return weight[:, :-1] if self.told.shifts else weight

    def _largest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Keep as many weights as asked, those that carry most; the dense ones decide ties."""
        assert self.case.amount is not None
        size = self._matrix(self.gram.diagonal(dim1=1, dim2=2)[:, :, None]).sqrt()
        carried = self._matrix(weight.double()).abs() * size
        tie = self._matrix(self.aim).abs() * size
        tie = tie / tie.amax().clamp_min(1e-300) * carried.amax().clamp_min(1e-300) * 1e-6
        mask = largest(
            (carried + tie).mT, self.case.amount, self.case.pattern, where=self.case.path
        ).mT
        return weight.double() * self._with_intercept(mask), mask

    def _with_intercept(self, mask: Tensor) -> Tensor:
        return torch.cat([mask, torch.ones_like(mask[:, :1])], 1) if self.told.shifts else mask

    def _behind(self, mask: Tensor, start: Tensor) -> Tensor:
        """Fit the weights of a mask behind the rectifier.

        Inactive targets follow the fit as long as it stays below the roof. Each round minimises
        a bound of the error that touches it where the round began, so no round adds to it, but
        for the ridge towards the weight to aim at.

        Returns:
            the best weight that was met.
        """
        lift, told, weight = self.lifted - self.gram, self.told, start * mask
        best = weight
        for _ in range(_TURNS):
            answer = told.x @ weight
            wanted = torch.where(told.active, told.target, torch.minimum(answer, told.roof))
            cross = told.x.mT @ wanted + lift @ self.aim
            weight = refit(mask.mT, self.lifted, cross.mT, weight.mT).mT
            before, after = self.cost(best), self.cost(weight)
            if after >= before * (1 - 1e-4):
                break
            best = weight
        return best

    def _thinned(self, weight: Tensor, proof: Certificate | None, note: str) -> Thinned:
        """Bring a weight back into the layer's own unit."""
        scale = self.told.scale[:, None, :]
        usable = scale != 0
        plain = torch.where(usable, weight / torch.where(usable, scale, 1.0), 0.0)
        return Thinned(
            self._matrix(plain).mT.contiguous(),
            plain[:, -1] * self.one if self.told.shifts else None,
            proof,
            "; ".join(self._said(note)),
        )

    def _said(self, note: str) -> Iterator[str]:
        """Tell what a reader should know."""
        columns = self.case.weight.shape[2]
        if self.rows < columns:
            yield f"only {self.rows} rows for {columns} inputs: what is zero may fit their noise"
        if note:
            yield note


def _worst(gap: Tensor) -> float | None:
    """Read the largest gap; None where a problem has none."""
    return None if bool(gap.isnan().any()) else max(float(gap.max()), 0.0)
