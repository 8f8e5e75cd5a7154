"""Climb to the top of a function that is the least of many smooth ones, and so has ridges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["climb"]

Slope = Callable[[Tensor], tuple[Tensor, float]]
FLAT = 1e-3  # share of the slope that may be left at the top
LIMIT = 300  # evaluations
SIDES = 32  # slopes kept at a time: on a ridge one for each of its sides
NEAR = {torch.float64: 1e-6, torch.float32: 3e-4}  # how far apart those sides are asked for


def climb(
    slope: Slope, start: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "d sides"], Float[Tensor, " sides"], int]:
    """Find where a distance along directions is largest, near a good direction.

    Where two matchings cost the same, the distance has a ridge, and at its top lies the maximum
    of most small clouds. There no single slope vanishes, but a mixture of those around it does.

    Args:
        slope: slope and value of the function at a unit vector.
        start: a unit vector.

    Returns:
        unit vectors, the best first and the others around it, the shares in which their slopes
        cancel, and how often a better one was found.

    Source: Goldstein 1977 for the slopes around a point; Wolfe 1975 for their shortest mixture.
    """
    best, (force, value) = start, slope(start)
    sides, forces, step, taken = [best], [force], 0.25, 0
    for _ in range(LIMIT):
        way, _ = _mixture(forces, best)
        length = float(way.norm())
        if length <= FLAT * float(forces[0].norm()) or len(sides) > SIDES:
            if step <= NEAR[start.dtype]:
                break
            step, sides, forces = step / 4, sides[:1], forces[:1]
            continue
        there = torch.nn.functional.normalize(best + step * way / length, dim=0)
        force, power = slope(there)
        if power >= value + 0.25 * step * length:
            best, value, taken = there, power, taken + 1
            sides, forces, step = [best], [force], min(2 * step, 0.5)
        elif float(_along(force, best) @ way) < 0.75 * length**2:
            sides, forces = [*sides, there], [*forces, force]
        elif step <= NEAR[start.dtype]:  # what is left to gain is lost in rounding
            break
        else:  # no other side of a ridge, but too long a step
            step, sides, forces = step / 4, sides[:1], forces[:1]
    return torch.stack(sides, dim=1), _mixture(forces, best)[1], taken


def _mixture(forces: list[Tensor], best: Tensor) -> tuple[Tensor, Tensor]:
    level = torch.stack([_along(one, best) for one in forces], dim=1)
    shares = _shortest(level)
    return level @ shares, shares


def _along(force: Tensor, theta: Tensor) -> Tensor:
    """Take off what would only make the direction longer."""
    return force - (force @ theta) * theta


def _shortest(vectors: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """Find the shares of the shortest mixture of some vectors."""
    if vectors.shape[1] == 1:
        return vectors.new_ones(1)
    from scipy.optimize import nnls

    # With a row of ones to hit, non-negative least squares is that problem up to its scale.
    scale = float(vectors.norm(dim=0).max()) or 1.0
    rows = torch.cat([vectors / scale, vectors.new_ones(1, vectors.shape[1])]).double().cpu()
    goal = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    goal[-1] = 1
    shares = torch.from_numpy(nnls(rows.numpy(), goal.numpy(), maxiter=10_000)[0]).to(vectors)
    return shares / shares.sum()
