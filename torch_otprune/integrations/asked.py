"""What is asked of an export: objections come before the work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, OTPruneError, StructureError
from torch_otprune.integrations.onnx_file import check_installed, check_opset
from torch_otprune.structure.eager import check_example
from torch_otprune.structure.forward import (
    Call,
    batch_size,
    called,
    first_line,
    flat_tensors,
    run,
    shapes,
)

__all__ = ["FORMATS", "Format", "answered", "calls_of", "check_module", "check_numbers", "settled"]

Format = Literal["onnx", "torch_export"]
FORMATS: dict[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
"""What can be written, with the usual ending of its file."""


def settled(path: Path, to: str | None, *, where: str = "export, to") -> Format:
    """Decide on a format.

    Args:
        path: the file.
        to: what is asked for; None to go by the ending of the file.
        where: what to name in an error.

    Returns:
        the format.

    Raises:
        OTPruneError: if it is none, or the ending says another one.
    """
    asked = next((kind for kind in FORMATS if kind == to), None)
    known = ", ".join(FORMATS)
    if to is not None and asked is None:
        raise OTPruneError(f"'{to}' is no format.", where=where, fix=f"say one of {known}.")
    if path.is_dir():
        raise OTPruneError(
            "the file cannot be written: this is a directory.",
            where=f"export, {path}",
            fix=f"name a file, such as {path / ('model' + FORMATS[asked or 'onnx'])}.",
        )
    said = next((kind for kind, end in FORMATS.items() if path.suffix.lower() == end), None)
    if asked is not None and said not in {None, asked}:
        raise OTPruneError(
            f"'{path.name}' has the ending of {said}, and {asked} is asked for.",
            where=where,
            fix=f"end the name in {FORMATS[asked]}, or leave the format out.",
        )
    if (found := asked or said) is None:
        raise OTPruneError(
            f"the ending of '{path.name}' says no format.",
            where=where,
            fix=f"end the name in {' or '.join(FORMATS.values())}, or say one of {known}.",
        )
    return found


def check_numbers(to: Format, *, tolerance: object, opset: object) -> None:
    """Object to settings that mean nothing, and to packages that are missing.

    Args:
        to: the format.
        tolerance: relative difference that is allowed; None for the default.
        opset: version of ONNX's operators; None for the default.

    Raises:
        OTPruneError: naming the setting.
    """
    real = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (real and 0 <= tolerance < math.inf):  # type: ignore[operator]
        raise OTPruneError(
            f"the tolerance {tolerance!r} is no relative difference.",
            where="export, tolerance",
            fix="pass a number from 0 on, such as 1e-4, or None.",
        )
    if to == "onnx":
        check_installed()
        check_opset(opset)
    elif opset is not None:
        raise OTPruneError(
            f"opset is {opset!r}, and {to} knows no versions of ONNX's operators.",
            where="export, opset",
            fix="leave opset out, or export to='onnx'.",
        )


def calls_of(
    model: nn.Module, example: Any, check: Sequence[Any], *, batch: bool, sequence: bool
) -> list[Call]:
    """Write the example and the batches to compare on as calls.

    Args:
        model: the model.
        example: one batch.
        check: further batches.
        batch: whether these may have other numbers of samples.
        sequence: whether they may have other lengths.

    Returns:
        the calls, that of the example first.

    Raises:
        CalibrationError: if one holds no tensor, or is shaped unlike the example.
        StructureError: if one holds no sample.
    """
    if isinstance(check, (Tensor, Mapping, str)):
        raise CalibrationError(
            f"check is a {type(check).__name__}, not a list of batches.",
            where="export, check",
            fix="pass a list, such as check=[batch].",
        )
    named = [("the example", example), *((f"check[{i}]", one) for i, one in enumerate(check))]
    found = []
    for name, given in named:
        if not flat_tensors(given):
            raise CalibrationError(
                f"{name} holds no tensor: it is a {type(given).__name__}.",
                where=f"export of {type(model).__name__}",
                fix="pass a tensor, a tuple or a dict of them; torch.from_numpy makes one.",
            )
        check_example(model, given, on=False)
        found.append(called(model, given))
        if _form(found[-1], batch, sequence) != _form(found[0], batch, sequence):
            raise CalibrationError(
                f"{name} has shapes {shapes(given)}, the example has {shapes(example)}.",
                where=f"export of {type(model).__name__}, check",
                fix="pass batches that differ from the example only in their values"
                f"{' and in how many samples they hold' if batch else ''}.",
            )
    return found


def _form(call: Call, batch: bool, sequence: bool) -> object:
    """Describe what calls of one file have in common."""
    size = batch_size(call)

    def fixed(tensor: Tensor) -> object:
        if sequence and tensor.dim() == 2:
            return 2
        free = batch and tensor.dim() and len(tensor) == size
        return tuple(tensor.shape[1:] if free else tensor.shape)

    return [(fixed(tensor), tensor.dtype) for tensor in flat_tensors(call)]


def answered(model: nn.Module, call: Call, given: Any, name: str) -> Any:
    """Run the model on what the user gave, which must work and give numbers.

    Args:
        model: the model.
        call: how it is called.
        given: what the user wrote.
        name: what to call that in an error.

    Returns:
        what the model returns.

    Raises:
        CalibrationError: if the model does not run, or answers NaN, or infinity alone.
    """
    try:
        out = run(model, call)
    except Exception as error:  # forward is the user's: it may raise anything
        words = f", keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else ""
        raise CalibrationError(
            f"the model does not run on {name}: {first_line(error).rstrip('.')}.",
            where=f"{type(model).__name__}, batch of shape {shapes(given)}{words}",
            fix="pass a batch that the model's forward takes"
            f"{': its arguments are ' + _arguments(model) if words else ''}.",
        ) from error
    for value in flat_tensors(out):
        finite = value.isfinite()
        if bool(value.isnan().any()) or (value.numel() and not bool(finite.any())):
            raise CalibrationError(
                f"the model answers {name} with numbers that are not finite: nothing could be "
                "compared.",
                where=f"export of {type(model).__name__}",
                fix="pass a batch, and a model, without NaN or infinity.",
            )
    return out


def _arguments(model: nn.Module) -> str:
    return ", ".join(inspect.signature(model.forward).parameters)


def check_module(model: object) -> None:
    """Refuse what is no module.

    Args:
        model: what is to be exported.

    Raises:
        StructureError: naming its type.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(
            f"the model is of type {type(model).__name__}.",
            where="export, model",
            fix="pass a torch.nn.Module.",
        )
