"""Configurations that must say something else after a cut: copies, and who refers to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_otprune.structure.configs import refused
from torch_otprune.surgery.layout import is_config

__all__ = ["Change", "Configs"]


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


class Configs:
    """Copies of the configurations that must say something else, and who refers to them.

    Args:
        modules: of the model, by path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.own: dict[str, Any] = {}
        self.shared: dict[int, Any] = {}

    def of(self, path: str) -> Any:
        """Find the configuration that a module refers to.

        Args:
            path: of the module.

        Returns:
            the object; None without one.
        """
        found = vars(self.modules[path]).get("config")
        return found if is_config(found) else None

    def write(self, path: str, key: str, value: Any) -> None:
        """Let one module's own copy say something else.

        Args:
            path: of the module.
            key: the field.
            value: what it says there.
        """
        self.own.setdefault(path, {})[key] = value

    def write_all(self, path: str, key: str, value: Any) -> None:
        """Let the one copy that all who share a configuration refer to say something else.

        Args:
            path: of a module that refers to it.
            key: the field.
            value: what it says there.
        """
        config = self.of(path)
        if id(config) not in self.shared:
            self.shared[id(config)] = (config, copy.copy(config))
        _set(self.shared[id(config)][1], key, value)

    def changes(self) -> Iterator[Change]:
        """Say who must refer to which copy.

        Yields:
            one change per module.
        """
        for _, made in list(self.shared.values()):
            for key, value in list(vars(made).items()):
                if id(value) in self.shared:
                    _set(made, key, self.shared[id(value)][1])
        for path, module in self.modules.items():
            config = self.of(path)
            if config is None or _computes(module):
                continue
            now = self.shared.get(id(config), (config, config))[1]
            if not path and now is not config:
                now = _accepted(config, now)
            if path in self.own:
                now = copy.copy(now)
                for key, value in self.own[path].items():
                    _set(now, key, value)
            if now is not config:
                yield Change(module, "config", now)


def _computes(module: nn.Module) -> bool:
    """Tell a module that works its buffers out of its configuration, as rotary tables are."""
    # It may do so again later, and must find then what it found at first.
    return bool(module._non_persistent_buffers_set) and next(module.parameters(), None) is None


def _accepted(before: Any, now: Any) -> Any:
    """Take back what a configuration would refuse to be written with."""
    # Some refuse a width that is no multiple of the number of heads, whatever a head's own size.
    if not refused(now) or refused(before):
        return now
    kept = copy.copy(now)
    for key, value in vars(now).items():
        if value is not vars(before).get(key):
            _set(kept, key, vars(before).get(key))
            if not refused(kept):
                break
    return kept


def _set(config: object, key: str, value: Any) -> None:
    """Write a field past the checks of a class that compares fields with one another."""
    object.__setattr__(config, key, value)
