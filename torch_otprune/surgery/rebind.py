"""An optimiser that goes on after its model was pruned: groups and state follow the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from torch_otprune.errors import OTPruneError
from torch_otprune.surgery.lineage import Heir, Lineage

__all__ = ["Draft", "Optimizes", "Rebound", "draft"]

_PLAIN = (bool, int, float, str, type(None))


@runtime_checkable
class Optimizes(Protocol):
    """What a torch optimiser and its wrappers have in common."""

    param_groups: list[dict[str, Any]]
    state: MutableMapping[Any, Any]


class Rebound(BaseModel):
    """What `rebind_` did, by names of parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sliced: tuple[str, ...] = Field(default=(), description="state cut as the parameter was")
    reset: tuple[str, ...] = Field(default=(), description="state that starts anew, and why")
    left: tuple[str, ...] = Field(default=(), description="gone from the model and the groups")
    joined: tuple[str, ...] = Field(default=(), description="new in the model and in a group")
    copies: int = Field(default=0, ge=0, description="averaged copies that were pruned as well")

    def __str__(self) -> str:
        """Print how many, and every state that was lost."""
        counts = f"{len(self.sliced)} sliced, {len(self.left)} left, {len(self.joined)} joined"
        return "\n".join([f"optimiser: {counts}, {len(self.reset)} start anew", *self.reset])


@dataclass
class Draft:
    """What will become of one optimiser; nothing is written before `write_`.

    Args:
        optimizer: whose.
        members: the parameters of every group.
        names: of them, where the user named them.
        state: of every parameter that is ours; None where it starts anew.
        said: what to report, by field of `Rebound`.
    """

    optimizer: Optimizes
    members: list[list[nn.Parameter]]
    names: list[list[str] | None]
    state: dict[nn.Parameter, dict[str, Any] | None] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)

    def write_(self) -> None:
        """Change the groups in place: schedulers and scalers hold on to the same objects."""
        for group, members, names in zip(
            self.optimizer.param_groups, self.members, self.names, strict=True
        ):
            group["params"][:] = members
            if names is not None:
                group["param_names"][:] = names
        for parameter, state in self.state.items():
            self.optimizer.state.pop(parameter, None)
            if state is not None:
                self.optimizer.state[parameter] = state
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer._numel_cache = None

    def back(self) -> Draft:
        """Write down how the optimiser is now, to return to it later."""
        groups = self.optimizer.param_groups
        state = {p: s and dict(s) for p in self.state for s in [self.optimizer.state.get(p)]}
        names = [list(g["param_names"]) if "param_names" in g else None for g in groups]
        return Draft(self.optimizer, [list(g["params"]) for g in groups], names, state)


def draft(lineage: Lineage, optimizers: Sequence[Optimizes]) -> list[Draft]:
    """Work out what becomes of every optimiser.

    Args:
        lineage: of the pruned model.
        optimizers: those that train it.

    Returns:
        one draft per optimiser.

    Raises:
        OTPruneError: if one trains no parameter of this model.
    """
    ours = {id(p) for p in (*lineage.before.values(), *lineage.new.values())}
    for optimizer in optimizers:
        _check(optimizer, ours)
    drafts = [_followed(lineage, optimizer) for optimizer in optimizers]
    present = {id(p) for one in drafts for members in one.members for p in members}
    for name, parameter in lineage.new.items():
        if parameter.requires_grad and id(parameter) not in present:
            _join(lineage, drafts, name, parameter)
    return drafts


def _check(optimizer: object, ours: set[int]) -> None:
    fix = "pass the optimiser that was built on the parameters of the model that was pruned."
    if not isinstance(optimizer, Optimizes):
        kind = type(optimizer).__name__
        raise OTPruneError(f"a {kind} is no optimiser.", where="Report.rebind_", fix=fix)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in ours for p in members):
        raise OTPruneError(
            "this optimiser trains no parameter of the pruned model.",
            where=f"Report.rebind_, {type(optimizer).__name__} with {len(members)} parameters",
            fix=fix,
        )


def _followed(lineage: Lineage, optimizer: Optimizes) -> Draft:
    """Let what is gone leave, and cut the state of what stays."""
    groups = optimizer.param_groups
    gone = {id(p): name for name, p in lineage.gone.items()}
    keep = [[i for i, p in enumerate(g["params"]) if id(p) not in gone] for g in groups]
    members = [[g["params"][i] for i in kept] for g, kept in zip(groups, keep, strict=True)]
    made = Draft(optimizer, members, list(_named(lineage, groups, keep)))
    held = {id(p) for group in groups for p in group["params"]}
    made.said["left"] = [name for key, name in gone.items() if key in held]
    made.state = {p: None for p in lineage.gone.values() if id(p) in held}
    whole = isinstance(optimizer, torch.optim.LBFGS)  # one vector over all parameters
    for heir in (h for h in lineage.heirs if id(h.parameter) in held):
        state = optimizer.state.get(heir.parameter)
        if not state:
            continue
        new = "it spans all parameters" if whole else _cut(state, heir)
        if isinstance(new, str):
            made.said.setdefault("reset", []).append(f"{heir.name}: {new}")
            made.state[heir.parameter] = _begun(optimizer, heir.parameter)
        elif new is not state:
            made.said.setdefault("sliced", []).append(heir.name)
            made.state[heir.parameter] = new
    return made


def _named(
    lineage: Lineage, groups: Sequence[Mapping[str, Any]], keep: Sequence[Sequence[int]]
) -> Iterator[list[str] | None]:
    """Call parameters what they are called now, where the user gave them the model's names."""
    before = {id(p): name for name, p in lineage.before.items()}
    now = {id(p): name for name, p in lineage.model.named_parameters()}
    for group, kept in zip(groups, keep, strict=True):
        if "param_names" not in group:
            yield None
            continue
        pairs = [(group["param_names"][i], group["params"][i]) for i in kept]
        yield [now[id(p)] if said == before.get(id(p)) else said for said, p in pairs]


def _begun(optimizer: Optimizes, parameter: nn.Parameter) -> dict[str, Any] | None:
    """Make the state that a parameter begins with, where an optimiser does so ahead of time."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return None
    start = optimizer.defaults["initial_accumulator_value"]
    made = torch.optim.Adagrad([parameter], initial_accumulator_value=start)
    return dict(made.state[parameter])


def _join(lineage: Lineage, drafts: Sequence[Draft], name: str, parameter: nn.Parameter) -> None:
    """Put a new parameter into the group of what stood in its place; not if that did not train."""
    home = _home(lineage, drafts, name, parameter)
    if home is None:
        return
    made, index = home
    order = {id(p): i for i, p in enumerate(lineage.model.parameters())}
    members = made.members[index]
    before = [i for i, p in enumerate(members) if order.get(id(p), -1) < order[id(parameter)]]
    place = max((i for i in before if id(members[i]) in order), default=-1) + 1
    members.insert(place, parameter)
    names = made.names[index]
    if names is not None:
        now = {id(p): n for n, p in lineage.model.named_parameters()}
        names.insert(place, now[id(parameter)])
    made.state[parameter] = _begun(made.optimizer, parameter)
    made.said.setdefault("joined", []).append(name)


def _home(
    lineage: Lineage, drafts: Sequence[Draft], name: str, parameter: nn.Parameter
) -> tuple[Draft, int] | None:
    path, _, key = name.rpartition(".")
    while path and not any(n.startswith(f"{path}.") for n in lineage.before):
        path = path.rpartition(".")[0]
    near = {n: p for n, p in lineage.before.items() if not path or n.startswith(f"{path}.")}
    held = {
        id(p): (made, index)
        for made in drafts
        for index, group in enumerate(made.optimizer.param_groups)
        for p in group["params"]
    }
    shapes = {id(heir.parameter): heir.shape for heir in lineage.heirs}

    def unlike(entry: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
        dims = len(shapes.get(id(entry[1]), entry[1].shape))
        return entry[0].rpartition(".")[2] != key, dims != parameter.dim()

    found = sorted(((n, p) for n, p in near.items() if id(p) in held), key=unlike)
    return held[id(found[0][1])] if found else None


def _cut(state: dict[str, Any], heir: Heir) -> dict[str, Any] | str:
    """Cut one parameter's state; the same object where nothing changes, a reason where it fails."""
    if heir.keeps is not None and not heir.keeps:
        return state
    if heir.keeps is None:
        return "its values were computed anew"
    new = {}
    for key, value in state.items():
        axes = _axes(key, value, heir)
        if axes is None:
            return f"'{key}' has a shape of its own"
        new[key] = _sliced(value, heir, axes) if axes else value
    return state if all(new[key] is state[key] for key in state) else new


def _axes(key: str, value: object, heir: Heir) -> dict[int, Tensor] | None:
    """Tell along which axis of a state what is kept; nothing for a number, None if unknown."""
    assert heir.keeps is not None
    if isinstance(value, _PLAIN):
        return {}
    if type(value) not in (Tensor, nn.Parameter):  # quantised or sharded state
        return None
    assert isinstance(value, Tensor)
    if not value.dim() or (value.shape == heir.parameter.shape != heir.shape):
        return {}
    old, keeps = tuple(heir.shape), dict(heir.keeps)
    if value.dim() == len(old) and all(n in (1, o) for n, o in zip(value.shape, old, strict=True)):
        return {a: k for a, k in keeps.items() if value.shape[a] == old[a]}
    without = [a for a in range(len(old)) if old[:a] + old[a + 1 :] == tuple(value.shape)]
    if len(without) > 1:  # a square matrix: its factors go by the names of its sides
        side = {"row": len(old) - 1, "col": len(old) - 2}
        without = [axis for word, axis in side.items() if word in key and axis in without]
    if len(without) != 1:
        return None
    return {a - (a > without[0]): k for a, k in keeps.items() if a != without[0]}


def _sliced(value: Tensor, heir: Heir, axes: Mapping[int, Tensor]) -> Tensor:
    made = value.detach()
    for axis, keep in axes.items():
        made = made.index_select(axis, keep.to(made.device))
    if made.shape != heir.parameter.shape:
        return made.contiguous()
    # fused kernels want state to lie in memory as the parameter does
    like = torch.empty_like(heir.parameter.detach(), dtype=made.dtype, device=made.device)
    return like.copy_(made)
