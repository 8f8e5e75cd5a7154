"""Entropic transport: kernel scaling by matmul, and its log-domain reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Potentials", "damping", "log_domain", "scaling"]

CHECK = 10  # iterations between looks at the marginals
STAGES = 4.0  # each temperature of the warm start over the next


@dataclass(frozen=True)
class Potentials:
    """Where an iteration stopped.

    Args:
        f: dual potential of the sources: P = a b exp((f + g - C) / eps).
        g: dual potential of the targets.
        error: mass that the next half step would still move, as a share of the total.
        iterations: how many were spent at the final temperature.
    """

    f: Float[Tensor, "*batch n"]
    g: Float[Tensor, "*batch m"]
    error: Float[Tensor, "*batch"]
    iterations: int


def damping(rho: float, eps: float) -> float:
    """Turn a marginal penalty into the factor on its potential: 1 is a hard marginal, 0 none."""
    return 1.0 if math.isinf(rho) else rho / (rho + eps)


def scaling(
    cost: Float[Tensor, "batch n m"],
    a: Float[Tensor, "batch n"],
    b: Float[Tensor, "batch m"],
    eps: Float[Tensor, " batch"],
    *,
    damp: tuple[float, float] = (1.0, 1.0),
    tol: float = 1e-3,
    limit: int = 2000,
) -> Potentials | None:
    """Scale rows and columns of the kernel in turn, moving large scalings into the potentials.

    Args:
        cost: ground costs of a batch of problems.
        a: source weights.
        b: target weights.
        eps: temperature of each problem, in the unit of its cost.
        damp: factors from `damping` for sources and targets.
        tol: marginal error to reach.
        limit: iterations to spend at the final temperature.

    Returns:
        potentials, or None where a kernel row underflowed: the log domain has to take over.

    Source: Schmitzer 2019 (absorption, temperature scaling), in the measure convention
    of Feydy et al. 2019, which keeps potentials finite on points of no weight.
    """
    top = float((cost.amax((-2, -1)) / eps).max())
    stages = max(0, math.ceil(math.log(top / 8, STAGES))) if top > 8 else 0
    state = _Kernel(cost, a, b, eps * STAGES**stages, damp)
    for stage in range(stages, 0, -1):
        if not state.run(tol=0.05, limit=20):
            return None
        state.heat(eps * STAGES ** (stage - 1))
    if not state.run(tol=tol, limit=limit):
        return None
    return Potentials(*state.potentials(), state.error, state.iterations)


class _Kernel:
    """Potentials f and g, the kernel exp((f + g - C) / eps) they make, and scalings on top."""

    def __init__(
        self, cost: Tensor, a: Tensor, b: Tensor, eps: Tensor, damp: tuple[float, float]
    ) -> None:
        self.cost, self.a, self.b, self.eps, self.damp = cost, a, b, eps, damp
        self.f, self.g = torch.zeros_like(a), torch.zeros_like(b)
        room = math.log(torch.finfo(cost.dtype).max) / 4
        # Subnormal numbers are slow: the kernel stops above them, far below what can matter.
        self.powers = (0.7 * math.log(torch.finfo(cost.dtype).tiny), 2 * room)
        self.high = math.exp(room)
        self.mass = a.sum(-1)
        self.kernel = torch.empty_like(cost)
        self.error = torch.full_like(self.mass, torch.inf)
        self.iterations = 0
        self.absorb()
        self.relax: Tensor | None = None

    def potentials(self) -> tuple[Tensor, Tensor]:
        e = self.eps[:, None]
        return self.f + e * self.u.log(), self.g + e * self.v.log()

    def heat(self, eps: Tensor) -> None:
        """Change the temperature, keeping the potentials."""
        self.f, self.g = self.potentials()
        self.eps = eps
        self.absorb()

    def absorb(self) -> None:
        """Rebuild the kernel around the current potentials."""
        e = self.eps[:, None]
        torch.add((self.f / e)[:, :, None], (self.g / e)[:, None, :], out=self.kernel)
        if len(self.eps) == 1:
            self.kernel.sub_(self.cost, alpha=1 / float(self.eps))
        else:
            self.kernel.addcdiv_(self.cost, e[:, :, None], value=-1)
        self.kernel.clamp_(*self.powers).exp_()
        self.u, self.v = torch.ones_like(self.a), torch.ones_like(self.b)

    def run(self, *, tol: float, limit: int) -> bool:
        """Iterate at this temperature; say whether the arithmetic held."""
        self.relax = None
        for self.iterations in range(1, limit + 1):
            look = self.iterations % CHECK == 0 or self.iterations == limit or self.iterations < 3
            before = self.error
            if not self.step(look):
                continue
            low, high = self.extremes()
            if not (low > 0 and high < math.inf):
                return False
            if bool((self.error <= tol).all()):
                return True
            if max(high, 1 / low) > self.high:
                self.f, self.g = self.potentials()
                self.absorb()
            if self.iterations >= CHECK:
                self.hurry(before)
        return True

    def extremes(self) -> tuple[float, float]:
        """Give the smallest and the largest scaling; NaN where there is one."""
        ends = torch.stack([*self.u.aminmax(), *self.v.aminmax()]).tolist()
        # min() and max() would lose a NaN.
        return (math.nan, math.nan) if math.isnan(sum(ends)) else (min(ends), max(ends))

    def hurry(self, before: Tensor) -> None:
        """Choose how far to overshoot each half step, from how fast the error has fallen.

        Source: Lehmann et al. 2022, 3: successive over-relaxation, whose best factor follows from
        the rate of plain scaling. Ours goes back to plain steps where the error grew.
        """
        if self.damp != (1.0, 1.0):
            return
        ratio = self.error / before.clamp(min=torch.finfo(before.dtype).tiny)
        if self.iterations == CHECK:
            rate = ratio.clamp(max=0.99).pow(1 / (CHECK - 2))
            self.relax = (2 / (1 + (1 - rate).sqrt()))[:, None]
        elif self.relax is not None:
            self.relax = self.relax.where(ratio[:, None] < 1, self.relax.new_ones(()))

    def step(self, look: bool) -> bool:
        """Take one iteration, columns last, so that only the rows can be wrong."""
        # What is looked at and what is returned come from plain steps, which meet the columns.
        relax = None if look or (self.iterations + 1) % CHECK == 0 else self.relax
        rows = torch.bmm(self.kernel, (self.b * self.v)[:, :, None])[:, :, 0]
        new = self._scale(rows, self.f, self.damp[0])
        if look:
            self.error = (self.a * rows * (self.u - new).abs_()).sum(-1) / self.mass
        self.u = new if relax is None else (new / self.u).pow_(relax).mul_(self.u)
        columns = torch.bmm((self.a * self.u)[:, None, :], self.kernel)[:, 0]
        new = self._scale(columns, self.g, self.damp[1])
        self.v = new if relax is None else (new / self.v).pow_(relax).mul_(self.v)
        return look

    def _scale(self, total: Tensor, base: Tensor, damp: float) -> Tensor:
        """Solve one half step for the scaling on top of the potential `base`."""
        if damp == 1:
            return total.reciprocal()
        scaled = base / self.eps[:, None]
        return (damp * (scaled - total.log()) - scaled).exp()


def log_domain(
    softmin_rows: Callable[[Tensor, float], Tensor],
    softmin_columns: Callable[[Tensor, float], Tensor],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    eps: float,
    *,
    start: float,
    first: tuple[Tensor, Tensor] | None = None,
    damp: tuple[float, float] = (1.0, 1.0),
    tol: float = 1e-3,
    limit: int = 2000,
) -> Potentials:
    """Iterate on the potentials alone; slower than `scaling`, and safe at any temperature.

    Args:
        softmin_rows: (h over targets, eps) -> soft minimum over targets for each source.
        softmin_columns: the same with the parts exchanged.
        a: source weights.
        b: target weights.
        eps: final temperature, in the unit of the cost.
        start: first temperature, usually the largest cost.
        first: potentials to start from; None is zero.
        damp: factors from `damping`.
        tol: marginal error to reach.
        limit: iterations to spend at the final temperature.

    Returns:
        potentials with exact columns.
    """
    log_a, log_b = a.log(), b.log()
    f, g = (torch.zeros_like(a), torch.zeros_like(b)) if first is None else first
    heat, pace = max(start, eps), _Pace(damp == (1.0, 1.0))
    while True:
        heat = max(heat / STAGES, eps)
        last = heat == eps
        for count in range(1, (limit if last else 3) + 1):
            look, relax = pace.plan(count, last=count == limit or not last)
            new = damp[0] * softmin_rows(log_b + g / heat, heat)
            if look:
                # The row marginal of the current plan, over the one the new potential would have.
                error = (a * ((f - new) / heat).expm1().abs()).sum() / a.sum()
            f = new if relax == 1 else torch.lerp(f, new, relax)
            new = damp[1] * softmin_columns(log_a + f / heat, heat)
            g = new if relax == 1 else torch.lerp(g, new, relax)
            if look and (float(error) <= tol or (last and count == limit)):
                break
            if look and last:
                pace.see(count, float(error))
        if last:
            return Potentials(f, g, error, count)


class _Pace:
    """How far to overshoot in the log domain: as `_Kernel.hurry` does, for one problem."""

    def __init__(self, hard: bool) -> None:
        self.hard, self.relax, self.before = hard, 1.0, math.inf

    def plan(self, count: int, *, last: bool) -> tuple[bool, float]:
        """Say whether to look at the marginals, and by what to overshoot."""
        if self.relax == 1 or last:
            return True, 1.0
        return count % CHECK == 0, self.relax if (count + 1) % CHECK > 1 else 1.0

    def see(self, count: int, error: float) -> None:
        """Learn from the error after so many iterations at the final temperature."""
        if not self.hard or (count % CHECK and count != 2):
            return
        if count == CHECK:
            rate = min(0.99, error / max(self.before, 1e-300)) ** (1 / (CHECK - 2))
            self.relax = 2 / (1 + math.sqrt(1 - rate))
        if count > 2 and not error < self.before:
            self.relax = 1.0
        self.before = error
