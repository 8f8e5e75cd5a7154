"""From whatever the user calls data to a bounded list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.reduce import rank, ranks_where
from torch_otprune.structure.forward import (
    Call,
    batch_size,
    called,
    evaluating,
    flat_tensors,
    head,
    joined,
    make,
    map_tensors,
    outside_inference,
)

__all__ = ["check_batch", "collect", "rebatched"]

_BATCH = 64


def collect(
    model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any], samples: int
) -> list[Any]:
    """Take batches from an iterable, or record those that a callable runs the model on.

    Where several ranks share the work, all of them fail if one does.

    Args:
        model: the model; run only where data is a callable, in evaluation mode.
        data: batches (tensor, tuple, mapping, Transformers batch), or a function of the model.
        samples: how many to take at most; the last batch is shortened.

    Returns:
        at least one batch.

    Raises:
        CalibrationError: if there is nothing to take, or a batch is empty or holds NaN.
    """
    failure: Exception | None = None
    batches: list[Any] = []
    try:
        batches = _taken(model, data, samples)
    except Exception as error:  # noqa: BLE001  # raised below: the other ranks must hear of it
        failure = error
    failed = ranks_where(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise CalibrationError(
            f"the data of rank {failed[0]} cannot be used.",
            where=f"seen from rank {rank()}",
            fix=f"read the error of rank {failed[0]}, and give every rank some batches.",
        )
    return batches


def _taken(model: nn.Module, data: Any, samples: int) -> list[Any]:
    if isinstance(data, Tensor):
        data = [data]
    recorded = callable(data) and not isinstance(data, Iterable)
    if not recorded and (isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable)):
        raise CalibrationError(
            f"the data is of type {type(data).__name__}, not batches.",
            where="data",
            fix="pass a list of batches, a DataLoader, or a function that runs the model.",
        )
    batches: list[Any] = []
    left = samples
    for batch in _recorded(model, data, samples) if recorded else data:
        if left <= 0:
            break
        check_batch(called(model, batch), len(batches))
        size = batch_size(batch)
        batches.append(_usable(batch if size <= left else head(batch, left)))
        left -= size
    if not batches:
        raise CalibrationError(
            "the data yielded no batch.",
            where=f"data of type {type(data).__name__}",
            fix="pass a list or a DataLoader with batches; an iterator is spent after one pass.",
        )
    return batches


def _usable(batch: Any) -> Any:
    """Copy what was made in inference mode: no gradient could be taken through it."""
    if not any(tensor.is_inference() for tensor in flat_tensors(batch)):
        return batch
    with outside_inference():
        return map_tensors(batch, torch.clone)


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


def check_batch(batch: Any, index: int) -> None:
    """Refuse a batch without samples or with NaN before it reaches the model.

    Infinity may pass: masks hold it. It is refused where the model cannot cope with it.

    Args:
        batch: the arguments that the model takes.
        index: its place in the data.

    Raises:
        CalibrationError: naming the batch, and the place of the first NaN.
    """
    tensors = flat_tensors(batch)
    if any(tensor.dim() for tensor in tensors) and not batch_size(batch):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CalibrationError(
            f"batch {index} holds no sample.",
            where=f"batch {index} of shape {shapes}",
            fix="leave empty batches out.",
        )
    for tensor in tensors:
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise CalibrationError(
                "the input holds NaN.",
                where=f"batch {index}, a {tuple(tensor.shape)} tensor, at "
                f"{torch.isnan(tensor).nonzero()[0].tolist()}",
                fix="clean the data.",
            )


def _recorded(model: nn.Module, function: Callable[[nn.Module], Any], samples: int) -> list[Any]:
    listener = _Listen(samples)
    handle = model.register_forward_pre_hook(listener, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            function(model)
    finally:
        handle.remove()
    return list(listener.calls)


class _Listen:
    """Keep what a model is called with, as far as it is needed: a function may run all data."""

    def __init__(self, samples: int) -> None:
        self.left = samples
        self.calls: list[Call] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.left > 0:
            call = Call(args, kwargs)
            # a loop may fill one buffer again and again
            self.calls.append(map_tensors(call, lambda tensor: tensor.detach().clone()))
            self.left -= batch_size(call)
