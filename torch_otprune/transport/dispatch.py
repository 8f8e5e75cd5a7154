"""The table that decides which solver runs, and the words that say why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
        purpose: a coupling (`plan`), or a distance without (`value`) or with its `gradient`.
        uniform: whether all weights are equal on both sides.
        hard: whether both marginals are hard constraints.
        entropic: whether a positive temperature is asked for, as `divergence` always does.
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
    """One line of the table: a solver, what for, where it applies, and why it is first there.

    Args:
        solver: name of the solver.
        when: where it applies, in words.
        why: the reason for it.
        applies: the same as `when`, for a problem of one of the purposes.
        purposes: what it is asked for.
        alias: another name under which it can be forced.
    """

    solver: str
    when: str
    why: str
    applies: Callable[[Problem], bool]
    purposes: tuple[Purpose, ...]
    alias: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """List what it can be forced by."""
        return (self.alias, self.solver) if self.alias else (self.solver,)


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it, with every line that was passed over."""

    solver: str
    why: str
    passed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.solver}: {self.told(True)}"

    def told(self, explain: bool) -> str:
        """Give the reason, and the lines that were passed over where they are asked for."""
        passed = [f"  not {line}" for line in self.passed] if explain else []
        return "\n".join([self.why, *passed])


def _exact(q: Problem) -> bool:
    if not q.hard or q.entropic:
        return False
    copies, large = math.lcm(q.n, q.m), max(q.n, q.m)
    if q.uniform and copies <= max(REPEAT, large):
        return large <= EXACT["cuda" if q.device == "cuda" else "cpu"]
    return large <= PROGRAM


def _few_dimensions(q: Problem) -> bool:
    low = LOW_CUDA if q.device == "cuda" else LOW_CPU
    return 0 < q.d <= low and q.keops()


ALL: tuple[Purpose, ...] = get_args(Purpose)
PLAN: tuple[Purpose, ...] = ("plan",)
DISTANCE: tuple[Purpose, ...] = ("value", "gradient")
TABLE: tuple[Row, ...] = (
    Row(
        "line",
        "d = 1, hard marginals, no temperature asked",
        "sorting is exact on the line, in n log n",
        lambda q: q.d == 1 and q.hard and not q.entropic,
        ALL,
    ),
    Row(
        "exact",
        f"hard marginals, n and m <= {EXACT['cpu']} ({EXACT['cuda']} on CUDA), or {PROGRAM} where "
        f"weights differ or lcm(n, m) > {REPEAT}",
        "at this size an exact plan costs less than an entropic one of equal accuracy",
        _exact,
        ALL,
    ),
    Row(
        "scaling",
        f"for a plan, n x m <= {STORED}",
        "the cost fits in memory: it is built once, and every iteration is two matrix products",
        lambda q: q.n * q.m <= STORED,
        PLAN,
    ),
    Row(
        "keops",
        f"for a plan, costs do not fit, d <= {LOW_CUDA}, on CUDA, KeOps runs here",
        "the cost does not fit in memory, and in few dimensions KeOps recomputes it fastest there",
        _few_dimensions,
        PLAN,
    ),
    Row(
        "blocks",
        "for a plan, everything else",
        "the cost does not fit in memory: torch recomputes it block by block",
        lambda q: True,
        PLAN,
    ),
    Row(
        "scaling",
        f"for a distance, max(n, m)^2 <= {STORED}",
        "the costs fit in memory: matrix products beat log-sums, in a debiased divergence",
        lambda q: max(q.n, q.m) ** 2 <= STORED,
        DISTANCE,
    ),
    Row(
        "geomloss",
        f"for a distance, costs do not fit, d <= {LOW_CUDA}, on CUDA, KeOps runs here, a "
        "temperature is asked",
        "the costs of a debiased divergence do not fit, and KeOps is fast in few dimensions",
        lambda q: q.entropic and _few_dimensions(q),
        DISTANCE,
        alias="keops",
    ),
    Row(
        "blocks",
        "for a distance, everything else",
        "the costs of a debiased divergence do not fit: torch recomputes them block by block",
        lambda q: True,
        DISTANCE,
    ),
)


def choose(problem: Problem, solver: str = "auto", *, where: str = "argument solver") -> Choice:
    """Pick the first line of the table that applies to a purpose, or the one that is forced.

    Args:
        problem: sizes, dimension, device, purpose.
        solver: `auto`, or the name of a solver.
        where: what an unknown solver is blamed on.

    Returns:
        the solver, why, and what was passed over.

    Example:
        >>> choose(Problem(n=100, m=100, d=3)).solver
        'exact'
        >>> choose(Problem(n=20_000, m=20_000, d=3, purpose="value")).solver
        'blocks'
    """
    rows = [row for row in TABLE if problem.purpose in row.purposes]
    forced = solver != "auto"
    if forced:
        _known(solver, rows, problem, where)
    # The last line for each purpose applies to everything.
    taken = next(
        i for i, row in enumerate(rows) if (solver in row.names if forced else row.applies(problem))
    )
    passed = tuple(f"{row.solver}: needs {row.when}" for row in rows[:taken])
    why = "forced by the caller" if forced else rows[taken].why
    return Choice(rows[taken].solver, why, passed)


def _known(solver: str, rows: Sequence[Row], problem: Problem, where: str) -> None:
    cold = ("line", "exact")  # no temperature can be meant for these
    names = [
        name for row in rows for name in row.names if not (problem.entropic and row.solver in cold)
    ]
    refuse(
        solver not in names,
        f"there is no solver {solver!r}.",
        where=where,
        fix=f"use one of auto, {', '.join(names)}.",
    )


def explain(
    n: int,
    m: int | None = None,
    *,
    d: int = 0,
    device: str = "cpu",
    purpose: Purpose = "plan",
    entropic: bool = False,
) -> str:
    """Say which solver would run for two uniform clouds of this size, and why.

    Args:
        n: number of sources.
        m: number of targets; None is n.
        d: dimension; 0 for a cost matrix.
        device: `cpu` or `cuda`.
        purpose: `plan` for a coupling; `value` or `gradient` for a distance.
        entropic: whether a temperature is asked for, as in every `divergence`.

    Returns:
        one line for the choice, and one for each solver that was passed over.
    """
    from torch_otprune.transport.keops import available

    m = n if m is None else m
    refuse(
        min(n, m) < 1 or d < 0 or purpose not in ALL,
        f"there is no {purpose} between {n} and {m} points of {d} dimensions.",
        where="explain, arguments n, m, d and purpose",
        fix=f"pass sizes of at least 1, and one of {', '.join(ALL)}.",
    )
    problem = Problem(n, m, d, device, purpose, entropic=entropic, keops=available)
    return str(choose(problem))
