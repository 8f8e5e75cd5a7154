"""How a model is run on a batch, whatever shape the batch has."""

from __future__ import annotations

import copy
import gc
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, OTPruneError
from torch_otprune.structure.lines import blamed

__all__ = [
    "Call",
    "batch_size",
    "called",
    "evaluating",
    "failing_line",
    "first_line",
    "first_tensor",
    "flat_tensors",
    "head",
    "joined",
    "make",
    "map_tensors",
    "outside_inference",
    "run",
    "run_checked",
    "shapes",
    "uncollected",
    "unpacked",
]

_LIBRARIES = ("torch", "torch_otprune", "jaxtyping", "beartype")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """A batch as a model was really called with it.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch.

    A mapping is passed as keywords, as far as `forward` names them, or whole where it names none
    of them; of a tuple or list, as
    many leading elements as `forward` has positional parameters without a default (one at
    least), so that `(images, labels)` feeds the images; anything else is the only argument.
    To feed an optional argument, pass a mapping.

    Args:
        model: any module.
        batch: tensor, tuple, list, mapping, or a Transformers batch.

    Returns:
        what the model returns.
    """
    call = called(model, batch)
    return model(*call.args, **call.kwargs)


def called(model: nn.Module, batch: Any) -> Call:
    """Write a batch as the arguments that the model will be called with.

    Args:
        model: any module.
        batch: as for `run`.

    Returns:
        the arguments that `forward` takes, without labels and the like.
    """
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        named = _named(model, batch)
        return Call((), named) if named or not batch else Call((batch,), {})
    if isinstance(batch, (tuple, list)):
        return Call(tuple(batch[: _positional(model, len(batch))]), {})
    return Call((batch,), {})


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _positional(model: nn.Module, given: int) -> int:
    parameters = _parameters(model)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return given
    wanted = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
    return max(len(wanted), 1)


def _named(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(model)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = {p.name for p in parameters}
    return {key: value for key, value in batch.items() if key in names}


def failing_line(error: BaseException) -> str:
    """Name the line of the user's code that raised an error.

    Args:
        error: what was raised.

    Returns:
        `file.py:12`, the innermost outside the libraries; empty where there is none.
    """
    found = traceback.extract_tb(error.__traceback__)
    frames = [(f.filename.replace("\\", "/"), f.name, f.lineno or 0) for f in reversed(found)]
    return blamed(f for f in frames if not any(f"/{room}/" in f[0] for room in _LIBRARIES))


def first_line(error: BaseException) -> str:
    """Take the first line of an error's message that says something.

    Args:
        error: any error.

    Returns:
        one line; the error's type where it has no message.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(":")


def shapes(batch: Any) -> str:
    """Write the shapes of a batch for an error; its type where it holds no tensor."""
    found = ", ".join(str(tuple(t.shape)) for t in flat_tensors(batch))
    return found or type(batch).__name__


def run_checked(model: nn.Module, batch: Any, index: int) -> Any:
    """Call the model on one of several batches, and name the batch where that fails.

    Args:
        model: any module.
        batch: as for `run`.
        index: the batch's place in the data.

    Returns:
        what the model returns.

    Raises:
        CalibrationError: if the model does not run on the batch.
        OTPruneError: as a hook of ours raised it.
    """
    try:
        return run(model, batch)
    except OTPruneError:  # a hook has said it better
        raise
    except Exception as error:  # forward is the user's: it may raise anything
        raise CalibrationError(
            f"the model does not run on batch {index}: {first_line(error)}.",
            where=f"{type(model).__name__}, batch of shape {shapes(batch)}",
            fix="make every batch one that the model's forward takes.",
        ) from error


def map_tensors(tree: Any, function: Any) -> Any:
    """Apply a function to every tensor of a nested batch and keep the nesting."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Call):
        return Call(map_tensors(tree.args, function), map_tensors(tree.kwargs, function))
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, function) for value in tree)
    if _is_record(tree):
        twin = copy.copy(tree)  # a frozen one, too; its fields may not be what __init__ takes
        for name, value in vars(tree).items():
            object.__setattr__(twin, name, map_tensors(value, function))
        return twin
    return tree


def flat_tensors(tree: Any) -> list[Tensor]:
    """List the tensors of a nested output in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(_opened(tree), note)
    return found


def _opened(tree: Any) -> Any:
    """Write dataclasses, at any depth, as what they hold."""
    if _is_record(tree):
        return {name: _opened(value) for name, value in vars(tree).items()}
    if isinstance(tree, Mapping):
        return {name: _opened(value) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [_opened(value) for value in tree]
    return tree


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Find what a layer is given, whether by position or by keyword.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        the first tensor; None where there is none.
    """
    return next(iter(flat_tensors((args, dict(kwargs)))), None)


def _is_record(tree: Any) -> bool:
    """Recognise what holds named values: a dataclass with a `__dict__`, a simple namespace."""
    if isinstance(tree, (type, Mapping, Call)):
        return False
    named = hasattr(tree, "__dataclass_fields__") and hasattr(tree, "__dict__")
    return named or isinstance(tree, SimpleNamespace)


def batch_size(batch: Any) -> int:
    """Read the number of samples: the length of the first tensor's first axis.

    Args:
        batch: as for `run`.

    Returns:
        1 where no tensor has an axis.
    """
    for tensor in flat_tensors(batch):
        if tensor.dim():
            return len(tensor)
    return 1


def head(batch: Any, samples: int) -> Any:
    """Keep the first samples of a batch.

    Args:
        batch: as for `run`.
        samples: how many to keep.

    Returns:
        the same nesting; tensors whose first axis is not the batch's stay whole.
    """
    size = batch_size(batch)
    return map_tensors(batch, lambda t: t[:samples] if t.dim() and len(t) == size else t)


def joined(batches: Sequence[Any]) -> Any:
    """Put batches of one make side by side.

    Args:
        batches: at least one; equal nesting, equal shapes but for the first axis.

    Returns:
        one batch; tensors whose first axis is not the batch's are taken from the first.
    """
    sizes = [batch_size(batch) for batch in batches]
    columns = zip(*(flat_tensors(batch) for batch in batches), strict=True)

    def join(first: Tensor) -> Tensor:
        column = next(columns)
        parts = zip(column, sizes, strict=True)
        return torch.cat(column) if all(t.dim() and len(t) == n for t, n in parts) else first

    return map_tensors(batches[0], join)


def make(batch: Any) -> Any:
    """Describe what a batch must share with another to be joined with it.

    Args:
        batch: as for `run`.

    Returns:
        shapes without the batch axis, and types; hashable.
    """
    size = batch_size(batch)
    cut = [
        (tuple(t.shape[1:] if t.dim() and len(t) == size else t.shape), t.dtype)
        for t in flat_tensors(batch)
    ]
    return type(batch), tuple(cut)


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave inference mode for a while, and grant no gradients that were not there.

    Yields:
        nothing.
    """
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for cycles: many small objects live until an analysis is over.

    Yields:
        nothing.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep every `TransformerEncoder` from packing padded texts into nested tensors.

    These have no shape, and pass the layers by. What stands at padded places is another number
    meanwhile: what the layers make of it, where nested tensors would leave zeros.

    Args:
        model: any module.

    Yields:
        nothing.
    """
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    packing = [encoder for encoder in encoders if encoder.use_nested_tensor]
    for encoder in packing:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder in packing:
            encoder.use_nested_tensor = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back; the random state is left as it was.

    Args:
        model: any module.

    Yields:
        nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            with unpacked(model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
