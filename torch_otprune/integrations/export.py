"""A model as a file that others run: written aside, compared with the model, then put in place."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.attach import check_unattached
from torch_otprune.errors import OTPruneError, VerificationError
from torch_otprune.integrations.asked import (
    FORMATS,
    Format,
    answered,
    calls_of,
    check_module,
    check_numbers,
    settled,
)
from torch_otprune.integrations.calls import plain, servable, tensors_of
from torch_otprune.integrations.programs import Ask, Program, one_size
from torch_otprune.structure.forward import Call, batch_size, evaluating, first_line, run

__all__ = ["FORMATS", "Exported", "export"]

_LIMITS = {torch.float16: 1e-2, torch.bfloat16: 4e-2}  # of a chain of roundings to 11 and 8 bits
_LIMIT = 1e-5


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees.

    Args:
        path: the file.
        to: its format.
        inputs: names of its inputs.
        outputs: names of its outputs.
        dynamic: names of the axes whose length may change.
        checked: number of samples of each batch that both were run on.
        by: what ran the file.
        error: largest difference found, relative to the largest value of that output.
    """

    path: Path
    to: Format
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[str, ...]
    checked: tuple[int, ...]
    by: str
    error: float


def export(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    to: Format | None = None,
    dynamic_batch: bool = True,
    dynamic_sequence: bool = False,
    check: Sequence[Any] = (),
    tolerance: float | None = None,
    opset: int | None = None,
) -> Exported:
    """Write a model as a file for other programs, and run the file against the model.

    The file is compared on values that it was not traced with, and on other numbers of samples
    where these may change. It appears only if they agree.

    Args:
        model: any module, pruned or not; it is traced in evaluation mode and left as it was.
        path: the file to write; an older one is replaced.
        example: one batch: a tensor, a tuple, or a dict of keywords such as a tokenizer's.
        to: `onnx`, run by ONNX Runtime among others, or `torch_export`, read by torch alone; None
            to go by the ending of the file, `.onnx` or `.pt2`.
        dynamic_batch: whether the file takes any number of samples.
        dynamic_sequence: whether it takes any length of the second axis of whatever has two axes,
            such as `input_ids`; equal lengths stay equal.
        check: further batches to compare on, where drawn values make no sense to the model.
        tolerance: relative difference that is allowed, from 0 on; by default 1e-5, 1e-2 in
            float16 and 4e-2 in bfloat16.
        opset: version of ONNX's operators; None leaves it to torch, which knows no older one.

    Returns:
        names, axes, and the largest difference found.

    Raises:
        OTPruneError: if a setting or a batch cannot be used, the extra is not installed, the model
            answers NaN, cannot be traced or expressed, the file cannot be written, or it
            disagrees; no file is left behind then.

    Limits: a Transformers model is traced without its cache, so a causal one reads whole texts.
    """
    kind = settled(Path(path), to)
    check_module(model)
    check_unattached(model)
    check_numbers(kind, tolerance=tolerance, opset=opset)
    batches = calls_of(model, example, check, batch=dynamic_batch, sequence=dynamic_sequence)
    limit = _limit(model) if tolerance is None else tolerance
    with evaluating(model), torch.no_grad(), servable(model):
        for index, (call, given) in enumerate(zip(batches, (example, *check), strict=True)):
            answered(model, call, given, f"check[{index - 1}]" if index else "the example")
        program = Program(model, batches[0], batch=dynamic_batch, sequence=dynamic_sequence)
        tests = [*program.tests(), *batches[1:]]
        with _aside(Path(path)) as draft:
            ask = program.write(draft, to=kind, opset=opset)
            error = max(_far(model, ask, test, limit=limit) for test in tests)
    return Exported(
        Path(path),
        kind,
        program.inputs,
        program.outputs,
        tuple(dict.fromkeys(program.axes.values())),
        tuple(batch_size(test) for test in tests),
        ask.by,
        error,
    )


def _limit(model: nn.Module) -> float:
    return max((_LIMITS.get(p.dtype, _LIMIT) for p in model.parameters()), default=_LIMIT)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Offer a file of the same name elsewhere on the disk, and put it in place at the end."""
    target = path.absolute()
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        yield aside / target.name
        # The file itself comes last: it names those with its weights.
        for found in sorted(aside.iterdir(), key=lambda file: file.name == target.name):
            os.replace(found, target.with_name(found.name))
    except OSError as error:
        raise OTPruneError(
            f"the file cannot be written: {(error.strerror or str(error)).rstrip('.')}.",
            where=f"export, {path}",
            fix="name a file in a directory that you may write to, on a disk with room.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _far(model: nn.Module, ask: Ask, test: Call, *, limit: float) -> float:
    """Measure how far a file's answers are from the model's, and object if that is too far."""
    size = batch_size(test)
    try:
        wanted = tensors_of(plain(run(model, test)), "output")
    except Exception as error:  # forward is the user's: it may raise anything
        raise one_size(model, error) from error
    for name, value in wanted.items():
        if value.numel() and not bool(value.isfinite().any()):
            raise _disagreement(model, f"no value of '{name}' is finite, so none says", size)
    try:
        found = ask(test)
    except Exception as error:  # a runtime may raise anything
        raise VerificationError(
            f"the file does not run: {first_line(error).rstrip('.')}.",
            where=f"export of {type(model).__name__}, on {size} samples",
            fix="export with dynamic_batch=False, or in the other format.",
        ) from error
    if len(found) != len(wanted):
        raise _disagreement(model, f"it has {len(found)} outputs, the model {len(wanted)}", size)
    worst = 0.0
    for (name, right), got in zip(wanted.items(), found, strict=True):
        worst = max(worst, far := _gap(right, got))
        if not far <= limit:
            said = f"'{name}' is off by {far:.1e} of its largest value, more than {limit:g}"
            raise _disagreement(model, said, size)
    return worst


def _disagreement(model: nn.Module, said: str, size: int) -> VerificationError:
    return VerificationError(
        f"the file does not compute what the model computes: {said}.",
        where=f"export of {type(model).__name__}, on {size} samples of other values",
        fix="pass `check` batches and a `tolerance` that suit the model, or the other format.",
    )


def _gap(wanted: Tensor, found: Tensor) -> float:
    """Measure the largest difference, relative to the largest value; infinite if no numbers."""
    if wanted.shape != found.shape:
        return float("inf")
    one, other = wanted.detach().cpu().double(), found.detach().cpu().double()
    finite = one.isfinite()
    odd = one[~finite].nan_to_num(nan=0.5), other[~finite].nan_to_num(nan=0.5)
    if not torch.equal(finite, other.isfinite()) or not torch.equal(*odd):
        return float("inf")
    if not finite.any():
        return 0.0
    far = float((one - other)[finite].abs().max())
    largest = float(one[finite].abs().max())
    return far / largest if largest else far
