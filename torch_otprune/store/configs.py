"""Configurations that a pruning changed: what they said, and how they say it again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from torch_otprune.store.parts import read
from torch_otprune.surgery.layout import is_config

__all__ = ["field_changes", "put_fields_", "sharing"]

_ABSENT = ""  # no value is written like this


def field_changes(
    modules: Iterable[tuple[str, nn.Module, Mapping[str, Any]]],
) -> dict[str, dict[str, str]]:
    """List what the configurations of a dense model said and those of the pruned one do not.

    Args:
        modules: path, module and old attributes of what was there before.

    Returns:
        path to `attribute.field` to the old value as Python writes it.
    """
    found: dict[str, dict[str, str]] = {}
    for path, module, said in modules:
        for key, before in said.items():
            now = vars(module).get(key)
            if is_config(before) and is_config(now) and now is not before:
                changed = _changed(vars(before), vars(now))
                found.setdefault(path, {}).update({f"{key}.{k}": v for k, v in changed.items()})
    return {path: fields for path, fields in found.items() if fields}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    fields = {key: _ABSENT for key in now if key not in before}
    for key, value in before.items():
        if key in now and (now[key] is value or now[key] == value):
            continue
        text = repr(value)
        try:
            same = repr(read(text)) == text
        except ValueError:  # another configuration inside: it has modules of its own
            same = False
        if same:
            fields[key] = text
    return fields


def sharing(modules: Iterable[tuple[str, nn.Module, Mapping[str, Any]]]) -> dict[str, int]:
    """Number the configurations of a dense model, so that those who shared one share it again.

    Args:
        modules: path, module and old attributes of what was there before.

    Returns:
        `path.attribute` to the number of the object.
    """
    numbers: dict[int, int] = {}
    return {
        f"{path}.{key}".strip("."): numbers.setdefault(id(value), len(numbers))
        for path, _, said in modules
        for key, value in said.items()
        if is_config(value)
    }


def put_fields_(
    model: nn.Module, fields: Mapping[str, Mapping[str, str]], shared: Mapping[str, int]
) -> None:
    """Let configurations say again what they said, and the same modules refer to the same one.

    Args:
        model: every configuration to change is exchanged for a copy.
        fields: what `field_changes` returned.
        shared: what `sharing` returned.
    """
    made: dict[int, Any] = {}
    instead: dict[int, Any] = {}
    kept: list[Any] = []  # an address that is free again would be taken again
    for name, number in shared.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        old = vars(module)[key]
        if number not in made:
            told = {n.partition(".")[::2]: text for n, text in fields.get(path, {}).items()}
            own = {field: text for (attribute, field), text in told.items() if attribute == key}
            made[number] = _copied(old, own) if own else old
        kept.append(old)
        instead[id(old)] = made[number]
        setattr(module, key, made[number])
    for config in made.values():  # a whole refers to its parts
        for key, value in list(vars(config).items()):
            if instead.get(id(value), value) is not value:
                object.__setattr__(config, key, instead[id(value)])


def _copied(config: Any, fields: Mapping[str, str]) -> Any:
    new = copy.copy(config)
    for key, text in fields.items():
        if text == _ABSENT:
            vars(new).pop(key, None)
        else:  # past the checks of a class that compares fields with one another
            object.__setattr__(new, key, read(text))
    return new
