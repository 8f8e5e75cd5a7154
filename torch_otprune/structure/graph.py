"""What was found in a model: units that live or die together, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["Blocked", "CostModel", "Dim", "Graph", "Group", "Member", "Side", "Tail", "Term"]

Side = Literal["out", "in", "through"]


@dataclass(frozen=True)
class Member:
    """One module's share in a group.

    Args:
        path: module path, or `module.parameter` for a bare parameter.
        side: `out` for a producer (its output channels), `in` for a consumer (its
            input channels), `through` for a layer that carries channels one to one.
        index: int64, units x width; the channels of each unit along that side.
        size: how many channels that side has in all.
    """

    path: str
    side: Side
    index: Tensor
    size: int


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each from all members at once.

    Args:
        name: path of the first producer in order of execution.
        units: how many there are.
        members: who is cut when a unit goes.
    """

    name: str
    units: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """List the members whose output channels go."""
        return tuple(m for m in self.members if m.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """List the members whose input channels go, in order of execution."""
        return tuple(m for m in self.members if m.side == "in")


@dataclass(frozen=True)
class Blocked:
    """Channels that cannot be removed, and why.

    Args:
        name: path of the first producer.
        modules: every module whose channels are tied to it.
        reason: the op or layer in the way, in one sentence.
        fix: the smallest change that would free it.
    """

    name: str
    modules: tuple[str, ...]
    reason: str
    fix: str


@dataclass(frozen=True)
class Tail:
    """What happens to a linear layer's output before anything else uses it.

    Args:
        modules: batch-norms, dropouts and identities it passes, in order.
        added: whether it is then added to a stream.
    """

    modules: tuple[str, ...] = ()
    added: bool = False


@dataclass(frozen=True)
class Dim:
    """One axis of a tensor: `fixed` channels that stay plus `width` for each kept unit."""

    fixed: int
    by_group: tuple[tuple[str, int], ...] = ()

    def at(self, keep: Mapping[str, int]) -> int:
        """Evaluate the axis at kept unit counts."""
        return self.fixed + sum(width * keep[name] for name, width in self.by_group)


@dataclass(frozen=True)
class Term:
    """A product of axes: the size of one tensor or the MACs of one layer."""

    owner: str
    scale: int
    dims: tuple[Dim, ...]

    def at(self, keep: Mapping[str, int]) -> int:
        """Evaluate the product at kept unit counts."""
        total = self.scale
        for dim in self.dims:
            total *= dim.at(keep)
        return total


@dataclass(frozen=True)
class CostModel:
    """A cost as an exact function of how many units each group keeps.

    A layer between two pruned groups costs the product of both widths, so the whole is a
    multilinear polynomial with integer coefficients, evaluated without rounding.

    Args:
        measure: `params` or `macs`.
        terms: what is summed.
    """

    measure: str
    terms: tuple[Term, ...]

    def at(self, keep: Mapping[str, int]) -> int:
        """Sum the terms at kept unit counts.

        Args:
            keep: kept units of every group.

        Returns:
            the cost in units of `measure`.
        """
        return sum(term.at(keep) for term in self.terms)


@dataclass(frozen=True)
class Graph:
    """The analysis of one model.

    Args:
        groups: what can be cut, in order of execution.
        blocked: what cannot, with reasons.
        tails: linear layer to what its output passes next.
        order: linear layers in order of execution.
        repeated: layers that run more than once per forward pass.
        costs: one cost model per measure.
    """

    groups: tuple[Group, ...]
    blocked: tuple[Blocked, ...]
    tails: Mapping[str, Tail]
    order: tuple[str, ...]
    repeated: frozenset[str] = frozenset()
    costs: Mapping[str, CostModel] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """Look a group up by its name."""
        return next(group for group in self.groups if group.name == name)

    def full(self) -> dict[str, int]:
        """Count all units of every group: the dense widths."""
        return {group.name: group.units for group in self.groups}
