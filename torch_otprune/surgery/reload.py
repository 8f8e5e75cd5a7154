"""Whether a model's own configuration would build it again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from torch_otprune.structure.forward import first_line
from torch_otprune.surgery.layout import PLAIN, is_config

__all__ = ["unlike", "unlike_config"]


@runtime_checkable
class _Saved(Protocol):
    """A configuration that can be written as plain values and read again."""

    def to_dict(self) -> dict[str, Any]:
        """Write it."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Read it."""


def unlike_config(model: nn.Module) -> tuple[str, ...]:
    """Compare a model with what its configuration builds.

    Where they agree, `save_pretrained` and `from_pretrained` bring the model back. Where they
    do not, the difference would be lost in silence: as far as a configuration can tell, every
    layer of a kind is alike.

    Args:
        model: any module; only what holds a configuration in it, and is built from that alone,
            can be compared.

    Returns:
        one sentence per difference, in order; none also where there is no configuration.

    Limits: costs one construction on the meta device. Functions and tensors' values are not
    compared.
    """
    return tuple(
        line
        for path, module in _roots(model)
        for line in _differences(path, module, vars(module)["config"])
    )


def unlike(model: nn.Module, config: Any) -> tuple[str, ...] | None:
    """Compare a model with what another configuration builds.

    Args:
        model: any module that is built from a configuration alone.
        config: the configuration.

    Returns:
        one sentence per difference; None where that configuration builds nothing.
    """
    try:
        return tuple(_apart("", model, _built(model, config)))
    except Exception:  # noqa: BLE001  # a constructor of the user's refuses what it refuses
        return None


def _roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules with a configuration of their own."""
    found: list[str] = []
    for path, module in model.named_modules():
        inner = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if not inner and is_config(vars(module).get("config")):
            found.append(path)
            yield path, module


def _differences(path: str, module: nn.Module, config: Any) -> Iterator[str]:
    try:
        built = _built(module, config)
    except Exception as error:  # noqa: BLE001  # a constructor of the user's, on a device that holds no values
        yield f"{_named(path)} cannot be built from its configuration: {first_line(error)}."
        return
    yield from _apart(path, module, built)


def _built(module: nn.Module, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(module)(_read(config))


def _apart(path: str, module: nn.Module, built: nn.Module) -> Iterator[str]:
    ours, theirs = dict(module.named_modules()), dict(built.named_modules())
    apart: list[str] = []
    for name in dict.fromkeys([*ours, *theirs]):
        here = _named(f"{path}.{name}".strip("."))
        if any(name.startswith(f"{outer}.") for outer in apart):
            continue  # said of the module around it
        if type(ours.get(name)) is not type(theirs.get(name)):
            apart.append(name)
        yield from _between(here, ours.get(name), theirs.get(name))


def _read(config: Any) -> Any:
    """Copy a configuration as saving and loading would."""
    if isinstance(config, _Saved):
        return type(config).from_dict(config.to_dict())
    return copy.deepcopy(config)


def _named(path: str) -> str:
    return f"'{path}'" if path else "the model"


def _between(here: str, ours: nn.Module | None, theirs: nn.Module | None) -> Iterator[str]:
    """Compare one module with what stands in its place."""
    if ours is None or theirs is None or type(ours) is not type(theirs):
        yield f"{here} is {_kind(ours)}, its configuration builds {_kind(theirs)}."
        return
    told, built = _said(ours), _said(theirs)
    for key in dict.fromkeys([*told, *built]):
        if told.get(key) != built.get(key):
            yield (f"{here} has {key} {told.get(key)}, its configuration builds {built.get(key)}.")


def _kind(module: nn.Module | None) -> str:
    return "missing" if module is None else type(module).__name__


def _said(module: nn.Module) -> dict[str, Any]:
    """Read a module's plain attributes and the shapes of its tensors."""
    fields = vars(module)
    plain = {k: v for k, v in fields.items() if isinstance(v, PLAIN) and not k.startswith("_")}
    plain.pop("training", None)
    tensors = {**fields["_parameters"], **fields["_buffers"]}
    return plain | {k: tuple(t.shape) for k, t in tensors.items() if t is not None}
