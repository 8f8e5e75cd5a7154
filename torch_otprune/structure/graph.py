"""What was found in a model: units that live or die together, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from torch_otprune.structure.cost import CostModel, Dim, Term

__all__ = [
    "Block",
    "Blocked",
    "CostModel",
    "Dim",
    "Graph",
    "Group",
    "Kind",
    "Member",
    "Side",
    "Site",
    "Swap",
    "Tail",
    "Term",
    "Wiring",
]

Side = Literal["out", "in", "through", "expert"]
Kind = Literal["channels", "heads", "hidden", "experts"]
Wiring = str | tuple[str | int | None, ...]
"""How a module returns its stream: `tensor`, or a tuple with `x` in its place; its other entries
are None, or the position or keyword of an input that is handed through."""


@dataclass(frozen=True)
class Member:
    """One module's share in a group.

    Args:
        path: module path, or `module.parameter` for a bare parameter, with `:axis` behind it
            where that is not the last axis with several entries.
        side: `out` for a producer (its output channels), `in` for a consumer (its
            input channels), `through` for a layer that carries channels one to one, `expert` for
            what holds one entry per expert of a mixture.
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
        kind: `channels`; `heads`, whole heads of an attention; `hidden`, channels that a norm
            takes together, as those of a residual stream; `experts` of a mixture.
        least: how many a router chooses, so that as many must stay; 0 where all take part.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    kind: Kind = "channels"
    least: int = 0

    @property
    def producers(self) -> tuple[Member, ...]:
        """List the members whose output channels go."""
        return tuple(m for m in self.members if m.side == "out")

    @property
    def owners(self) -> tuple[str, ...]:
        """List the paths that targets are held against: of a mixture, its experts."""
        side = "expert" if self.kind == "experts" else "out"
        return tuple(m.path for m in self.members if m.side == side)

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
        kind: of the units that they would be, where that is known.
    """

    name: str
    modules: tuple[str, ...]
    reason: str
    fix: str
    kind: Kind = "channels"


@dataclass(frozen=True)
class Swap:
    """A module that makes way when a block goes.

    Args:
        path: the module.
        by: what stands in for it: `skip` hands its input on, `zero` writes zeros, `scale`,
            `low_rank` and `hidden` write a cheap map of the input.
        wiring: how it returns.
        size: channels of what it writes.
        axis: where they are.
        rank: of a `low_rank` map; units of a `hidden` layer.
        like: a linear layer that writes as many channels, also once some of them are cut; empty
            where none is known.
    """

    path: str
    by: Literal["skip", "zero", "scale", "low_rank", "hidden"]
    wiring: Wiring = "tensor"
    size: int = 0
    axis: int = 1
    rank: int = 0
    like: str = ""


@dataclass(frozen=True)
class Block:
    """Layers that can be taken out whole: what they write has the shape of what they read.

    Args:
        name: the module that goes; of a branch, the module whose output is added to the stream.
        kind: `block`, a module from its input to its output; `branch`, what is added to a stream.
        level: `layer` for what `auto` offers, `part` for what is inside of one or around several.
        chain: name of the first of the blocks that follow one another directly.
        place: position in the chain, from 0.
        swaps: the modules that make way.
        channels: of the stream.
        axis: where they are.
        positions: of the stream, per sample.
        front: the linear layer whose output was added last to what the block reads; None where
            there is none.
        writer: the same of what the block writes.
        joint: of a branch, number of the addition that joins it to its stream among all
            additions of two tensors, and which operand the stream is; None for a block.
    """

    name: str
    kind: Literal["block", "branch"]
    level: Literal["layer", "part"]
    chain: str
    place: int
    swaps: tuple[Swap, ...]
    channels: int
    axis: int
    positions: int
    front: str | None = None
    writer: str | None = None
    joint: tuple[int, int] | None = None

    @property
    def like(self) -> str:
        """Name a linear layer that writes to the stream, and so has its width; empty without."""
        return self.writer or self.front or ""

    def holds(self, path: str) -> bool:
        """Tell whether a module goes with the block."""
        return any(path == s.path or path.startswith(f"{s.path}.") for s in self.swaps)


@dataclass(frozen=True)
class Site:
    """One call of an activation in a forward pass.

    Args:
        name: the module's path, or `path:relu` for a functional call in that module's forward;
            with `#2` and so on from the second call in one forward pass.
        function: `relu`, `leakyrelu`, `gelu`, ...: the class of the torch module in lower case.
        module: the innermost module that was running: the activation itself, if it is one.
        within: the module whose forward called it; of a function, the same as `module`.
        functional: whether it is a function and no module.
        ordinal: which call, from 1, of this module, or of this function by this module.
        calls: how often the module runs in one forward pass.
        channels: of its input; 0 where there are none, as in a softmax and the scores it reads.
        axis: where they are.
        norm: batch-norm whose output is the input as it is; None without one.
        producer: linear layer whose output gets here through norms and dropouts alone.
        readers: linear layers that read its output, as it is, pooled or flattened.
        others: whether anything else reads its output.
        reason: why no module in its place could make it linear; empty where one can.
        fix: what would change that.
    """

    name: str
    function: str
    module: str
    within: str
    functional: bool
    ordinal: int
    calls: int
    channels: int
    axis: int
    norm: str | None
    producer: str | None
    readers: tuple[str, ...]
    others: bool
    reason: str = ""
    fix: str = ""


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
class Graph:
    """The analysis of one model.

    Args:
        groups: what can be cut, in order of execution.
        blocked: what cannot, with reasons.
        tails: linear layer to what its output passes next.
        order: linear layers in order of execution.
        repeated: layers that run more than once per forward pass.
        costs: one cost model per measure.
        blocks: what can be taken out whole, in order of execution.
        stuck: what looks like a block and cannot go, with reasons.
        norms: linear layer to the layer-norm that alone reads the sum its output is added to.
        sites: the activations, in order of execution.
    """

    groups: tuple[Group, ...]
    blocked: tuple[Blocked, ...]
    tails: Mapping[str, Tail]
    order: tuple[str, ...]
    repeated: frozenset[str] = frozenset()
    costs: Mapping[str, CostModel] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    stuck: tuple[Blocked, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()

    def group(self, name: str) -> Group:
        """Look a group up by its name."""
        return next(group for group in self.groups if group.name == name)

    def block(self, name: str) -> Block:
        """Look a block up by its name."""
        return next(block for block in self.blocks if block.name == name)

    def widths(self, blocks: Iterable[Block]) -> dict[str, Dim]:
        """Write the channels of each block's stream as what the groups keep of them.

        Args:
            blocks: some of the blocks.

        Returns:
            block to the axis.
        """
        return {block.name: self._width(block.like, block.channels) for block in blocks}

    def _width(self, path: str, size: int) -> Dim:
        each = [
            (group, member.index.shape[1])
            for group in self.groups
            for member in group.members
            if member.path == path and member.side != "in"
        ]
        fixed = size - sum(width * group.units for group, width in each)
        return Dim(fixed, tuple((group.name, width) for group, width in each))

    @property
    def routes(self) -> bool:
        """Tell whether what runs depends on the data: a router sends tokens to some experts."""
        chosen = any(group.least for group in self.groups)
        return chosen or any(blocked.kind == "experts" for blocked in self.blocked)

    def full(self) -> dict[str, int]:
        """Count all units of every group: the dense widths."""
        return {group.name: group.units for group in self.groups}
