"""W_1 between clouds too large for a coupling: a learnt potential, and what to read beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.transport.checks import at_least_one, cloud, refuse, same_space
from torch_otprune.transport.divergence import divergence
from torch_otprune.transport.sliced import max_sliced

__all__ = ["Critic", "Potential", "critic"]

ROWS = 2**16  # points that a potential is evaluated at together
LOOKS = 8  # times that the potential is judged on all points while it learns
BJORCK = 12  # iterations towards orthonormal rows, of a float32 weight
EPS = 0.02
NEAR = 0.95  # of what one direction shows: a critic that finds less has not learnt enough


@dataclass(frozen=True, eq=False)
class Potential:
    """A function of points that changes by at most the distance between them.

    Linear layers of spectral norm 1 with sorted pairs in between: each is 1-Lipschitz, so their
    composition is.

    Args:
        weights: of each layer, float64, none with a spectral norm above 1.
        biases: likewise.
        centre: subtracted from the points.
        scale: divided out, and multiplied in again at the end.
    """

    weights: tuple[Float[Tensor, "_ _"], ...]
    biases: tuple[Float[Tensor, " _"], ...]
    centre: Float[Tensor, " d"]
    scale: float

    def __call__(self, points: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Evaluate it.

        Args:
            points: in the space of the clouds.

        Returns:
            one number per point, in their unit.
        """
        parts = points.detach().split(ROWS)
        return torch.cat([self._part(part.to(self.centre)) for part in parts])

    def _part(self, points: Tensor) -> Tensor:
        inner = (points - self.centre) / self.scale
        return self.scale * _through(inner, self.weights, self.biases)

    @property
    def lipschitz(self) -> float:
        """Bound the steepest slope: the product of the layers' spectral norms."""
        bound = 1.0
        for weight in self.weights:
            bound *= float(torch.linalg.matrix_norm(weight, ord=2))
        return bound


@dataclass(frozen=True, eq=False)
class Critic:
    """A learnt lower bound of W_1, beside two numbers that need no training.

    A critic that stopped early reads low, so do not compare two of them without the others.

    Args:
        distance: what the potential finds between the clouds: never above their W_1, rounding
            aside.
        fresh: the same on rows that it did not learn from: what it says about the laws; may be
            negative where there is nothing to find.
        max_sliced: W_1 in the worst direction found, a lower bound too.
        sinkhorn: debiased entropic W_1 of a subsample.
        null: the same between two halves of the first cloud's subsample: no effect looks like this.
        sample: rows of each cloud's subsample.
        potential: the function itself.
        steps: of training.
    """

    distance: Float[Tensor, ""]
    fresh: float
    max_sliced: float
    sinkhorn: float
    null: float
    sample: int
    potential: Potential
    steps: int

    @property
    def bound(self) -> float:
        """Give the better of both lower bounds."""
        return max(float(self.distance), self.max_sliced)

    @property
    def underfit(self) -> bool:
        """Tell whether the potential found clearly less than one direction shows."""
        return float(self.distance) < NEAR * self.max_sliced

    def __str__(self) -> str:
        """Print the critic and what stands beside it."""
        lines = [
            f"W1 critic   {float(self.distance):.4g} (on fresh rows {self.fresh:.4g}), a lower "
            f"bound after {self.steps} steps",
            f"max-sliced  {self.max_sliced:.4g}, a lower bound without training",
            f"Sinkhorn    {self.sinkhorn:.4g} on {self.sample} rows; {self.null:.4g} between "
            "halves of one cloud",
        ]
        if self.underfit:
            lines.append("note: the critic found less than one direction shows; take more steps")
        return "\n".join(lines)


def critic(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    width: int = 64,
    depth: int = 2,
    steps: int = 300,
    batch: int = 512,
    rate: float = 0.01,
    sample: int = 1024,
    seed: int = 0,
) -> Critic:
    """Train a potential between two clouds, and measure max-sliced and a Sinkhorn subsample too.

    By duality W_1 is the largest difference of means of a 1-Lipschitz function. Any such function
    gives a lower bound; training looks for a good one. Time grows with the steps and not with the
    clouds, but for one look at all points every `steps` / 8.

    Args:
        x: points of one measure, uniform weights.
        y: points of the other, in the same space.
        width: units of each hidden layer, even.
        depth: hidden layers.
        steps: of training.
        batch: rows of each cloud per step.
        rate: learning rate of Adam, falling to 0.
        sample: rows of each cloud for Sinkhorn, at most.
        seed: of the start, the batches and the subsample.

    Returns:
        the bounds and the potential.

    Source: Arjovsky et al. 2017 for the critic; Anil, Lucas & Grosse 2019 for sorted pairs between
    orthonormal layers, in place of clipped weights; the float64 division by the exact norm is ours.

    Limits: a lower bound, how far below is not known; where the clouds are small enough,
    `wasserstein` is exact and faster. In many dimensions samples of one law are far apart: read
    `fresh` and `null` before `distance`. No gradient reaches the points.

    Example:
        >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
        >>> found = critic(x, x + torch.tensor([2.0, 0.0, 0.0]), steps=100)
        >>> 1.8 < float(found.distance) <= 2.0
        True
    """
    x, y = cloud(x, "x").detach(), cloud(y, "y").detach()
    same_space(x, y)
    for value, name in ((depth, "depth"), (steps, "steps"), (batch, "batch")):
        at_least_one(value, name)
    _sound(x, y, width=width, rate=rate, sample=sample)
    y, generator = y.to(x), torch.Generator("cpu").manual_seed(seed)
    (seen_x, fresh_x), (seen_y, fresh_y) = (_parted(c, generator) for c in (x, y))
    with torch.no_grad():
        some_x, some_y = (c[_order(c, generator)[:sample]] for c in (x, y))
        half = len(some_x) // 2
        pairs = ((some_x, some_y), (some_x[:half], some_x[half : 2 * half]))
        near, null = (float(divergence(a, b, p=1, eps=EPS)) for a, b in pairs)
        worst = float(max_sliced(x, y, p=1, seed=seed).distance)
    sizes = (x.shape[1], *[width] * depth, 1)
    learner = _Learner(x, y, sizes, generator)
    with torch.inference_mode(False), torch.enable_grad():
        found = learner.train(seen_x, seen_y, steps=steps, batch=batch, rate=rate)
    apart = found(x).mean() - found(y).mean()
    return Critic(
        distance=apart.clamp_min(0),  # the constant function finds 0
        fresh=float(found(fresh_x).mean() - found(fresh_y).mean()),
        max_sliced=worst,
        sinkhorn=near,
        null=null,
        sample=min(len(some_x), len(some_y)),
        potential=found,
        steps=steps,
    )


def _sound(x: Tensor, y: Tensor, *, width: int, rate: float, sample: int) -> None:
    refuse(
        min(len(x), len(y)) < 8,
        f"clouds of {len(x)} and {len(y)} points train no critic.",
        where="critic, arguments x and y",
        fix="pass at least 8 points of each, or use `wasserstein`, which is exact there.",
    )
    refuse(
        width < 2 or width % 2 != 0,
        f"{width} units cannot be sorted in pairs.",
        where="critic, argument width",
        fix="pass an even number such as 64.",
    )
    refuse(
        not 0 < rate < float("inf") or sample < 4,
        f"rate is {rate} and sample is {sample}.",
        where="critic, arguments rate and sample",
        fix="pass a positive finite rate such as 0.01, and at least 4 rows.",
    )


class _Learner:
    """A potential while it learns."""

    def __init__(
        self, x: Tensor, y: Tensor, sizes: Sequence[int], generator: torch.Generator
    ) -> None:
        both = torch.cat([x[:ROWS], y[:ROWS]]).double()
        self.centre = both.mean(0)
        radius = float((both - self.centre).square().sum(1).mean().sqrt())
        self.scale = radius or 1.0  # dead clouds have no radius
        self.generator, self.like = generator, x
        self.weights = [self._draw(out, into) for into, out in pairwise(sizes)]
        self.biases = [torch.zeros(out, device=x.device) for out in sizes[1:]]
        shift = (y.mean(0) - x.mean(0)).float()
        if bool(shift.norm() > 0):  # the mean's own direction first
            self.weights[0][0] = shift / shift.norm() * self.weights[0][0].norm()

    def _draw(self, out: int, into: int) -> Tensor:
        return torch.randn(out, into, generator=self.generator, device="cpu").to(self.like.device)

    def train(self, x: Tensor, y: Tensor, *, steps: int, batch: int, rate: float) -> Potential:
        """Climb, and keep the best potential that was looked at on all rows it learns from."""
        parameters = [t.requires_grad_() for t in (*self.weights, *self.biases)]
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.95))
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, most = None, -float("inf")
        for step in range(1, steps + 1):
            a, b = (self._inner(self._some(c, batch)) for c in (x, y))
            weights = [_orthonormal(w, BJORCK) for w in self.weights]
            loss = _through(b, weights, self.biases).mean()
            loss = loss - _through(a, weights, self.biases).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            if step % max(1, steps // LOOKS) == 0 or step == steps:
                found = self.potential()
                value = float(found(x).mean() - found(y).mean())
                if value > most:
                    best, most = found, value
        assert best is not None
        return best

    def _some(self, points: Tensor, batch: int) -> Tensor:
        if len(points) <= batch:
            return points
        drawn = torch.randint(len(points), (batch,), generator=self.generator, device="cpu")
        return points[drawn.to(points.device)]

    def _inner(self, points: Tensor) -> Tensor:
        return ((points - self.centre.to(points)) / self.scale).float()

    @torch.no_grad()
    def potential(self) -> Potential:
        """Write the function out in float64, with the bound on its slope made exact."""
        weights = []
        for weight in self.weights:
            even = _orthonormal(weight.double(), 2 * BJORCK)
            weights.append(even / torch.linalg.matrix_norm(even, ord=2).clamp_min(1.0))
        biases = tuple(bias.detach().double() for bias in self.biases)
        return Potential(tuple(weights), biases, self.centre, self.scale)


def _through(
    points: Float[Tensor, "n d"], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    """Run points through linear layers, with pairs of units sorted in between."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        points = points @ weight.T + bias
        first, second = points[:, ::2], points[:, 1::2]
        points = torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)
    return (points @ weights[-1].T + biases[-1])[:, 0]


def _orthonormal(weight: Float[Tensor, "out in"], iterations: int) -> Float[Tensor, "out in"]:
    """Bring all singular values towards 1, so that no slope is lost on the way."""
    wide: Tensor = weight if len(weight) <= weight.shape[1] else weight.T
    with torch.no_grad():
        norm = torch.linalg.eigvalsh(wide @ wide.T)[-1].clamp_min(0).sqrt()
    wide = wide / norm.clamp_min(1e-30)
    for _ in range(iterations):
        wide = 1.5 * wide - 0.5 * (wide @ wide.T) @ wide
    return wide if len(weight) <= weight.shape[1] else wide.T


def _order(points: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(points), generator=generator, device="cpu").to(points.device)


def _parted(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hold a quarter of the rows back."""
    order, held = _order(points, generator), max(1, len(points) // 4)
    return points[order[held:]], points[order[:held]]
