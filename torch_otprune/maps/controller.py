"""A price that rises and falls until a count meets its budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch_otprune.transport.checks import positive, refuse

__all__ = ["DualController", "Tuned", "within_budget"]

_RISE = 1.5


@dataclass
class DualController:
    """Move the logarithm of a price by how far a count is off its budget.

    It is dual ascent on the budget: the price rests where the count meets it, and no proposal is
    drawn or thrown away.

    Args:
        budget: the count to meet.
        price: to start from, positive.
        gain: step of the logarithm for a count that is off by the whole budget.

    Source: ours, in place of the annealed search of Chen, Xie & Zhang 2025.
    """

    budget: float
    price: float
    gain: float = 1.0

    def __post_init__(self) -> None:
        positive(self.price, "price")
        positive(self.gain, "gain")
        refuse(
            not self.budget >= 0,
            f"budget is {self.budget!r}.",
            where="DualController, argument budget",
            fix="pass how many channels may move, 0 or more.",
        )

    def see(self, count: float) -> float:
        """Learn a count and give the next price."""
        off = (count - self.budget) / max(self.budget, 1.0)
        self.price *= math.exp(self.gain * max(-1.0, min(1.0, off)))
        return self.price


@dataclass(frozen=True)
class Tuned:
    """Where a controller came to rest.

    Args:
        price: the last that met the budget; the highest tried where none did.
        count: at that price.
        met: whether the budget is met.
    """

    price: float
    count: float
    met: bool


def within_budget(
    measure: Callable[[float], float], budget: float, start: float, *, steps: int = 40
) -> Tuned:
    """Find a price at which a count is within its budget, and hardly below.

    Args:
        measure: gives the count at a price; it falls as the price rises.
        budget: most of it.
        start: first price, positive.
        steps: measurements, at most.

    Returns:
        the cheapest price that met the budget. Once prices on both sides are known, the
        controller's step is held between them.
    """
    control, low, high = DualController(budget, start), 0.0, math.inf
    best: Tuned | None = None
    price = start
    for _ in range(steps):
        count = measure(price)
        if count <= budget:
            best = Tuned(price, count, True) if best is None or price < best.price else best
            high = min(high, price)
            if count == budget:
                break
        else:
            low = max(low, price)
        control.price = price
        price = control.see(count if count != budget else budget - 1e-3)
        if high == math.inf:
            price = max(price, _RISE * low)  # near the budget the controller's own step is small
        elif not low < price < high:
            price = math.sqrt(low * high) if low > 0 else high / 4
        if low > 0 and high / low < 1 + 1e-3:
            break
    return best or Tuned(price, measure(price), False)
