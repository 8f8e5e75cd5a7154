"""When to prune while somebody trains, and how much is gone by then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.base import Declaration, problem
from torch_otprune.policy.rules import Count

__all__ = ["Schedule"]


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


_Steps = Annotated[
    tuple[Count, ...],
    BeforeValidator(_one_or_more, json_schema_input_type=int | tuple[Count, ...]),
]


class Schedule(Declaration):
    """Prune in rounds while training: at these optimiser steps, or every so many of them.

    What the policy keeps is what is kept after the last round. After round i of n, with
    p = i / n, `cubic` keeps final + (1 - final) (1 - p)^3 of the dense model and `linear`
    final + (1 - final) (1 - p); `one_shot` has one round.

    Limits: activations that a `linearize` rule makes linear go in the last round, all of them.

    Source: the cubic law is that of gradual magnitude pruning (Zhu & Gupta 2017, eq. 1); theirs
    counts steps from a beginning where nothing goes, ours counts rounds, so that the first one
    removes something and `at` need not be even.

    Example:
        >>> schedule = Schedule(every=100, until=400)
        >>> tuple(schedule.steps)
        (100, 200, 300, 400)
        >>> [round(schedule.kept(0.2, i), 2) for i in range(5)]
        [1.0, 0.54, 0.3, 0.21, 0.2]
    """

    at: _Steps | None = Field(
        default=None,
        min_length=1,
        description="optimiser steps after which a round is due, ascending; one or several",
    )
    every: Count | None = Field(default=None, description="optimiser steps between two rounds")
    start: Count | None = Field(
        default=None, description="with `every`: the step of the first round; null: after `every`"
    )
    until: Count | None = Field(
        default=None, description="with `every`: no round is later than this step"
    )
    shape: Literal["cubic", "linear", "one_shot"] = Field(
        default="cubic", description="how the kept share falls from 1 to what the policy keeps"
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            at: int | Iterable[int] | None = None,
            every: int | None = None,
            start: int | None = None,
            until: int | None = None,
            shape: Literal["cubic", "linear", "one_shot"] = "cubic",
        ) -> None: ...

    @model_validator(mode="after")
    def _agree(self) -> Self:
        self._say_when()
        if self.at is not None and any(a >= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise problem(
                f"the steps {', '.join(map(str, self.at))} do not ascend.",
                fix="write every step once, in order.",
                key="at",
            )
        if not self.steps:
            raise problem(
                f"no round is due: the first would be at step {self.start or self.every}, and "
                f"until is {self.until}.",
                fix="raise until.",
                key="until",
            )
        if self.shape == "one_shot" and len(self.steps) > 1:
            raise problem(
                f"one_shot has one round, and {len(self.steps)} are due.",
                fix="give one step, or choose `cubic` or `linear`.",
                key="shape",
            )
        return self

    def _say_when(self) -> None:
        given = [key for key in ("every", "start", "until") if getattr(self, key) is not None]
        if self.at is not None and given:
            raise problem(
                f"at and {given[0]} both say when.",
                fix="give `at`, or `every` and `until`.",
                key=given[0],
            )
        if self.at is None and (self.every is None or self.until is None):
            raise problem(
                "the schedule does not say when.",
                fix="give `at`, such as at=[500], or `every` and `until`.",
            )

    @property
    def steps(self) -> Sequence[int]:
        """List the optimiser steps after which a round is due."""
        if self.at is not None:
            return self.at
        assert self.every is not None
        assert self.until is not None
        return range(self.start or self.every, self.until + 1, self.every)

    def kept(self, final: float, done: int) -> float:
        """Tell what share of the dense model is kept after some rounds.

        Args:
            final: what is kept in the end, in (0, 1].
            done: rounds, from 0 to all.

        Returns:
            a share; exactly `final` after the last round.
        """
        left = 1 - done / len(self.steps)
        return final + (1 - final) * left ** (3 if self.shape == "cubic" else 1)
