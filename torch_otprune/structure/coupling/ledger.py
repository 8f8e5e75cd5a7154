"""What is known of every tensor of a run: its fields, and where it comes from."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torch_otprune.structure.coupling.fields import compact, core, varying
from torch_otprune.structure.coupling.forest import KEPT, Forest
from torch_otprune.structure.coupling.known import Known, Shared
from torch_otprune.structure.forward import run
from torch_otprune.structure.lines import blamed

__all__ = ["Axis", "Fact", "Ledger", "Role"]

Role = Literal["out", "in", "through"]
Source = Literal["data", "static", "table", "made", "filler"]
Axis = tuple[str, int]
"""Name of a parameter or buffer, and one of its axes."""


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    Args:
        fields: compact labels; each varies along axes of its own.
        source: `data`, computed from what the model was given; `static`, from parameters too but
            from nothing given; `table`, a buffer, or what only moves one; `made`, from buffers and
            constants; `filler`, a constant made in forward, which may follow.
        even: whether all its numbers are one, as those of zeros like another tensor.
    """

    fields: tuple[Tensor, ...] = ()
    source: Source = "data"
    even: bool = False


class Ledger:
    """The labels of one run.

    Args:
        leaves: parameters and buffers by name; those of one tensor under several names appear
            under the first.
    """

    def __init__(self, leaves: Iterable[tuple[str, Tensor]]) -> None:
        self.forest = Forest()
        self.facts = Known[Fact]()
        self.alone = Known[Tensor]()  # single channels: whence, if anybody uses them
        self.near: dict[int, Fact] = {}  # of tensors that are alive while one op is followed
        self.names: dict[int, str] = {}
        self.leaves: dict[str, Tensor] = {}
        self.aliases: dict[str, list[str]] = defaultdict(list)
        for name, tensor in leaves:
            first = self.names.setdefault(id(tensor), name)
            self.leaves[first] = tensor
            self.aliases[first].append(name)
        self.axes: list[Axis] = []
        self.starts: list[int] = []
        self.roles: dict[Axis, set[Role]] = defaultdict(set)
        self.sheets: list[Tensor] = []
        self.asks: list[tuple[Tensor, int]] = []
        self.heads: list[Tensor] = []
        self.inner: list[Tensor] = []
        self.chosen: list[tuple[Tensor, int]] = []
        self.memory = Shared()
        self.marks: dict[str, Tensor] = {}
        self.op = ""

    def fact(self, tensor: Tensor) -> Fact:
        """Look a tensor up; what was never seen is data."""
        found = self.near.get(id(tensor))
        if found is None:
            found = self.facts.get(tensor)
            if found is None and id(tensor) in self.names:
                found = self._register(tensor)
        return found or Fact()

    def told(self, tensor: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
        """List what is stored of each field of a tensor, and the axes along which it varies."""
        return [(core(field), varying(field)) for field in self.fact(tensor).fields]

    def _register(self, tensor: Tensor) -> Fact:
        fields, name = [], self.names[id(tensor)]
        for axis, size in enumerate(tensor.shape):
            if size > 1:
                self.axes.append((name, axis))
                self.starts.append(self.forest.size)
                shape = [1] * tensor.dim()
                shape[axis] = size
                fields.append(self.forest.grow(size).view(shape).expand(tensor.shape))
        fact = Fact(tuple(fields), "static" if isinstance(tensor, nn.Parameter) else "table")
        self.note(tensor, fact)
        return fact

    def copies(self, shape: Sequence[int], axis: int) -> Tensor:
        """Make labels for an axis along which one number was written several times.

        No parameter owns them: copies go with whatever they meet.

        Args:
            shape: of the tensor.
            axis: along which.

        Returns:
            labels that vary along the axis.
        """
        self.axes.append(("", axis))
        self.starts.append(self.forest.size)
        line = [1] * len(shape)
        line[axis] = shape[axis]
        return self.forest.grow(shape[axis]).view(line).expand(tuple(shape))

    def copied(self, field: Tensor) -> bool:
        """Tell whether labels are those of copies that have met nothing of a parameter's yet."""
        first = int(core(self.roots(field)).max())
        place = int(np.searchsorted(np.asarray(self.starts), first, side="right")) - 1
        return place >= 0 and not self.axes[place][0]

    def labels(self, name: str, axis: int) -> Tensor | None:
        """Give the labels of one axis of a parameter.

        Args:
            name: of the parameter.
            axis: which axis.

        Returns:
            int64, one for each index; None where it took no part in the run.
        """
        fact = self.facts.get(self.leaves[name])
        for field in fact.fields if fact else ():
            if varying(field) == (axis,):
                return core(field).flatten()
        return None

    def mark(self, path: str, out: Any, axis: int) -> None:
        """Remember the labels along one axis of what a module without tensors returns.

        Args:
            path: of the module.
            out: what it returned.
            axis: on which its channels lie.
        """
        for field in self.fact(out).fields if isinstance(out, Tensor) and out.dim() else ():
            if varying(field) == (axis % out.dim(),):
                labels = core(field).flatten()
                self.join(self.marks.setdefault(path, labels), labels)

    def note(self, tensor: Tensor, fact: Fact) -> None:
        """Write down what is known of a tensor."""
        self.facts[tensor] = self.near[id(tensor)] = fact
        self.memory.add(tensor)
        for field in fact.fields:
            if len(varying(field)) > 1:
                self.sheets.append(core(field).squeeze())

    def mates(self, tensor: Tensor) -> list[Tensor]:
        """List the other tensors that look at the same memory."""
        return self.memory.mates(tensor)

    def put(self, tensor: Any, fields: Iterable[Tensor], source: Source = "data") -> None:
        """Write down an op's output.

        Args:
            tensor: what the op returned; anything that is no tensor is passed over.
            fields: labels of its shape.
            source: as in `Fact`.
        """
        if not isinstance(tensor, Tensor):
            return
        told = []
        for field in fields if source != "made" else ():
            assert field.shape == tensor.shape, f"{self.op}: {field.shape} for {tensor.shape}"
            kept = compact(self.roots(field) if source == "data" else field)
            if varying(kept):
                told.append(kept)
        self.note(tensor, Fact(tuple(told), source))

    def roots(self, field: Tensor) -> Tensor:
        """Name the labels of a field after their sets."""
        return self.forest.roots(core(field)).expand(field.shape)

    def source(self, tensors: Iterable[Tensor]) -> Source:
        """Find where an op's output comes from: data if any operand does."""
        found = {self.fact(t).source for t in tensors}
        order: tuple[Source, ...] = ("data", "static", "table", "made", "filler")
        return next((s for s in order if s in found), "filler")

    def computed(self, tensors: Iterable[Tensor]) -> Source:
        """Find the same of an op that computes: what comes of buffers alone does not follow."""
        found = self.source(tensors)
        return "made" if found == "table" else found

    def play(self, tensor: Tensor, labels: Tensor, role: Role) -> None:
        """Note what part the parameters behind some labels take.

        Args:
            tensor: the operand; only static ones count.
            labels: as they were made, before any was joined.
            role: `out`, `in` or `through`.
        """
        if self.fact(tensor).source not in ("static", "table") or not self.starts:
            return
        found = labels.numpy()
        first, last = (bisect_right(self.starts, end) - 1 for end in (found.min(), found.max()))
        if first == last >= 0:  # of one axis, as nearly always
            self.roles[self.axes[first]].add(role)
            return
        owned = np.unique(found)
        places = np.searchsorted(np.asarray(self.starts), owned[owned >= 0], side="right") - 1
        for place in np.unique(places):
            self.roles[self.axes[place]].add(role)

    def object(self, labels: Tensor, kind: str, said: str) -> None:
        """Note why the units of these labels cannot go, and where in the user's code.

        Args:
            labels: int64.
            kind: as in `Objection`.
            said: one clause; the op and its place are added.
        """
        if labels.numel() and int(labels.max()) >= 0:
            where = f" at {line}" if (line := _line()) else ""
            self.forest.object(labels, kind, f"{said} (op {self.op}{where})")

    def tie(self, field: Tensor, axes: Collection[int]) -> Tensor:
        """Join all labels that differ only along some axes.

        Args:
            field: compact labels.
            axes: which.

        Returns:
            compact labels that vary along none of them.
        """
        kept = core(field)
        for axis in axes:
            if kept.shape[axis] > 1:
                first = kept.amax(axis, keepdim=True)
                self.join(kept, first.expand(kept.shape))
                kept = first
        return compact(self.forest.roots(kept).expand(field.shape))

    def tied(self, field: Tensor, axes: Collection[int]) -> bool:
        """Tell whether `tie` joins anything; what it leaves apart are places that stay."""
        small = self.tie(field, axes)
        before, after = self.forest.roots(core(field)), self.forest.roots(core(small))
        kept = before != KEPT
        return bool((before != after.expand(before.shape))[kept].any())

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join labels place by place; where one stays, the other must stay too.

        Args:
            first: int64.
            second: int64, the same shape.
        """
        self.forest.union(first, second)
        a, b = first.numpy(), second.numpy()
        alone = (a < 0) != (b < 0)
        if alone.any():
            both = torch.from_numpy(np.maximum(a, b)[alone])
            self.object(both, "fixed", "they meet numbers that stay")

    def without(self, field: Tensor, axes: Sequence[int], kind: str, said: str) -> Tensor | None:
        """Take axes from a field: what varies along others is tied, what does not is blamed.

        Args:
            field: compact labels.
            axes: the axes that are not carried.
            kind: as in `Objection`.
            said: as in `Objection`.

        Returns:
            compact labels that vary along other axes; None where there are none.
        """
        vary = varying(field)
        if not set(vary) & set(axes):
            return field
        if set(vary) <= set(axes):
            self.object(core(field), kind, said)
            return None
        return self.tie(field, axes)


_PASSED = {"torch", "torch_otprune", "contextlib", "jaxtyping", "beartype"}  # not the user's


def _line() -> str:
    """Find the line of the user's code that is running."""
    return blamed(_frames(sys._getframe(1)))


def _frames(frame: Any) -> Iterator[tuple[str, str, int]]:
    """Yield what led from the call of the model to an op, the innermost first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == run.__module__:
            return
        if module.split(".")[0] not in _PASSED:
            yield frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back


def parametrised(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List the tensors that parametrisations compute, under the names they are read by.

    Args:
        model: any module; must run under `torch.nn.utils.parametrize.cached`.

    Returns:
        name and tensor.
    """
    from torch.nn.utils import parametrize

    return [
        (f"{path}.{name}" if path else name, getattr(module, name))
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name in module.parametrizations
    ]
