"""Take what stands for removed layers out of its list, and make the model say so."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_otprune.errors import PlanError
from torch_otprune.nn import Skip
from torch_otprune.structure.forward import evaluating, first_line, flat_tensors, run, run_checked
from torch_otprune.surgery.compact_config import Place, place_of, retype_, shorten_, types_of
from torch_otprune.surgery.compact_index import Entry, renumber_, silenced
from torch_otprune.surgery.experts import settle_
from torch_otprune.surgery.layout import Layout

__all__ = ["compact_", "renamed", "take_out_"]

_log = logging.getLogger(__name__)

_ONLY_NUMBERED = "*"  # no entry of a list is called that

_Box: TypeAlias = nn.ModuleList | nn.Sequential


def compact_(model: nn.Module, example: Any) -> tuple[str, ...]:
    """Take every `Skip` out of the lists that it sits in, and number what is left anew.

    Depth and types of layers in the configuration, their numbers and their places in the
    key-value cache follow. The model's output stays the same, bit for bit: a list whose loss
    would change it keeps its placeholders, and no list is left empty.

    Args:
        model: with placeholders; written in place.
        example: one batch, as the model takes it.

    Returns:
        what `take_out_` needs to do the same again: the paths that went, as they were before,
        and `<list>.*` for a list whose layers were only numbered anew.

    Raises:
        CalibrationError: if the model does not run on the example.

    Limits: places in the cache are worked out, not tried: the example is run without
    generating. Numbers that continue from one list to the next stay as they are.
    """
    gone: list[str] = []
    with evaluating(model), torch.no_grad():
        expected = [t.clone() for t in flat_tensors(run_checked(model, example, 0))]
        for path, box in _boxes(model):
            names = _placeholders(box)
            given = {"path": path, "example": example, "expected": expected}
            if names and _try_(model, box, names, **given):
                gone += [_joined(path, name) for name in names]
            elif _silenced(model, box) and _try_(model, box, (), **given):
                gone.append(_joined(path, _ONLY_NUMBERED))
    return tuple(gone)


def take_out_(model: nn.Module, gone: Iterable[str]) -> None:
    """Do again, on an equal model, what `compact_` has found to be possible.

    Args:
        model: with the same placeholders; written in place.
        gone: what `compact_` returned.

    Raises:
        PlanError: if there is no placeholder where one should go; nothing is written then.
    """
    settle_(model)
    asked: dict[str, list[str]] = {}
    for path in gone:
        owner, _, name = path.rpartition(".")
        asked.setdefault(owner, []).append(name)
    boxes = dict(_boxes(model))
    for path, names in asked.items():
        _check_placeholders(path, boxes.get(path), [n for n in names if n != _ONLY_NUMBERED])
    for path, box in boxes.items():
        if path in asked:
            _take_(model, box, [n for n in asked[path] if n != _ONLY_NUMBERED])


def _check_placeholders(path: str, box: _Box | None, names: Sequence[str]) -> None:
    table = {} if box is None else box._modules
    for name in names or ([_ONLY_NUMBERED] if box is None else []):
        if not isinstance(table.get(name), Skip):
            raise PlanError(
                "the plan takes a removed layer out of a list that does not hold its placeholder.",
                where=f"'{_joined(path, name)}'",
                fix="apply the plan to the dense model it was made for.",
            )


def renamed(names: Iterable[str], gone: Iterable[str]) -> dict[str, str]:
    """Tell what modules are called after entries of lists are gone.

    Args:
        names: every module path of the model before.
        gone: the paths that went, as `compact_` returned them.

    Returns:
        old path to new path of what is left; entries of a list that is not numbered from zero
        keep their names.

    Example:
        >>> renamed(["h", "h.0", "h.1", "h.1.mlp", "h.2"], ["h.0"])
        {'h': 'h', 'h.1': 'h.0', 'h.1.mlp': 'h.0.mlp', 'h.2': 'h.1'}
    """
    names = list(names)
    lost = {path for path in gone if path.rpartition(".")[2] != _ONLY_NUMBERED}
    children: dict[str, list[str]] = {}
    for path in dict.fromkeys(p for name in [*names, *lost] if name for p in _prefixes(name)):
        owner, _, entry = path.rpartition(".")
        children.setdefault(owner, []).append(entry)
    moved = {
        _joined(owner, old): new
        for owner, entries in children.items()
        for old, new in _moved(owner, entries, lost).items()
    }
    return {name: _path(name, moved) for name in names if not _within(name, lost)}


def _moved(owner: str, entries: Sequence[str], lost: set[str]) -> dict[str, str]:
    """Number what is left of one list; nothing where its entries have names."""
    order = [str(i) for i in range(len(entries))]
    if sorted(entries) != sorted(order):
        return {}
    kept = [entry for entry in order if _joined(owner, entry) not in lost]
    return {old: str(new) for new, old in enumerate(kept)}


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _within(name: str, lost: set[str]) -> bool:
    return any(prefix in lost for prefix in _prefixes(name))


def _path(name: str, moved: Mapping[str, str]) -> str:
    return ".".join(moved.get(p, p.rpartition(".")[2]) for p in _prefixes(name))


def _boxes(model: nn.Module) -> list[tuple[str, _Box]]:
    """List the lists of modules, outer before inner."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    ]


def _placeholders(box: _Box) -> list[str]:
    """Name the entries to take out: all placeholders, but the first where there is nothing else."""
    names = [name for name, module in box._modules.items() if isinstance(module, Skip)]
    return names[1:] if len(names) == len(box) else names


def _entries(box: _Box, without: Sequence[str]) -> list[Entry]:
    return [
        Entry(old, module)
        for old, (name, module) in enumerate(box._modules.items())
        if name not in without and module is not None
    ]


def _silenced(model: nn.Module, box: _Box) -> bool:
    return _place(model, box).stage is None and silenced(_entries(box, ()))


def _place(model: nn.Module, box: _Box) -> Place:
    return place_of(model, next(path for path, module in model.named_modules() if module is box))


def _try_(
    model: nn.Module,
    box: _Box,
    names: Sequence[str],
    *,
    path: str,
    example: Any,
    expected: Sequence[Tensor],
) -> bool:
    """Take entries out of one list, or leave everything as it is."""
    layout = Layout(model)
    _take_(model, box, names)
    objection = _objection(model, example, expected)
    if objection:
        layout.restore_()
        _log.info("'%s' keeps its placeholders: %s", path, objection)
    return not objection


def _take_(model: nn.Module, box: _Box, names: Sequence[str]) -> None:
    """Take entries out of one list, and put right what counts or numbers them."""
    table, count = box._modules, len(box)
    entries = _entries(box, names)
    place = _place(model, box)
    if names:
        gone = {old for old, name in enumerate(table) if name in names}
        numbered = list(table) == [str(i) for i in range(count)]
        kept = [(name, module) for name, module in table.items() if name not in names]
        table.clear()
        table.update((str(new) if numbered else n, m) for new, (n, m) in enumerate(kept))
        shorten_(model, place, count, gone)
    if place.stage is None:
        types = types_of(place, len(entries))
        changed = renumber_(entries, types)
        if changed is not None and changed != types:
            retype_(model, place, changed)


def _objection(model: nn.Module, example: Any, expected: Sequence[Tensor]) -> str:
    """Say how a model's output differs from what is expected; nothing where it does not."""
    try:
        got = flat_tensors(run(model, example))
    except Exception as error:  # noqa: BLE001  # forward may look for an entry that is gone
        return f"the model does not run without them: {first_line(error)}."
    same = len(got) == len(expected) and all(map(_equal, got, expected))
    return "" if same else "the output is another without them."


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
