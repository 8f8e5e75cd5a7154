"""A deep copy of a model, cached activations included."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["copied", "lendable"]


def copied(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """Copy a model; tensors that hang on an autograd graph are copied off it.

    PyTorch refuses to copy those, yet a module that keeps its last activation has one.

    Args:
        model: any module; left as it was.
        shared: whether the copy holds the model's own parameters: for a copy that is cut and run,
            as a cut replaces tensors and writes none. Buffers, which forward may write, and the
            weights of recurrent layers, which cuDNN moves, are copied.

    Returns:
        the copy.
    """
    hanging = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in hanging}
    if shared:
        memo |= {id(parameter): parameter for parameter in lendable(model)}
    return copy.deepcopy(model, memo)


def lendable(model: nn.Module) -> Iterator[nn.Parameter]:
    """List the parameters that a copy may share.

    Args:
        model: any module.

    Yields:
        all but those of recurrent layers.
    """
    moved = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.RNNBase)
        for parameter in module.parameters()
    }
    yield from (parameter for parameter in model.parameters() if id(parameter) not in moved)
