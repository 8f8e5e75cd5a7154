"""What becomes of every parameter when channels go, and what keeps the others from going."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.utils import parametrize

from torch_otprune.structure.costs import computed
from torch_otprune.structure.graph import Blocked, Graph, Group, Kind, Member, Term
from torch_otprune.structure.layers import axes, bare
from torch_otprune.structure.remedies import NAMED, Obstacle, advice, obstacles

__all__ = ["FATES", "Ailment", "Fate", "Finding", "Ward", "ailments", "findings", "wards"]

Fate = Literal["prunable", "protected", "blocked", "fixed"]
FATES: tuple[Fate, ...] = ("prunable", "protected", "blocked", "fixed")

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
    obstacles: tuple[Obstacle, ...] = Field(
        default=(), description="what is in the way, with op and line"
    )

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
    kind: Kind = Field(
        default="channels",
        description="`channels`, `heads` of an attention, `hidden` (the width of a stream that a "
        "norm takes as one), `experts`",
    )
    units: int = Field(gt=0)
    least: int = Field(
        default=0, description="experts that must stay: as many as the router chooses for one token"
    )
    producers: tuple[str, ...] = Field(description="modules that lose output channels")
    carriers: tuple[str, ...] = Field(description="modules that carry them one to one")
    consumers: tuple[str, ...] = Field(description="modules that lose input channels")
    params_per_unit: int = Field(description="parameters that the first removed unit frees")
    macs_per_unit: int = Field(description="multiply-accumulates per sample that it frees")
    rule: int | None = Field(default=None, description="the policy's rule that may cut it, if any")
    protected: str = Field(default="", description="why the policy lets none of them go")
    fix: str = Field(default="", description="what to change in the policy")


class Ailment(_Frozen):
    """Channels or a block that cannot go: what is in the way, and what would free them."""

    name: str = Field(description="path of the first producer, or of the block")
    modules: tuple[str, ...] = Field(description="every module that is tied to it")
    reason: str
    fix: str
    obstacles: tuple[Obstacle, ...] = ()


def findings(model: nn.Module, graph: Graph, ran: Container[str]) -> Iterator[Finding]:
    """Tell what becomes of every parameter.

    Args:
        model: any module; it is read, never written.
        graph: its analysis.
        ran: paths of the modules that the example reached.

    Yields:
        one finding per parameter, in the order of `named_parameters`.
    """
    cut, tied = _cut(model, graph.groups), defaultdict[str, list[Blocked]](list)
    for blocked in graph.blocked:
        for path in dict.fromkeys(bare(path)[0] for path in blocked.modules):
            tied[path].append(blocked)
    for name, parameter in model.named_parameters():
        whole = computed(name)
        owner = whole.rpartition(".")[0]
        culprits = _blocked(model, whole, [*tied.get(owner, ()), *tied.get(whole, ())])
        shape = tuple(parameter.shape)
        if name in cut:
            yield Finding(parameter=name, shape=shape, fate="prunable", groups=cut[name])
        elif culprits:
            yield _stuck(name, shape, culprits)
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
    felt = defaultdict[tuple[str, str], list[Term]](list)
    for measure, cost in graph.costs.items():
        for term in cost.terms:
            for name in {name for dim in term.dims for name, _ in dim.by_group}:
                felt[measure, name].append(term)
    full = graph.full()
    return tuple(_ward(group, full, felt) for group in graph.groups)


def ailments(blocked: Sequence[Blocked]) -> tuple[Ailment, ...]:
    """Describe what cannot go.

    Args:
        blocked: refusals of the analysis.

    Returns:
        one ailment each.
    """
    return tuple(map(_ailment, blocked))


def _ailment(blocked: Blocked) -> Ailment:
    found = obstacles(blocked.reason)
    return Ailment(
        name=blocked.name,
        modules=blocked.modules,
        reason=_told(found),
        fix=_fix(blocked),
        obstacles=found,
    )


def _told(found: Sequence[Obstacle]) -> str:
    return "; ".join(dict.fromkeys(map(str, found)))


def _blocked(model: nn.Module, name: str, found: list[Blocked]) -> list[Blocked]:
    """Choose what keeps a parameter; a bias belongs to what its layer writes, not what it reads."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf not in {tensor for tensor, _ in axes(module, "in")}:
        return [b for b in found if b.name == owner] or found
    return found


def _stuck(name: str, shape: tuple[int, ...], blocked: Sequence[Blocked]) -> Finding:
    """Prefer what can be changed: a layer may stand between a blocked group and the output."""
    culprits = [b for b in blocked if not _is_output(b)] or list(blocked)
    found = tuple(dict.fromkeys(o for b in culprits for o in obstacles(b.reason)))
    return Finding(
        parameter=name,
        shape=shape,
        fate="fixed" if _is_output(culprits[0]) else "blocked",
        reason=_told(found),
        fix=advice(_fix(b) for b in culprits),
        obstacles=found,
    )


def _is_output(blocked: Blocked) -> bool:
    """Tell what ends up in the answer: whatever else is in the way, changing it frees nothing."""
    return not _OUTPUT.isdisjoint(blocked.reason.split("; "))


def _fix(blocked: Blocked) -> str:
    other = not _is_output(blocked) or NAMED in blocked.reason
    return blocked.fix if other else _LEAVE


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
        yield bare(member.path)[0]
        return
    if member.side == "expert":  # a list of them
        for name, _ in modules[member.path].named_parameters():
            yield f"{member.path}.{name}"
    for tensor, axis in axes(modules[member.path], member.side):
        yield f"{member.path}.{tensor}"
        for name in _originals(modules[member.path], tensor, axis):
            yield f"{member.path}.{name}"


def _originals(module: nn.Module, tensor: str, axis: int) -> Iterator[str]:
    """Name what a parametrisation computes a tensor from, as far as it is as long."""
    if not parametrize.is_parametrized(module, tensor):
        return
    head = f"parametrizations.{tensor}."
    for name, parameter in module.named_parameters():
        if name.startswith(head) and (parameter.dim() <= axis or parameter.shape[axis] > 1):
            yield name


def _untouched(module: nn.Module, owner: str, ran: Container[str]) -> tuple[str, str]:
    kind = type(module).__name__
    if owner not in ran and not list(module.children()):
        fix = "pass an example that reaches it, or remove it from the model."
        return f"'{owner}' ({kind}) did not run on the example", fix
    return f"'{owner}' ({kind}) has no channels that a group could cut", "nothing."


def _ward(
    group: Group, full: Mapping[str, int], felt: Mapping[tuple[str, str], Sequence[Term]]
) -> Ward:
    less = {**full, group.name: group.units - 1}
    freed = {
        measure: round(
            sum(term.at(full) - term.at(less) for term in felt.get((measure, group.name), ()))
        )
        for measure in ("params", "macs")
    }
    carriers = [m for m in group.members if m.side == "through"]
    return Ward(
        group=group.name,
        kind=group.kind,
        units=group.units,
        least=group.least,
        producers=tuple(m.path for m in group.producers),
        carriers=tuple(m.path for m in carriers),
        consumers=tuple(m.path for m in group.consumers),
        params_per_unit=freed["params"],
        macs_per_unit=freed["macs"],
    )
