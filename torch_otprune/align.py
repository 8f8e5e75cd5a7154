"""Two networks of one architecture: whose neurons correspond, and one's weights for the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.repair.folded import Fold, folds
from torch_otprune.repair.matching import Cost, Matching
from torch_otprune.repair.moves import Carrier, Move, owned
from torch_otprune.statistics.signals import hear
from torch_otprune.structure import Graph, trace
from torch_otprune.structure.forward import head
from torch_otprune.structure.graph import Group, Member
from torch_otprune.structure.layers import shared, tensor
from torch_otprune.transport import Coupling

__all__ = ["Alignment", "align"]

_EXAMPLE = 2  # samples that the analysis runs on
_ROUNDING = 1e-12  # share of a unit that is none
_FAINT = 1e-4  # of a signal's size: what breaks ties and decides nothing else


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which of a teacher's units corresponds to which of a student's, group by group.

    Args:
        teacher: whose weights are handed over; never written.
        couplings: group to the coupling of its units in both, teacher's first.
        moves: the same as maps along the members of every group.
        graph: the teacher's analysis.
        shapes: of the student's tensors, by name.
    """

    teacher: nn.Module
    couplings: Mapping[str, Coupling]
    moves: Mapping[str, Move] = field(repr=False)
    graph: Graph = field(repr=False)
    shapes: Mapping[str, torch.Size] = field(repr=False)

    @torch.no_grad()
    def transfer_(self, student: nn.Module, *, share: float = 1.0) -> nn.Module:
        """Write the teacher's weights into the student, in the student's own coordinates.

        Tensors are written in place, so an optimiser that holds them goes on.

        Args:
            student: the network that was aligned, or one of the same widths.
            share: of the teacher; the rest stays the student's own, as in fusing two networks.

        Returns:
            the student.

        Raises:
            StructureError: if share is out of range or the student has other tensors; nothing is
                written then.
        """
        if not 0 < share <= 1:
            raise StructureError(
                f"share is {share}.", where="Alignment.transfer_", fix="pass one in (0, 1]."
            )
        _check_names(self.teacher, student)
        for name, own in _tensors(student).items():
            if own.shape != self.shapes[name]:
                raise StructureError(
                    f"the student's tensor is {tuple(own.shape)}, not {tuple(self.shapes[name])}.",
                    where=f"'{name}'",
                    fix="align the teacher with this student.",
                )
        made = dict(_carried(self, student))
        for name, own in _tensors(student).items():
            new = made[name].to(own.device)
            mixed = new if share == 1 or not own.is_floating_point() else _mean(own, new, share)
            own.copy_(mixed.to(own.dtype))
        return student


def align(
    teacher: nn.Module,
    student: nn.Module,
    example: Any,
    *,
    features: Literal["weights", "activations"] = "weights",
    cost: Cost = "l2",
    eps: float | None = None,
    solver: str = "auto",
    sweeps: int = 4,
) -> Alignment:
    """Find out whose neurons correspond in two networks of one architecture.

    The widths of groups may differ. `alignment.transfer_(student)` then starts the student from
    the teacher: each of its units is the mean of those that correspond to it, and every layer
    reads the teacher's units through the student's. Between equal widths a coupling is a
    permutation.

    Args:
        teacher: left as it was.
        student: left as it was; the same modules under the same names.
        example: a batch as both take it; units are compared on it if `features` say so.
        features: what units are compared by: the weights that write them (and, from the second
            sweep on, those that read them), their inputs expressed in the student's units; or
            their signals, with weights to tell silent units apart.
        cost: between features: Euclidean (`l2`), or `l1` or `cosine` of rows of length one.
        eps: temperature, of the mean cost; exact where that is cheap if None.
        solver: a line of the transport's dispatch table.
        sweeps: most passes over all groups with weights; it ends when no coupling moves.

    Returns:
        the alignment.

    Raises:
        PolicyError: if features or cost are none of these.
        StructureError: if the networks differ in more than the number of units of groups.

    Source: Singh & Jaggi 2020, "Model fusion via optimal transport", section 4; further sweeps
    with the reading weights as in Ainsworth et al. 2023. Shares that keep the function where
    widths differ, batch-norms in the mean, and residual streams by their group are ours.

    Limits: experts are not aligned and must be of equal width. Tensors that layers share are
    written once, as the last of their layers asks. One sample decides nothing: pass some hundred
    rows for `activations`. A wider student computes what the teacher does, unless a norm runs over
    channels of a stream and its width is no multiple, or `eps` mixes.
    """
    _check_known("features", features, ("weights", "activations"))
    _check_known("cost", cost, get_args(Cost))
    _check_names(teacher, student)
    graphs = [trace(model, head(example, _EXAMPLE)) for model in (teacher, student)]
    blank = [_move(group, _partner(graphs[1], group)) for group in _groups(graphs[0])]
    pair = _Pair(teacher, student, graphs, blank, Matching(cost, eps=eps, solver=solver))
    if features == "activations":
        pair.by_signals(example)
    else:
        pair.by_weights(sweeps)
    moves = MappingProxyType(dict(pair.carrier.moves))
    shapes = MappingProxyType({name: own.shape for name, own in _tensors(student).items()})
    return Alignment(teacher, MappingProxyType(pair.couplings), moves, graphs[0], shapes)


class _Pair:
    """The work on two networks."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        graphs: Sequence[Graph],
        blank: Sequence[Move],
        matching: Matching,
    ) -> None:
        self.models, self.graphs, self.matching = (teacher, student), graphs, matching
        ties = [shared(model) for model in self.models]
        self.carrier = Carrier(teacher, student, graphs[0], blank, ties=ties[0])
        sides = [m for move in blank for m in move.new]
        self.norms: tuple[dict[str, Fold], dict[str, Fold]] = (
            self.carrier.folds,
            folds(student, graphs[1], sides, ties[1]),
        )
        self.couplings: dict[str, Coupling] = {}
        self.names = [frozenset(dict(model.named_modules())) for model in self.models]
        self._check()

    def _check(self) -> None:
        """Refuse networks that differ along an axis that no group accounts for."""
        for name, own in _tensors(self.models[0]).items():
            path, _, leaf = name.rpartition(".")
            axes = self.carrier.at.get((path, leaf), {})
            other = tensor(self.models[1].get_submodule(path), leaf)
            if own.dim() != other.dim() or any(
                axis not in axes and size != other.shape[axis]
                for axis, size in enumerate(own.shape)
            ):
                raise StructureError(
                    f"the teacher's tensor is {tuple(own.shape)}, the student's "
                    f"{tuple(other.shape)}, and no group accounts for that.",
                    where=f"'{name}'",
                    fix="pass two networks that differ in the widths of their groups alone.",
                )
            for axis in axes:
                self.carrier.along(path, leaf, axis)

    def by_signals(self, example: Any) -> None:
        """Couple every group by what its consumers read."""
        moves = self.carrier.moves.values()
        readers = dict.fromkeys(m.path for move in moves for m in move.old if m.side == "in")
        heard = [hear(model, readers, [example]) for model in self.models]
        for group, move in list(self.carrier.moves.items()):
            pairs = [
                tuple(
                    rows[m.path].double()[:, m.index].transpose(1, 2).flatten(0, 1).T
                    for rows, m in zip(heard, both, strict=True)
                )
                for both in zip(move.old, move.new, strict=True)
                if both[0].side == "in" and all(both[0].path in rows for rows in heard)
            ]
            # what is silent on the example is told apart by its weights
            self._couple(group, pairs, beside=list(self._weights(move, first=True)))

    def by_weights(self, sweeps: int) -> None:
        """Couple group after group, until nothing moves."""
        for sweep in range(max(sweeps, 1)):
            before = {name: move.out for name, move in self.carrier.moves.items()}
            for group, move in list(self.carrier.moves.items()):
                self._couple(group, list(self._weights(move, first=sweep == 0)))
            moves = self.carrier.moves
            if sweep and all(torch.equal(before[name], moves[name].out) for name in moves):
                break

    def _couple(
        self, group: str, pairs: Sequence[Sequence[Tensor]], beside: Sequence[Sequence[Tensor]] = ()
    ) -> None:
        faint = [(x * _FAINT, y * _FAINT) for x, y in (_sized(*pair) for pair in beside)]
        sized = [*(_sized(*pair) for pair in pairs), *faint]
        x, y = (torch.cat([pair[side] for pair in sized], dim=1) for side in (0, 1))
        found = self.matching.copied(x, y)
        plan = found.plan()
        plan = plan * (plan > plan.amax(0) * _ROUNDING)  # of an exact plan
        out, into = plan / plan.sum(0), plan / plan.sum(1, keepdim=True)
        plain = bool(((out == 0) | (out == 1)).all() and ((into == 0) | (into == 1)).all())
        move = self.carrier.moves[group]
        self.carrier.moves[group] = replace(move, out=out, into=into, plain=plain)
        self.couplings[group] = found

    def _weights(self, move: Move, *, first: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Lay out what belongs to each unit in both networks, member by member."""
        for old, new in zip(move.old, move.new, strict=True):
            if first and old.side == "in":
                continue
            there = owned(self.models[0], old, self.names[0])
            for path, name, axis in there:
                fold = old.side == "through" and path in self.norms[0]
                if fold and name.startswith("running"):
                    continue  # only in what is folded
                x = self._expressed(path, name, axis)
                if x is None:
                    continue
                y = tensor(self.models[1].get_submodule(path), name).double().cpu()
                rows = [
                    _lines(t, axis, m) * self._gain(side, m, (path, name, axis))
                    for side, (t, m) in enumerate(((x, old), (y, new)))
                ]
                yield rows[0], rows[1]

    def _expressed(self, path: str, name: str, axis: int) -> Tensor | None:
        """Write one of the teacher's tensors in the student's units along all other axes."""
        found = tensor(self.models[0].get_submodule(path), name).double().cpu()
        for other, groups in self.carrier.at[path, name].items():
            if other == axis:
                continue
            if any(group not in self.couplings for group, _ in groups):
                return None
            along = self.carrier.along(path, name, other)
            found = torch.tensordot(along, found, dims=([1], [other])).movedim(0, other)
        return found

    def _gain(self, side: int, member: Member, at: tuple[str, str, int]) -> Tensor | float:
        """Say what the batch-norm behind multiplies a producer's weights by."""
        if member.side != "out":
            return 1.0
        fold = next((f for f in self.norms[side].values() if f.producer == at[0]), None)
        return 1.0 if fold is None else fold.gain[member.index].mean(1, keepdim=True)


def _lines(values: Tensor, axis: int, member: Member) -> Float[Tensor, "units features"]:
    """Lay a tensor out by unit; a grouped convolution's inputs repeat along a shorter axis."""
    return values.movedim(axis, 0)[member.index % values.shape[axis]].flatten(1)


def _sized(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a block to size one in both networks by one factor."""
    size = torch.stack([x.square().mean(), y.square().mean()]).mean().sqrt().clamp_min(1e-300)
    # many features of one layer shall not outweigh few of another
    size = size * x.shape[1] ** 0.5
    return x / size, y / size


def _groups(graph: Graph) -> list[Group]:
    return [group for group in graph.groups if group.kind != "experts"]


def _partner(graph: Graph, group: Group) -> Group:
    """Find the student's group of the same members."""
    wanted = [(m.path, m.side) for m in group.members]
    for other in graph.groups:
        if other.name == group.name and [(m.path, m.side) for m in other.members] == wanted:
            _check_widths(group, other)
            return other
    raise StructureError(
        f"group '{group.name}' of the teacher has no partner with the same members.",
        where=f"align; the student's groups: {', '.join(g.name for g in graph.groups) or 'none'}",
        fix="pass two networks that differ in the widths of their groups alone.",
    )


def _check_widths(old: Group, new: Group) -> None:
    """Refuse units, such as heads, that are wider in one network than in the other."""
    for member, other in zip(old.members, new.members, strict=True):
        wide = [m.index.shape[1] for m in (member, other)]
        if wide[0] != wide[1]:
            raise StructureError(
                f"a unit of group '{old.name}', {old.kind}, has {wide[0]} channels in the teacher "
                f"and {wide[1]} in the student.",
                where=f"align, '{member.path}', side {member.side}",
                fix="give the student more or fewer units of the teacher's width, as of a head.",
            )


def _move(old: Group, new: Group) -> Move:
    blank = torch.zeros(old.units, new.units, dtype=torch.float64, device="cpu")
    return Move(old.name, old.members, new.members, blank, blank)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_known(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PolicyError(
            f"{name} is {value!r}.", where="align", fix=f"pass one of {', '.join(known)}."
        )


def _check_names(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse networks whose tensors have other names."""
    names = [dict(_tensors(model)) for model in (teacher, student)]
    odd = [n for n in {**names[0], **names[1]} if not (n in names[0] and n in names[1])]
    if odd:
        owner = "teacher" if odd[0] in names[0] else "student"
        raise StructureError(
            f"only the {owner} has a tensor '{odd[0]}'.",
            where=f"align({type(teacher).__name__}, {type(student).__name__})",
            fix="pass two networks that differ in the widths of their groups alone.",
        )
    if any(is_parametrized(m) for model in (teacher, student) for m in model.modules()):
        raise StructureError(
            "a module computes its weight from others.",
            where=f"align({type(teacher).__name__}, {type(student).__name__})",
            fix="call torch.nn.utils.parametrize.remove_parametrizations on both first.",
        )


def _carried(alignment: Alignment, student: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Compute every tensor of the student from the teacher's."""
    teacher = alignment.teacher
    moves = alignment.moves.values()
    carrier = Carrier(teacher, student, alignment.graph, moves, ties=shared(teacher))
    for name, value in _tensors(teacher).items():
        path, _, leaf = name.rpartition(".")
        yield name, carrier.value(path, leaf) if (path, leaf) in carrier.at else value.detach()


def _mean(own: Tensor, new: Tensor, share: float) -> Tensor:
    return share * new.double() + (1 - share) * own.double()
