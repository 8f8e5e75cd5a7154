"""The way back: everything a cut or a repair may touch, kept as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.surgery.layout import PLAIN, Layout, is_config
from torch_otprune.surgery.lineage import give_
from torch_otprune.surgery.recurrent import refresh_

__all__ = ["Snapshot"]

_TABLES = ("_parameters", "_buffers")


class Snapshot:
    """A model's tensors and widths at one moment.

    The old tensors themselves come back, refilled with their old values, so that an optimiser
    that still points at them is right again. Costs one copy of the model's tensors.

    Args:
        model: the model to remember.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layout = Layout(model)
        self._records = [_Record(module) for module in model.modules()]

    def modules(self) -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
        """List the modules that were there, and what they said about themselves.

        Yields:
            path, module, plain attributes; a module that sits at several places comes again.
        """
        known = {id(record.module): record for record in self._records}
        pending = [("", self.model)]
        while pending:
            path, module = pending.pop()
            record = known[id(module)]
            yield path, module, record.said
            inner = [
                (_joined(path, name), m) for name, m in record.children.items() if m is not None
            ]
            pending += reversed(inner)

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """List the tensors that were there.

        Yields:
            full name, the tensor itself, its old memory, and a copy of its old values.
        """
        known = {id(record.module): record for record in self._records}
        for path, module, _ in self.modules():
            for entries in known[id(module)].tensors.values():
                for key, entry in entries.items():
                    if entry is not None:
                        yield _joined(path, key), *entry

    def restore_(self) -> None:
        """Put every module, tensor, width and training flag back, bit for bit."""
        self._layout.restore_()
        with torch.inference_mode(mode=False), torch.no_grad():
            for record in self._records:
                record.restore_()


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Record:
    """One module's share of a snapshot."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.children = dict(module._modules)
        self.said = {
            key: list(value) if isinstance(value, list) else value
            for key, value in vars(module).items()
            if isinstance(value, (*PLAIN, list)) or is_config(value)
        }
        self.tensors: dict[str, dict[str, tuple[Tensor, Tensor, Tensor] | None]] = {
            table: {
                key: None if t is None else (t, t.detach(), t.detach().clone())
                for key, t in vars(module)[table].items()
            }
            for table in _TABLES
        }

    def restore_(self) -> None:
        for table, entries in self.tensors.items():
            live = vars(self.module)[table]
            live.clear()
            for key, entry in entries.items():
                if entry is not None:
                    _refill_(*entry)
                live[key] = entry and entry[0]
        refresh_(self.module)


def _refill_(tensor: Tensor, memory: Tensor, value: Tensor) -> None:
    """Write in place, so that whatever shares the memory is right again too."""
    memory.copy_(value)
    if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
        give_(tensor, memory)  # somebody put other data under the same tensor
