"""What a parameter is multiplied with, whoever multiplies it: seen op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_otprune.structure.layers import axis_of

__all__ = ["Product", "Products"]

_COPIES = frozenset(("clone", "_to_copy"))
_PICKS = frozenset(("index", "index_select"))
_SUMS = ("addmm", "_addmm_activation", "baddbmm", "addmv")  # something is added to the product
_LEFT = ("mm", "bmm", "mv", "dot", "vdot")
_MATRIX, _BATCHED = 2, 3  # axes of a factor


@dataclass(frozen=True)
class Product:
    """One product along a watched axis of a parameter.

    Args:
        path: the axis, as a group's member names it.
        rows: the other factor, one column for each place that was met.
        columns: these places along the axis.
        outs: where in the parameter, its axis put first and the others laid flat, what it is
            multiplied with.
    """

    path: str
    rows: Float[Tensor, "rows columns"]
    columns: Int[Tensor, " columns"]
    outs: Int[Tensor, " outs"]


@dataclass(frozen=True)
class _Leaf:
    """A parameter in memory, and the axes of it that are watched, by path."""

    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    paths: dict[int, str]


@dataclass(frozen=True)
class _Copy:
    """A copy of some view, kept so that nothing else comes to lie at its place.

    Args:
        made: the copy.
        source: storage of the view.
        first: where in it the view starts.
        strides: of the view.
        picks: which entry of the view's first axis each entry is; None where they are the same.
    """

    made: Tensor
    source: int
    first: int
    strides: tuple[int, ...]
    picks: Tensor | None = None


_Met = tuple[str, list[tuple[Tensor, Tensor, Tensor]]]
"""A path, and pieces of the summed axis: places in the factor, places along the axis, outs."""


class Products(TorchDispatchMode):
    """Hear every product in which a view or copy of a watched parameter is a factor.

    A view tells by its strides where it lies in its parameter; of copies it is remembered what
    they are copies of. So it does not matter who multiplies: a layer of torch's own, an einsum,
    a loop over experts.

    Limits: products of what was computed from a parameter, such as a normalised weight, are not
    heard; nor are a grouped convolution's.

    Args:
        leaves: path of each watched axis to its parameter, contiguous.
        hear: told every product, in order.
    """

    def __init__(self, leaves: Mapping[str, Tensor], hear: Callable[[Product], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hear = hear
        self.leaves: dict[int, list[_Leaf]] = {}
        self.copies: dict[int, _Copy] = {}
        self.known: dict[tuple[Any, ...], _Met | None] = {}
        for path, leaf in leaves.items():
            several, shape = self.leaves.setdefault(_storage(leaf), []), tuple(leaf.shape)
            first, axis = _first(leaf), axis_of(path, shape)
            same = next((one for one in several if one.first == first), None)
            if same is None:
                same = _Leaf(first, shape, leaf.stride(), {})
                several.append(same)
            same.paths[axis] = path

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and function._can_decompose():
            with self:  # elsewhere, ops come in parts by themselves
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__.removesuffix("_")
        if name in _COPIES:
            self._copied(args[0], out, None)
        elif name in _PICKS:
            self._picked(name, args, out)
        else:
            self._multiplied(name, args, kwargs)
        return out

    def _knows(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor) or tensor.is_sparse:
            return False
        key = _storage(tensor)
        return key in self.leaves or key in self.copies

    def _copied(self, source: Tensor, out: Any, picks: Tensor | None) -> None:
        if self._knows(source) and isinstance(out, Tensor) and _storage(out) != _storage(source):
            key, first = _storage(source), _first(source)
            self.copies[_storage(out)] = _Copy(out, key, first, source.stride(), picks)

    def _picked(self, name: str, args: Any, out: Any) -> None:
        """Follow entries that are picked along the first axis, as each token's expert is."""
        if name == "index_select":
            picks = args[2] if args[1] == 0 else None
        else:
            picks = args[1][0] if len(args[1]) == 1 else None
        if isinstance(picks, Tensor) and picks.dim() == 1 and picks.dtype == torch.int64:
            self._copied(args[0], out, picks)

    def _multiplied(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "convolution":
            self._convolved(*args)
        elif name == "_grouped_mm":
            self._grouped(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        elif name in _SUMS or name in _LEFT:
            pair = args[1:3] if name in _SUMS else args[:2]
            known = [self._knows(factor) for factor in pair]
            if known[0] != known[1]:
                left, right = _matrices(*pair)
                # whichever it is, the summed axis of the parameter comes before its own
                weight, data = (right, left) if known[1] else (left.mT, right.mT)
                self._meet(weight, data)

    def _meet(self, weight: Tensor, data: Tensor) -> None:
        """Tell of a product `data @ weight`, matrix by matrix."""
        found = self._where(weight, 1, 0)
        if found is None:
            return
        path, pieces = found
        for places, columns, outs in pieces:
            for first in outs[:, 0].unique().tolist():
                same = (outs[:, 0] == first).nonzero().flatten().to(data.device)
                rows = data[same][:, :, places.to(data.device)].flatten(0, 1)
                self.hear(Product(path, rows, columns, outs[same[0]]))

    def _grouped(self, data: Tensor, weight: Tensor, ends: Tensor | None) -> None:
        """Tell of the products of one matrix's rows, a stretch of them for each entry."""
        flat = ends is not None and data.dim() == _MATRIX and weight.dim() == _BATCHED
        found = self._where(weight, 1, 0) if flat and self._knows(weight) else None
        if found is None or ends is None:
            return
        path, pieces = found
        for places, columns, outs in pieces:
            start = 0
            for entry, stop in enumerate(ends.tolist()):
                rows = data[start:stop][:, places.to(data.device)]
                if len(rows):
                    self.hear(Product(path, rows, columns, outs[entry]))
                start = stop

    def _convolved(self, x: Tensor, weight: Tensor, *rest: Any) -> None:
        """Tell what the channels of a convolution read, each tap an output of its own."""
        transposed, groups = rest[4], rest[6]
        found = None
        if groups == 1 and self._knows(weight):
            found = self._where(weight, 0 if transposed else 1, None)
        if found is not None:
            rows = x.movedim(1, -1).flatten(0, -2)
            for places, columns, outs in found[1]:
                self.hear(Product(found[0], rows[:, places.to(x.device)], columns, outs[0]))

    def _where(self, weight: Tensor, summed: int, batch: int | None) -> _Met | None:
        key = (_storage(weight), weight.storage_offset(), weight.shape, weight.stride(), summed)
        if key[0] not in self.leaves:  # a copy, gone when this call is over
            return self._look(weight, summed, batch)
        if key not in self.known:
            self.known[key] = self._look(weight, summed, batch)
        return self.known[key]

    def _look(self, weight: Tensor, summed: int, batch: int | None) -> _Met | None:
        """Find which axis of which parameter a factor's summed axis is."""
        size, start = weight.shape[summed], _first(weight)
        line = start + torch.arange(size, device="cpu") * weight.stride(summed)
        leaf, at = self._origin(_storage(weight), line)
        if leaf is None or size < _MATRIX:
            return None
        rest = [a for a in range(weight.dim()) if a not in (summed, batch)]
        grid = _sums([batch] if batch is not None else [], weight)[:, None] + _sums(rest, weight)
        for axis, path in leaf.paths.items():
            others = _flat(at, leaf.shape, axis)
            segments = [(others == one).nonzero().flatten() for one in others.unique().tolist()]
            if all(len(s) == size // len(segments) > 1 for s in segments):
                told = []
                for places in segments:
                    moved = grid + start + int(places[0]) * weight.stride(summed)
                    _, spots = self._origin(_storage(weight), moved.flatten())
                    outs = _flat(spots, leaf.shape, axis).view(moved.shape)
                    told.append((places, at[places, axis], outs))
                return path, told
        return None

    def _origin(self, key: int, places: Tensor) -> tuple[_Leaf | None, Tensor]:
        """Follow places in memory back to a parameter; its coordinates there, one row each."""
        while key in self.copies:
            copy = self.copies[key]
            made = copy.made
            index = _coordinates(places - _first(made), made.shape, made.stride())
            if copy.picks is not None:
                index[:, 0] = copy.picks.to(index.device)[index[:, 0]]
            strides = torch.tensor(copy.strides, device="cpu")
            key, places = copy.source, copy.first + (index * strides).sum(1)
        low, high = int(places.min()), int(places.max())
        for leaf in self.leaves.get(key, ()):
            if leaf.first <= low and high < leaf.first + prod(leaf.shape):
                return leaf, _coordinates(places - leaf.first, leaf.shape, leaf.strides)
        return None, places

    def forget(self) -> None:
        """Let go of the copies."""
        self.copies.clear()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _first(tensor: Tensor) -> int:
    return int(tensor.storage_offset())


def _matrices(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Write both factors as stacks of matrices."""
    left = left[None] if left.dim() < _MATRIX else left
    right = right[:, None] if right.dim() < _MATRIX else right
    return tuple(t[None] if t.dim() < _BATCHED else t for t in (left, right))  # type: ignore[return-value]


def _sums(axes: Sequence[int], tensor: Tensor) -> Tensor:
    """List how far every entry along some axes is from the first."""
    total = torch.zeros(1, dtype=torch.int64, device="cpu")
    for axis in axes:
        steps = torch.arange(tensor.shape[axis], device="cpu") * tensor.stride(axis)
        total = (total[:, None] + steps).flatten()
    return total


def _coordinates(
    places: Int[Tensor, " places"], shape: Sequence[int], strides: Sequence[int]
) -> Int[Tensor, "places axes"]:
    """Tell at which index a tensor without gaps has its places in memory."""
    found = torch.zeros(len(places), len(shape), dtype=torch.int64, device="cpu")
    for axis in sorted(range(len(shape)), key=lambda a: -strides[a]):
        if shape[axis] > 1:
            found[:, axis] = places // strides[axis]
            places = places % strides[axis]
    return found


def _flat(at: Int[Tensor, "places axes"], shape: Sequence[int], axis: int) -> Tensor:
    """Number places by all axes but one."""
    total = torch.zeros(len(at), dtype=torch.int64, device="cpu")
    for other in (a for a in range(len(shape)) if a != axis):
        total = total * shape[other] + at[:, other]
    return total
