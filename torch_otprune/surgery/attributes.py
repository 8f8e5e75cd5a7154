"""What modules say about themselves in plain integers, put right after a cut.

No list of model classes: an integer follows a cut if it stands in a module near the layers that
were cut, and equals a width or counts heads that changed. Names decide only where two readings
are possible, and the trial on the real model has the last word.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_otprune.plan.model import Cut, Slice
from torch_otprune.structure.layers import TokenNorm, axis_of, bare, channels
from torch_otprune.surgery.layout import is_config

__all__ = ["Change", "changes"]

_HEADS = re.compile(r"heads?$|^n_?heads?$|nheads?$")
_GROUPS = re.compile(r"^n(um)?_?groups$")
_INNER = re.compile(r"inter|inner|ffn|ff_|ff$|mlp|expert|expan|all_head|proj|split")
_OUT = re.compile(r"^(nf|out|output)")
_IN = re.compile(r"^(nx|in_|input|hidden|embed)")
# integers that only ever coincide with a width
_NEVER = re.compile(
    r"idx|index|kernel|stride|padding|dilation|window|layer|position|length|max|min|seed|_id$|"
    r"vocab|bucket|chunk|head_dim|(?<!all_)head_size|dim_head|topk|top_k|experts|patch|image|seq|"
    r"key_value_groups|per_tok|labels|num_emb|block|depth|state|steps|distance"
)


@dataclass(frozen=True)
class Change:
    """One attribute and what it must say.

    Args:
        owner: a module, or a configuration that is a copy of the model's.
        name: of the attribute.
        value: the new value.
    """

    owner: Any
    name: str
    value: Any

    def apply_(self) -> None:
        """Write it."""
        setattr(self.owner, self.name, self.value)


@dataclass(frozen=True)
class _Width:
    """One side of one module: how wide it was and how wide it is."""

    path: str
    side: str
    old: int
    new: int


@dataclass
class _Case:
    """One cut, as attributes see it."""

    cut: Cut
    widths: tuple[_Width, ...]
    modules: Mapping[str, nn.Module]

    @property
    def heads(self) -> bool:
        """Several channels go with every unit, wherever it is: heads of an attention."""
        return all(w.old > self.cut.units for w in self.widths if w.side != "through") or any(
            w.side == "out" and w.old > self.cut.units for w in self.widths
        )

    @property
    def stream(self) -> bool:
        """A norm, a table or a whole model's width is among them: a residual stream."""
        return not self.heads and any(
            isinstance(self.modules.get(w.path), (*TokenNorm, nn.Embedding))
            or (w.side == "through" and w.path not in self.modules)
            for w in self.widths
        )

    def scaled(self, value: int) -> int | None:
        """Count what is left of a number of heads."""
        units, kept = self.cut.units, len(self.cut.keep)
        return value * kept // units if value % units == 0 and value else None


def changes(model: nn.Module, cuts: Sequence[Cut], pieces: Sequence[Slice]) -> list[Change]:
    """Find the plain attributes that must follow a cut.

    Args:
        model: the dense model; left as it is.
        cuts: a plan's decisions.
        pieces: the same, joined by module and side.

    Returns:
        what to write once the tensors are cut; each attribute once.
    """
    modules = dict(model.named_modules())
    after = {(p.path, p.side): len(p.keep) for p in pieces}
    cases = [
        _Case(
            cut,
            tuple(_Width(s.path, s.side, s.size, after[s.path, s.side]) for s in cut.slices),
            modules,
        )
        for cut in cuts
        if len(cut.keep) < cut.units
    ]
    order = sorted(cases, key=lambda c: 0 if c.heads else 2 if c.stream else 1)
    found: dict[tuple[int, str], Change] = {}
    book = _Configs(modules)
    for case in order:
        for change in _of(case, book):
            found.setdefault((id(change.owner), change.name), change)
    return [*found.values(), *book.changes()]


def _of(case: _Case, book: _Configs) -> Iterator[Change]:
    for width in case.widths:
        if width.path not in case.modules:
            yield from _own(case, width)
    if case.stream:
        yield from _along_stream(case, book)
        return
    for path, near in _rooms(case):
        yield from _in_room(case, path, near, book)


def _own(case: _Case, width: _Width) -> Iterator[Change]:
    """A module that holds a bare parameter: Conv1D of GPT-2, a router, a home-made norm."""
    name = bare(width.path)[0]
    path, _, tensor = name.rpartition(".")
    owner = case.modules[path]
    if _counts_heads(owner):
        return  # a room of its own: treated as one
    cut_axis = axis_of(width.path, getattr(owner, tensor).shape)
    others = _uncut_axes(case, path, owner, (tensor, cut_axis))
    for key, value in _numbers(owner):
        new = _replaced(value, {width.old: width.new})
        if new is None or _NEVER.search(key):
            continue
        if width.old in others and (_IN if width.side == "out" else _OUT).search(key):
            continue
        if width.old in others and width.side == "in" and not _IN.search(key):
            continue
        yield Change(owner, key, new)


def _uncut_axes(case: _Case, path: str, owner: nn.Module, cut: tuple[str, int]) -> set[int]:
    done = {cut}
    for width in case.widths:
        whole, axis = bare(width.path)
        if width.path not in case.modules and whole.rpartition(".")[0] == path:
            name = whole.rpartition(".")[2]
            shape = getattr(owner, name).shape
            done.add((name, axis_of(width.path, shape) if axis is None else axis))
    return {
        size
        for name, leaf in owner.named_parameters(recurse=False)
        if leaf.dim() > 1
        for axis, size in enumerate(leaf.shape)
        if (name, axis) not in done
    }


def _rooms(case: _Case) -> list[tuple[str, bool]]:
    """List the modules around what is cut, nearest first: parent, then its parent."""
    found: dict[str, bool] = {}
    for width in case.widths:
        path = width.path
        if path not in case.modules:
            path = bare(path)[0].rpartition(".")[0]
            if _counts_heads(case.modules[path]):
                found[path] = True
                continue
        for near in (True, False):
            if not path:
                break
            path = path.rpartition(".")[0]
            found[path] = found.get(path, False) or near
    return list(found.items())


def _in_room(case: _Case, path: str, near: bool, book: _Configs) -> Iterator[Change]:
    room = case.modules[path]
    inside = [room, *(m for m in room.children() if near and not _holds_tensors(m))]
    for owner in inside:
        for key, value in _numbers(owner):
            new = _follow(case, room, key, value, near=near)
            if new is not None:
                yield Change(owner, key, new)
    if near and case.heads and (config := book.read_by(room)) is not None:
        for key, value in _fields(config, room):
            new = _follow(case, room, key, value, near=near)
            if new is not None:
                book.write(path, key, new)


def _follow(case: _Case, room: nn.Module, key: str, value: Any, *, near: bool) -> Any:
    """Say what an attribute becomes; None where it stays."""
    if case.heads and isinstance(value, int) and _HEADS.search(key):
        return case.scaled(value)
    if case.heads and value == case.cut.units and _GROUPS.search(key):
        return len(case.cut.keep)
    if _NEVER.search(key) or _HEADS.search(key) or not near:
        return None
    sizes = {w.old: w.new for w in case.widths if w.old > 1}
    if not case.heads:
        stay = _uncut_sides(case, room)
        if not _INNER.search(key):
            sizes = {old: new for old, new in sizes.items() if old not in stay}
    return _replaced(value, sizes)


def _uncut_sides(case: _Case, room: nn.Module) -> set[int]:
    """List the widths of layers in a room that this cut leaves alone."""
    cut = {(w.path, w.side) for w in case.widths}
    names = {id(m): path for path, m in case.modules.items()}
    return {
        size
        for child in room.modules()
        for side in ("in", "out")
        if (size := channels(child, side)) is not None  # type: ignore[arg-type]
        and not isinstance(child, TokenNorm)
        and (names.get(id(child), ""), side) not in cut
    }


def _along_stream(case: _Case, book: _Configs) -> Iterator[Change]:
    """A residual stream's width stands in many modules and in their configuration."""
    sizes = {w.old: w.new for w in case.widths if w.old > 1}
    owners = {bare(w.path)[0] for w in case.widths}
    holding = {""}
    for path in owners:
        while path:
            holding.add(path)
            path = path.rpartition(".")[0]
    for path, module in case.modules.items():
        bodiless = not _holds_tensors(module) and path.rpartition(".")[0] in holding
        if path not in holding and not bodiless:
            continue
        if channels(module, "out") is not None and not bodiless:
            continue  # `cut_` sees to these
        stay = _uncut_sides(case, module) if _counts_heads(module) else set()
        for key, value in _numbers(module):
            new = _replaced(value, {o: n for o, n in sizes.items() if o not in stay})
            if new is not None and not _elsewhere(key):
                yield Change(module, key, new)
        for key, value in _integers(book.of(path)):
            new = _replaced(value, sizes)
            if new is not None and not _elsewhere(key):
                book.write_all(path, key, new)


def _elsewhere(key: str) -> bool:
    return bool(_NEVER.search(key) or _HEADS.search(key) or _INNER.search(key))


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the integers, and tuples and lists of them, that a module keeps."""
    if channels(module, "out") is None or not _holds_tensors(module):
        yield from _integers(module)


def _integers(owner: object) -> Iterator[tuple[str, Any]]:
    for key, value in list(getattr(owner, "__dict__", {}).items()):
        if key.startswith("_") or isinstance(value, bool):
            continue
        whole = isinstance(value, (tuple, list)) and value and all(type(v) is int for v in value)
        if type(value) is int or whole:
            yield key, value


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    """Write new widths for old ones; None where there is none to write."""
    if isinstance(value, (tuple, list)):
        new = type(value)(sizes.get(v, v) for v in value)
        return new if new != value else None
    return sizes.get(value)


def _counts_heads(module: nn.Module) -> bool:
    return any(_HEADS.search(key) for key, value in _integers(module))


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _reads(module: nn.Module) -> set[str]:
    """List the names that the methods of a module's class mention, but for its construction."""
    names: set[str] = set()
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for key, method in vars(kind).items():
            code = getattr(method, "__code__", None)
            if code is not None and key != "__init__":
                names |= set(code.co_names)
    return names


def _fields(config: object, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration that a module reads while it runs."""
    read = _reads(module)
    if "config" not in read:
        return
    aliases = getattr(config, "attribute_map", {})
    named = {aliases.get(name, name) for name in read}
    for key, value in _integers(config):
        if key in named:
            yield key, value


class _Configs:
    """Copies of the configurations that must say something else, and who refers to them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.own: dict[str, Any] = {}
        self.shared: dict[int, Any] = {}

    def of(self, path: str) -> Any:
        """Give the configuration a module refers to; None without one."""
        found = vars(self.modules[path]).get("config")
        return found if is_config(found) else None

    def read_by(self, module: nn.Module) -> Any:
        """Give the configuration a module refers to; None without one."""
        found = vars(module).get("config")
        return found if is_config(found) else None

    def write(self, path: str, key: str, value: Any) -> None:
        """Let one module's own copy say something else."""
        self.own.setdefault(path, {})[key] = value

    def write_all(self, path: str, key: str, value: Any) -> None:
        """Let the one copy that all who share this configuration refer to say something else."""
        config = self.of(path)
        if id(config) not in self.shared:
            self.shared[id(config)] = (config, copy.copy(config))
        _set(self.shared[id(config)][1], key, value)

    def changes(self) -> Iterator[Change]:
        """Yield who must refer to which copy."""
        for _, made in list(self.shared.values()):
            for key, value in list(vars(made).items()):
                if id(value) in self.shared:
                    _set(made, key, self.shared[id(value)][1])
        for path, module in self.modules.items():
            config = self.of(path)
            if config is None:
                continue
            now = self.shared.get(id(config), (config, config))[1]
            if path in self.own:
                now = copy.copy(now)
                for key, value in self.own[path].items():
                    _set(now, key, value)
            if now is not config:
                yield Change(module, "config", now)


def _set(config: object, key: str, value: Any) -> None:
    """Write a field past the checks of a class that compares fields with one another."""
    object.__setattr__(config, key, value)
