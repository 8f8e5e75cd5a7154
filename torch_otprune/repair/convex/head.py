"""Refit a hidden layer and the layer behind its rectifier, of any width, by convex programs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import skip_init

from torch_otprune.errors import RepairError
from torch_otprune.repair.convex.loss import LOSSES, Loss, LossName
from torch_otprune.repair.convex.program import Pair, Program, answers, objective, solve
from torch_otprune.repair.convex.robust import robust_objective, stable, toughen

__all__ = ["ConvexHead", "Refit"]

_TINY = 1e-6  # of the longest unit: shorter ones are gone
_DRAWN = 4  # patterns are drawn so many times over; the steepest stay
_STEPS = 100  # of the refit of output weights

Layers = tuple[nn.Linear, nn.Linear]


@dataclass(frozen=True)
class Refit:
    """A refitted pair and how good it is. Objectives are means over rows.

    Args:
        pair: in balanced form, for scaled inputs.
        scale: what inputs are divided by.
        before: objective at the start.
        objective: afterwards; with radii, of the worst case.
        bound: lower bound of the last convex program without radii.
        gap: plain objective less that bound; None with radii, for which no bound is known.
        penalty: absolute weight of the group penalty.
        patterns: units that the last program could use.
        stable: share of units and rows that no move within the radii can switch.
    """

    pair: Pair = field(repr=False)
    scale: float
    before: float
    objective: float
    bound: float
    gap: float | None
    penalty: float
    patterns: int
    stable: float

    @property
    def units(self) -> int:
        """Count the units that carry weight."""
        return self.pair.units.shape[1]

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write the pair as hidden weight and bias, output weight and bias, in float64.

        A unit's two sides are of one length, so that weight decay would ask the same penalty.

        Returns:
            units x columns, units, outputs x units, outputs.
        """
        root = self.pair.units.norm(dim=0).sqrt()
        units = self.pair.units / root.clamp_min(1e-300)
        return (
            (units[:-1] / self.scale).T,
            units[-1],
            (self.pair.ways * root[:, None]).T,
            self.pair.offset,
        )

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """Build a plain hidden layer, rectifier and output layer."""
        weight, bias, out, offset = self.weights()
        sizes = (weight.shape[1], self.units), (self.units, len(offset))
        with warnings.catch_warnings():  # a pair without units has nothing to draw
            warnings.filterwarnings("ignore", message="Initializing zero-element")
            hidden, output = (skip_init(nn.Linear, *size, device=weight.device) for size in sizes)
        made = nn.Sequential(hidden, nn.ReLU(), output).to(dtype)
        values = (weight, bias, out, offset)
        with torch.no_grad():
            for parameter, value in zip(made.parameters(), values, strict=True):
                parameter.copy_(value)
        return made


class ConvexHead(BaseModel):
    """Fit a rectified pair by convex programs over sampled activation patterns.

    Every present unit gives its pattern and its output direction, and so do random units that
    descend steepest; over these the best weights are one convex program, whose group penalty
    decides which units stay. Every sweep starts from the pair found so far and is never worse.
    Between sweeps output directions are refitted. With radii, sequential convex programs then
    lower the worst case over inputs that move by so much.

    Limits: optimal over the patterns and directions drawn, not over all; the gap says how far from
    that. Rows in thousands and columns in hundreds. With radii no gap is known.

    Source: Pilanci & Ergen 2020; Bai, Gautam, Gai & Sojoudi 2021 and 2022. Patterns of present
    units, directions for several outputs and the worst case by intervals are ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: LossName = Field(default="squared", description="squared, hinge or logistic")
    penalty: float = Field(
        default=1e-3, gt=0, lt=1, description="share of the penalty that leaves no unit at all"
    )
    patterns: int = Field(default=64, ge=0, description="random units to choose from")
    rounds: int = Field(default=300, ge=1, description="of the solver, per sweep")
    sweeps: int = Field(default=2, ge=1, description="programs, each from the last one's units")
    tolerance: float = Field(default=1e-3, gt=0, description="gap that is enough, relative")
    steps: int = Field(default=300, ge=1, description="towards the worst case, with radii")
    seed: int = 0

    @torch.no_grad()
    def fit(
        self,
        features: Float[Tensor, "rows columns"],
        target: Tensor,
        *,
        start: Layers | None = None,
        width: int | None = None,
        radii: Float[Tensor, " columns"] | None = None,
    ) -> Refit:
        """Fit the pair.

        Args:
            features: what the hidden layer reads.
            target: rows x outputs to come near; class numbers for hinge and logistic.
            start: the present hidden and output layer; None starts from nothing.
            width: units at most; None leaves it to the penalty.
            radii: how far each feature may move; None for not at all.

        Returns:
            the refitted pair; its objective is at most that of the start.

        Raises:
            RepairError: if data do not fit, are not finite or are too few.
        """
        goal = self._goal(features, target, start)
        _check(features, goal, start, width, radii)
        x, scale = _inputs(features)
        loss, first = LOSSES[self.loss], _pair(start, x.shape[1], goal, scale)
        if width is not None and first.units.shape[1] > width:
            first = _largest(first, width)
        penalty = self.penalty * _steepest(x, goal, loss, self.seed)
        search = _Search(self, x, goal, loss, penalty, width)
        pair, bound, patterns = search.run(first)
        plain = search.program(pair)
        before, after = objective(plain, first), objective(plain, pair)
        gap, share = after - bound, 1.0
        if radii is not None:
            pair, before, after, share = _against(self, plain, (first, pair), radii, scale)
        pair = _live(pair)
        return Refit(
            pair, scale, before, after, bound, gap if radii is None else None,
            penalty, patterns, share,
        )  # fmt: skip

    def _goal(self, features: Tensor, target: Tensor, start: Layers | None) -> Tensor:
        """Write targets as rows x outputs in float64."""
        where = f"ConvexHead(loss='{self.loss}')"
        if not LOSSES[self.loss].labelled:
            if target.dim() != 2 or not target.is_floating_point():
                raise RepairError(
                    f"targets of shape {tuple(target.shape)} and {target.dtype} are no answers.",
                    where=where,
                    fix="pass rows x outputs of numbers, or choose loss='logistic' for labels.",
                )
            return target.double()
        whole = target.dim() == 1 and not target.is_floating_point()
        if not whole or not len(target) or int(target.min()) < 0:
            raise RepairError(
                f"targets of shape {tuple(target.shape)} and {target.dtype} are no labels.",
                where=where,
                fix="pass one class number per row, from 0 on.",
            )
        classes = max(int(target.max()) + 1, 2)
        if start is not None:
            classes, found = start[1].out_features, classes
            if found > classes:
                raise RepairError(
                    f"there is a label {found - 1}, but the output layer has {classes} outputs.",
                    where=where,
                    fix="pass labels below the number of outputs.",
                )
        return nn.functional.one_hot(target.long(), classes).double()


@dataclass
class _Search:
    """Programs one after the other, each around the best pair so far."""

    setting: ConvexHead
    x: Tensor
    goal: Tensor
    loss: Loss
    penalty: float
    width: int | None

    def run(self, first: Pair) -> tuple[Pair, float, int]:
        """Sweep; give the best pair, and bound and size of the last program."""
        generator = torch.Generator("cpu").manual_seed(self.setting.seed)
        pair, bound, patterns = first, -torch.inf, 0
        for _ in range(self.setting.sweeps):
            program = self.program(pair, generator)
            found = solve(
                program, pair, rounds=self.setting.rounds, tolerance=self.setting.tolerance
            )
            bound, patterns = found.bound, program.on.shape[1]
            pair = min(pair, self._fitting(found.pair), key=self._cost)
            pair = min(pair, _live(self._turned(pair)), key=self._cost)
        return pair, bound, patterns

    def _cost(self, pair: Pair) -> float:
        return objective(self.program(pair), pair)

    def _fitting(self, pair: Pair) -> Pair:
        """Keep as many units as there is room for, and let these make up for the others."""
        pair = _live(pair)
        if self.width is None or pair.units.shape[1] <= self.width:
            return pair
        pair = _largest(pair, self.width)
        return _live(solve(self.program(pair), pair, rounds=self.setting.rounds).pair)

    def program(self, pair: Pair, generator: torch.Generator | None = None) -> Program:
        """Write the program over a pair's own patterns and, with a generator, over drawn ones."""
        on, ways = self.x @ pair.units > 0, pair.ways
        if generator is not None and self.setting.patterns:
            more, turned = self._drawn(pair, generator)
            on, ways = torch.cat([on, more], 1), torch.cat([ways, turned])
        return Program(self.x, self.goal, on, ways, self.loss, self.penalty)

    def _drawn(self, pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw random units and take those along which the loss falls steepest.

        For the answers' slopes R and a pattern D, the best direction is the leading right singular
        vector of X'DR.

        Returns:
            rows x units where these are active, and units x outputs.
        """
        units = _random(self.x, _DRAWN * self.setting.patterns, generator)
        on = torch.unique(self.x @ units > 0, dim=1)
        slope = self.loss.slope(answers(pair, self.x), self.goal)
        fall = torch.stack(
            [-(on * slope[:, c, None]).T.to(self.x) @ self.x for c in range(slope.shape[1])], 2
        )
        power, ways = torch.linalg.eigh(fall.mT @ fall)
        best = power[:, -1].argsort(descending=True, stable=True)[: self.setting.patterns]
        way = ways[best, :, -1]
        toward = (fall[best] @ way[:, :, None])[
            :, :, 0
        ] @ self.x.T  # what descent would make active
        same = (toward * (2.0 * on[:, best].T - 1)).sum(1, keepdim=True)
        return on[:, best], torch.where(same < 0, -way, way)

    def _turned(self, pair: Pair) -> Pair:
        """Refit output weights behind fixed units, and so directions; a group lasso."""
        if self.setting.loss == "hinge" or not pair.units.shape[1]:
            return pair
        length = pair.units.norm(dim=0)
        unit = pair.units / length.clamp_min(1e-300)
        design = torch.cat([(self.x @ unit).relu(), torch.ones_like(self.x[:, :1])], 1)
        weight = last = torch.cat([pair.ways * length[:, None], pair.offset[None]])
        step = len(design) / torch.linalg.eigvalsh(design.T @ design)[-1].clamp_min(1e-300)
        for turn in range(_STEPS):
            ahead = weight + turn / (turn + 3) * (weight - last)
            slope = self.loss.slope(design @ ahead, self.goal)
            down = ahead - step * design.T @ slope / len(design)
            size = down.norm(dim=1, keepdim=True).clamp_min(1e-300)
            last, weight = weight, down * (1 - step * self.penalty / size).clamp_min(0)
        sizes = weight[:-1].norm(dim=1)
        ways = torch.where(
            sizes[:, None] > 0, weight[:-1] / sizes[:, None].clamp_min(1e-300), pair.ways
        )
        return Pair(unit * sizes, ways, weight[-1])


def _against(
    setting: ConvexHead, plain: Program, pairs: tuple[Pair, Pair], radii: Tensor, scale: float
) -> tuple[Pair, float, float, float]:
    """Turn to the worst case, from the better of start and plain refit."""
    wide = torch.cat([radii.double() / scale, radii.new_zeros(1).double()])
    before = robust_objective(plain, pairs[0], wide)
    found = [toughen(plain, pair, wide, steps=setting.steps) for pair in pairs]
    pair, after = min(found, key=lambda made: made[1])
    return pair, before, after, stable(pair, plain.x, wide)


def _inputs(features: Tensor) -> tuple[Tensor, float]:
    """Scale inputs to rows of length one on average, and append a one."""
    scale = float(features.double().square().sum(1).mean().sqrt()) or 1.0
    return torch.cat(
        [features.double() / scale, features.new_ones(len(features), 1).double()], 1
    ), scale


def _pair(start: Layers | None, columns: int, goal: Tensor, scale: float) -> Pair:
    """Write layers in balanced form."""
    outputs = goal.shape[1]
    if start is None:
        none = goal.new_zeros(columns, 0)
        return Pair(none, goal.new_zeros(0, outputs), goal.mean(0) * 0)
    hidden, output = start
    weight, out = hidden.weight.detach().double(), output.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if hidden.bias is None else hidden.bias.detach().double()
    offset = out.new_zeros(outputs) if output.bias is None else output.bias.detach().double()
    length = out.norm(dim=0)
    ways = (out / length.clamp_min(1e-300)).T
    ways[length == 0, 0] = 1.0
    return Pair(torch.cat([scale * weight, bias[:, None]], 1).T * length, ways, offset)


def _live(pair: Pair) -> Pair:
    """Drop units that carry nothing."""
    length = pair.units.norm(dim=0)
    if not len(length):
        return pair
    live = length > _TINY * length.max()
    return Pair(pair.units[:, live], pair.ways[live], pair.offset)


def _largest(pair: Pair, count: int) -> Pair:
    """Keep the longest units."""
    first = pair.units.norm(dim=0).argsort(descending=True, stable=True)[:count].sort().values
    return Pair(pair.units[:, first], pair.ways[first], pair.offset)


def _random(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw units whose kinks pass through random rows."""
    drawn = torch.randn(
        x.shape[1] - 1, count, generator=generator, dtype=torch.float64, device="cpu"
    )
    rows = torch.randint(len(x), (count,), generator=generator, device="cpu").to(x.device)
    units = drawn.to(x.device) / x[:, :-1].std(0, correction=0).clamp_min(1e-6)[:, None]
    return torch.cat([units, -(x[rows, :-1] * units.T).sum(1)[None]])


def _steepest(x: Tensor, goal: Tensor, loss: Loss, seed: int) -> float:
    """Measure how steeply the loss falls from no unit at all along the best of random ones."""
    slope = loss.idle(goal)
    units = _random(x, 64, torch.Generator("cpu").manual_seed(seed))
    on = torch.cat([x @ units > 0, torch.ones_like(x[:, :1], dtype=torch.bool)], 1)
    falls = [(on[:, i, None] * slope).T @ x for i in range(on.shape[1])]
    return float(torch.stack([torch.linalg.matrix_norm(fall, 2) for fall in falls]).max()) / len(x)


def _check(
    features: Tensor, goal: Tensor, start: Layers | None, width: Any, radii: Tensor | None
) -> None:
    """Refuse data that do not fit."""
    where = f"ConvexHead.fit, features {tuple(features.shape)}, targets {tuple(goal.shape)}"
    columns = features.shape[-1]
    faults = {
        "features are no table of rows x columns": features.dim() != 2,
        "features and targets differ in rows": len(features) != len(goal),
        "there are not two rows": len(features) < 2,
        "features or targets are not finite": not bool(
            features.isfinite().all() and goal.isfinite().all()
        ),
        "the hidden layer reads another number of features": start is not None
        and start[0].in_features != columns,
        "the output layer does not read the hidden one": start is not None
        and start[1].in_features != start[0].out_features,
        "the output layer has another number of outputs": start is not None
        and start[1].out_features != goal.shape[1],
        "the width is below 1": width is not None and width < 1,
        "radii are not one number per feature, finite and not negative": radii is not None
        and (
            tuple(radii.shape) != (columns,)
            or not bool((radii >= 0).all() & radii.isfinite().all())
        ),
    }
    for fault, found in faults.items():
        if found:
            raise RepairError(f"{fault}.", where=where, fix="pass data that fit the two layers.")
