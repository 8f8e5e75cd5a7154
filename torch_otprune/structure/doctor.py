"""The doctor: every parameter of a model accounted for, and what keeps it from going."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.structure.forward import head
from torch_otprune.structure.graph import Blocked, Graph, Group, Member
from torch_otprune.structure.layers import axes
from torch_otprune.structure.probe import probe
from torch_otprune.structure.trace import trace

__all__ = ["Ailment", "Diagnosis", "Finding", "Ward", "doctor"]

Fate = Literal["prunable", "blocked", "fixed"]
FATES: tuple[Fate, ...] = ("prunable", "blocked", "fixed")
_EXAMPLE = 2  # samples of the example that the trace runs on

# Channels that are the task's own: nothing is in the way of cutting them but the answer itself.
_OUTPUT = {"they reach the model's output", "no layer consumes them before the model's output"}
_LEAVE = "nothing: these channels are the model's answer."
_MEANING = {
    "prunable": "lose elements when a unit of their group goes",
    "blocked": "could be cut if the model were changed",
    "fixed": "belong to no channel that may go",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Frozen):
    """What can become of one parameter, and why."""

    parameter: str = Field(description="name as in `named_parameters`")
    shape: tuple[int, ...]
    fate: Fate
    groups: tuple[str, ...] = Field(default=(), description="groups that cut one of its axes")
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
    """Channels that cannot go: what is in the way, and what would free them."""

    name: str = Field(description="path of the first producer")
    modules: tuple[str, ...] = Field(description="every module whose channels are tied to it")
    reason: str
    fix: str


class Diagnosis(_Frozen):
    """Every parameter of a model as prunable, blocked or fixed; together they are 100 %.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = doctor(model, torch.zeros(1, 4))
        >>> found.elements("prunable"), found.elements("blocked"), found.elements("fixed")
        (64, 0, 3)
    """

    version: Literal[1] = 1
    model: str = Field(description="class of the model")
    params: int = Field(description="elements of all parameters, tied ones once")
    macs: int = Field(description="multiply-accumulates per sample of the example")
    findings: tuple[Finding, ...]
    groups: tuple[Ward, ...]
    ailments: tuple[Ailment, ...]

    def elements(self, fate: Fate) -> int:
        """Count the parameters of one fate.

        Args:
            fate: `prunable`, `blocked` or `fixed`.

        Returns:
            elements.
        """
        return sum(finding.elements for finding in self.findings if finding.fate == fate)

    def share(self, fate: Fate) -> float:
        """Measure the parameters of one fate against all.

        Args:
            fate: `prunable`, `blocked` or `fixed`.

        Returns:
            a fraction; the three sum to 1.
        """
        return self.elements(fate) / self.params

    def totals(self) -> list[tuple[str, str, str, str]]:
        """Sum up, one row per fate.

        Returns:
            rows of fate, elements, share, meaning.
        """
        return [(f, f"{self.elements(f):,}", f"{self.share(f):.1%}", _MEANING[f]) for f in FATES]

    def stays(self) -> list[tuple[str, str, str, str]]:
        """List the parameters that cannot go.

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
        import json

        totals: dict[str, Any] = {fate: self.elements(fate) for fate in FATES}
        return json.dumps({**self.model_dump(mode="json"), "totals": totals}, indent=2)

    def __str__(self) -> str:
        """Print the totals, the groups, and whatever cannot go with its reason."""
        lines = [f"{self.model}: {self.params:,} parameters, {self.macs:,} MACs per sample", ""]
        lines += _columns([(fate, n, share, text) for fate, n, share, text in self.totals()])
        for ward in self.groups:
            lines += ["", f"group {ward.group}: {ward.units} units", *map(_indent, _coupled(ward))]
        for ailment in self.ailments:
            lines += ["", f"kept whole {ailment.name}: {ailment.reason}"]
            lines += [_indent(f"modules: {', '.join(ailment.modules)}"), f"  fix: {ailment.fix}"]
        rows = [(name, fate, reason) for name, fate, reason, _ in self.stays()]
        return "\n".join([*lines, *(["", *_columns(rows)] if rows else [])])


def doctor(model: nn.Module, example: Any) -> Diagnosis:
    """Explain every parameter of a model: in which group it can go, or what keeps it.

    A parameter is prunable if a group cuts any of its axes, blocked if none does and one could
    if the model were changed, and fixed otherwise.

    Args:
        model: any module with parameters; it is read, never written.
        example: one batch, as the model takes it.

    Returns:
        the diagnosis.

    Raises:
        StructureError: if the model cannot be analysed, or does not run on the example.

    Limits: reads the structure only. The plan also checks each cut on the real model and may
        refuse a group that is listed here.
    """
    some = head(example, _EXAMPLE)
    graph, ran = trace(model, some), probe(model, some).calls
    full = graph.full()
    return Diagnosis(
        model=type(model).__name__,
        params=graph.costs["params"].at(full),
        macs=graph.costs["macs"].at(full),
        findings=tuple(_findings(model, graph, ran)),
        groups=tuple(_ward(graph, group) for group in graph.groups),
        ailments=tuple(
            Ailment(name=b.name, modules=b.modules, reason=b.reason, fix=_fix(b))
            for b in graph.blocked
        ),
    )


def _findings(model: nn.Module, graph: Graph, ran: Container[str]) -> Iterator[Finding]:
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


def _coupled(ward: Ward) -> Iterator[str]:
    for word, paths in (("from", ward.producers), ("via", ward.carriers), ("to", ward.consumers)):
        if paths:
            yield f"{word + ':':6}{', '.join(paths)}"
    yield f"frees {ward.params_per_unit:,} parameters and {ward.macs_per_unit:,} MACs per unit"


def _indent(line: str) -> str:
    return f"  {line}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align all columns but the last, which may be a sentence."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    pad = [[cell.ljust(w) for cell, w in zip(row, widths, strict=False)] for row in rows]
    return ["  ".join([*cells, row[-1]]) for cells, row in zip(pad, rows, strict=True)]
