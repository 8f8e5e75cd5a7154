"""The kinds of rules: what may go, and what mends the network afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.amount import Amount, AmountLike, Several
from torch_otprune.policy.base import plain, problem, short
from torch_otprune.policy.registry import (
    CRITERIA,
    LAYER_CRITERIA,
    PENALTIES,
    REPAIRS,
    REPLACEMENTS,
    RULES,
    Entry,
    Setting,
)
from torch_otprune.policy.targets import check_pattern

__all__ = ["Count", "Counted", "Criterion", "Layers", "Linearize", "Repairs", "Rule", "SettingLike"]

SettingLike = str | Mapping[str, Any] | Setting
Count = Annotated[int, Field(ge=1, strict=True), BeforeValidator(plain)]


def listed(value: object) -> object:
    """Read one entry as a list of one."""
    return (value,) if isinstance(value, (str, Mapping, Setting)) else value


def _share(value: object) -> object:
    """Read how many of several go: a whole number counts, one of them included."""
    number = _number(value) if isinstance(value, str) else plain(value)
    whole = isinstance(number, int)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or isnan(number):
        raise problem(f"{short(value)} is no number of layers.", fix=_SHARE)
    if number <= 0:
        raise problem(f"{value!r} removes nothing.", fix="drop at least one layer.")
    if number == 1 and not whole:
        raise problem(f"{value!r} removes every layer.", fix="drop less than 100 %.")
    if number > 1 and not whole:
        raise problem(f"{value!r} is neither a share below 100 % nor whole.", fix=_SHARE)
    return number


def _number(text: str) -> int | float | None:
    """Read a whole number, a fraction or a percentage; None where it is none of them."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    if found is None:
        return None
    if found[1].isdecimal() and not found[2]:
        return int(found[1])
    return float(Decimal(found[1]) / (100 if found[2] else 1))


_SHARE = "write a whole number such as 3, a fraction such as 0.25, or a percentage such as '25%'."


def _units_only(value: object) -> object:
    if isinstance(value, str) and value.strip()[-1:] in tuple("kKMGBT"):
        raise problem(
            f"{value!r} is no number of units.",
            fix="write a fraction, a percentage, or a whole number of units.",
        )
    return value


_Pattern = Annotated[str, BeforeValidator(check_pattern)]
Criterion = Annotated[Setting, Entry(CRITERIA)]
_Repair = Annotated[Setting, Entry(REPAIRS)]
_LayerCriterion = Annotated[Setting, Entry(LAYER_CRITERIA)]
_Replacement = Annotated[Setting, Entry(REPLACEMENTS)]
_Penalty = Annotated[Setting, Entry(PENALTIES)]
Patterns = Annotated[
    tuple[_Pattern, ...],
    BeforeValidator(listed, json_schema_input_type=str | tuple[str, ...]),
]
Repairs = Annotated[
    tuple[_Repair, ...],
    BeforeValidator(listed, json_schema_input_type=_Repair | tuple[_Repair, ...]),
]


Counted = Annotated[Several, BeforeValidator(_units_only)]
"""How many of several stay: a whole number counts them, 1 included."""


class Rule(Setting):
    """What every kind of rule says: where it applies and how much it keeps there.

    A new kind subclasses this, narrows `kind` and is decorated with `@RULES.register`;
    `Policy`, YAML and the schema then know it.
    """

    targets: Patterns = Field(
        default=("auto",),
        min_length=1,
        description="module paths, globs, `re:` patterns, class names, or `auto` for all; "
        "a container stands for everything below it",
    )
    ignore: Patterns = Field(default=(), description="what the targets must not reach; same words")
    keep: Annotated[Amount, BeforeValidator(_units_only)] | None = Field(
        default=None,
        description="what each target keeps: a fraction of its units, or a number of units; 1 is "
        "all of them; null leaves it to the budget",
    )
    repair: Repairs = Field(
        default=(), description="what mends the network afterwards, in this order"
    )

    @property
    def asks(self) -> bool:
        """Tell whether the rule itself says that something must go."""
        return self.keep is not None and not self.keep.everything

    @model_validator(mode="after")
    def _reach_something(self) -> Self:
        if set(self.targets) <= set(self.ignore) or "auto" in self.ignore:
            raise problem(
                f"every target of this {self.kind!r} rule is ignored.",
                fix="remove the pattern from `ignore`, or remove the rule.",
                key="ignore",
            )
        return self


class _Depth(Rule):
    """What rules about whole layers have in common: some of what they reach goes."""

    keep: Counted | None = Field(
        default=None,
        description="how many of the targets stay: a whole number counts them, 1 included; a "
        "fraction or a percentage is a share, rounded down; null leaves it to `drop` or the budget",
    )
    drop: Annotated[int | float, BeforeValidator(_share)] | None = Field(
        default=None,
        description="how many of the targets go: a whole number counts them, 1 included; a "
        "fraction or a percentage is a share, rounded down; null leaves it to `keep` or the budget",
    )

    @property
    def asks(self) -> bool:
        """Tell whether the rule itself says that something must go."""
        return self.drop is not None or super().asks

    @model_validator(mode="after")
    def _say_it_once(self) -> Self:
        if self.drop is not None and self.keep is not None:
            raise problem(
                "drop and keep say the same thing twice.", fix="give one of them.", key="drop"
            )
        return self

    def dropped(self, count: int) -> int | None:
        """Tell how many of so many targets go.

        Args:
            count: how many the rule reaches.

        Returns:
            a number, which may exceed `count`; None where a budget decides. A share is rounded
            down: of `drop` what goes, of `keep` what stays.
        """
        if self.keep is not None:
            return count - self.keep.of(count)
        if isinstance(self.drop, float):
            return Amount(self.drop).of(count)
        return self.drop


@RULES.register
class Layers(_Depth):
    """Remove whole layers: residual blocks, transformer layers, or their halves.

    Example:
        >>> from torch_otprune.policy import Layers
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> Layers(targets="encoder", drop="25%").dropped(12)
        3
    """

    kind: Literal["layers"] = "layers"
    criterion: _LayerCriterion = Field(
        default="transport",
        validate_default=True,
        description="ranks the layers: a name, or a table with `kind` and settings",
    )
    replace: _Replacement = Field(
        default="affine",
        validate_default=True,
        description="what stands in for a removed layer: a name, or a table with `kind`",
    )
    repair: Repairs = Field(
        default=("least_squares",),
        validate_default=True,
        description="what mends the layers that stay, in this order: names, or tables with `kind`",
    )
    penalty: _Penalty | None = Field(
        default=None, description="what training adds to the loss so that layers can go"
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["layers"] = "layers",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            drop: int | float | str | None = None,
            criterion: SettingLike = "transport",
            replace: SettingLike = "affine",
            repair: SettingLike | Iterable[SettingLike] = ("least_squares",),
            penalty: SettingLike | None = None,
        ) -> None: ...


@RULES.register
class Linearize(_Depth):
    """Make activations affine, and fold the linear layers around them into one.

    An activation makes way for a line per channel, which the layer in front takes up. What then
    is linear folds into one layer. Chosen is the set of the asked size that costs least by the
    criterion among those where every activation disappears inside a fold that the gate allows:
    a network that is less expressive and no faster is no use. So some activations go only in
    pairs, such as the two of an inverted residual block. `unfolded="allow"` takes the cheapest
    activations whatever folds, and the plan says which of them save nothing.

    A `drop` or `keep` of its own decides how many go; a budget does not. Beside other rules,
    channels are cut and layers removed first, and folds are priced at the widths that are left.

    `surrogate` says which line: `affine` the best one, `identity` the line of EASIER, `on_off`
    that of TLC, which switches a channel off where its mean input is below zero.

    Example:
        >>> from torch_otprune.policy import Linearize
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> Linearize(targets="features", drop=2).asks
        True
    """

    kind: Literal["linearize"] = "linearize"
    criterion: _LayerCriterion = Field(
        default="stein",
        validate_default=True,
        description="ranks the activations: a name, or a table with `kind` and settings",
    )
    gate: Literal["macs", "params", "none"] = Field(
        default="macs",
        description="a fold that would raise this is refused; `none` folds whatever can be folded",
    )
    surrogate: Literal["affine", "identity", "on_off"] = Field(
        default="affine",
        description="the line per channel in an activation's place: the best one, the identity, "
        "or the identity for channels that are mostly on and zero for the others",
    )
    interior: bool = Field(
        default=False,
        description="also fold past zero padding, where the border of the output changes; that "
        "is one more error, measured and repaired",
    )
    unfolded: Literal["refuse", "allow"] = Field(
        default="refuse",
        description="what happens to activations without which nothing more would fold",
    )
    repair: Repairs = Field(
        default=("least_squares",),
        validate_default=True,
        description="what mends the layers behind, in this order: names, or tables with `kind`",
    )
    penalty: _Penalty | None = Field(
        default=None, description="what training adds to the loss so that activations can go"
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["linearize"] = "linearize",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            drop: int | float | str | None = None,
            criterion: SettingLike = "stein",
            gate: Literal["macs", "params", "none"] = "macs",
            surrogate: Literal["affine", "identity", "on_off"] = "affine",
            interior: bool = False,
            unfolded: Literal["refuse", "allow"] = "refuse",
            repair: SettingLike | Iterable[SettingLike] = ("least_squares",),
            penalty: SettingLike | None = None,
        ) -> None: ...
