"""The rule about single weights: zeros in ordinary tensors, free or in a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.amount import Amount, AmountLike
from torch_otprune.policy.base import problem, short
from torch_otprune.policy.registry import RULES, WEIGHT_CRITERIA, Entry, Setting
from torch_otprune.policy.rules import Rule, SettingLike

__all__ = ["Pattern", "WeightSetting", "Weights"]

_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
_WRITE = "write 'unstructured', or n:m with n below m, such as '2:4'."


@dataclass(frozen=True)
class Pattern:
    """Where zeros may lie.

    Args:
        n: weights that stay of every `m` neighbours; 0 where they may lie anywhere.
        m: neighbours along the input axis that are counted together.

    Example:
        >>> Pattern.read("2:4"), Pattern.read("unstructured").free
        (Pattern(n=2, m=4), True)
    """

    n: int = 0
    m: int = 1

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Read `unstructured` or `n:m`."""
        found = _PATTERN.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else cls()

    @property
    def free(self) -> bool:
        """Tell whether zeros may lie anywhere."""
        return self.n == 0


class WeightSetting(Setting):
    """What the rule about weights asks of a criterion before any is known."""

    @property
    def budgeted(self) -> bool:
        """Tell whether the criterion itself says how much may change, and so how many go."""
        return False


def _pattern(value: object) -> object:
    if not isinstance(value, str):
        raise problem(f"{short(value)} is no pattern.", fix=_WRITE)
    if value.strip() == "unstructured":
        return "unstructured"
    found = _PATTERN.fullmatch(value)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise problem(f"{value!r} is no pattern.", fix=_WRITE)
    return f"{int(found[1])}:{int(found[2])}"


def _share_only(value: object) -> object:
    amount = Amount.parse(value)
    if not amount.relative:
        raise problem(
            f"{short(value)} is a number of weights, and layers differ in size.",
            fix="write a share, such as 0.5 or '50%'.",
        )
    return amount


@RULES.register
class Weights(Rule):
    """Set single weights of linear layers and convolutions to zero; shapes stay as they are.

    Every layer keeps the same share. Zeros are real zeros in ordinary tensors: parameters and
    MACs are as many as before, and nothing runs faster but on hardware and kernels that skip
    them, such as those for 2:4. A budget counts dense parameters, so it asks nothing of this
    rule.

    In a pattern n:m, n of every m neighbours along the input axis stay; of a convolution, of m
    neighbouring input channels at one position of its kernel.

    Example:
        >>> from torch_otprune.policy import Weights
        >>> Weights(pattern="2:4").share
        0.5
    """

    kind: Literal["weights"] = "weights"
    keep: Annotated[Amount, BeforeValidator(_share_only)] | None = Field(
        default=None,
        description="share of its weights that every layer keeps; null with a pattern n:m, which "
        "says it, and with a criterion that has a radius of its own",
    )
    pattern: Annotated[str, BeforeValidator(_pattern)] = Field(
        default="unstructured",
        description="where zeros may lie: `unstructured`, anywhere; `n:m`, such as `2:4`, n of "
        "every m neighbours along the input axis stay",
    )
    criterion: Annotated[Setting, Entry(WEIGHT_CRITERIA)] = Field(
        default="alps",
        validate_default=True,
        description="chooses the weights, and what those that stay become: a name, or a table "
        "with `kind` and settings",
    )

    @property
    def neighbours(self) -> Pattern:
        """Read the pattern."""
        return Pattern.read(self.pattern)

    @property
    def budgeted(self) -> bool:
        """Tell whether the criterion decides how many weights go."""
        return isinstance(self.criterion, WeightSetting) and self.criterion.budgeted

    @property
    def share(self) -> float | None:
        """Tell the share of weights that stays; None where the criterion decides."""
        pattern = self.neighbours
        if not pattern.free:
            return pattern.n / pattern.m
        return None if self.keep is None else float(self.keep.value)

    @property
    def asks(self) -> bool:
        """Tell whether the rule itself says that something must go."""
        return self.budgeted or not self.neighbours.free or super().asks

    @model_validator(mode="after")
    def _say_how_much(self) -> Self:
        given, free = self.keep is not None, self.neighbours.free
        if self.repair:
            raise problem(
                "a repair would fill the zeros again.",
                fix="drop `repair`: the criteria alps, sparsegpt and net_trim refit what stays.",
                key="repair",
            )
        if given and not free:
            raise problem(
                f"keep and the pattern {self.pattern} both say how many weights stay.",
                fix="drop `keep`, or write pattern='unstructured'.",
                key="keep",
            )
        if self.budgeted and (given or not free):
            raise problem(
                f"the radius of {self.criterion.kind!r} and the rule both say how many weights "
                "stay.",
                fix="drop the radius of the criterion, or `keep` and `pattern` of the rule.",
                key="keep" if given else "pattern",
            )
        if free and not given and not self.budgeted:
            raise problem(
                "this rule does not say how many weights stay; a budget counts zeros as "
                "parameters, and cannot.",
                fix="give a `keep` such as '50%', or a pattern such as '2:4'.",
                key="keep",
            )
        return self

    if TYPE_CHECKING:  # what may be written is wider than what is stored

        def __init__(
            self,
            *,
            kind: Literal["weights"] = "weights",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            pattern: str = "unstructured",
            criterion: SettingLike = "alps",
        ) -> None: ...
