"""The table that decides which solver runs, and the words that say why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch_otprune.transport.checks import refuse

__all__ = ["TABLE", "Choice", "Problem", "Purpose", "Row", "choose", "explain"]

Purpose = Literal["value", "gradient", "plan"]

# Measured by benchmarks/transport.py; see docs/transport_dispatch.md for the figures.
# Points up to which an assignment is worth its time: at 8 192 it takes 1.5 to 2.5 times that of
# kernel scaling, which is 3 to 19 % off there. The figure for CUDA is a guess until measured.
EXACT = {"cpu": 10_000, "cuda": 4096}
# Copies per side up to which unequal numbers become an assignment; beyond, the linear program is
# faster, unless one number divides the other.
REPEAT = 1536
PROGRAM = 2048  # points up to which the screened linear program is, which then takes some seconds
STORED = 2**26  # entries of a cost matrix worth storing: 256 MiB in float32, twice with the kernel
# Dimensions up to which KeOps beats torch in blocks. On a CPU it never does: on one thread it takes
# 1.7 to 3 times as long for p = 1 and 2. The figure for CUDA is a guess until measured.
LOW_CPU, LOW_CUDA = 0, 96
# Dimensions kept when a cloud is too large to store its costs: up to here a walk over pairs costs
# less than twice what its exponentials alone do.
REDUCED = 64


@dataclass(frozen=True)
class Problem:
    """What is known before a solver runs.

    Args:
        n: number of sources.
        m: number of targets.
        d: dimension of the points; 0 when only a cost matrix is given.
        device: `cpu` or `cuda`.
        purpose: what is asked for.
        uniform: whether all weights are equal on both sides.
        hard: whether both marginals are hard constraints.
        entropic: whether the user fixed a positive temperature.
        keops: whether KeOps runs here; asked only where it matters.
    """

    n: int
    m: int
    d: int = 0
    device: str = "cpu"
    purpose: Purpose = "plan"
    uniform: bool = True
    hard: bool = True
    entropic: bool = False
    keops: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Row:
    """One line of the table: a solver, where it applies, and why it is first there."""

    solver: str
    when: str
    why: str
    applies: Callable[[Problem], bool]


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it, with every line that was passed over."""

    solver: str
    why: str
    passed: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.solver}: {self.why}", *(f"  not {line}" for line in self.passed)])


def _exact(q: Problem) -> bool:
    if not q.hard or q.entropic:
        return False
    copies, large = math.lcm(q.n, q.m), max(q.n, q.m)
    if q.uniform and copies <= max(REPEAT, large):
        return large <= EXACT["cuda" if q.device == "cuda" else "cpu"]
    return large <= PROGRAM


TABLE: tuple[Row, ...] = (
    Row(
        "line",
        "d = 1, hard marginals, no temperature asked",
        "sorting is exact on the line, in n log n",
        lambda q: q.d == 1 and q.hard and not q.entropic,
    ),
    Row(
        "exact",
        f"hard marginals, n and m <= {EXACT['cpu']} ({EXACT['cuda']} on CUDA), or {PROGRAM} where "
        f"weights differ or lcm(n, m) > {REPEAT}",
        "at this size an exact plan costs less than an entropic one of equal accuracy",
        _exact,
    ),
    Row(
        "scaling",
        f"n x m <= {STORED}",
        "the cost fits in memory: it is built once, and every iteration is two matrix products",
        lambda q: q.n * q.m <= STORED,
    ),
    Row(
        "keops",
        f"costs do not fit, d <= {LOW_CUDA}, on CUDA, KeOps runs here",
        "the cost does not fit in memory, and in few dimensions KeOps recomputes it fastest there",
        lambda q: 0 < q.d <= (LOW_CUDA if q.device == "cuda" else LOW_CPU) and q.keops(),
    ),
    Row(
        "blocks",
        "everything else",
        "the cost does not fit in memory: torch recomputes it block by block",
        lambda q: True,
    ),
)


def choose(problem: Problem, solver: str = "auto") -> Choice:
    """Pick the first line of the table that applies, or the one that is forced.

    Args:
        problem: sizes, dimension, device, purpose.
        solver: `auto`, or the name of a solver.

    Returns:
        the solver, why, and what was passed over.

    Example:
        >>> choose(Problem(n=100, m=100, d=3)).solver
        'exact'
    """
    passed: list[str] = []
    if solver != "auto":
        _known(solver)
    for row in TABLE:
        if solver == row.solver:
            return Choice(row.solver, "forced by the caller", tuple(passed))
        if solver == "auto" and row.applies(problem):
            return Choice(row.solver, row.why, tuple(passed))
        passed.append(f"{row.solver}: needs {row.when}")
    return Choice(TABLE[-1].solver, TABLE[-1].why, tuple(passed[:-1]))  # applies to everything


def _known(solver: str) -> None:
    refuse(
        solver not in {row.solver for row in TABLE},
        f"there is no solver {solver!r}.",
        where="argument solver",
        fix=f"use one of auto, {', '.join(row.solver for row in TABLE)}.",
    )


def explain(
    n: int, m: int | None = None, *, d: int = 0, device: str = "cpu", purpose: Purpose = "plan"
) -> str:
    """Say which solver would couple two uniform clouds of this size, and why.

    Args:
        n: number of sources.
        m: number of targets; None is n.
        d: dimension; 0 for a cost matrix.
        device: `cpu` or `cuda`.
        purpose: `value`, `gradient` or `plan`.

    Returns:
        one line for the choice, and one for each solver that was passed over.
    """
    from torch_otprune.transport.keops import available

    problem = Problem(n, n if m is None else m, d, device, purpose, keops=available)
    return str(choose(problem))
