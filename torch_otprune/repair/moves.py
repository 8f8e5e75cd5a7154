"""A group's units carried over to another number of units, tensor by tensor.

Producers write means of the old units, consumers read every old unit as a mean of the new ones.
Which entries of which tensor that concerns is what a group's members say: their index lists the
channels of each unit along an axis, so that flattened, grouped and concatenated channels need no
case of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.repair.folded import folds
from torch_otprune.structure.graph import Graph, Member
from torch_otprune.structure.layers import axes, axis_of, bare, tensor
from torch_otprune.surgery.cut import put_

__all__ = ["Carrier", "Move", "owned"]

Owned = tuple[str, str, int]
"""Path of a module, name of its tensor, axis."""


@dataclass(frozen=True)
class Move:
    """What becomes of one group.

    Args:
        group: its name.
        old: its members in the old model.
        new: the same members in the new one, in the same order.
        out: what each new unit is made of; its columns are the new units.
        into: what each old unit is read as; its columns are the new units.
        readers: consumer to what it reads instead of `into`.
        plain: whether units only stay or go.
    """

    group: str
    old: tuple[Member, ...]
    new: tuple[Member, ...]
    out: Float[Tensor, "old new"]
    into: Float[Tensor, "old new"]
    readers: Mapping[str, Tensor] = field(default_factory=dict)
    plain: bool = False

    def along(self, member: Member) -> Float[Tensor, "old new"]:
        """Say what happens along one member's axis."""
        if member.side == "in":
            return self.readers.get(member.path, self.into)
        if member.side == "out":
            return self.out
        # what a layer does to one channel is no signal: it is averaged, however signals are summed
        return self.out / self.out.sum(0).clamp_min(1e-300)


class Carrier:
    """Writes the tensors of a new model from those of an old one, group by group.

    Args:
        old: where values come from; never written.
        new: what is written: the same modules, some of their axes of another length.
        graph: the old model's analysis.
        moves: what becomes of the groups whose number of units changes.
        ties: modules that share tensors.
    """

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        graph: Graph,
        moves: Iterable[Move],
        *,
        ties: frozenset[str],
    ) -> None:
        self.old, self.new = old, new
        self.moves = {move.group: move for move in moves}
        self.shifts: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        self.at: dict[tuple[str, str], dict[int, list[tuple[str, int]]]] = defaultdict(dict)
        self.produced: set[Owned] = set()
        modules = frozenset(name for name, _ in old.named_modules())
        for move in self.moves.values():
            for number, member in enumerate(move.old):
                for path, name, axis in owned(old, member, modules):
                    self.at[path, name].setdefault(axis, []).append((move.group, number))
                    self.produced |= {(path, name, axis)} if member.side == "out" else set()
        self.folds = folds(old, graph, [m for v in self.moves.values() for m in v.old], ties)
        self.behind = {fold.producer: fold for fold in self.folds.values()}

    def touched(self, group: str) -> list[tuple[str, str]]:
        """List the tensors that a group's units run along, by module and name."""
        return [
            key
            for key, lengths in self.at.items()
            if any(group == name for found in lengths.values() for name, _ in found)
        ]

    def write_(self, move: Move) -> None:
        """Write every tensor that a group's units run along, as a move says."""
        keys = self._concerned(move.group)
        self.moves[move.group] = move
        for path, name in dict.fromkeys([*keys, *self._concerned(move.group)]):
            put_(self.new.get_submodule(path), name, self.value(path, name))

    def back_(self, move: Move) -> None:
        """Write a group as another move says, and take back what it added to biases."""
        keys = self._concerned(move.group)
        self.moves[move.group] = move
        for by in self.shifts.values():
            by.pop(move.group, None)
        for path, name in keys:
            put_(self.new.get_submodule(path), name, self.value(path, name))

    def _concerned(self, group: str) -> list[tuple[str, str]]:
        """List the tensors that a group is written in, moved biases included."""
        shifted = [key for key, by in self.shifts.items() if group in by]
        return list(dict.fromkeys([*self.touched(group), *shifted]))

    def value(self, path: str, name: str) -> Tensor:
        """Compute one tensor of the new model, in float64."""
        fold = self.folds.get(path)
        if fold is not None and self._mixes(fold.producer):
            along = self.along(fold.producer, *fold.axis)
            base = {leaf: self._base(path, leaf).cpu() for leaf in fold.leaves(self.old)}
            return fold.values(along.to(fold.gain), base)[name]
        found = self._base(path, name)
        for axis in sorted(self.at.get((path, name), {})):
            along = self._weighed(path, name, axis)
            found = torch.tensordot(along.to(found), found, dims=([1], [axis])).movedim(0, axis)
        return found

    def _weighed(self, path: str, name: str, axis: int) -> Tensor:
        """Map one axis; what a batch-norm behind multiplies by is folded into the mean."""
        along, fold = self.along(path, name, axis), self.behind.get(path)
        if fold is None or (path, name, axis) not in self.produced or not self._mixes(path):
            return along
        return fold.weighed(along)

    def _mixes(self, path: str) -> bool:
        """Tell whether a producer's units are mixed, and not only chosen from."""
        moves = self.moves.values()
        return any(
            m.path == path and m.side == "out" and not move.plain
            for move in moves
            for m in move.old
        )

    def _base(self, path: str, name: str) -> Tensor:
        found = tensor(self.old.get_submodule(path), name).double()
        for by in self.shifts.get((path, name), {}).values():
            found = found + by.to(found)
        return found

    def along(self, path: str, name: str, axis: int) -> Float[Tensor, "new old"]:
        """Map one axis of one tensor: blocks for units, ones for what belongs to none."""
        sizes = [tensor(m.get_submodule(path), name).shape[axis] for m in (self.new, self.old)]
        found = torch.zeros(*sizes, dtype=torch.float64, device="cpu")
        free = [torch.ones(size, dtype=torch.bool, device="cpu") for size in sizes]
        for group, number in self.at[path, name][axis]:
            move = self.moves[group]
            old, new = move.old[number], move.new[number]
            block = move.along(old).T
            # a grouped convolution numbers its inputs group by group along a shorter axis
            there, here = new.index % sizes[0], old.index % sizes[1]
            for to, of in zip(there.T, here.T, strict=True):
                found[to[:, None], of] = block
            free[0][there.flatten()] = free[1][here.flatten()] = False
        left = [mask.nonzero().flatten() for mask in free]
        _check_left(path, name, left)
        found[left[0], left[1]] = 1.0
        return found


def _check_left(path: str, name: str, left: Sequence[Tensor]) -> None:
    if len(left[0]) != len(left[1]):
        raise StructureError(
            f"{len(left[1])} channels that belong to no group would become {len(left[0])}.",
            where=f"'{path}.{name}'",
            fix="use two models that differ in the widths of their groups alone.",
        )


def owned(model: nn.Module, member: Member, modules: Container[str]) -> list[Owned]:
    """List the tensors that a member's channels run along.

    Args:
        model: what it is a member in.
        member: a module's share, or a bare parameter's.
        modules: paths of all modules.

    Returns:
        module path, name and axis of each.
    """
    if member.path in modules:
        return [(member.path, *at) for at in axes(model.get_submodule(member.path), member.side)]
    path, _, name = bare(member.path)[0].rpartition(".")
    return [(path, name, axis_of(member.path, getattr(model.get_submodule(path), name).shape))]
