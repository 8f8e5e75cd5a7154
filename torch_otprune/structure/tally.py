"""The products of one run, each with the module that ran it and the labels along its loops."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torch_otprune.structure.forward import batch_size, evaluating, outside_inference, run
from torch_otprune.structure.graph import Dim, Term
from torch_otprune.structure.products import (
    Product,
    composed,
    left_out,
    named,
    plain,
    products,
)

__all__ = ["Tally", "tallied"]

Labels = Callable[[Tensor], Sequence[tuple[Tensor, tuple[int, ...]]]]
"""From a tensor to what is stored of each of its fields, and the axes along which it varies."""

_Ints = npt.NDArray[np.int64]
_NONE = -1
_LENGTHS = (torch.ops.aten._pack_padded_sequence,)  # reads them without a tag that says so


@dataclass(frozen=True)
class _Record:
    """One product that somebody labelled.

    Args:
        owner: the innermost module that was running.
        data: whether it has no weights.
        sizes: of its loops.
        lines: labels, and the loops along which they vary; `_` for an axis that is none.
    """

    owner: str
    data: bool
    sizes: Mapping[str, int]
    lines: tuple[tuple[Tensor, str], ...]


class Tally:
    """What a run multiplies.

    Args:
        model: any module; it is left as it was.
        samples: of the batch that it runs on.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.model, self.samples = model, samples
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.records: list[_Record] = []
        self.plain: Counter[tuple[str, bool]] = Counter()
        self.rows: Counter[str] = Counter()
        self.left_out: set[str] = set()
        self.open = False  # other data of the same shapes might make it multiply something else
        self.roots: _Ints = np.zeros(0, dtype=np.int64)
        self.listening = False
        self._running: list[str] = []
        self._stored = {_memory(p) for p in self.model.parameters()}

    @property
    def total(self) -> int:
        """Sum the multiply-accumulates per sample of a run without labels, rounded down."""
        return sum(self.plain.values()) // self.samples

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen, and know which module is running.

        Yields:
            nothing.
        """
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(_Enter(self, path)))
            handles.append(module.register_forward_hook(_Leave(self), always_call=True))
        self.listening = True
        try:
            yield
        finally:
            self.listening = False
            for handle in handles:
                handle.remove()

    def enter(self, path: str) -> None:
        """Note that a module is about to run."""
        self._running.append(path)

    def leave(self) -> None:
        """Note that the innermost module has run."""
        self._running.pop()

    def note(self, function: Any, given: Any, out: Any, labels: Labels | None = None) -> None:
        """Write down what an op multiplies.

        Args:
            function: the op.
            given: its arguments by name.
            out: what it returned.
            labels: of its operands.
        """
        owner = self._running[-1] if self._running else ""
        self.open = self.open or _looks(function)
        if name := left_out(function):
            self.left_out.add(name)
        for product in products(function, given, out):
            if any(t.layout is not torch.strided for t, _ in product.operands):
                self.left_out.add(f"{function.overloadpacket} of a sparse matrix")
                continue
            self.rows[owner] += next(iter(product.sizes.values()))
            data = self._stored.isdisjoint(_memory(t) for t, _ in product.operands)
            lines = _lines(product, labels) if labels else ()
            if lines:
                self.records.append(_Record(owner, data, product.sizes, lines))
            else:
                self.plain[owner, data] += product.macs

    def terms(self, whose: _Ints, groups: Sequence[tuple[str, int]]) -> tuple[Term, ...]:
        """Write the multiply-accumulates per sample as products of what the groups keep.

        Args:
            whose: root of a label to the number of its group; -1 for none.
            groups: name and units of each group, by number.

        Returns:
            terms by module; exact fractions where the samples share a product.
        """
        reader = _Reader(self.roots, whose, groups)
        found: dict[tuple[str, tuple[Dim, ...], bool], Fraction | int] = defaultdict(int)
        for (owner, data), macs in self.plain.items():
            found[owner, (), data] += macs
        for record in self.records:
            scale, dims = reader.read(record)
            found[record.owner, dims, record.data] += scale
        return tuple(
            Term(owner, self._each(macs), dims, data) for (owner, dims, data), macs in found.items()
        )

    def _each(self, macs: Fraction | int) -> Fraction | int:
        """Share out among the samples."""
        each = Fraction(macs, self.samples)
        return each.numerator if each.denominator == 1 else each


def _looks(function: Any) -> bool:
    """Tell whether what an op returns has a shape, or is a number, that its data decide."""
    decide = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not decide.isdisjoint(function.tags) or function.overloadpacket in _LENGTHS


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _lines(product: Product, labels: Labels) -> tuple[tuple[Tensor, str], ...]:
    """Collect the labels along the loops of a product."""
    found = []
    for tensor, letters in product.operands:
        sizes = [product.sizes.get(letter) for letter in letters]
        loops = [c if n == m else "_" for c, n, m in zip(letters, sizes, tensor.shape, strict=True)]
        for kept, axes in labels(tensor):
            along = "".join(loops[axis] for axis in axes)
            if along.strip("_"):
                found.append((kept, along))
    return tuple(found)


class _Reader:
    """From labels to what the groups keep of each loop."""

    def __init__(self, roots: _Ints, whose: _Ints, groups: Sequence[tuple[str, int]]) -> None:
        self.groups = groups
        self.roots = np.append(roots, _NONE)  # the label of what stays is -1: the last place
        self.group = np.append(whose, _NONE)[self.roots]
        self.known: dict[Any, tuple[tuple[str, _Ints], ...]] = {}

    def read(self, record: _Record) -> tuple[Fraction | int, tuple[Dim, ...]]:
        """Split a product into a constant and the loops that groups shorten."""
        lines: dict[str, list[_Ints]] = defaultdict(list)
        for kept, loops in record.lines if self.groups else ():
            for loop, line in self._along(kept, loops):
                lines[loop].append(line)
        scale: Fraction | int = 1
        dims: list[Dim] = []
        for loop, size in record.sizes.items():
            if loop not in lines:
                scale *= size
                continue
            slots = _slots(lines[loop])
            scale *= Fraction(1, size ** (len(slots) - 1)) if slots[1:] else 1
            for slot in slots:
                share, dim = self._dim(slot)
                scale *= share
                dims.append(dim)
        return scale, tuple(dims)

    def _along(self, kept: Tensor, loops: str) -> tuple[tuple[str, _Ints], ...]:
        """Read the groups' numbers along the one axis on which units differ."""
        key = kept.data_ptr(), tuple(kept.shape), kept.stride(), loops
        if key not in self.known:
            self.known[key] = tuple(self._read(kept.squeeze().numpy(), loops))
        return self.known[key]

    def _read(self, labels: _Ints, loops: str) -> Iterator[tuple[str, _Ints]]:
        groups = self.group[labels]
        if groups.max() < 0:
            return
        if len(loops) > 1:
            axis = _differing(self.roots[labels])
            groups = groups.max(tuple(a for a in range(groups.ndim) if a != axis))
            loops = loops[axis]
        if loops != "_":
            yield loops, groups

    def _dim(self, line: _Ints) -> tuple[Fraction | int, Dim]:
        """Write a loop as places that stay and places of each unit; parts of places as a share."""
        counts = np.bincount(line + 1, minlength=len(self.groups) + 1)
        each = [
            (*self.groups[g], int(counts[g + 1])) for g in range(len(self.groups)) if counts[g + 1]
        ]
        parts = 1
        for _, units, places in each:
            parts *= units if places % units else 1
        widths = tuple(sorted((name, parts * places // units) for name, units, places in each))
        share = 1 if parts == 1 else Fraction(1, parts)
        return share, Dim(parts * int(counts[0]), widths)


def _differing(roots: _Ints) -> int:
    """Find the axis along which units differ; a place that stays is none."""
    for axis in range(roots.ndim):
        highest = roots.max(axis, keepdims=True)
        if ((roots != highest) & (roots >= 0)).any():
            return axis
    return 0


def _slots(lines: list[_Ints]) -> list[_Ints]:
    """Lay lines over one another; those that disagree were two axes before they became one."""
    slots: list[_Ints] = []
    for line in lines:
        for place, slot in enumerate(slots):
            if slot is line or not ((slot != line) & (slot >= 0) & (line >= 0)).any():
                slots[place] = slot if slot is line else np.maximum(slot, line)
                break
        else:
            slots.append(line)
    return slots


class _Enter:
    """The hook before a module."""

    def __init__(self, tally: Tally, path: str) -> None:
        self.tally, self.path = tally, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.tally.enter(self.path)


class _Leave:
    """The hook behind a module."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        self.tally.leave()


class _Listen(TorchDispatchMode):
    """Count without labels."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = tally

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = composed(self, function, args, kwargs or {})
        if out is NotImplemented:
            out = function(*args, **(kwargs or {}))
            self.tally.note(function, named(function, args, kwargs or {}), out)
        return out


def tallied(model: nn.Module, example: Any) -> Tally:
    """Run a model and count what it multiplies.

    Args:
        model: any module; it is left as it was.
        example: one batch.

    Returns:
        the tally, without labels.
    """
    tally = Tally(model, batch_size(example))
    with outside_inference(), parametrize.cached(), evaluating(model), torch.no_grad(), plain():
        _computed(model)
        with tally.watching(), _Listen(tally):
            run(model, example)
    return tally


def _computed(model: nn.Module) -> None:
    """Compute what parametrisations compute: that costs once, and nothing per sample."""
    for module in filter(parametrize.is_parametrized, model.modules()):
        for name in module.parametrizations:  # type: ignore[union-attr]
            getattr(module, name)
