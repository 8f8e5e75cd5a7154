"""What modules say about themselves in plain integers, put right after a cut.

No list of model classes: an integer follows a cut if it stands in a module near the layers that
were cut, and equals a width or counts heads that changed. Names decide only where two readings
are possible, and the trial on the real model has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_otprune.plan.model import Cut, Slice
from torch_otprune.structure.layers import axis_of, bare, channels, is_token_norm
from torch_otprune.surgery.configs import Change, Configs
from torch_otprune.surgery.wording import mentions, only_scales

__all__ = ["changes"]

_HEADS = re.compile(r"heads?$|^n_?heads?$|nheads?$")
_SHARED = re.compile(r"key_value_groups|n_rep$")
_GROUPS = re.compile(r"^n(um)?_?groups$")
_STREAM = "d_model"  # the width of all heads together has other names
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
    def each(self) -> set[int]:
        """How many channels one head has, layer by layer."""
        return {w.old // self.cut.units for w in self.widths if w.old > self.cut.units}

    @property
    def stream(self) -> bool:
        """A norm, a table or a whole model's width is among them: a residual stream."""
        return not self.heads and any(
            self._normed(w) or (w.side == "through" and w.path not in self.modules)
            for w in self.widths
        )

    def _normed(self, width: _Width) -> bool:
        module = self.modules.get(width.path)
        return module is not None and (
            is_token_norm(module) or isinstance(module, (nn.Embedding, nn.GroupNorm))
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
    book = Configs(modules)
    for case in order:
        for change in _of(case, book):
            found.setdefault((id(change.owner), change.name), change)
    return [*found.values(), *book.changes()]


def _of(case: _Case, book: Configs) -> Iterator[Change]:
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
        if new is None or _NEVER.search(key) or only_scales(type(owner), key):
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
    theirs = {p for p, m in case.modules.items() if isinstance(m, nn.MultiheadAttention)}
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
    return [(path, near) for path, near in found.items() if path not in theirs]


def _in_room(case: _Case, path: str, near: bool, book: Configs) -> Iterator[Change]:
    room = case.modules[path]
    inside = [room, *(m for m in room.children() if near and not _holds_tensors(m))]
    for owner in inside:
        for key, value in _numbers(owner):
            new = _follow(case, room, key, value, near=near)
            if new is not None:
                yield Change(owner, key, new)
    if near and case.heads and (config := book.of(path)) is not None:
        for key, value in _fields(config, room):
            new = _follow(case, room, key, value, near=near)
            if new is not None:
                book.write(path, key, new)


def _follow(case: _Case, room: nn.Module, key: str, value: Any, *, near: bool) -> Any:
    """Say what an attribute becomes; None where it stays."""
    if case.heads and isinstance(value, int) and _HEADS.search(key):
        return case.scaled(value)
    if case.heads and type(value) is int and _SHARED.search(key):
        return case.scaled(value) if _queries_alone(case) else None
    if case.heads and value == case.cut.units and _GROUPS.search(key):
        return len(case.cut.keep)
    if _NEVER.search(key) or _HEADS.search(key) or not near:
        return None
    sizes = {w.old: w.new for w in case.widths if w.old > 1}
    if case.heads and _counts_heads(room) and case.cut.units in case.each:
        sizes.pop(case.cut.units, None)  # heads are counted under their name: this is their size
    if key == _STREAM and value in _uncut_sides(case, room):
        return None
    if not case.heads:
        stay = _uncut_sides(case, room)
        if not _INNER.search(key):
            sizes = {old: new for old, new in sizes.items() if old not in stay}
    return _replaced(value, sizes)


def _queries_alone(case: _Case) -> bool:
    """Tell whether queries go while all share the keys: then fewer of them share each."""
    outs = [w for w in case.widths if w.side == "out" and w.path in case.modules]
    ins = [w.old for w in case.widths if w.side == "in"]
    return len(outs) == 1 and bool(ins) and outs[0].old < 3 * ins[0]


def _uncut_sides(case: _Case, room: nn.Module) -> set[int]:
    """List the widths of layers in a room that this cut leaves alone."""
    cut = {(id(case.modules.get(w.path)), w.side) for w in case.widths}
    return {
        size
        for child in room.modules()
        for side in ("in", "out")
        if (size := channels(child, side)) is not None
        and not is_token_norm(child)
        and (id(child), side) not in cut
    }


def _along_stream(case: _Case, book: Configs) -> Iterator[Change]:
    """A residual stream's width stands in many modules and in their configuration."""
    sizes = {w.old: w.new for w in case.widths if w.old > 1}
    owners = {bare(w.path)[0] for w in case.widths}
    holding = {""}
    for parts in (path.split(".") for path in owners):
        holding |= {".".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    for path, module in case.modules.items():
        bodiless = not _holds_tensors(module) and path.rpartition(".")[0] in holding
        if path not in holding and not bodiless:
            continue
        if channels(module, "out") is not None and not bodiless:
            continue  # `cut_` sees to these
        stay = _uncut_sides(case, module) if _counts_heads(module) else set()
        for key, value in _numbers(module):
            new = _replaced(value, {o: n for o, n in sizes.items() if o not in stay})
            if new is not None and not _elsewhere(key) and not only_scales(type(module), key):
                yield Change(module, key, new)
        config = book.of(path)
        for key, value in _integers(config):
            new = _replaced(value, sizes)
            if new is not None and not _elsewhere(key) and not only_scales(type(config), key):
                book.write_all(path, key, new)
                if only_scales(type(module), key):
                    book.write(path, key, value)


def _elsewhere(key: str) -> bool:
    return bool(_NEVER.search(key) or _HEADS.search(key) or _INNER.search(key))


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the integers, and tuples and lists of them, that a module keeps."""
    if channels(module, "out") is None:
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


def _fields(config: object, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration that a module reads while it runs."""
    read = mentions(module)
    if "config" not in read:
        return
    aliases = getattr(config, "attribute_map", {})
    named = {aliases.get(name, name) for name in read}
    for key, value in _integers(config):
        if key in named:
            yield key, value
