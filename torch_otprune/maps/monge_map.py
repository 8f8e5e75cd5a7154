"""A map that fits its target and moves its points no further than it must."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.errors import TransportError
from torch_otprune.maps.affine import AffineMap, with_moments
from torch_otprune.maps.base import AffineFit, FittedMap, FreeFit, TransportMap, register
from torch_otprune.maps.elastic import Elastic
from torch_otprune.maps.gap import Cost, monge_gap
from torch_otprune.maps.samples import Samples, held_out
from torch_otprune.maps.trial import Trial
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.transport import divergence

__all__ = ["Descent", "MongeMap"]

_LOOK = 10  # steps between looks at them
_RIDGE = 1e-4
_NEAR = "the closed form is as near as chance can tell, and stays"
_WEIGHTS = {True: 0.1, False: 1.0}  # of the gap, with pairs and without


@register
class MongeMap(TransportMap):
    """Minimise a fit plus a weight times the Monge gap, from the affine map of the moments.

    The fit is the squared error of pairs, or the squared debiased Sinkhorn distance without them.
    The gap is centred, so that it vanishes for every optimal map and its weight does not move the
    answer where one exists. Gradients hold the coupling still. What is best on held-out rows
    stays, so a map never ends worse than it started there.

    Without pairs the Bures map is left only for a step that a held-out half confirms: the squared
    distance to the target falls by more than halves of the target are apart, and the gap does not
    grow. An affine map then gets the target's second moments back. Where the start stays, the
    notes say why.

    Limits: without pairs it needs many rows per dimension, or the Bures map stays. The form `mlp`
    is not folded: it takes the place of a removed block.

    Source: Uscidda & Cuturi 2023; starting at the closed form and the held-out choice are ours.
    """

    kind: Literal["monge_map"] = "monge_map"
    form: Literal["affine", "mlp"] = Field(
        default="affine", description="`mlp` adds a hidden layer to the affine map"
    )
    cost: Literal["squared", "euclidean", "elastic"] = "squared"
    elastic: Elastic = Field(default=Elastic(), description="what `elastic` adds to half a square")
    weight: float | None = Field(
        default=None, ge=0, description="of the gap; null is 0.1 with pairs and 1 without"
    )
    width: int = Field(default=64, ge=1, description="hidden units of `mlp`")
    steps: int = Field(default=60, ge=0, description="of gradient descent, at most")
    rate: float = Field(default=0.01, gt=0, description="of Adam, in shares of the spread")
    batch: int = Field(default=256, ge=8, description="rows per step")
    eps: float = Field(default=0.01, gt=0, description="temperature of the gap, of the mean cost")
    seed: int = 0

    @property
    def ground(self) -> Cost:
        """Name the cost of moving."""
        return self.elastic if self.cost == "elastic" else self.cost

    @property
    def affine(self) -> bool:
        """Tell whether it folds."""
        return self.form == "affine"

    def fitted(self, samples: Samples) -> FittedMap:
        """Descend from the closed form."""
        start = AffineMap().fitted(samples)
        assert isinstance(start, AffineFit)
        if samples.matched is None:
            return self._by_laws(samples, start)
        body = _Body.around(start, samples.x, self)
        note = Descent(self, samples, body, body.unit).run()
        return self._made(samples, start, body, note=note)

    def _by_laws(self, samples: Samples, start: AffineFit) -> FittedMap:
        """Descend on one half, and keep the closed form unless the other half speaks for more."""
        still = self._made(samples, start, _Body.around(start, samples.x, self), note=_NEAR)
        try:
            trial = Trial.of(samples)
            if trial.settled(start):
                return still
            body = _Body.around(start, samples.x, self)
            note = Descent(self, trial.learn, body, body.unit).run()
            moved = self._made(samples, start, body, note=note)
            better, why = trial.verdict(start, moved, self.ground)
        except TransportError as error:  # a distance that did not settle judges nothing
            return replace(still, notes=(f"the closed form stays: {error.problem}",))
        return replace(moved, notes=(why, note)) if better else replace(still, notes=(why,))

    def _made(
        self, samples: Samples, start: AffineFit, body: _Body, *, note: str
    ) -> AffineFit | FreeFit:
        common: dict[str, Any] = {"cost": self.ground, "start": start, "notes": (note,)}
        if self.form == "mlp":
            return FreeFit(self.kind, samples, **common, body=body.eval().requires_grad_(False))
        matrix, shift = body.affine()
        if samples.matched is None and bool(body.turn.any()):
            matrix, shift = with_moments(matrix, shift, samples)
        return AffineFit(self.kind, samples, **common, matrix=matrix, shift=shift)


class _Body(nn.Module):
    """The affine start, a correction in whitened coordinates, and a hidden layer if asked for."""

    matrix: Tensor
    shift: Tensor
    white: Tensor
    mean: Tensor

    def __init__(self, matrix: Tensor, shift: Tensor, *, white: Tensor, unit: float, hidden: int):
        super().__init__()
        self.unit = unit
        for name, value in (("matrix", matrix), ("shift", shift), ("white", white)):
            self.register_buffer(name, value)
        out, width = matrix.shape
        self.turn = nn.Parameter(matrix.new_zeros(out, white.shape[0]))
        self.push = nn.Parameter(matrix.new_zeros(out))
        self.down = self.up = None
        if hidden:
            self.down = nn.Linear(width, hidden, dtype=matrix.dtype)
            self.up = nn.Parameter(matrix.new_zeros(out, hidden))

    @classmethod
    def around(cls, start: AffineFit, x: Tensor, setting: MongeMap) -> _Body:
        mean = x.mean(0)
        cov = (x - mean).T @ (x - mean) / len(x)
        factor = ridge_factor(cov, _RIDGE)
        white = torch.linalg.solve_triangular(
            factor, torch.eye(len(cov), dtype=x.dtype, device=x.device), upper=False
        )
        unit = float(start(x).std(0).square().mean().sqrt().clamp_min(1e-12))
        hidden = setting.width if setting.form == "mlp" else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            made = cls(start.matrix, start.shift, white=white, unit=unit, hidden=hidden)
        made.register_buffer("mean", mean)
        return made.to(x.device)

    def forward(self, x: Tensor) -> Tensor:
        plain = x @ self.matrix.T + self.shift
        seen = (x - self.mean) @ self.white.T
        more = seen @ self.turn.T + self.push
        if self.down is not None and self.up is not None:
            more = more + nn.functional.gelu(self.down(seen)) @ self.up.T
        return plain + self.unit * more

    def affine(self) -> tuple[Tensor, Tensor]:
        turn = self.unit * (self.turn @ self.white).detach()
        matrix = self.matrix + turn
        return matrix, self.shift - turn @ self.mean + self.unit * self.push.detach()


@dataclass
class Descent:
    """Adam on batches, with an eye on held-out rows.

    Args:
        setting: weights, costs and steps.
        samples: to fit to.
        body: what is fitted; written, and left as it did best.
        unit: spread of what it writes.
    """

    setting: MongeMap
    samples: Samples
    body: nn.Module
    unit: float

    def run(self) -> str:
        """Descend, and say how far."""
        generator = torch.Generator().manual_seed(self.setting.seed)
        learn, held = self._parts()
        adam = torch.optim.Adam(self.body.parameters(), lr=self.setting.rate)
        best, first = self._look(held), None
        first, kept, at = best, self._state(), 0
        for step in range(1, self.setting.steps + 1):
            adam.zero_grad()
            with torch.enable_grad():
                self._loss(_drawn(learn, self.setting.batch, generator)).backward()
            adam.step()
            if step % _LOOK == 0 or step == self.setting.steps:
                now = self._look(held)
                if now < best:
                    best, kept, at = now, self._state(), step
                elif step - at >= 3 * _LOOK:
                    break
        self.body.load_state_dict(kept)
        return f"objective on held-out rows {first:.4g} -> {best:.4g}, from step {at}"

    def _parts(self) -> tuple[Samples, Samples]:
        """Hold rows out: of each side, and of the pairs where there are any."""
        s = self.samples
        matched = [None, None] if s.matched is None else zip(*map(held_out, s.matched), strict=True)
        both = zip(held_out(s.x), held_out(s.y), matched, strict=True)
        learn, held = (Samples(x, y, m) for x, y, m in both)
        return learn, held

    def _look(self, held: Samples) -> float:
        with torch.no_grad():
            few = Samples(held.x[:512], held.y[:512], held.matched and _first(held.matched))
            return float(self._loss(few))

    def _state(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.body.state_dict().items()}

    def _loss(self, rows: Samples) -> Tensor:
        """Fit plus weighted gap, in units of the spread of the start."""
        unit, weight = self.unit, self.setting.weight
        if weight is None:
            weight = _WEIGHTS[rows.matched is not None]
        x, y = (rows.x, rows.y) if rows.matched is None else rows.matched
        mapped = self.body(x)
        scale = unit**2 * y.shape[1]
        if rows.matched is None:
            fit = divergence(mapped / unit, y / unit).square() / y.shape[1]
        else:
            fit = (mapped - y).square().sum(1).mean() / scale
        if not weight:
            return fit
        gap = monge_gap(x, mapped, cost=self.setting.ground, eps=self.setting.eps)
        per = unit * y.shape[1] ** 0.5 if self.setting.cost == "euclidean" else scale
        return fit + weight * gap / per


def _first(matched: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return matched[0][:512], matched[1][:512]


def _drawn(rows: Samples, size: int, generator: torch.Generator) -> Samples:
    def some(points: Tensor) -> Tensor:
        return torch.randint(len(points), (min(size, len(points)),), generator=generator)

    if rows.matched is not None:
        at = some(rows.matched[0]).to(rows.x.device)
        return Samples(rows.x, rows.y, (rows.matched[0][at], rows.matched[1][at]))
    return Samples(rows.x[some(rows.x)], rows.y[some(rows.y)])
