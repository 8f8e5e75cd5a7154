"""The way back: everything a cut or a repair may touch, kept as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_otprune.surgery.layout import Layout
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

    def restore_(self) -> None:
        """Put every module, tensor, width and training flag back, bit for bit."""
        self._layout.restore_()
        with torch.inference_mode(mode=False), torch.no_grad():
            for record in self._records:
                record.restore_()


class _Record:
    """One module's share of a snapshot."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors: dict[str, dict[str, tuple[Tensor | None, Tensor | None]]] = {
            table: {
                key: (t, None if t is None else t.detach().clone())
                for key, t in vars(module)[table].items()
            }
            for table in _TABLES
        }

    def restore_(self) -> None:
        for table, entries in self.tensors.items():
            live = vars(self.module)[table]
            live.clear()
            for key, (tensor, value) in entries.items():
                if tensor is not None and value is not None:
                    _refill_(tensor, value)
                live[key] = tensor
        refresh_(self.module)


def _refill_(tensor: Tensor, value: Tensor) -> None:
    """Write in place, so that whatever shares the memory is right again too."""
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:  # somebody put other data under the same tensor
        tensor.data = value.clone()
