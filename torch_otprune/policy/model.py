"""The declaration: what may go, how much must stay, and on what evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.amount import Amount, AmountLike
from torch_otprune.policy.base import Declaration, problem
from torch_otprune.policy.registry import CRITERIA, REPAIRS, RULES, Entry, Setting
from torch_otprune.policy.targets import check_pattern
from torch_otprune.policy.yaml_io import dump_yaml, load_yaml

__all__ = ["Budget", "Calibration", "Channels", "Policy", "Rule"]

SettingLike = str | Mapping[str, Any] | Setting
Count = Annotated[int, Field(ge=1, strict=True)]


def _listed(value: object) -> object:
    """Read one entry as a list of one."""
    return (value,) if isinstance(value, (str, Mapping, Setting)) else value


def _units_only(value: object) -> object:
    if isinstance(value, str) and value.strip()[-1:] in tuple("kKMGBT"):
        raise problem(
            f"{value!r} is no number of units.",
            fix="write a fraction, a percentage, or a whole number of units.",
        )
    return value


_Pattern = Annotated[str, BeforeValidator(check_pattern)]
_Criterion = Annotated[Setting, Entry(CRITERIA)]
_Repair = Annotated[Setting, Entry(REPAIRS)]
Patterns = Annotated[
    tuple[_Pattern, ...],
    BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]),
]
Repairs = Annotated[
    tuple[_Repair, ...],
    BeforeValidator(_listed, json_schema_input_type=_Repair | tuple[_Repair, ...]),
]


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
        description="what each target keeps: a fraction of its units, or a number of units; "
        "null leaves it to the budget",
    )
    repair: Repairs = Field(
        default=(), description="what mends the network afterwards, in this order"
    )

    @model_validator(mode="after")
    def _reach_something(self) -> Self:
        if set(self.targets) <= set(self.ignore) or "auto" in self.ignore:
            raise problem(
                f"every target of this {self.kind!r} rule is ignored.",
                fix="remove the pattern from `ignore`, or remove the rule.",
                key="ignore",
            )
        return self


@RULES.register
class Channels(Rule):
    """Remove channels: of convolutions and linear layers, with all that is tied to them.

    Example:
        >>> from torch_otprune.policy import Channels
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> rule = Channels(targets="layer*", keep="50%", multiple_of=8)
        >>> rule.widths(64)
        (32,)
    """

    kind: Literal["channels"] = "channels"
    criterion: _Criterion = Field(
        default="transport",
        validate_default=True,
        description="ranks the units: a name, or a table with `kind` and settings",
    )
    repair: Repairs = Field(
        default=("least_squares",),
        validate_default=True,
        description="what mends the consumers, in this order: names, or tables with `kind`",
    )
    min_keep: Count = Field(default=1, description="units every group keeps at least")
    multiple_of: Count = Field(
        default=1,
        description="kept units are a multiple of this; a group too small for it stays whole",
    )

    if TYPE_CHECKING:  # what may be written is wider than what is stored

        def __init__(
            self,
            *,
            kind: Literal["channels"] = "channels",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            criterion: SettingLike = "transport",
            repair: SettingLike | Iterable[SettingLike] = ("least_squares",),
            min_keep: int = 1,
            multiple_of: int = 1,
        ) -> None: ...

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.keep is None or self.keep.relative:
            return self
        keep = self.keep.value
        if keep < self.min_keep:
            raise problem(
                f"keep is {keep} units, but min_keep is {self.min_keep}.",
                fix="lower min_keep or raise keep.",
                key="keep",
            )
        if keep % self.multiple_of:
            raise problem(
                f"keep is {keep} units, which is no multiple of multiple_of = {self.multiple_of}.",
                fix="choose a keep that is a multiple, or drop multiple_of.",
                key="keep",
            )
        return self

    def widths(self, units: int) -> tuple[int, ...]:
        """List how many units a group may keep under this rule.

        Args:
            units: how many the group has.

        Returns:
            ascending counts; without `keep` the last is all of them, with `keep` there is
            one: the nearest that `min_keep` and `multiple_of` allow.
        """
        step = self.multiple_of
        allowed = [k for k in range(step, units, step) if k >= self.min_keep] + [units]
        if self.keep is None:
            return tuple(allowed)
        wanted = self.keep.of(units)
        return (min(allowed, key=lambda width: (abs(width - wanted), width)),)


class Budget(Declaration):
    """What the whole model keeps; with two measures, both must hold.

    Example:
        >>> Budget(macs="50%", params="1.2M").macs
        Amount(value=0.5)
    """

    params: Amount | None = Field(
        default=None, description="parameters kept at most: a fraction of all, or a count"
    )
    macs: Amount | None = Field(
        default=None,
        description="multiply-accumulates of one forward pass on the example kept at most: "
        "a fraction of all, or a count (1 MAC = 2 FLOPs)",
    )
    weighting: Literal["output", "uniform", "none"] = Field(
        default="output",
        description="what an error at a layer weighs: `output`, how much the network's output "
        "feels it; `uniform`, the same for every relative error; `none`, no weighting at all",
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            params: AmountLike | None = None,
            macs: AmountLike | None = None,
            weighting: Literal["output", "uniform", "none"] = "output",
        ) -> None: ...

    @property
    def limits(self) -> dict[str, Amount]:
        """Collect the measures that are limited, by name."""
        named = {"params": self.params, "macs": self.macs}
        return {name: amount for name, amount in named.items() if amount is not None}

    @model_validator(mode="after")
    def _limit_something(self) -> Self:
        if not self.limits:
            raise problem("this budget limits nothing.", fix="give `macs` or `params`.")
        return self


class Calibration(Declaration):
    """How much data the decisions may see.

    Example:
        >>> Calibration(samples=256).probe
        64
    """

    samples: Count = Field(
        default=1024,
        description="samples read at most, over all ranks; further batches are not run",
    )
    rows_per_dim: Count = Field(
        default=4,
        description="rows gathered per unknown of a least-squares problem; more positions than "
        "that are sub-sampled",
    )
    probe: Count = Field(
        default=64,
        description="samples on which the output's sensitivity to each layer is measured",
    )
    memory: float = Field(
        default=4.0, gt=0, description="GiB that the statistics may take; more is an error"
    )


_CALIBRATION = Calibration()
RuleLike = str | Mapping[str, Any] | Rule
_Rule = Annotated[Rule, Entry(RULES)]
Rules = Annotated[
    tuple[_Rule, ...],
    BeforeValidator(_listed, json_schema_input_type=_Rule | tuple[_Rule, ...]),
]


class Policy(Declaration):
    """Everything that is declared about one pruning, frozen.

    Example:
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> policy = Policy(rules="channels", budget=Budget(macs="50%"))
        >>> Policy.from_yaml(policy.to_yaml()) == policy
        True
    """

    rules: Rules = Field(min_length=1, description="what may go; one rule or several")
    budget: Budget | None = Field(default=None, description="what the whole model keeps")
    ignore: Patterns = Field(default=(), description="what no rule may reach")
    calibration: Calibration = Field(
        default=_CALIBRATION, description="how much data the decisions may see"
    )
    seed: int = Field(default=0, ge=0, strict=True, description="fixes every random choice")

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            rules: RuleLike | Iterable[RuleLike],
            budget: Budget | Mapping[str, Any] | None = None,
            ignore: str | Iterable[str] = (),
            calibration: Calibration | Mapping[str, Any] = _CALIBRATION,
            seed: int = 0,
        ) -> None: ...

    @model_validator(mode="after")
    def _remove_something(self) -> Self:
        limits = self.budget.limits.values() if self.budget else ()
        if all(rule.keep and rule.keep.everything for rule in self.rules):
            raise problem(
                "nothing would be pruned: every rule keeps 100 %.",
                fix="lower the `keep` of a rule, or drop it and leave the choice to a budget.",
                key="rules",
            )
        asked = [*limits, *(rule.keep for rule in self.rules if rule.keep)]
        if all(amount.everything for amount in asked):
            raise problem(
                "nothing would be pruned: no rule has a `keep` and no budget asks for less.",
                fix="give a rule a `keep`, or the policy a budget such as Budget(macs='50%').",
                key="budget",
            )
        return self

    def to_yaml(self) -> str:
        """Write every field, defaults included.

        Returns:
            YAML that `from_yaml` reads back to an equal policy.
        """
        return dump_yaml(self.model_dump(mode="json"))

    def to_json(self) -> str:
        """Write every field, defaults included.

        Returns:
            JSON that `from_json` reads back to an equal policy.
        """
        return self.model_dump_json()

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a policy from YAML 1.2 text or a file.

        Args:
            source: text, a `Path`, or a one-line string that ends in .yaml or .yml.

        Returns:
            the policy.

        Raises:
            OTPruneError: `PolicyError` or `BudgetError`, naming line and column.
        """
        return load_yaml(cls, source)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            the policy.

        Raises:
            OTPruneError: `PolicyError` or `BudgetError`, naming the field.
        """
        return cls.model_validate_json(text)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Describe policy files to editors, with every kind registered by now.

        Returns:
            a JSON schema (2020-12) of what may be written.
        """
        dialect = "https://json-schema.org/draft/2020-12/schema"
        return {"$schema": dialect, **cls.model_json_schema(mode="validation")}
