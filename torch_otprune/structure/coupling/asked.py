"""Which axis of a view follows its channels: the one whose size forward leaves open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_otprune.structure.coupling.fields import core, varying
from torch_otprune.structure.coupling.ledger import Ledger

__all__ = ["Asked"]

_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
_SPLITS = (Tensor.unflatten, torch.unflatten)


class Asked(TorchFunctionMode):
    """Note the -1 in `view(batch, 3, -1)`: where labels vary along it, it is their count.

    Args:
        ledger: where it is noted.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in _VIEWS or function in _SPLITS:
            self._note(function, [*args, *(kwargs or {}).values()], out)
        return out

    def _note(self, function: Any, given: list[Any], out: Any) -> None:
        sizes = given[1:]
        if function in _SPLITS:
            first, sizes = sizes[0] % given[0].dim(), sizes[1:]
        else:
            first = 0
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        if not isinstance(out, Tensor) or -1 not in [s for s in sizes if isinstance(s, int)]:
            return
        axis = first + sizes.index(-1)
        for field in self.ledger.fact(out).fields:
            vary = varying(field)
            if axis in vary and len(vary) > 1:
                self.ledger.asks.append((core(field), axis))
