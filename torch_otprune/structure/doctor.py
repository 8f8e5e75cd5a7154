"""What becomes of every parameter when channels go, and what keeps the others from going."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.structure.graph import Blocked, Graph, Group, Member
from torch_otprune.structure.layers import axes

__all__ = ["FATES", "Ailment", "Fate", "Finding", "Ward", "ailments", "findings", "wards"]

Fate = Literal["prunable", "blocked", "fixed"]
FATES: tuple[Fate, ...] = ("prunable", "blocked", "fixed")

# Channels that are the task's own: nothing is in the way of cutting them but the answer itself.
_OUTPUT = {"they reach the model's output", "no layer consumes them before the model's output"}
_LEAVE = "nothing: these channels are the model's answer."


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Frozen):
    """What can become of one parameter, and why."""

    parameter: str = Field(description="name as in `named_parameters`")
    shape: tuple[int, ...]
    fate: Fate
    groups: tuple[str, ...] = Field(default=(), description="groups that cut one of its axes")
    blocks: tuple[str, ...] = Field(default=(), description="removable blocks that it goes with")
    reason: str = Field(default="", description="why it stays; empty where it may go")
    fix: str = Field(default="", description="the smallest change that would free it")

    @property
    def elements(self) -> int:
        """Count the parameter's elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


class Ward(_Frozen):
    """One group: units that can go one by one, and every module that feels it."""

    group: str = Field(description="path of the first producer")
    units: int = Field(gt=0)
    producers: tuple[str, ...] = Field(description="modules that lose output channels")
    carriers: tuple[str, ...] = Field(description="modules that carry them one to one")
    consumers: tuple[str, ...] = Field(description="modules that lose input channels")
    params_per_unit: int = Field(description="parameters that the first removed unit frees")
    macs_per_unit: int = Field(description="multiply-accumulates per sample that it frees")


class Ailment(_Frozen):
    """Channels or a block that cannot go: what is in the way, and what would free them."""

    name: str = Field(description="path of the first producer, or of the block")
    modules: tuple[str, ...] = Field(description="every module that is tied to it")
    reason: str
    fix: str


def findings(model: nn.Module, graph: Graph, ran: Container[str]) -> Iterator[Finding]:
    """Tell what becomes of every parameter.

    Args:
        model: any module; it is read, never written.
        graph: its analysis.
        ran: paths of the modules that the example reached.

    Yields:
        one finding per parameter, in the order of `named_parameters`.
    """
    cut = _cut(model, graph.groups)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        blocked = _blocked(model, name, graph.blocked)
        shape = tuple(parameter.shape)
        if name in cut:
            yield Finding(parameter=name, shape=shape, fate="prunable", groups=cut[name])
        elif blocked:
            yield _stuck(name, shape, blocked)
        else:
            reason, fix = _untouched(model.get_submodule(owner), owner, ran)
            yield Finding(parameter=name, shape=shape, fate="fixed", reason=reason, fix=fix)


def wards(graph: Graph) -> tuple[Ward, ...]:
    """Describe every group that can be cut.

    Args:
        graph: the model's analysis.

    Returns:
        groups in order of execution.
    """
    return tuple(_ward(graph, group) for group in graph.groups)


def ailments(blocked: Sequence[Blocked]) -> tuple[Ailment, ...]:
    """Describe what cannot go.

    Args:
        blocked: refusals of the analysis.

    Returns:
        one ailment each.
    """
    return tuple(
        Ailment(name=b.name, modules=b.modules, reason=b.reason, fix=_fix(b)) for b in blocked
    )


def _blocked(model: nn.Module, name: str, blocked: Sequence[Blocked]) -> list[Blocked]:
    """Find what keeps a parameter; a bias belongs to what its layer writes, not what it reads."""
    owner, _, leaf = name.rpartition(".")
    found = [b for b in blocked if {owner, name} & set(b.modules)]
    module = model.get_submodule(owner)
    if leaf not in {tensor for tensor, _ in axes(module, "in")}:
        return [b for b in found if b.name == owner] or found
    return found


def _stuck(name: str, shape: tuple[int, ...], blocked: Sequence[Blocked]) -> Finding:
    """Prefer what can be changed: a layer may stand between a blocked group and the output."""
    culprits = [b for b in blocked if not _is_output(b)] or list(blocked)
    return Finding(
        parameter=name,
        shape=shape,
        fate="fixed" if _is_output(culprits[0]) else "blocked",
        reason="; ".join(dict.fromkeys(r for b in culprits for r in b.reason.split("; "))),
        fix=" ".join(dict.fromkeys(_fix(b) for b in culprits)),
    )


def _is_output(blocked: Blocked) -> bool:
    return set(blocked.reason.split("; ")) <= _OUTPUT


def _fix(blocked: Blocked) -> str:
    return _LEAVE if _is_output(blocked) else blocked.fix


def _cut(model: nn.Module, groups: Sequence[Group]) -> Mapping[str, tuple[str, ...]]:
    """Map every parameter with an axis in a group to the groups, producers first."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for group in groups:
        for member in group.members:
            for name in _tensors(modules, member):
                names = found.setdefault(name, [])
                names += [group.name] if group.name not in names else []
    return {name: tuple(names) for name, names in found.items()}


def _tensors(modules: Mapping[str, nn.Module], member: Member) -> Iterator[str]:
    if member.path not in modules:  # a bare parameter
        yield member.path
        return
    for tensor, _ in axes(modules[member.path], member.side):
        yield f"{member.path}.{tensor}"


def _untouched(module: nn.Module, owner: str, ran: Container[str]) -> tuple[str, str]:
    kind = type(module).__name__
    if owner not in ran and not list(module.children()):
        fix = "pass an example that reaches it, or remove it from the model."
        return f"'{owner}' ({kind}) did not run on the example", fix
    return f"'{owner}' ({kind}) has no channels that a group could cut", "nothing."


def _ward(graph: Graph, group: Group) -> Ward:
    full = graph.full()
    less = full | {group.name: group.units - 1}
    freed = {name: cost.at(full) - cost.at(less) for name, cost in graph.costs.items()}
    carriers = [m for m in group.members if m.side == "through"]
    return Ward(
        group=group.name,
        units=group.units,
        producers=tuple(m.path for m in group.producers),
        carriers=tuple(m.path for m in carriers),
        consumers=tuple(m.path for m in group.consumers),
        params_per_unit=freed["params"],
        macs_per_unit=freed["macs"],
    )
