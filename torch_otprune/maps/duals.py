"""Convex potentials whose gradients are maps, fitted by gradient steps; slow, and on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.maps.affine import AffineMap
from torch_otprune.maps.base import AffineFit, FreeFit
from torch_otprune.maps.elastic import Elastic
from torch_otprune.maps.samples import Samples, held_out
from torch_otprune.transport.gaussian import matrix_root

__all__ = ["ConvexPotential", "Gradient", "conjugate", "fit_dual"]

_BATCH = 256
_LOOK = 20  # steps between looks at them
_INNER = 4  # steps of the map per step of the potential
_CYCLE = 3.0  # weight of the way there and back


class ConvexPotential(nn.Module):
    """A convex function: half a square in the start's metric, plus a small input-convex net.

    Weights between hidden units are squared, so that they are never negative whatever an
    optimiser does. The net's last weights start near 0: the gradient starts as the start's map.

    Args:
        matrix: symmetric positive semi-definite part of the map that it starts from.
        shift: its constant.
        width: hidden units, twice.
        unit: length by which inputs are divided.

    Source: Amos, Xu & Kolter 2017 for the net; Korotin et al. 2021 for CELU and the quadratic part.
    """

    def __init__(
        self, matrix: Tensor, shift: Tensor, *, width: int = 32, unit: float = 1.0
    ) -> None:
        super().__init__()
        self.unit, d = unit, len(matrix)
        self.root = nn.Parameter(matrix_root(matrix))  # trained too, or the map could only stretch
        self.shift = nn.Parameter(shift.clone())
        self.first = nn.Linear(d, width, dtype=matrix.dtype)
        self.skip = nn.Linear(d, width, dtype=matrix.dtype)
        self.between = nn.Parameter(torch.rand(width, width, dtype=matrix.dtype) / width**0.5)
        self.last = nn.Parameter(torch.full((width,), 0.1, dtype=matrix.dtype))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Evaluate."""
        square = (x @ self.root).square().sum(1) / 2 + x @ self.shift
        z = F.celu(self.first(x / self.unit)) + 1
        z = F.celu(self.skip(x / self.unit) + z @ self.between.square().T) + 1
        return square + self.unit**2 * (z @ self.last.square())

    def slope(self, x: Float[Tensor, "n d"], *, keep: bool = True) -> Float[Tensor, "n d"]:
        """Differentiate, so that losses of the gradient can be differentiated once more."""
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            (found,) = torch.autograd.grad(self(at).sum(), at, create_graph=keep)
        return found


class Gradient(nn.Module):
    """The map that a potential is the potential of.

    Args:
        potential: convex.
    """

    def __init__(self, potential: ConvexPotential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Map points."""
        flat = x.reshape(-1, x.shape[-1]).to(self.potential.root.dtype)
        return self.potential.slope(flat, keep=False).detach().reshape(x.shape).to(x)


def conjugate(
    potential: ConvexPotential, y: Float[Tensor, "m d"], start: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """Find where x·y − potential(x) is largest for every y, by L-BFGS.

    Args:
        potential: convex.
        y: slopes.
        start: where to begin.

    Returns:
        the points, detached: by the envelope theorem nothing flows through them.
    """
    x = start.detach().clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([x], max_iter=30, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def value() -> Tensor:
        lbfgs.zero_grad()
        with torch.enable_grad():
            loss = (potential(x) - (x * y).sum(1)).sum() / len(y)
            (x.grad,) = torch.autograd.grad(loss, x)
        told: Tensor = loss.detach()
        return told

    lbfgs.step(value)
    return x.detach()


def fit_dual(
    kind: str,
    solver: Literal["icnn", "w2gn", "lbfgs"],
    samples: Samples,
    *,
    elastic: Elastic,
    steps: int,
    seed: int,
) -> FreeFit:
    """Fit a convex potential of the source whose gradient reaches the target.

    Args:
        kind: for the report.
        solver: `icnn` plays two potentials against each other, `w2gn` ties them by a cycle, and
            `lbfgs` solves for the conjugate.
        samples: unpaired; pairs are not looked at.
        elastic: penalty of the displacement, averaged over points and summed over coordinates.
        steps: of gradient descent.
        seed: of first values and batches.

    Returns:
        the map, as it was when it did best on held-out rows.

    Source: Makkuva et al. 2020, Korotin et al. 2021, Amos 2023; the penalty in the player that
    owns the map is Chen, Xie & Zhang's 2025. To begin at the map between Gaussians is ours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        duel = _Duel.between(samples, solver, elastic)
        note = duel.run(steps)
    body = Gradient(duel.f.eval().requires_grad_(False))
    return FreeFit(kind, samples, start=duel.start, notes=(note,), body=body)


@dataclass
class _Duel:
    """Two potentials: f, whose gradient maps the source, and g, whose gradient maps back."""

    f: ConvexPotential
    g: ConvexPotential
    start: AffineFit
    solver: str
    samples: Samples
    elastic: Elastic

    @classmethod
    def between(cls, samples: Samples, solver: str, elastic: Elastic) -> _Duel:
        bare = Samples(samples.x, samples.y)
        there, back = (AffineMap().fitted(s) for s in (bare, Samples(samples.y, samples.x)))
        assert isinstance(there, AffineFit)
        assert isinstance(back, AffineFit)
        f, g = _around(there, samples.x), _around(back, samples.y)
        return cls(f, g, there, solver, samples, elastic)

    def run(self, steps: int) -> str:
        """Descend, and keep what did best on held-out rows."""
        rates = {"lr": 1e-2, "betas": (0.5, 0.9)}
        adam_f = torch.optim.Adam(self.f.parameters(), **rates)  # type: ignore[arg-type]
        adam_g = torch.optim.Adam(self.g.parameters(), **rates)  # type: ignore[arg-type]
        (x, x_held), (y, y_held) = (held_out(p) for p in (self.samples.x, self.samples.y))
        first = best = self._look(x_held, y_held)
        kept, at = {k: v.clone() for k, v in self.f.state_dict().items()}, 0
        for step in range(1, steps + 1):
            for _ in range(_INNER if self.solver == "icnn" else 1):
                self._turn(adam_g, self._loss_g(_some(x), _some(y)))
            self._turn(adam_f, self._loss_f(_some(x), _some(y)))
            if step % _LOOK == 0 or step == steps:
                now = self._look(x_held, y_held)
                if now < best:
                    best, at = now, step
                    kept = {k: v.clone() for k, v in self.f.state_dict().items()}
        self.f.load_state_dict(kept)
        return f"distance on held-out rows {first:.4g} -> {best:.4g}, from step {at} of {steps}"

    def _turn(self, adam: torch.optim.Optimizer, loss: Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    def _loss_g(self, x: Tensor, y: Tensor) -> Tensor:
        """Let g's gradient find where each target comes from."""
        with torch.enable_grad():
            if self.solver == "lbfgs":  # only the first guess is learnt
                with torch.no_grad():
                    guess = self.g.slope(y, keep=False)
                found = conjugate(self.f, y, guess)
                return (self.g.slope(y) - found).square().sum(1).mean()
            from_y = self.g.slope(y)
            loss: Tensor = (self.f(from_y) - (from_y * y).sum(1)).mean()
            if self.solver == "w2gn":
                loss = loss + self._cycle(x, y)
            return loss

    def _loss_f(self, x: Tensor, y: Tensor) -> Tensor:
        """Raise f where the way back ends, lower it on the source; ask for few moves."""
        with torch.enable_grad():
            back = self.g.slope(y, keep=False).detach()
            if self.solver == "lbfgs":
                back = conjugate(self.f, y, back)
            loss: Tensor = self.f(x).mean() - self.f(back).mean()
            if self.solver == "w2gn":
                loss = loss + self._cycle(x, y)
            if self.elastic.weight:
                moved = self.f.slope(x) - x
                loss = loss + self.elastic.weight * self.elastic.penalty(moved).mean()
            return loss

    def _cycle(self, x: Tensor, y: Tensor) -> Tensor:
        there = self.f.slope(self.g.slope(y)) - y
        return _CYCLE / 2 * there.square().sum(1).mean()

    def _look(self, x: Tensor, y: Tensor) -> float:
        from torch_otprune.transport import divergence

        with torch.no_grad():
            mapped = self.f.slope(x[:512], keep=False).detach()
            far = float(divergence(mapped, y[:512])) ** 2
            price = self.elastic.penalty(mapped - x[:512]).mean() if self.elastic.weight else 0.0
            return far + self.elastic.weight * float(price)


def _around(start: AffineFit, points: Tensor) -> ConvexPotential:
    matrix = (start.matrix + start.matrix.T) / 2
    return ConvexPotential(matrix, start.shift, unit=float(points.std(0).mean()) + 1e-9)


def _some(rows: Tensor) -> Tensor:
    return rows[torch.randint(len(rows), (min(_BATCH, len(rows)),))]
