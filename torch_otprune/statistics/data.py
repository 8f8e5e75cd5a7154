"""From whatever the user calls data to a bounded list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.structure.forward import Call, batch_size, flat_tensors, head, joined, make

__all__ = ["check_finite", "collect", "rebatched"]

_BATCH = 64


def collect(
    model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any], samples: int
) -> list[Any]:
    """Take batches from an iterable, or record those that a callable runs the model on.

    Args:
        model: the model; run only where data is a callable.
        data: batches (tensor, tuple, mapping, Transformers batch), or a function of the model.
        samples: how many to take at most; the last batch is shortened.

    Returns:
        at least one batch.

    Raises:
        CalibrationError: if there is nothing to take, or a batch holds NaN or infinity.
    """
    if isinstance(data, Tensor):
        data = [data]
    source = _recorded(model, data) if callable(data) and not isinstance(data, Iterable) else data
    batches: list[Any] = []
    left = samples
    for batch in source:
        if left <= 0:
            break
        check_finite(batch, len(batches))
        size = batch_size(batch)
        batches.append(batch if size <= left else head(batch, left))
        left -= size
    if not batches:
        raise CalibrationError(
            "the data yielded no batch.",
            where=f"data of type {type(data).__name__}",
            fix="pass a list or a DataLoader with batches; an iterator is spent after one pass.",
        )
    return batches


def rebatched(batches: Sequence[Any], size: int = _BATCH) -> list[Any]:
    """Join small neighbouring batches, so that the number of batches stays small.

    Args:
        batches: in order.
        size: samples wanted per batch.

    Returns:
        the same samples in the same order.
    """
    found: list[list[Any]] = []
    for batch in batches:
        last = found[-1] if found else []
        room = bool(last) and sum(map(batch_size, last)) + batch_size(batch) <= size
        if room and make(last[0]) == make(batch):
            last.append(batch)
        else:
            found.append([batch])
    return [joined(group) if len(group) > 1 else group[0] for group in found]


def check_finite(batch: Any, index: int) -> None:
    """Refuse a batch with NaN or infinity before it reaches the model.

    Args:
        batch: as the model takes it.
        index: its place in the data.

    Raises:
        CalibrationError: naming the batch and the sample.
    """
    for tensor in flat_tensors(batch):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise CalibrationError(
                "the input holds NaN or infinity.",
                where=f"batch {index}, a {tuple(tensor.shape)} tensor, at {where}",
                fix="clean the data.",
            )


def _recorded(model: nn.Module, function: Callable[[nn.Module], Any]) -> list[Any]:
    listener = _Listen()
    handle = model.register_forward_pre_hook(listener, with_kwargs=True)
    try:
        with torch.no_grad():
            function(model)
    finally:
        handle.remove()
    return list(listener.calls)


class _Listen:
    """Keep what a model is called with."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(Call(args, kwargs))
