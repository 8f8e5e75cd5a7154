"""Rows of layers in which each layer's output goes to the next one and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from torch import nn

from torch_otprune.fold.geometry import Geometry
from torch_otprune.fold.linear import TOKEN_NORMS, count, has_line, norm_line
from torch_otprune.fold.modules import (
    ACTIVATIONS,
    AFFINE,
    DROPOUTS,
    describe,
    is_weighted,
    why_not,
)
from torch_otprune.fold.stencil import diagonal
from torch_otprune.structure.flow import Flow, Visit
from torch_otprune.structure.layers import shared

__all__ = ["Layer", "chains", "runs"]

_KNOWN = (*AFFINE, *ACTIVATIONS, *TOKEN_NORMS)


@dataclass(frozen=True)
class Layer:
    """One module of a chain.

    Args:
        path: the module.
        module: itself.
        kind: `affine`; `activation`; `norm`, a normalisation that hands on a scale and a shift;
            `stuck`, what must stay as it is.
        reason: why it is stuck.
        passed: dropouts between the layer before and this one.
        geometry: of an affine layer, and of the scale and shift of a norm.
        positions: how often each weight is used, per sample.
    """

    path: str
    module: nn.Module
    kind: Literal["affine", "activation", "norm", "stuck"]
    reason: str = ""
    passed: tuple[str, ...] = ()
    geometry: Geometry | None = None
    positions: int = 0

    @cached_property
    def params(self) -> int:
        """Count the elements of its parameters."""
        return count(self.module)

    @property
    def macs(self) -> int:
        """Count its multiply-accumulates per sample; norms and pools are free, as in plans."""
        if self.geometry is None or not is_weighted(self.module):
            return 0
        return self.geometry.weights * self.positions


def chains(
    model: nn.Module, notes: Flow, samples: int, *, bends: Collection[str] = ()
) -> tuple[tuple[Layer, ...], ...]:
    """Follow every known layer's output as long as exactly one known layer reads it.

    Dropouts and identities in evaluation mode hand their input on and are passed. What the model
    returns, and what a hooked module takes or gives, has a reader that cannot be seen.

    Args:
        model: any module; it is read, never written.
        notes: one run of it.
        samples: in that run's batch.
        bends: paths of further modules that are activations, whatever their class.

    Returns:
        chains in order of execution; a layer on its own is one.
    """
    reader = _Reader(model, notes, samples, bends)
    behind = {id(a): b for a in reader.visits if (b := reader.next(a)) is not None}
    inner = {id(visit) for visit in behind.values()}
    starts = [visit for visit in reader.visits if id(visit) not in inner]
    return tuple(tuple(map(reader.layer, _along(start, behind))) for start in starts)


def _along(start: Visit, behind: Mapping[int, Visit]) -> Iterator[Visit]:
    visit: Visit | None = start
    while visit is not None:
        yield visit
        visit = behind.get(id(visit))


class _Reader:
    """One model and what its run showed."""

    def __init__(self, model: nn.Module, notes: Flow, samples: int, bends: Collection[str]) -> None:
        self.modules = dict(model.named_modules())
        self.notes, self.samples, self.bends = notes, samples, bends
        self.calls = Counter(visit.path for visit in notes.visits)
        every = model.named_modules(remove_duplicate=False)
        self.names = Counter(id(module) for _, module in every)
        self.tied = shared(model)
        self.visits = [v for v in notes.visits if self._known(v.path)]
        self.reading: dict[int, list[Visit]] = {}
        for visit in self.visits:
            self.reading.setdefault(_only(visit.reads), []).append(visit)
        self.idle: dict[int, list[str]] = {}
        self.watched = set(notes.returned)
        for visit in notes.visits:
            self._note(visit, self.modules[visit.path])

    def _note(self, visit: Visit, module: nn.Module) -> None:
        if type(module) in DROPOUTS:
            self.idle.setdefault(_only(visit.writes), []).append(visit.path)
        if not self._known(visit.path) and (module._forward_hooks or module._forward_pre_hooks):
            self.watched.update(visit.reads.values(), visit.writes.values())

    def _known(self, path: str) -> bool:
        return path in self.bends or isinstance(self.modules[path], _KNOWN)

    def next(self, visit: Visit) -> Visit | None:
        """Find the one layer that reads a layer's output."""
        node = _only(visit.writes)
        found = self.reading.get(node, []) if node >= 0 else []
        # A dropout that serves several places must stay, and so must what is around it.
        torn = any(map(self._repeated, self.idle.get(node, ())))
        if node in self.watched or len(found) != 1 or torn:
            return None
        inside = range(found[0].first, found[0].last)
        return found[0] if all(op in inside for op in self.notes.readers.get(node, ())) else None

    def _repeated(self, path: str) -> str | None:
        if (calls := self.calls[path]) > 1:
            return f"it runs {calls} times"
        return "it stands in several places" if self.names[id(self.modules[path])] > 1 else None

    def layer(self, visit: Visit) -> Layer:
        """Describe one layer as it was called."""
        path, module = visit.path, self.modules[visit.path]
        node = _only(visit.reads)
        reason = self._repeated(path) or self._stuck(path, module)
        if reason or node < 0:
            return Layer(path, module, "stuck", reason or "it reads several tensors")
        passed = tuple(self.idle.get(node, ()))
        if path in self.bends or isinstance(module, ACTIVATIONS):
            return Layer(path, module, "activation", passed=passed)
        given, made = (self.notes.shapes[n] for n in (node, _only(visit.writes)))
        if isinstance(module, TOKEN_NORMS):
            line = diagonal(*norm_line(module), 0).geometry
            return Layer(path, module, "norm", passed=passed, geometry=line)
        geometry = _geometry(module, given)
        grid = prod(given if geometry.transposed else made)
        channels = geometry.into if geometry.transposed else geometry.out
        positions = grid // channels // self.samples
        return Layer(path, module, "affine", passed=passed, geometry=geometry, positions=positions)

    def _stuck(self, path: str, module: nn.Module) -> str | None:
        if path in self.tied:
            return "it shares a tensor with another module"
        if path in self.bends:
            hooked = module._forward_hooks or module._forward_pre_hooks
            return "it carries hooks" if hooked else None
        if reason := why_not(module):
            return reason
        if type(module) not in _KNOWN:
            return f"{type(module).__name__} may do more than its base"
        line = not isinstance(module, TOKEN_NORMS) or has_line(module)
        return None if line else "it has no scale and shift along the last axis to fold"


def _geometry(module: nn.Module, given: tuple[int, ...]) -> Geometry:
    axes = max(len(given) - 2, 0)
    return describe(module, channels=given[1] if len(given) > 1 else 0, axes=axes)


def _only(nodes: Mapping[int, int]) -> int:
    """Name the one node of a call; -1 where it takes or gives several, or none."""
    found = set(nodes.values())
    return found.pop() if len(found) == 1 else -1


def runs(chain: tuple[Layer, ...], linear: Collection[str]) -> Iterator[tuple[Layer, ...]]:
    """Cut a chain into rows that would be affine if some activations were.

    Args:
        chain: layers in order of execution.
        linear: paths of the activations that are taken for the identity.

    Yields:
        rows that start and end with an affine layer; only a first layer may be a norm.
    """
    row: list[Layer] = []
    for layer in chain:
        joins = layer.kind == "affine" and (not row or _same_home(row, layer))
        if joins or (layer.path in linear and row):
            row.append(layer)
            continue
        yield from _trimmed(row)
        row = [layer] if layer.geometry is not None else []
    yield from _trimmed(row)


def _trimmed(row: list[Layer]) -> Iterator[tuple[Layer, ...]]:
    while row and row[-1].geometry is None:
        row.pop()
    if row:
        yield tuple(row)


def _same_home(row: list[Layer], layer: Layer) -> bool:
    """Tell whether a layer's parameters have the dtype and device of those before it."""
    homes = {(p.dtype, p.device) for x in (*row, layer) for p in x.module.parameters()}
    return len(homes) <= 1
