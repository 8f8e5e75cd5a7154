"""The rules about width: channels, heads, and the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from torch_otprune.policy.amount import AmountLike
from torch_otprune.policy.base import problem
from torch_otprune.policy.registry import RULES
from torch_otprune.policy.rules import Count, Counted, Criterion, Repairs, Rule, SettingLike

__all__ = ["Channels", "Experts", "Heads", "Hidden", "Units"]


_OF_CHANNELS = ("taylor", "bn_scale", "cpot", "dtp")
_OF_READERS = {
    "least_squares": "refits what reads the units, and an expert has no reader of its own",
    "bias": "shifts what reads the units, and an expert has no reader of its own",
    "sparse_map": "maps what the readers write, and an expert has no reader of its own",
    "domain_map": "maps what the readers write, and an expert has no reader of its own",
    "flow": "maps what the readers write, and an expert has no reader of its own",
    "coupling": "fuses units into their mean, and experts are whole networks, which have none",
}


Unit = Literal["channels", "heads", "hidden", "experts"]


class Units(Rule):
    """What rules about width have in common: units of one kind, ranked, removed and repaired.

    Attributes:
        unit: what the analysis calls the groups that the rule is about.
    """

    unit: ClassVar[Unit]
    criterion: Criterion = Field(
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


@RULES.register
class Channels(Units):
    """Remove channels: of convolutions and linear layers, with all that is tied to them.

    Example:
        >>> from torch_otprune.policy import Channels
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> rule = Channels(targets="layer*", keep="50%", multiple_of=8)
        >>> rule.widths(64)
        (32,)
    """

    unit: ClassVar[Unit] = "channels"
    kind: Literal["channels"] = "channels"

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


@RULES.register
class Heads(Units):
    """Remove heads of attentions: whole heads, and where queries share keys, whole groups of them.

    Example:
        >>> from torch_otprune.policy import Heads
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> Heads(keep="50%").widths(12)
        (6,)
    """

    unit: ClassVar[Unit] = "heads"
    kind: Literal["heads"] = "heads"
    keep: Counted | None = Field(
        default=None,
        description="what each target keeps: a whole number of heads, 1 included, or a share of "
        "them; null leaves it to the budget",
    )

    if TYPE_CHECKING:  # what may be written is wider than what is stored

        def __init__(
            self,
            *,
            kind: Literal["heads"] = "heads",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            criterion: SettingLike = "transport",
            repair: SettingLike | Iterable[SettingLike] = ("least_squares",),
            min_keep: int = 1,
            multiple_of: int = 1,
        ) -> None: ...


@RULES.register
class Hidden(Units):
    """Narrow a residual stream that norms take as one: embeddings, norms and every layer on it.

    A norm over fewer channels has another mean, so the smaller network is one whose norms see
    only what is kept; the repair takes up what that changes.

    Example:
        >>> from torch_otprune.policy import Hidden
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> Hidden(keep=0.75, multiple_of=8).widths(64)
        (48,)
    """

    unit: ClassVar[Unit] = "hidden"
    kind: Literal["hidden"] = "hidden"

    @model_validator(mode="after")
    def _masked(self) -> Self:
        if self.criterion.kind == "dtp":
            raise problem(
                "criterion 'dtp' masks what is behind a norm, and a norm takes this stream whole.",
                fix="use dtp on Channels, Heads or Layers, and another criterion here.",
                key="criterion",
            )
        return self

    if TYPE_CHECKING:  # what may be written is wider than what is stored

        def __init__(
            self,
            *,
            kind: Literal["hidden"] = "hidden",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            criterion: SettingLike = "transport",
            repair: SettingLike | Iterable[SettingLike] = ("least_squares",),
            min_keep: int = 1,
            multiple_of: int = 1,
        ) -> None: ...


@RULES.register
class Experts(Units):
    """Remove whole experts of mixtures, with their rows of the router.

    A removed expert is one that the router never chooses: its logit is minus infinity. At least
    as many stay as the router chooses for one token. What an expert costs is what its mixture's
    output would change by without it, the tokens that it had given to others.

    Limits: costs are measured one expert at a time. Criteria `taylor`, `bn_scale` and `cpot` look
    at what single channels have, and cannot rank experts. An expert has no consumer of its own to
    refit, and no mean with others: `repair` is `none` by default, and may be `norm` or
    `reconstruct`.

    Example:
        >>> from torch_otprune.policy import Experts
        >>> import torch_otprune.criteria, torch_otprune.repair
        >>> Experts(keep="75%").widths(8)
        (6,)
    """

    unit: ClassVar[Unit] = "experts"
    kind: Literal["experts"] = "experts"
    keep: Counted | None = Field(
        default=None,
        description="what each target keeps: a whole number of experts, 1 included, or a share of "
        "them; null leaves it to the budget",
    )
    repair: Repairs = Field(
        default=("none",),
        validate_default=True,
        description="what mends the layers behind, in this order: names, or tables with `kind`",
    )

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        kind = self.criterion.kind
        if kind in _OF_CHANNELS:
            raise problem(
                f"criterion {kind!r} ranks channels, not experts.",
                fix="choose transport, obs, activation, fpgm, magnitude or random.",
                key="criterion",
            )
        for repair in self.repair:
            if repair.kind in _OF_READERS:
                raise problem(
                    f"repair {repair.kind!r} {_OF_READERS[repair.kind]}.",
                    fix="leave repair out, or choose reconstruct.",
                    key="repair",
                )
        return self

    if TYPE_CHECKING:  # what may be written is wider than what is stored

        def __init__(
            self,
            *,
            kind: Literal["experts"] = "experts",
            targets: str | Iterable[str] = ("auto",),
            ignore: str | Iterable[str] = (),
            keep: AmountLike | None = None,
            criterion: SettingLike = "transport",
            repair: SettingLike | Iterable[SettingLike] = ("none",),
            min_keep: int = 1,
            multiple_of: int = 1,
        ) -> None: ...
