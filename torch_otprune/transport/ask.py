"""What the caller of a coupling fixed, and which of it contradicts the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_otprune.errors import TransportError
from torch_otprune.transport.checks import number, refuse
from torch_otprune.transport.keops import unavailable_because

__all__ = ["HARD", "Ask", "consistent", "prices", "sound"]

HARD = (math.inf, math.inf)


@dataclass(frozen=True)
class Ask:
    """What the caller fixed."""

    eps: float | None
    relax: tuple[float, float]
    solver: str
    tol: float
    limit: int
    explain: bool


def prices(relax: object) -> tuple[float, float]:
    """Return the prices of both marginals, whatever pair holds them, and refuse what is none."""
    if isinstance(relax, tuple | list) and len(relax) == 2 and all(map(number, relax)):
        return float(relax[0]), float(relax[1])
    raise TransportError(
        f"relax is {relax!r}, which is no pair of prices.",
        where="coupling, argument relax",
        fix="pass two prices, source and target, such as relax=(1.0, 1.0).",
    )


def sound(ask: Ask) -> None:
    """Refuse settings out of range; NaN is in no range."""
    warm = ask.eps is None or (number(ask.eps) and 0 <= ask.eps < math.inf)
    refuse(
        not warm or not all(price >= 0 for price in ask.relax),
        f"eps is {ask.eps} and relax is {ask.relax}.",
        where="coupling, arguments eps and relax",
        fix="pass a finite eps of at least 0, and two prices of at least 0.",
    )
    refuse(
        not ask.tol >= 0 or ask.limit < 1,
        f"tol is {ask.tol} and limit is {ask.limit}.",
        where="coupling, arguments tol and limit",
        fix="pass a tolerance such as 0.001, and at least one iteration.",
    )


def consistent(ask: Ask, d: int) -> None:
    """Refuse a forced solver that would have to overrule another setting."""
    refuse(
        ask.solver == "line" and d != 1,
        "solver='line' needs points of one dimension.",
        where="coupling_points, argument solver",
        fix="pass x and y with one column each, or solver='auto'.",
    )
    exact = ask.solver in {"line", "exact"}
    refuse(
        exact and (bool(ask.eps) or ask.relax != HARD),
        f"solver={ask.solver!r} is exact and has hard marginals, but eps is {ask.eps} and relax is "
        f"{ask.relax}.",
        where="coupling, argument solver",
        fix="leave eps and relax out, or pass solver='auto'.",
    )
    refuse(
        ask.solver not in {"auto", "line", "exact"} and ask.eps == 0,
        f"eps=0 insists on an exact plan, which solver={ask.solver!r} does not give.",
        where="coupling, arguments eps and solver",
        fix="pass eps=0.01, or solver='exact'.",
    )
    if ask.solver == "keops":
        _recomputed(d)


def _recomputed(d: int) -> None:
    refuse(
        d == 0,
        "solver='keops' recomputes costs from points, and here is a matrix of costs.",
        where="coupling, argument solver",
        fix="use coupling_points, or solver='auto'.",
    )
    reason = unavailable_because()
    refuse(
        reason is not None,
        f"KeOps does not run here: {reason}.",
        where="argument solver",
        fix="use solver='blocks', or install a C++ compiler.",
    )
