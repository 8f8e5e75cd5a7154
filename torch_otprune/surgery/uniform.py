"""A configuration whose plain fields say how wide a model is, where one width holds everywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.plan.model import Cut
from torch_otprune.surgery.cut import merged
from torch_otprune.surgery.layout import is_config
from torch_otprune.surgery.reload import unlike

__all__ = ["fit_config_", "unsaid"]

_Place = tuple[str, ...]
"""A field of a configuration, or of a part of it: the names that lead there."""

_Edits = Mapping[_Place, int]
_HEAD = "head_dim"
_WHOLE = 1000  # more than the differences inside one module
_NUMBERS = ("_id", "_idx", "_index")


def fit_config_(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Let a model's configuration build it as it is now, so that any Transformers loads it.

    No table of field names: a field is written where that brings what the configuration builds
    closer to the model, and the end is reached when nothing is left between them.

    Args:
        model: the pruned model; its configuration is exchanged for a copy. A model without a
            configuration is left as it is.
        cuts: what was carried out on it.

    Raises:
        PlanError: if no fields say it; nothing is written then.
    """
    config = vars(model).get("config")
    if not is_config(config):
        return
    edits, left = _search(model, config, cuts)
    if left is None or left:
        raise PlanError(
            "the configuration cannot say what is left of the model: "
            f"{left[0] if left else 'it builds no model with these widths.'}",
            where=f"Policy.serving = 'uniform', {type(config).__name__}"
            + (f"; {len(left)} differences" if left else ""),
            fix="leave these layers out of the rules, or ask for serving='registered'.",
        )
    if edits:
        _write_(model, config, edits)


def unsaid(model: nn.Module, cuts: Sequence[Cut]) -> tuple[str, ...]:
    """Say what no fields of a configuration can express about a pruned model.

    Args:
        model: the pruned model; left as it is.
        cuts: what was carried out on it.

    Returns:
        one sentence per difference that is left; none where the fields say it all.
    """
    config = vars(model).get("config")
    if not is_config(config):
        return ()
    left = _search(model, config, cuts)[1]
    return ("its configuration builds no model with these widths.",) if left is None else left


def _search(
    model: nn.Module, config: Any, cuts: Sequence[Cut]
) -> tuple[_Edits, tuple[str, ...] | None]:
    """Write one field after another, each time the one after which least is left to say."""
    edits: dict[_Place, int] = {}
    left = unlike(model, config)
    for options in (list(_options(model, config, cuts)), list(_empty(model, config, cuts))):
        while left != () and options:
            tried = [unlike(model, _edited(config, {**edits, **o})[0]) for o in options]
            index = min(range(len(tried)), key=lambda i: _size(tried[i]))
            if _size(tried[index]) >= _size(left):
                break
            edits, left = {**edits, **options.pop(index)}, tried[index]
    return _needed(model, config, edits) if left == () else edits, left


def _size(left: tuple[str, ...] | None) -> float:
    """Weigh what is left; a module that is not there hides whatever else would differ in it."""
    if left is None:
        return float("inf")
    return sum(_WHOLE if "missing" in line else 1 for line in left)


def _needed(model: nn.Module, config: Any, edits: _Edits) -> _Edits:
    """Leave out what was written on the way and is not needed at the end."""
    for place in list(edits):
        fewer = {key: value for key, value in edits.items() if key != place}
        if unlike(model, _edited(config, fewer)[0]) == ():
            edits = fewer
    return edits


def _options(model: nn.Module, config: Any, cuts: Sequence[Cut]) -> Iterator[_Edits]:
    """List what fields may say instead: widths and counts that a cut has changed."""
    counts = {(cut.units, len(cut.keep)) for cut in cuts}
    # Where no field gives the size of a head, it is worked out from what changes here.
    sizes = {vars(m)[_HEAD] for m in model.modules() if type(vars(m).get(_HEAD)) is int}
    heads = {place: value for place, value in _fields(config) if "heads" in place[-1]}
    wider: list[dict[_Place, int]] = [
        {place: new}
        for place, value in _fields(config)
        for old, new in sorted(_sizes(cuts) | counts)
        if value == old
    ]
    for old, new in sorted(counts):  # several queries may share a key: both numbers at once
        scaled = {place: n // old * new for place, n in heads.items() if n % old == 0}
        wider += [scaled, *({place: n} for place, n in scaled.items())] if scaled else []
    parts = {place[:-1] for place, _ in _fields(config)}
    pins = [{(*part, _HEAD): size} for part in sorted(parts) for size in sorted(sizes)]
    joint = (one | pin for one in wider for pin in pins if heads.keys() & one.keys())
    unique = {tuple(option.items()): option for option in (*pins, *wider, *joint)}
    yield from unique.values()


def _sizes(cuts: Sequence[Cut]) -> set[tuple[int, int]]:
    return {(p.size, len(p.keep)) for p in merged(cuts) if len(p.keep) < p.size}


def _empty(model: nn.Module, config: Any, cuts: Sequence[Cut]) -> Iterator[_Edits]:
    """List fields that say nothing, which leaves a width to a rule of the model's own."""
    sizes = {new for _, new in _sizes(cuts)} | _untold(model, config)
    for place, value in _walk(config):
        if value is None and not place[-1].endswith(_NUMBERS):
            yield from ({place: size} for size in sorted(sizes))


def _untold(model: nn.Module, config: Any) -> set[int]:
    """List widths that no field says: the rule no longer gives them where another was cut."""
    shapes = (p.shape for p in model.parameters() if p.dim() == 2)
    return {size for shape in shapes for size in shape} - {v for _, v in _fields(config)}


def _fields(config: Any) -> Iterator[tuple[_Place, int]]:
    for place, value in _walk(config):
        if type(value) is int and value > 1 and not place[-1].endswith(_NUMBERS):
            yield place, value


def _walk(config: Any, place: _Place = ()) -> Iterator[tuple[_Place, Any]]:
    for key, value in vars(config).items():
        if is_config(value):
            yield from _walk(value, (*place, key))
        elif not key.startswith("_"):
            yield (*place, key), value


def _edited(config: Any, edits: _Edits) -> tuple[Any, dict[int, Any]]:
    """Copy a configuration with other values; and tell which part became which."""
    memo: dict[int, Any] = {}
    made = copy.deepcopy(config, memo)
    for place, value in edits.items():
        part = made
        for name in place[:-1]:
            part = vars(part)[name]
        # Past the checks of a class that compares fields with one another: building checks all.
        object.__setattr__(part, place[-1], value)
    return made, memo


def _write_(model: nn.Module, config: Any, edits: _Edits) -> None:
    _, memo = _edited(config, edits)
    for module in model.modules():
        fields = vars(module)
        fields.update({k: memo[id(v)] for k, v in fields.items() if is_config(v) and id(v) in memo})
