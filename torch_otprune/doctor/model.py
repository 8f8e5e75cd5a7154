"""The diagnosis: what can become of every parameter, block and activation; frozen, JSON."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from torch_otprune.doctor import text, tree
from torch_otprune.fold.segments import Segment
from torch_otprune.plan.model import Cost
from torch_otprune.structure.doctor import FATES, Ailment, Fate, Finding, Ward

__all__ = ["Activation", "Diagnosis", "Removable"]

_MEANING: dict[Fate, str] = {
    "prunable": "lose elements when a unit of their group goes",
    "protected": "could be cut, but the policy does not let them",
    "blocked": "could be cut if the model were changed",
    "fixed": "belong to no channel that may go",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Removable(_Frozen):
    """A block that can be taken out whole, and what the model costs without it."""

    block: str = Field(description="path of the module that goes")
    kind: Literal["block", "branch"] = Field(
        description="`block`: from its input to its output; `branch`: what is added to a stream"
    )
    level: Literal["layer", "part"] = Field(
        description="`layer`: what `auto` offers; `part`: inside of one or around several, which a "
        "rule must name"
    )
    chain: str = Field(description="first of the blocks that follow one another directly")
    place: int = Field(ge=0, description="position in the chain")
    channels: int = Field(gt=0, description="of the stream")
    modules: tuple[str, ...] = Field(min_length=1, description="modules that make way")
    instead: str = Field(description="what stands in its place, unless a replacement is fitted")
    params: Cost = Field(description="parameters of the model with the block and without it")
    macs: Cost = Field(description="multiply-accumulates per sample, likewise")


class Activation(_Frozen):
    """One call of an activation, and whether it could be made linear."""

    name: str = Field(description="path, or `path:function` where that module's forward calls it")
    function: str = Field(description="such as `relu`")
    functional: bool = Field(description="whether it is a function and no module")
    channels: int = Field(ge=0, description="of its input; 0 where it mixes values")
    between: tuple[str, ...] = Field(
        description="the linear layer that feeds it and those that read it, if nothing else does"
    )
    reason: str = Field(default="", description="why it stays; empty where it can be linearised")
    fix: str = Field(default="", description="the smallest change that would free it")


class Diagnosis(_Frozen):
    """What can go from a model, in width and in depth, and what keeps the rest.

    Every parameter is prunable, protected by the policy, blocked or fixed, as far as channels go;
    together they are 100 %. With a policy that removes blocks, what is inside of these is prunable.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_otprune.doctor import doctor
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = doctor(model, torch.zeros(1, 4))
        >>> found.elements("prunable"), found.elements("blocked"), found.elements("fixed")
        (64, 0, 3)
        >>> [(s.layers, s.activations, s.certificate.macs.after) for s in found.segments]
        [(('0', '2'), ('1',), 12)]
    """

    version: Literal[1] = 1
    model: str = Field(description="class of the model")
    rules: tuple[str, ...] = Field(
        default=(), description="kinds of the policy's rules; empty where none was given"
    )
    notes: tuple[str, ...] = Field(default=(), description="what to know when reading this")
    params: int = Field(description="elements of all parameters, tied ones once")
    macs: int = Field(description="multiply-accumulates per sample of the example")
    findings: tuple[Finding, ...]
    groups: tuple[Ward, ...]
    ailments: tuple[Ailment, ...]
    blocks: tuple[Removable, ...] = Field(default=(), description="what can be taken out whole")
    stuck: tuple[Ailment, ...] = Field(
        default=(), description="what looks like a block and cannot go"
    )
    activations: tuple[Activation, ...] = ()
    segments: tuple[Segment, ...] = Field(
        default=(),
        description="longest rows of layers that fold now (without activations), or would once "
        "their activations are linear",
    )

    def elements(self, fate: Fate) -> int:
        """Count the parameters of one fate.

        Args:
            fate: `prunable`, `protected`, `blocked` or `fixed`.

        Returns:
            elements.
        """
        return sum(finding.elements for finding in self.findings if finding.fate == fate)

    def share(self, fate: Fate) -> float:
        """Measure the parameters of one fate against all.

        Args:
            fate: `prunable`, `protected`, `blocked` or `fixed`.

        Returns:
            a fraction; those of all fates sum to 1.
        """
        return self.elements(fate) / self.params

    def totals(self) -> list[tuple[str, str, str, str]]:
        """Sum up, one row per fate.

        Returns:
            rows of fate, elements, share, meaning.
        """
        fates = [f for f in FATES if self.rules or f != "protected"]
        return [(f, f"{self.elements(f):,}", f"{self.share(f):.1%}", _MEANING[f]) for f in fates]

    def stays(self) -> list[tuple[str, str, str, str]]:
        """List the parameters of which no channel can go.

        Returns:
            rows of parameter, fate, reason, fix.
        """
        stuck = (f for f in self.findings if f.fate != "prunable")
        return [(f.parameter, f.fate, f.reason, f.fix) for f in stuck]

    def to_json(self) -> str:
        """Write everything, the totals included.

        Returns:
            indented JSON.
        """
        totals: dict[str, Any] = {fate: self.elements(fate) for fate in FATES}
        return json.dumps({**self.model_dump(mode="json"), "totals": totals}, indent=2)

    def listed(self) -> str:
        """Print as `str` does, but give every entry a row of its own.

        Returns:
            several lines.
        """
        return text.diagnosis(self, every=True)

    def tree(self, *, every: bool = False) -> str:
        """Draw the modules as a tree, each with its parameters and what can become of them.

        Args:
            every: a branch for every module; otherwise neighbours that differ only in their
                numbers share one.

        Returns:
            several lines.
        """
        return tree.draw(self, every=every)

    def __str__(self) -> str:
        """Print the totals, the groups, what can go in depth, and what stays with its reason.

        What differs in the numbers of its modules alone shares a row.

        Returns:
            several lines.
        """
        return text.diagnosis(self)
