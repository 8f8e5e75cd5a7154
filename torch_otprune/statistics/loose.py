"""Consumers that are no layer of their own: parameters that somebody else multiplies with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, gcd, lcm
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.blame import finite
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.patches import pick
from torch_otprune.statistics.products import Product, Products
from torch_otprune.statistics.recorder import FLOOR, Recorder
from torch_otprune.structure.forward import evaluating, run
from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import axis_of, bare, channels, leaf_of

__all__ = [
    "Slots",
    "agreed",
    "filed",
    "flat_rows",
    "listened",
    "loose",
    "others",
    "slots",
    "stretches",
    "watch_products",
]

_MOST = 1024  # stretches of one parameter that are told apart
_PLAIN = (nn.RNNBase, nn.MultiheadAttention)  # what torch runs as one op, unless told otherwise
Slots = Mapping[str, int]
"""Path of each axis to the number of equal stretches of its parameter that read inputs of their
own, as the experts of a table do; 0 where nobody was seen to read it."""


def loose(model: nn.Module, graph: Graph, names: Iterable[str]) -> tuple[str, ...]:
    """List the consumers of some groups that are no modules.

    Args:
        model: the model.
        graph: its analysis.
        names: group names.

    Returns:
        paths of their axes, in order.
    """
    wanted, modules = set(names), {path for path, _ in model.named_modules()}
    paths = (m.path for g in graph.groups if g.name in wanted for m in g.consumers)
    return tuple(dict.fromkeys(path for path in paths if path not in modules))


def flat_rows(model: nn.Module, path: str) -> Float[Tensor, "places others"]:
    """Read a parameter with one axis put first, the others laid flat.

    Args:
        model: the model.
        path: of the axis.

    Returns:
        a copy in float64 on the CPU.
    """
    value = leaf_of(model, path).detach().double().cpu()
    return value.movedim(axis_of(path, value.shape), 0).unsqueeze(-1).flatten(1)


def _runner(model: nn.Module, path: str) -> str:
    """Name the module that multiplies: of a layer that does not run itself, the one around it."""
    found = bare(path)[0].rpartition(".")[0]
    while found and channels(model.get_submodule(found), "out") is not None:
        found = found.rpartition(".")[0]
    return found


def slots(model: nn.Module, paths: Sequence[str], example: Any) -> dict[str, int]:
    """Find out who reads what in one run: how finely the inputs must be told apart.

    Args:
        model: the model; left as it was.
        paths: consumers that are no modules.
        example: one batch.

    Returns:
        the number of stretches of each.
    """
    steps = dict.fromkeys(paths, 0)
    sizes = {path: leaf_of(model, path).numel() // _size(model, path) for path in paths}

    def note(product: Product) -> None:
        first, last = int(product.outs.min()), int(product.outs.max())
        whole, count = sizes[product.path], len(product.outs)
        gap = last - first + 1 != count  # what lies scattered is not told apart
        step = whole if gap else gcd(first, count, whole)
        steps[product.path] = gcd(steps[product.path], step)

    listener = listened(model, paths, note)
    try:
        with evaluating(model), torch.no_grad():
            run(model, example)
    finally:
        for handle in listener:
            handle.remove()
    counts = {path: sizes[path] // step if step else 0 for path, step in steps.items()}
    return {path: count if count <= _MOST else 1 for path, count in counts.items()}


def _size(model: nn.Module, path: str) -> int:
    shape = leaf_of(model, path).shape
    return shape[axis_of(path, shape)]


def listened(
    model: nn.Module, paths: Sequence[str], hear: Callable[[Product], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook the modules that hold some parameters, to hear of their products.

    Args:
        model: the model.
        paths: consumers that are no modules.
        hear: told every product while one of the modules runs.

    Returns:
        handles of the hooks.
    """
    return _hooked(_Ear(model, tuple(p for p in paths if not _computed(model, p)), hear))


def _hooked(ear: _Ear) -> list[torch.utils.hooks.RemovableHandle]:
    handles = []
    for owner in dict.fromkeys(_runner(ear.model, path) for path in ear.paths):
        module = ear.model.get_submodule(owner)
        handles.append(module.register_forward_pre_hook(_Open(ear)))
        handles.append(module.register_forward_hook(_Shut(ear), always_call=True))
    return handles


def _computed(model: nn.Module, path: str) -> bool:
    owner, _, name = bare(path)[0].rpartition(".")
    return parametrize.is_parametrized(model.get_submodule(owner), name)


@dataclass
class _Ear:
    """Listens while at least one of the modules runs."""

    model: nn.Module
    paths: tuple[str, ...]
    hear: Callable[[Product], None]
    inside: list[bool] = field(default_factory=list)
    mode: Products | None = None
    was: tuple[bool, bool, bool] | None = None

    def open(self, module: nn.Module) -> None:
        if not self.inside:
            leaves = {path: leaf_of(self.model, path).detach() for path in self.paths}
            self.mode = Products(leaves, self.hear)
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        plain = isinstance(module, _PLAIN) and not any(self.inside)
        self.inside.append(plain)
        if plain:
            self.was = _switches()
            _switch(False, False, False)

    def shut(self) -> None:
        if not self.inside:
            return
        if self.inside.pop() and self.was is not None:
            _switch(*self.was)
        if not self.inside and self.mode is not None:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.mode.forget()
            self.mode = None


def _switches() -> tuple[bool, bool, bool]:
    fast = torch.backends.mha.get_fastpath_enabled()
    return torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled(), fast


def _switch(mkldnn: bool, cudnn: bool, fast: bool) -> None:
    """Choose whether recurrent layers and attention run as one op each."""
    torch._C._set_mkldnn_enabled(mkldnn)
    torch._C._set_cudnn_enabled(cudnn)
    torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class _Begin:
    """Opens the ear where the root holds a parameter, and was hooked when it ran already."""

    ear: _Ear

    def __call__(self) -> None:
        self.ear.open(self.ear.model)


@dataclass
class _Open:
    """The hook before a module that holds parameters of interest."""

    ear: _Ear | None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.ear is not None:
            self.ear.open(module)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the statistics: a copy of the model is not observed."""
        return type(self), (None,)


@dataclass
class _Shut(_Open):
    """The hook behind it, also where it fails."""

    def __call__(self, module: nn.Module, args: Any, out: Any = None) -> None:
        if self.ear is not None:
            self.ear.shut()


def watch_products(model: nn.Module, counts: Slots, recorder: Recorder) -> None:
    """Observe, with a recorder, what parameters are multiplied with.

    Args:
        model: the model to hook.
        counts: as `slots` found.
        recorder: takes the hooks off with its own.
    """
    seen = {path: count for path, count in counts.items() if count}
    recorder.others |= others(model, seen)
    sizes = {path: _size(model, path) for path in seen}
    late = {p for p in seen if isinstance(model.get_submodule(_runner(model, p)), _PLAIN)}
    outs = {path: leaf_of(model, path).numel() // sizes[path] for path in seen}
    hear = _Sum(recorder, seen, sizes, outs, frozenset(late))
    ear = _Ear(model, tuple(p for p in seen if not _computed(model, p)), hear)
    recorder.handles += _hooked(ear)
    if not all(_runner(model, path) for path in ear.paths):
        recorder.begin = _Begin(ear)


def others(model: nn.Module, counts: Slots) -> dict[str, int]:
    """Name what will be filed: the moments of each stretch of each parameter.

    Args:
        model: the model.
        counts: as `slots` found.

    Returns:
        name to columns.
    """
    return {
        _name(path, number, count): _size(model, path)
        for path, count in counts.items()
        for number in range(count)
    }


def _name(path: str, number: int, count: int) -> str:
    return f"{path}@{number}/{count}"


def _read(name: str) -> tuple[str, int, int]:
    path, _, tail = name.rpartition("@")
    number, _, count = tail.partition("/")
    return path, int(number), int(count)


def stretches(path: str, moments: Mapping[str, Moments]) -> Iterator[tuple[int, int, Moments]]:
    """Find what was filed of one parameter.

    Args:
        path: of its axis.
        moments: by name.

    Yields:
        number of the stretch, how many there are, and its moments.
    """
    for name, own in moments.items():
        if name.startswith(f"{path}@"):
            yield *_read(name)[1:], own


def agreed(told: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Agree on what is filed beside the layers' inputs: all that is on any rank, as finely.

    Args:
        told: name to columns, by rank.

    Returns:
        the same for all of them, in order.
    """
    found = {n: width for names in told for n, width in names.items() if "@" not in n}
    finest: dict[str, int] = {}
    widths: dict[str, int] = {}
    for names in told:
        for name in (n for n in names if "@" in n):
            path, _, count = _read(name)
            finest[path] = lcm(finest.get(path, 1), count)
            widths[path] = names[name]
    for path, count in finest.items():
        found |= {_name(path, number, count): widths[path] for number in range(count)}
    return dict(sorted(found.items()))


def filed(moments: Mapping[str, Moments], name: str) -> Moments | None:
    """Look up what was filed under a name; what was not told apart here read the same.

    Args:
        moments: of this rank.
        name: as `agreed` has it.

    Returns:
        the moments; None where nothing was seen.
    """
    if name in moments or "@" not in name:
        return moments.get(name)
    path, number, count = _read(name)
    for own, many, found in stretches(path, moments):
        if own == number * many // count:
            return found
    return None


@dataclass
class _Sum:
    """Adds up what is heard."""

    recorder: Recorder
    counts: Slots
    sizes: Mapping[str, int]
    outs: Mapping[str, int]
    late: frozenset[str]

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, product: Product) -> None:
        recorder, path = self.recorder, product.path
        if not recorder.active:
            return
        if not finite(product.rows):
            raise self._explained(path, product.rows)
        rows = self._some(path, product.rows)
        full = rows.new_zeros(len(rows), self.sizes[path], dtype=torch.float64)
        full[:, product.columns.to(full.device)] = rows.double()
        sums = Moments.empty(full.shape[1], full.device)
        sums.update(full)
        each = self.outs[path] // self.counts[path]
        for number in (product.outs // each).unique().tolist():
            own = recorder.moments.setdefault(
                _name(path, number, self.counts[path]), Moments.empty(full.shape[1], full.device)
            )
            own.total += sums.total
            own.product += sums.product
            own.count += sums.count

    def _some(self, path: str, rows: Tensor) -> Tensor:
        """Take the samples that count, and of each no more rows than are wanted."""
        recorder = self.recorder
        size, samples = recorder.batch
        if not size or len(rows) % size:
            return rows
        # torch's own recurrent layers and attention put time first, whatever they are given
        x = (
            rows.unflatten(0, (-1, size)).transpose(0, 1)
            if path in self.late
            else (rows.unflatten(0, (size, -1)))
        )
        wanted = max(ceil(recorder.rows_per_column * self.sizes[path] / recorder.samples), FLOOR)
        at = pick(x.shape[1], wanted, path, recorder.seed).to(x.device)
        some: Tensor = x[:samples, at]
        return some.flatten(0, 1)

    def _explained(self, path: str, rows: Tensor) -> CalibrationError:
        name = bare(path)[0]
        if self.recorder.explain is not None:
            return self.recorder.explain(f"what '{name}' is multiplied with")
        return CalibrationError(
            f"what '{name}' is multiplied with holds NaN or infinity.",
            where=f"first seen at '{name}', a {tuple(rows.shape)} tensor",
            fix="clean the batch, or the layer before that produced it.",
        )
