"""A model that writes to its own buffers while it runs is given them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["unwritten"]


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Put every buffer back as it was, whatever forward makes of it meanwhile.

    Args:
        model: any module.

    Yields:
        nothing.
    """
    held = [
        (module, name, buffer, None if buffer.is_meta else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in held:
            module._buffers[name] = buffer
            if before is not None and buffer.shape != before.shape:
                module._buffers[name] = before
            elif before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
