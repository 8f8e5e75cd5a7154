"""The plan: every decision, frozen, readable, and without a tensor in it."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from torch_otprune.errors import PlanError
from torch_otprune.policy import Policy
from torch_otprune.structure.graph import Swap

__all__ = [
    "Cost",
    "Cut",
    "Drop",
    "Folding",
    "Line",
    "Plan",
    "Refusal",
    "Slice",
    "Thinning",
    "Trial",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Frozen):
    """What one module keeps along one side."""

    path: str = Field(description="module path, or `module.parameter` for a bare parameter")
    side: Literal["out", "in", "through", "expert"] = Field(description="which side is cut")
    size: int = Field(gt=0, description="channels along that side before the cut")
    keep: tuple[int, ...] = Field(min_length=1, description="sorted channel indices that stay")


class Cut(_Frozen):
    """One group's decision: which units stay, why, and what that is predicted to cost."""

    group: str = Field(description="path of the group's first producer")
    rule: int = Field(ge=0, description="index of the rule in the policy that decided it")
    units: int = Field(gt=0, description="units before the cut")
    keep: tuple[int, ...] = Field(min_length=1, description="sorted unit indices that stay")
    criterion: str = Field(description="what ranked the units")
    reason: str = Field(description="one sentence")
    error: float | None = Field(
        ge=0,
        description="predicted change of the network's output, as a share of its RMS; null where "
        "no data was seen by what reads these units",
    )
    slices: tuple[Slice, ...] = Field(description="the same cut, module by module")


class Drop(_Frozen):
    """One removed block: what stands in for it, why it goes, and what that is predicted to cost."""

    block: str = Field(description="path of the removed module")
    rule: int = Field(ge=0, description="index of the rule in the policy that decided it")
    criterion: str = Field(description="what ranked the blocks")
    replace: str = Field(description="the replacement")
    reason: str = Field(description="one sentence")
    error: float = Field(ge=0, description="predicted change, in the unit that `reason` names")
    swaps: tuple[Swap, ...] = Field(min_length=1, description="the same, module by module")
    silent: bool = Field(
        default=False, description="whether training ended without it, so that nothing is missed"
    )


class Refusal(_Frozen):
    """Channels or blocks that cannot go, and why."""

    group: str
    reason: str
    fix: str


class Cost(_Frozen):
    """A cost before and after."""

    before: int = Field(ge=0)
    after: int = Field(ge=0)

    @property
    def ratio(self) -> float:
        """Divide after by before: the fraction kept."""
        return self.after / self.before if self.before else 1.0


class Line(_Frozen):
    """One activation that makes way for a line per channel, and why."""

    site: str = Field(description="path of the activation")
    rule: int = Field(ge=0, description="index of the rule in the policy that decided it")
    criterion: str = Field(description="what ranked the activations")
    surrogate: Literal["affine", "identity", "on_off"] = Field(description="which line")
    into: str | None = Field(description="path of the layer in front, which takes it up")
    reason: str = Field(description="one sentence")
    error: float = Field(ge=0, description="predicted damage, in the unit of the criterion")
    params: int = Field(description="parameters that the layer in front gains")


class Folding(_Frozen):
    """Layers that one layer stands for once the lines between them are taken up."""

    layers: tuple[str, ...] = Field(min_length=2, description="paths, in order of execution")
    into: str = Field(description="the path among them where the one layer sits")
    idle: tuple[str, ...] = Field(description="paths of dropouts between them, which go as well")
    lines: tuple[str, ...] = Field(description="the activations that are gone from inside")
    writes: str = Field(description="whose output in the dense model the one layer is to write")
    kind: Literal["exact", "interior"] = Field(description="`interior`: but for a border")
    border: tuple[int, ...] = Field(
        default=(), description="output positions along each edge that may differ, per axis"
    )
    error: float | None = Field(
        default=None,
        ge=0,
        description="of an `interior` fold: measured change, as a share of the largest output",
    )
    reason: str = Field(description="one sentence")
    params: Cost
    macs: Cost


class Trial(_Frozen):
    """How the cuts were tried on the real model before the plan was handed out."""

    parts: int = Field(gt=0, description="groups of one part were tried together")
    bytes: int = Field(
        ge=0, description="memory of the largest part beside the model, activations aside"
    )

    def __str__(self) -> str:
        """Quote the memory."""
        size = f"{self.bytes / _MIB:,.1f} MiB" if self.bytes >= _MIB else f"{self.bytes:,} bytes"
        if self.parts == 1:
            return f"tried on the model: {size} beside it"
        return (
            f"tried on the model in {self.parts} parts, as Calibration.memory asks: {size} beside "
            "it; groups of different parts were not tried together"
        )


_MIB = 2**20


class Thinning(_Frozen):
    """One layer in which single weights become zero; which ones is decided on the data."""

    layer: str = Field(description="path of the layer")
    rule: int = Field(ge=0, description="index of the rule in the policy that decided it")
    criterion: str = Field(description="what chooses the weights")
    pattern: str = Field(description="`unstructured`, or n:m along the input axis")
    weights: int = Field(gt=0, description="weights of the layer, behind all cuts")
    keep: int | None = Field(
        ge=0, description="weights that stay at most; null where the criterion has a radius"
    )
    reason: str = Field(description="one sentence")


class Plan(_Frozen):
    """All decisions for one model; JSON in and out loses nothing.

    Example:
        >>> Cost(before=200, after=100).ratio
        0.5
    """

    version: Literal[1] = 1
    policy: Policy
    fingerprint: str = Field(description="hash of the dense model's tensor names, shapes and types")
    calibration: str = Field(description="hash of the statistics that decided, or `none`")
    samples: int = Field(ge=0, description="calibration samples seen")
    cuts: tuple[Cut, ...]
    drops: tuple[Drop, ...] = ()
    lines: tuple[Line, ...] = ()
    thinned: tuple[Thinning, ...] = Field(
        default=(), description="layers in which single weights become zero"
    )
    foldings: tuple[Folding, ...] = ()
    refused: tuple[Refusal, ...] = ()
    params: Cost
    macs: Cost
    layers: Cost = Field(default=Cost(before=0, after=0), description="of the blocks on offer")
    compacted: tuple[str, ...] = Field(
        default=(), description="list entries that are taken out, so that the later ones move up"
    )
    notes: tuple[str, ...] = Field(default=(), description="what the allocation wants you to know")
    trial: Trial | None = Field(
        default=None, description="how the plan was tried on the model; null with verify='off'"
    )
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hash the canonical JSON: equal plans have equal hashes on every machine.

        Returns:
            64 hexadecimal digits.
        """
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Write canonical JSON: sorted keys, no spaces to disagree about.

        Returns:
            one line.
        """
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            the same plan.

        Raises:
            PlanError: if the text is no plan.
        """
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            said = [line.partition(" [type=")[0].strip() for line in str(error).splitlines()]
            raise PlanError(
                f"this is no plan: {': '.join(said[1:3]) or said[0]}.",
                where="Plan.from_json",
                fix="pass the text that Plan.to_json wrote, with the same library version.",
            ) from error

    def keep(self) -> dict[str, int]:
        """Count the kept units of every cut group; a removed block keeps none."""
        kept = {cut.group: len(cut.keep) for cut in self.cuts}
        return kept | {drop.block: 0 for drop in self.drops}

    def __str__(self) -> str:
        """Print every cut, its reason and its price, then the totals."""
        return _table(self)


def _table(plan: Plan) -> str:
    rows = [("group", "units", "keep", "error", "reason")]
    rows += [
        (c.group, str(c.units), str(len(c.keep)), _share(c.error), c.reason) for c in plan.cuts
    ]
    rows += [(d.block, "block", "0", f"{d.error:.3g}", d.reason) for d in plan.drops]
    rows += [(x.site, "bend", "0", f"{x.error:.3g}", x.reason) for x in plan.lines]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    costs = [("params", plan.params), ("macs", plan.macs), ("layers", plan.layers)]
    for name, cost in costs if plan.layers.before else costs[:2]:
        lines.append(f"{name}: {cost.before:,} -> {cost.after:,} ({cost.ratio:.1%} kept)")
    lines += [_folded(folding) for folding in plan.foldings]
    lines += [f"weights {t.layer}: {t.reason}" for t in plan.thinned]
    lines += [str(plan.trial)] if plan.trial else []
    lines += [f"refused {r.group}: {r.reason}" for r in plan.refused]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _share(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2%}"


def _folded(folding: Folding) -> str:
    macs, params = (f"{c.before:,} -> {c.after:,}" for c in (folding.macs, folding.params))
    far = "" if folding.error is None else f", moves by {folding.error:.1e} at most"
    said = f"{folding.kind}{far}: {folding.reason}"
    return f"fold {' + '.join(folding.layers)}: macs {macs}, params {params} ({said})"
