"""The way back for structure: which module sits where, and what modules say about themselves."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

__all__ = ["PLAIN", "Layout", "forget_recorders_", "is_config"]

PLAIN = (bool, int, float, str, tuple, type(None))
# Transformers installs its recording hooks once, on the modules that are there at the time.
_RECORDING = "_output_capturing_hooks_installed"
_RECORDER = "transformers.utils.output_capturing"


@runtime_checkable
class _Described(Protocol):
    """What a Transformers configuration has in common with others of its kind."""

    def to_dict(self) -> dict[str, Any]:
        """Write it as plain values."""


def is_config(value: object) -> bool:
    """Tell a configuration that a module refers to.

    Args:
        value: any attribute of a module.

    Returns:
        whether it is an object with `to_dict`, or an instance of a dataclass.
    """
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, _Described) or is_dataclass(value)


class Layout:
    """A model's structure at one moment: module tables, plain attributes, configurations.

    Tensors are not kept. Configurations are kept by reference: whoever changes one afterwards
    must change a copy.

    Args:
        model: the model to remember.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._records = [_Record(module) for module in model.modules()]

    def restore_(self) -> None:
        """Put every module, plain attribute and configuration back."""
        for record in self._records:
            record.restore_()
        for record in self._records:  # now that the modules are back that must lose their hooks
            record.forget_()


class _Record:
    """One module's share of a layout."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.children = dict(module._modules)
        self.recording = _RECORDING in vars(module)
        self.plain: dict[str, Any] = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_")
            and (isinstance(value, PLAIN) or is_config(value) or _is_widths(value))
        }

    def forget_(self) -> None:
        if _RECORDING in vars(self.module) and not self.recording:
            forget_recorders_(self.module)

    def restore_(self) -> None:
        table = self.module._modules
        table.clear()
        table.update(self.children)
        vars(self.module).update(self.plain)


def _is_widths(value: object) -> bool:
    """Tell a list of integers, which a cut replaces by another."""
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def forget_recorders_(model: nn.Module) -> None:
    """Let Transformers install its hooks anew: modules that come back have none."""
    for module in model.modules():
        vars(module).pop(_RECORDING, None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == _RECORDER:
                del module._forward_hooks[key]
