"""A deep copy of a model, cached activations included."""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["copied"]


def copied(model: nn.Module) -> nn.Module:
    """Copy a model; tensors that hang on an autograd graph are copied off it.

    PyTorch refuses to copy those, yet a module that keeps its last activation has one.

    Args:
        model: any module; left as it was.

    Returns:
        the copy.
    """
    hanging = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in hanging})
