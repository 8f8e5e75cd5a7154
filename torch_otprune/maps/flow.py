"""Particles that flow towards a law, one implicit step of a gradient flow after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.maps.affine import least_squares_map, with_moments
from torch_otprune.maps.base import AffineFit, FittedMap, FreeFit, TransportMap, register
from torch_otprune.maps.samples import Samples
from torch_otprune.transport import coupling_points, divergence

__all__ = ["Critic", "Flow", "Nearest", "force", "jkos"]

_POINTS = 768
_INNER = 3  # gradient steps per implicit step
_ASCENT = 5  # steps of the critic before each step of the particles


@register
class Flow(TransportMap):
    """Carry particles to the target by implicit (JKO) steps of a Wasserstein gradient flow.

    Each step minimises |X − X_k|² / 2a plus an energy of the particles: half the squared debiased
    Sinkhorn distance to the target, or the Jensen-Shannon divergence in its variational form, with
    a critic that is trained along. A step that would raise an independent Sinkhorn energy is not
    taken, so that the energy falls from anchor to anchor.

    `affine` regresses where particles ended on where they began, so that the map folds; `points`
    gives a new point the displacement of the nearest particle.

    Limits: it knows laws alone; where pairs are known least squares uses more. A critic sees what
    its few units see. With few particles per dimension it chases single samples, and a distance
    of samples is less where spread is lost; `affine` gives the target's second moments back.

    Source: Fan, Zhang, Taghvaei & Chen 2022 for the variational form; Feydy et al. 2019 for the
    debiased energy. That steps are refused by an independent energy is ours.
    """

    kind: Literal["flow"] = "flow"
    energy: Literal["sinkhorn", "jsd"] = "sinkhorn"
    form: Literal["affine", "points"] = "affine"
    step: float = Field(default=1.0, gt=0, description="a, of the implicit step")
    anchors: int = Field(default=8, ge=0, description="implicit steps, at most")
    eps: float = Field(default=0.02, gt=0, description="temperature, of the mean cost")
    width: int = Field(default=32, ge=1, description="hidden units of the critic")
    rate: float = Field(default=1e-2, gt=0, description="of the critic's Adam")
    seed: int = 0

    @property
    def affine(self) -> bool:
        """Tell whether it folds."""
        return self.form == "affine"

    def fitted(self, samples: Samples) -> FittedMap:
        """Let particles flow, then read a map off them."""
        x, y = samples.some(_POINTS, self.seed)
        unit = float(y.std(0).square().mean().sqrt().clamp_min(1e-12))
        pull = self._pull(x / unit, y / unit)
        ended, energies = jkos(
            x / unit, y / unit, pull, step=self.step, anchors=self.anchors, eps=self.eps
        )
        ended = ended * unit
        told = " -> ".join(f"{unit**2 * e:.3g}" for e in (energies[0], energies[-1]))
        common: dict[str, Any] = {"notes": (f"energy {told} in {len(energies) - 1} steps",)}
        if self.form == "points":
            return FreeFit(self.kind, samples, **common, body=Nearest(x, ended))
        around, middle = x - x.mean(0), ended.mean(0)
        cross = around.T @ (ended - middle) / len(x)
        cov = around.T @ around / len(x)
        matrix, shift = least_squares_map(x.mean(0), cov, middle, cross, ridge=1e-4)
        matrix, shift = with_moments(matrix, shift, samples)
        return AffineFit(self.kind, samples, **common, matrix=matrix, shift=shift)

    def _pull(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        if self.energy == "sinkhorn":
            return _Sinkhorn(y, self.eps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Critic(y, width=self.width, rate=self.rate)


def jkos(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    pull: Callable[[Tensor], Tensor],
    *,
    step: float,
    anchors: int,
    eps: float = 0.02,
) -> tuple[Float[Tensor, "n d"], list[float]]:
    """Take implicit steps until the energy stops to fall.

    Args:
        x: particles.
        y: target.
        pull: minus the gradient of the energy at every particle, per unit of its mass.
        step: a, of |X − X_k|² / 2a.
        anchors: steps, at most.
        eps: temperature of the energy that is watched.

    Returns:
        where they end, and half the squared Sinkhorn distance at every anchor, the first included.
    """
    energies = [_energy(x, y, eps)]
    for _ in range(anchors):
        at, size = x, 1 / (1 + 1 / step)
        for _ in range(_INNER):
            at = at + size * (pull(at) - (at - x) / step)
        now = _energy(at, y, eps)
        if now >= energies[-1] * (1 - 1e-3):
            break
        x, energies = at, [*energies, now]
    return x, energies


def force(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, eps: float = 0.02
) -> Float[Tensor, "n d"]:
    """Pull particles where half the squared debiased Sinkhorn distance falls fastest.

    Args:
        x: particles.
        y: target.
        eps: temperature relative to the mean cost, of each term its own.

    Returns:
        minus the gradient per particle, times their number.
    """
    there = coupling_points(x, y, eps=eps, tol=1e-2)
    own = coupling_points(x, x, eps=eps, tol=1e-2)
    return there.barycentric_map(y) - own.barycentric_map(x)


@dataclass
class _Sinkhorn:
    y: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return force(x, self.y, eps=self.eps)


class Critic(nn.Module):
    """A classifier of particles against the target, whose best loss is their Jensen-Shannon.

    Args:
        y: the target.
        width: hidden units, twice.
        rate: of its Adam.
    """

    y: Tensor

    def __init__(self, y: Float[Tensor, "m d"], *, width: int = 32, rate: float = 1e-2) -> None:
        super().__init__()
        self.register_buffer("y", y)
        self.body = nn.Sequential(
            nn.Linear(y.shape[1], width), nn.CELU(), nn.Linear(width, width), nn.CELU(),
            nn.Linear(width, 1),
        ).to(y)  # fmt: skip
        self.adam = torch.optim.Adam(self.body.parameters(), lr=rate)

    def value(self, x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Bound the Jensen-Shannon divergence from below, in nats."""
        with_p, with_q = F.logsigmoid(self.body(x)), F.logsigmoid(-self.body(self.y))
        two = torch.log(x.new_tensor(2.0))
        return (with_p.mean() + with_q.mean()) / 2 + two

    def ascend(self, x: Float[Tensor, "n d"], steps: int = _ASCENT) -> None:
        """Learn to tell particles from the target; the particles are held still."""
        x = x.detach()
        for _ in range(steps):
            self.adam.zero_grad()
            with torch.enable_grad():
                (-self.value(x)).backward()
            self.adam.step()

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Pull particles where the divergence falls, after some steps of the critic."""
        self.ascend(x)
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(F.logsigmoid(self.body(at)).sum(), at)
        return -slope


class Nearest(nn.Module):
    """Displace a point as the nearest particle was displaced.

    Args:
        began: particles at the start.
        ended: at the end.
    """

    began: Tensor
    moved: Tensor

    def __init__(self, began: Float[Tensor, "n d"], ended: Float[Tensor, "n d"]) -> None:
        super().__init__()
        self.register_buffer("began", began)
        self.register_buffer("moved", ended - began)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Map points."""
        flat = x.reshape(-1, x.shape[-1])
        at = torch.cdist(flat.to(self.began), self.began).argmin(1)
        return (flat + self.moved[at].to(flat)).reshape(x.shape)


def _energy(x: Tensor, y: Tensor, eps: float) -> float:
    with torch.no_grad():
        return float(divergence(x, y, eps=eps)) ** 2 / 2
