"""The diagnosis as a tree of modules: how much of each can go, and what keeps the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch_otprune.structure.doctor import FATES

if TYPE_CHECKING:
    from torch_otprune.doctor.model import Diagnosis
    from torch_otprune.structure.doctor import Fate, Finding

__all__ = ["draw"]


_LEAST = 0.005  # share that is written as a whole percent


@dataclass
class _Node:
    """One module.

    Args:
        name: last part of its path.
        counts: elements of each fate, of everything below.
        parts: modules and parameters below.
        told: of a parameter, its groups or the reason why it stays.
    """

    name: str
    counts: Counter[Fate] = field(default_factory=Counter)
    parts: dict[str, _Node] = field(default_factory=dict)
    told: str = ""

    def shape(self) -> object:
        """Describe the node so that those alike compare equal: all but its own name."""
        below = tuple((name, part.shape()) for name, part in self.parts.items())
        return tuple(sorted(self.counts.items())), below, bool(self.told)

    def said(self) -> str | None:
        """Say what is true of every parameter below; None where they differ."""
        below = {part.said() for part in self.parts.values()}
        alike = len(self.counts) == 1 and len(below) == 1
        return self.told if not self.parts else below.pop() if alike else None


def draw(found: Diagnosis, *, every: bool) -> str:
    """Draw the modules as a tree.

    Args:
        found: the diagnosis.
        every: a branch for every module, not one for neighbours that are alike.

    Returns:
        several lines.
    """
    root = _Node(found.model)
    kinds = {ward.group: ward.kind for ward in found.groups if not ward.protected}
    for finding in found.findings:
        _plant(root, finding, kinds)
    return "\n".join([_line(root, every=True), *_branches(root, "", every=every)])


def _plant(root: _Node, finding: Finding, kinds: Mapping[str, str]) -> None:
    node = root
    node.counts[finding.fate] += finding.elements
    for part in finding.parameter.split("."):
        node = node.parts.setdefault(part, _Node(part))
        node.counts[finding.fate] += finding.elements
    cuts = ", ".join(f"{name} ({kinds[name]})" for name in finding.groups if name in kinds)
    node.told = finding.reason.split("; ")[0] or cuts or f"goes with {', '.join(finding.blocks)}"


def _branches(node: _Node, margin: str, *, every: bool) -> Iterator[str]:
    runs = list(_runs(list(node.parts.values()), every=every))
    for place, run in enumerate(runs):
        last = place == len(runs) - 1
        yield f"{margin}{'└─ ' if last else '├─ '}{_line(run[0], run, every=every)}"
        if every or run[0].said() is None:
            yield from _branches(run[0], margin + ("   " if last else "│  "), every=every)


def _runs(parts: Sequence[_Node], *, every: bool) -> Iterator[list[_Node]]:
    """Put neighbours together that are numbered and alike."""
    run: list[_Node] = []
    for part in parts:
        alike = run and part.name.isdecimal() and run[0].name.isdecimal()
        if alike and not every and part.shape() == run[0].shape():
            run.append(part)
            continue
        if run:
            yield run
        run = [part]
    if run:
        yield run


def _line(node: _Node, run: Sequence[_Node] = (), *, every: bool = False) -> str:
    name = f"{run[0].name} ... {run[-1].name}" if len(run) > 1 else node.name
    many = f", {len(run)} such" if len(run) > 1 else ""
    said = node.said() if not (every and node.parts) else None
    told = f": {said}" if said else ""
    return f"{name}: {sum(node.counts.values()):,}{many}, {_fates(node)}{told}"


def _fates(node: _Node) -> str:
    total = sum(node.counts.values())
    told = {fate: node.counts[fate] for fate in FATES if node.counts[fate]}
    if len(told) == 1:
        return next(iter(told))
    return ", ".join(f"{_percent(n / total)} {fate}" for fate, n in told.items())


def _percent(share: float) -> str:
    """Write a share so that what is there never reads as nothing, nor a part as the whole."""
    return "<1%" if share < _LEAST else ">99%" if share > 1 - _LEAST else f"{share:.0%}"
