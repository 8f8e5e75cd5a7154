"""The declaration: what may go, how much must stay, and on what evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.amount import Amount, AmountLike, Several
from torch_otprune.policy.base import Declaration, plain, problem, short
from torch_otprune.policy.preserve import Preserve, PreserveLike
from torch_otprune.policy.registry import RULES, Entry
from torch_otprune.policy.rules import Count, Layers, Linearize, Patterns, Rule, listed
from torch_otprune.policy.schedule import Schedule
from torch_otprune.policy.yaml_io import dump_yaml, load_yaml

__all__ = ["Budget", "Calibration", "Policy"]


class Budget(Declaration):
    """What the whole model keeps; with several measures, all must hold.

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
    layers: Several | None = Field(
        default=None,
        description="layers kept at most, of those that a `layers` rule may remove: a whole "
        "number counts them, 1 included; a fraction or a percentage is a share",
    )
    weighting: Literal["output", "uniform", "none"] = Field(
        default="output",
        description="what an error at a layer weighs: `output`, how much the network's output "
        "feels it; `uniform`, the same for every relative error; `none`, no weighting at all",
    )
    foresee: bool = Field(
        default=False,
        description="whether an error counts less where layers behind it are refitted after it, "
        "as `least_squares` does; for widths alone",
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            params: AmountLike | None = None,
            macs: AmountLike | None = None,
            layers: AmountLike | None = None,
            weighting: Literal["output", "uniform", "none"] = "output",
            foresee: bool = False,
        ) -> None: ...

    @property
    def limits(self) -> dict[str, Amount]:
        """Collect the measures that are limited, by name."""
        named = {"params": self.params, "macs": self.macs, "layers": self.layers}
        return {name: amount for name, amount in named.items() if amount is not None}

    @model_validator(mode="after")
    def _limit_something(self) -> Self:
        if not self.limits:
            raise problem("this budget limits nothing.", fix="give `macs`, `params` or `layers`.")
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
        default=4.0,
        gt=0,
        description="GiB that the statistics may take, more is an error; and that the trial of a "
        "plan may take beside the model, more is tried in parts",
    )


_CALIBRATION = Calibration()
RuleLike = str | Mapping[str, Any] | Rule
_Rule = Annotated[Rule, Entry(RULES)]


def _rules(value: object) -> object:
    """Read one rule as a list of one, and say plainly what no rule can be."""
    if isinstance(value, Iterable):
        return listed(value)
    raise problem(
        f"{short(value)} is no rule and no list of rules.",
        fix="write a name such as channels, a table such as {kind: channels, keep: 50%}, or a "
        "list of these.",
    )


Rules = Annotated[
    tuple[_Rule, ...],
    BeforeValidator(_rules, json_schema_input_type=_Rule | tuple[_Rule, ...]),
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
    seed: Annotated[int, BeforeValidator(plain)] = Field(
        default=0, ge=0, strict=True, description="fixes every random choice"
    )
    serving: Literal["registered", "uniform", "plain"] = Field(
        default="registered",
        description="how a Transformers model is to be loaded again: `registered`, by "
        "`from_pretrained` where this library is imported; `uniform`, by `from_pretrained` alone: "
        "layers of a kind keep equally many units; `plain`, by `otp.load` only",
    )
    verify: Literal["on", "off"] = Field(
        default="on",
        description="whether a plan is checked on the real model before it is returned; `off` "
        "saves a copy and two forward passes, and lets pass what the analysis may get wrong",
    )
    preserve: Preserve = Field(
        default=(),
        description="what the model is as a function of its first input and stays: `convex`, "
        "`monotone`, or a bound such as `{lipschitz: 2.0}`; proved before and after every step",
    )
    schedule: Schedule | None = Field(
        default=None,
        description="when `attached.step` prunes while the model trains; whatever else plans or "
        "prunes does all of it at once",
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            rules: RuleLike | Iterable[RuleLike],
            budget: Budget | Mapping[str, Any] | None = None,
            ignore: str | Iterable[str] = (),
            calibration: Calibration | Mapping[str, Any] = _CALIBRATION,
            seed: int = 0,
            serving: Literal["registered", "uniform", "plain"] = "registered",
            verify: Literal["on", "off"] = "on",
            preserve: PreserveLike | Iterable[PreserveLike] = (),
            schedule: Schedule | Mapping[str, Any] | None = None,
        ) -> None: ...

    @model_validator(mode="after")
    def _foresee_widths(self) -> Self:
        if self.budget and self.budget.foresee and any(isinstance(r, Layers) for r in self.rules):
            raise problem(
                "budget.foresee changes the prices of widths, and a rule about layers shares them.",
                fix="leave foresee out, or cut layers by a policy of their own.",
                key="budget",
            )
        return self

    @model_validator(mode="after")
    def _remove_something(self) -> Self:
        limits = self.budget.limits if self.budget else {}
        if all(rule.keep and rule.keep.everything for rule in self.rules):
            raise problem(
                "nothing would be pruned: every rule keeps 100 %.",
                fix="lower the `keep` of a rule, or drop it and leave the choice to a budget.",
                key="rules",
            )
        asked = any(rule.asks for rule in self.rules)
        if not asked and all(amount.everything for amount in limits.values()):
            raise problem(
                f"nothing would be pruned: no rule has a `{self._amount}` and no budget asks for "
                "less.",
                fix=self._ask,
                key="budget",
            )
        if "layers" in limits and not any(isinstance(rule, Layers) for rule in self.rules):
            raise problem(
                "the budget limits layers, and no rule may remove any.",
                fix="add a rule such as Layers(), or limit `macs` or `params`.",
                key="budget",
            )
        return self

    @property
    def _amount(self) -> str:
        """Name the field in which these rules say how much goes."""
        depth = all(isinstance(rule, (Layers, Linearize)) for rule in self.rules)
        return "drop" if depth else "keep"

    @property
    def _ask(self) -> str:
        """Say how these rules could be made to remove something."""
        if all(isinstance(rule, Linearize) for rule in self.rules):
            return "give a rule a `drop`, such as drop=2: a budget chooses no activations."
        budget = "layers='75%'" if self._amount == "drop" else "macs='50%'"
        return f"give a rule a `{self._amount}`, or the policy a budget such as Budget({budget})."

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
