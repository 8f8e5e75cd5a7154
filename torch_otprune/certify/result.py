"""What a certificate says, and how it is printed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torch_otprune.policy.base import Declaration

__all__ = ["Certificate", "Finding", "How", "Kind", "Reason", "Violation"]

Kind = Literal["convex", "monotone", "lipschitz"]
How = Literal["structural", "empirical", "refused"]
_SHOWN = 4


class Reason(Declaration):
    """Why a property is not proved, at one module."""

    module: str = Field(description="path of the module; empty for the model itself")
    text: str = Field(description="what breaks the property there")


class Violation(Declaration):
    """Two inputs between which a property fails."""

    a: tuple[float, ...] = Field(description="one input, flattened")
    b: tuple[float, ...] = Field(description="the other; of `monotone`, not below the first")
    output: int = Field(description="number of the output, flattened")
    found: float = Field(description="`convex`: the output halfway; `monotone`: the output at a")
    allowed: float = Field(description="`convex`: the mean of both; `monotone`: the output at b")
    share: float = Field(description="share of random pairs that fail")


class Finding(Declaration):
    """Whether one property holds, and how that is known."""

    kind: Kind = Field(description="the property")
    how: How = Field(
        description="`structural`: proved from the weights and the operations, for every input; "
        "`empirical`: not proved, and no violation was found; `refused`: neither"
    )
    text: str = Field(description="one sentence")
    reasons: tuple[Reason, ...] = Field(default=(), description="why it is not proved")
    violation: Violation | None = Field(
        default=None, description="a counterexample, if one is known"
    )

    def __str__(self) -> str:
        lines = [f"{self.kind:<10} {self.how}: {self.text}"]
        for reason in self.reasons[:_SHOWN]:
            at = f"'{reason.module}'" if reason.module else "the model itself"
            lines.append(f"           {at}: {reason.text}")
        more = len(self.reasons) - _SHOWN
        return "\n".join(lines + [f"           and {more} more"] * (more > 0))


class Certificate(Declaration):
    """What is known of a model as a function of one of its inputs.

    Printed, it has one line per property and one per reason.
    """

    input: str = Field(description="which input, of which shape; the outputs are taken together")
    convex: Finding = Field(description="whether every output is convex in that input")
    monotone: Finding = Field(description="whether every output never falls where the input rises")
    lipschitz: Finding = Field(description="whether the output's change is bounded")
    bound: float | None = Field(
        default=None,
        description="most that all outputs together can change, per change of the whole input, "
        "both in Euclidean norm; None where nothing bounds it",
    )

    def finding(self, kind: Kind) -> Finding:
        """Give the finding on one property.

        Args:
            kind: which.

        Returns:
            the finding.
        """
        found: Finding = getattr(self, kind)
        return found

    def __str__(self) -> str:
        found = (self.convex, self.monotone, self.lipschitz)
        return "\n".join([f"as a function of {self.input}", *map(str, found)])
