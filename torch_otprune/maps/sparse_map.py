"""Maps that move few channels: a few rows of an affine map, or few coordinates of every point."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.maps.affine import AffineMap
from torch_otprune.maps.base import AffineFit, FittedMap, FreeFit, TransportMap, register
from torch_otprune.maps.controller import within_budget
from torch_otprune.maps.elastic import CONVEX_L0, Elastic
from torch_otprune.maps.flow import force
from torch_otprune.maps.mbo import MBO, fit_mbo
from torch_otprune.maps.samples import Samples
from torch_otprune.policy.base import problem, short
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.transport.checks import refuse

__all__ = ["SparseMap"]

_RIDGE = 1e-6
_ROUNDS = 12  # proximal steps of the unpaired correction, per price
_POINTS = 768  # of each side that a Sinkhorn problem sees
_STEP = 0.5  # of a squared distance, whose curvature is 2: a step lands on the couplings' mean


@register
class SparseMap(TransportMap):
    """Move as few channels as will do.

    `group` corrects whole channels: T(x) = x + B x + b with most rows of (B, b) exactly 0, so that
    the map folds and leaves every other channel's weights as they are. With pairs, the rows are
    independent least-squares problems and the ones kept are those that explain most: no other set
    of that size has a smaller error. Without, proximal steps on the debiased Sinkhorn divergence
    shrink whole rows, at a price that a dual controller moves until the budget is met.

    `mbo` lets the pattern differ from point to point: an entropic plan under an elastic cost, and
    its proximal map. With a budget, the weight of the cost is moved likewise.

    `icnn`, `w2gn` and `lbfgs` fit a convex potential by gradient steps and add the elastic penalty
    of the displacement: opt-in, slow, with zeros that are only approximate.

    Limits: a pattern that differs from point to point cannot be folded. With pairs and no budget,
    `affine` is better.

    Source: Chen, Xie & Zhang 2025 for the penalty in a dual; Cuturi, Klein & Ablin 2023 for `mbo`;
    Makkuva et al. 2020, Korotin et al. 2021 and Amos 2023 for the duals; `group` is ours.
    """

    kind: Literal["sparse_map"] = "sparse_map"
    solver: Literal["group", "mbo", "icnn", "w2gn", "lbfgs"] = "group"
    budget: int | float | None = Field(
        default=None, ge=0, description="channels that may move: a number, or a share below 1"
    )
    elastic: Elastic = Field(
        default=Elastic(), description="cost of a displacement, for `mbo` etc."
    )
    eps: float = Field(default=0.05, gt=0, description="temperature, of the mean cost")
    steps: int = Field(default=300, ge=1, description="gradient steps of the duals")
    seed: int = 0

    @field_validator("budget", mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        # a bool is a whole number to Python, and one budget of it would move one channel
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            raise problem(
                f"{short(value)} is no number of channels.",
                fix="write a whole number of channels, or a share up to 1.0.",
            )
        return value

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.budget is not None and isinstance(self.budget, float) and self.budget > 1:
            raise problem(
                f"a share of {self.budget:g} of the channels cannot move.",
                fix="write a whole number of channels, or a share up to 1.0.",
                key="budget",
            )
        if self.budget is not None and self.solver in ("icnn", "w2gn", "lbfgs"):
            raise problem(
                f"the solver {self.solver!r} keeps no budget: its zeros are approximate.",
                fix="use the solver 'group' or 'mbo', or leave the budget out.",
                key="budget",
            )
        if self.budget is not None and self.solver == "mbo" and self.elastic.reg == "l0":
            raise problem(
                "a smoothed l0 leaves no coordinate exactly 0, so no budget can be met.",
                fix="use the elastic 'l1', 'stvs' or 'koverlap', or leave the budget out.",
                key="budget",
            )
        return self

    @property
    def affine(self) -> bool:
        """Tell whether it folds."""
        return self.solver == "group"

    def allowed(self, channels: int) -> int:
        """Count the channels that may move; half of them where nothing is said."""
        if self.budget is None:
            return max(1, channels // 2)
        share = isinstance(self.budget, float) and self.budget <= 1
        return min(channels, int(self.budget * channels) if share else int(self.budget))

    def fitted(self, samples: Samples) -> FittedMap:
        """Fit by the solver that was asked for."""
        if self.solver == "group":
            paired = samples.matched is not None
            return self._rows(samples) if paired else self._proximal(samples)
        if self.solver == "mbo":
            return self._points(samples)
        from torch_otprune.maps.duals import fit_dual

        return fit_dual(self.kind, self.solver, samples, elastic=self.elastic, steps=self.steps,
                        seed=self.seed)  # fmt: skip

    def _rows(self, samples: Samples) -> FittedMap:
        """Keep the rows that explain most; every row is a least-squares problem of its own."""
        assert samples.matched is not None
        x, y = samples.matched
        design = _design(x)
        gram = design.T @ design / len(design)
        rows = torch.cholesky_solve(design.T @ (y - x) / len(x), ridge_factor(gram, _RIDGE)).T
        # what a row takes off the squared error: its length in the metric of the design
        explained = (rows @ gram * rows).sum(1)
        kept = _most(explained, self.allowed(x.shape[1]))
        note = f"rows kept explain {_share(explained, kept):.1%} of what all would"
        return _affine(self.kind, samples, rows * kept[:, None], note)

    def _proximal(self, samples: Samples) -> FittedMap:
        """Shrink rows while the plan moves points, then fit the rows that are left once more."""
        x, y = samples.some(_POINTS, self.seed)
        problem_ = _Unpaired(x, y, self.eps, _first(samples))
        allowed = self.allowed(x.shape[1])
        begin = max(float(problem_.norms(problem_.rows).mean()) / 4, 1e-12)
        found = within_budget(lambda price: problem_.descend(price).moved, allowed, begin, steps=16)
        at = problem_.descend(found.price)
        # at a tie the price may jump past the budget; the largest rows stay
        kept = _most(problem_.norms(at.rows), allowed) & (problem_.norms(at.rows) > 0)
        rows = problem_.debiased(at.rows, kept)
        note = f"price {found.price:.3g} per row, {found.count:g} rows for a budget of {allowed}"
        return _affine(self.kind, samples, rows * kept[:, None], note)

    def _points(self, samples: Samples) -> FittedMap:
        """Fit the entropic map, at the weight that keeps the budget."""
        x, y = samples.some(_POINTS, self.seed)
        cost, note = self.elastic, ""
        if self.budget is not None:
            allowed = self.allowed(x.shape[1])

            def count(price: float) -> float:
                body = fit_mbo(x, y, _at(self.elastic, price), eps=self.eps)
                return float((body(x) != x).sum(1).double().mean())

            start = cost.scale if cost.reg == "stvs" else max(cost.weight, 1e-6)
            found = within_budget(count, allowed, start, steps=16)
            refuse(
                not found.met,
                f"no weight of {cost.reg} leaves as few as {allowed} coordinates moved: at "
                f"{found.price:.3g}, {found.count:.3g} still do.",
                where="SparseMap.fit, solver mbo, field budget",
                fix="raise the budget, or use the solver 'group'.",
            )
            cost = _at(self.elastic, found.price)
            word = "scale" if cost.reg == "stvs" else "weight"
            note = (
                f"{word} {found.price:.3g}: {found.count:.3g} of {allowed} coordinates on average"
            )
        body: MBO = fit_mbo(x, y, cost, eps=self.eps)
        zeros = float((body(x) == x).double().mean())
        notes = tuple(n for n in (note, f"{zeros:.1%} of all displacements are exactly 0") if n)
        return FreeFit(self.kind, samples, cost=cost, notes=notes, body=body)


class _Unpaired:
    """Proximal gradient on rows of a correction, against the law of the target alone.

    Args:
        x: source.
        y: target.
        eps: temperature relative to the mean cost.
        rows: of the correction to start from, the constant last.
    """

    def __init__(self, x: Tensor, y: Tensor, eps: float, rows: Tensor) -> None:
        self.x, self.y, self.eps = x, y, eps
        self.design = _design(x)
        self.gram = self.design.T @ self.design / len(x)
        self.factor = ridge_factor(self.gram, _RIDGE)
        self.rows, self.moved = rows, float(x.shape[1])

    def norms(self, rows: Tensor) -> Tensor:
        """Measure how far each row displaces its channel, root mean square."""
        found: Tensor = (rows @ self.gram * rows).sum(1).clamp(min=0).sqrt()
        return found

    def descend(self, price: float) -> _Unpaired:
        """Take proximal steps at a price per row, in the metric where they are exact."""
        rows = self.rows
        for _ in range(_ROUNDS):
            rows = self._stepped(rows)
            size = self.norms(rows)
            shrink = (1 - _STEP * price / size.clamp_min(1e-300)).clamp(min=0)
            rows = rows * shrink[:, None]
        made = copy.copy(self)
        made.rows, made.moved = rows, float((self.norms(rows) > 0).sum())
        return made

    def debiased(self, rows: Tensor, kept: Tensor) -> Tensor:
        """Take steps on the rows that are left alone, without the price."""
        rows = rows * kept[:, None]
        for _ in range(_ROUNDS):
            rows = self._stepped(rows) * kept[:, None]
        return rows

    def _stepped(self, rows: Tensor) -> Tensor:
        """Step along the gradient of the debiased divergence, projected on affine maps."""
        at = self.x + self.design @ rows.T
        wanted = self.design.T @ force(at, self.y, eps=self.eps) * (2 * _STEP / len(at))
        return rows + torch.cholesky_solve(wanted, self.factor).T


def _first(samples: Samples) -> Tensor:
    """Start from the map between Gaussians."""
    start = AffineMap().fitted(Samples(samples.x, samples.y))
    assert isinstance(start, AffineFit)
    eye = torch.eye(len(start.matrix), dtype=start.matrix.dtype, device=start.matrix.device)
    return torch.cat([start.matrix - eye, start.shift[:, None]], dim=1)


def _affine(kind: str, samples: Samples, rows: Tensor, note: str) -> AffineFit:
    matrix = rows[:, :-1].clone()
    matrix.diagonal().add_(1)
    return AffineFit(kind, samples, notes=(note,), matrix=matrix, shift=rows[:, -1].clone())


def _design(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def _most(values: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[values.topk(count).indices] = True
    return kept


def _share(values: Tensor, kept: Tensor) -> float:
    total = float(values.sum())
    return float(values[kept].sum()) / total if total > 0 else 1.0


def _at(cost: Elastic, price: float) -> Elastic:
    """Set what the controller moves: the weight, or the scale where that is tied to 1."""
    if cost.reg == "stvs":
        return Elastic(reg="stvs", scale=price)
    if cost.reg == "l0":
        price = min(price, CONVEX_L0 * cost.scale**2)
    return Elastic(reg=cost.reg, weight=max(price, math.ulp(0.0)), scale=cost.scale, k=cost.k)
