"""From a model and one call to a traced program, and from that to a file that answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.integrations.calls import Door, door_of, fresh, plain, resized, tensors_of
from torch_otprune.integrations.onnx_file import Session, hushed, write
from torch_otprune.structure.forward import Call, batch_size, first_line, map_tensors, run

__all__ = ["Ask", "Program", "one_size"]

_TRACED = 2  # samples: torch.export takes an axis of length one for a constant


class Program:
    """A model, traced on one call.

    Args:
        model: the model, in evaluation mode.
        example: how it is called.
        batch: whether the number of samples may change.
        sequence: whether the length of integer inputs with two axes may change.

    Raises:
        StructureError: if the model cannot be traced, or not with those axes.
    """

    def __init__(self, model: nn.Module, example: Call, *, batch: bool, sequence: bool) -> None:
        self.model, self.dynamic = model, batch
        size = batch_size(example)
        # Sizes that must not change are those of the example itself.
        self.size = _TRACED if batch else size
        self.example = resized(example, self.size, batch=size) if batch else example
        out = self._run()
        self.door, self.call = door_of(model, self.example)
        self.lengths = _lengths(self.call) if sequence else {}
        self.inputs = tuple(tensors_of(self.door.named(self.call)))
        found = tensors_of(plain(out), "output")
        self.outputs = tuple(f"{n}_out" if n in self.inputs else n for n in found)
        self.ranges: dict[str, dict[str, int]] = {}
        self.traced = self._trace()
        self.axes = self._axes()

    def _run(self) -> Any:
        try:
            return run(self.model, self.example)
        except Exception as error:  # it ran on the user's own number of samples
            raise one_size(self.model, error) from error

    def _trace(self) -> ExportedProgram:
        try:
            return self._trace_once()
        except Exception as error:  # tracing runs the user's forward: it may raise anything
            self.ranges = _ranges(str(error))
            if not self.ranges:
                raise _untraceable(self.model, error) from error
        try:
            return self._trace_once()
        except Exception as error:  # the same
            raise _untraceable(self.model, error) from error

    def _trace_once(self) -> ExportedProgram:
        with hushed():
            return torch.export.export(
                self.door,
                self.call.args,
                self.call.kwargs,
                dynamic_shapes=map_tensors(self.door.named(self.call), self._dims),
                strict=False,
            )

    def _dims(self, tensor: Tensor) -> dict[int, Any] | None:
        named = self._names(tensor).items()
        return {axis: Dim(name, **self.ranges.get(name, {})) for axis, name in named} or None

    def _names(self, tensor: Tensor) -> dict[int, str]:
        """Name the axes of an input that may change."""
        named = {}
        if self.dynamic and tensor.dim() and len(tensor) == self.size:
            named[0] = "batch"
        if _is_sequence(tensor) and tensor.shape[1] in self.lengths:
            named[1] = self.lengths[tensor.shape[1]]
        return named

    def _axes(self) -> dict[str, str]:
        """Look up which symbol of the program stands for which axis."""
        found = {}
        values = {node.name: node.meta.get("val") for node in self.traced.graph.nodes}
        given = tensors_of(self.door.named(self.call)).values()
        for name, tensor in zip(self.traced.graph_signature.user_inputs, given, strict=True):
            for axis, word in self._names(tensor).items():
                value: Any = values[str(name)]
                found[str(value.shape[axis])] = word
        return found

    def write(self, path: Path, *, to: str, opset: int | None) -> Ask:
        """Write the program as a file and open that again.

        Args:
            path: the file.
            to: `onnx` or `torch_export`.
            opset: version of ONNX's operators.

        Returns:
            what answers a call from the file alone.
        """
        with hushed():
            if to == "torch_export":
                torch.export.save(self.traced, path)
                return Ask(self.door, _Loaded(torch.export.load(path).module()), "torch")
            names = {"inputs": self.inputs, "outputs": self.outputs}
            write(self.traced, path, axes=self.axes, opset=opset, **names)
            session = Session(path)
        return Ask(self.door, lambda call: session(tensors_of(self.door.named(call))), session.by)

    def tests(self) -> Iterator[Call]:
        """Draw calls to compare on: other values, other sizes.

        Yields:
            calls of the model.
        """
        generator = torch.Generator().manual_seed(0)
        limits = self.ranges.get("batch", {})
        sizes = (self.size, self.size + 1, 1) if self.dynamic else (self.size,)
        for size in sizes:
            if not limits.get("min", 0) <= size <= limits.get("max", size):
                continue
            yield fresh(resized(self.example, size, batch=self.size), generator)
        if self.lengths:
            yield fresh(map_tensors(self.example, self._shorter), generator)

    def _shorter(self, tensor: Tensor) -> Tensor:
        # Longer might leave a table of positions behind.
        return tensor[:, :-1] if 1 in self._names(tensor) else tensor


@dataclass(frozen=True)
class Ask:
    """A file that answers calls of the model.

    Args:
        door: what the file was traced through.
        answer: takes a call of the door.
        by: name of what runs the file.
    """

    door: Door
    answer: Callable[[Call], list[Tensor]]
    by: str

    def __call__(self, call: Call) -> list[Tensor]:
        """Answer a call of the model."""
        return self.answer(self.door.split(call))


class _Loaded:
    """A program of torch's, read back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, call: Call) -> list[Tensor]:
        return list(tensors_of(run(self.module, call), "output").values())


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 2


def _lengths(call: Call) -> dict[int, str]:
    """Name every length of a sequence; equal lengths are one axis."""
    found = {t.shape[1] for t in tensors_of(call).values() if _is_sequence(t)}
    if not found:
        raise OTPruneError(
            "no input is a sequence: none is an integer tensor of two axes.",
            where="export, dynamic_sequence",
            fix="leave dynamic_sequence out.",
        )
    return {n: f"sequence_{i + 1}" if i else "sequence" for i, n in enumerate(sorted(found))}


def _ranges(text: str) -> dict[str, dict[str, int]]:
    """Read the limits that torch.export proposes, such as the length of a table of positions."""
    if "specialized it to be a constant" in text:
        return {}
    proposed = re.findall(r"^ *(\w+) = Dim\('\w+', ([^)]*)\)", text, re.MULTILINE)
    return {
        name: {key: int(value) for key, value in re.findall(r"(min|max)=(\d+)", limits)}
        for name, limits in proposed
    }


def _untraceable(model: nn.Module, error: Exception) -> StructureError:
    """Say which module torch.export stopped at, or which axis is not free."""
    text = str(error)
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        axis = "sequence" if "sequence" in text.split("!", 1)[0] else "batch"
        return one_size(model, axis=axis)
    return StructureError(
        f"torch.export cannot trace this: {first_line(error).rstrip('.')}.",
        where=_innermost(model, error),
        fix="write that forward without branches on values, or leave the model in Python.",
    )


def one_size(
    model: nn.Module, error: Exception | None = None, *, axis: str = "batch"
) -> StructureError:
    """Say that a model has the length of an axis written down.

    Args:
        model: the model.
        error: what it raised on another length.
        axis: name of the axis.

    Returns:
        the error to raise.
    """
    said = "" if error is None else f"; on another it says: {first_line(error).rstrip('.')}"
    return StructureError(
        f"the model works for one size of the axis '{axis}' only: its forward writes it down.",
        where=(type(model).__name__ if error is None else _innermost(model, error)) + said,
        fix=f"pass dynamic_{axis}=False, or take the size from the input.",
    )


def _innermost(model: nn.Module, error: Exception) -> str:
    """Name the last module whose forward was running when an error was raised."""
    names: Mapping[int, str] = {id(module): name for name, module in model.named_modules()}
    found, trace = type(model).__name__, error.__traceback__
    while trace is not None:
        inner = trace.tb_frame.f_locals.get("self")
        if id(inner) in names:
            path = names[id(inner)]
            found = f"{path} ({type(inner).__name__})" if path else type(inner).__name__
        trace = trace.tb_next
    return found
