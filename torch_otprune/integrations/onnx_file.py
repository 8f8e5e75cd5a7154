"""The only door to ONNX: from a traced program to a file, and from a file to answers."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.integrations.extras import needed

__all__ = ["Session", "check_installed", "check_opset", "hushed", "write"]

_OLDEST = 18  # what torch's exporter writes first and converts from


def check_installed() -> None:
    """Object early where a package for ONNX is missing.

    Raises:
        OTPruneError: naming the extra.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package, "onnx")


def check_opset(opset: object) -> None:
    """Object to a version of the operators that does not exist, or that torch cannot write.

    Args:
        opset: what is asked for; None leaves it to torch.

    Raises:
        OTPruneError: naming the versions that there are.
    """
    newest: int = needed("onnx.defs", "onnx").onnx_opset_version()
    known = isinstance(opset, int) and not isinstance(opset, bool)
    if opset is not None and not (known and _OLDEST <= opset <= newest):  # type: ignore[operator]
        raise OTPruneError(
            f"opset {opset!r} cannot be written: versions are {_OLDEST} to {newest}.",
            where="export, opset",
            fix=f"pass a whole number from {_OLDEST} to {newest}, or leave opset out.",
        )


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep exporters from talking: they print, warn and log about their own insides.

    Yields:
        nothing.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    talk = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(talk),
        contextlib.redirect_stderr(talk),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def write(
    program: torch.export.ExportedProgram,
    path: Path,
    inputs: Sequence[str],
    *,
    outputs: Sequence[str],
    axes: Mapping[str, str],
    opset: int | None,
) -> None:
    """Write a traced program as an ONNX file; one over 2 GB keeps its weights beside it.

    Args:
        program: what torch.export traced.
        path: the file.
        inputs: names of the inputs.
        outputs: names of the outputs.
        axes: symbol in the program to the name of a dynamic axis.
        opset: version of the operators; None leaves it to torch.

    Raises:
        StructureError: if ONNX has no such operator, or not in that version.
    """
    _reshape_freely_(program)
    try:
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
        )
    except torch.onnx.OnnxExporterError as error:
        problem, where, fix = _inexpressible(program, str(error))
        raise StructureError(problem, where=where, fix=fix) from error
    written = made.model.graph.opset_imports.get("")
    if opset not in {None, written}:
        raise StructureError(
            f"torch writes this model with opset {written}, and cannot turn that into {opset}.",
            where="export, opset",
            fix=f"pass opset={written}, or leave opset out.",
        )
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        _name_axes_(value, axes)
    for node in made.model.graph:
        for value in node.outputs:
            _name_axes_(value, axes)
    made.save(path)


def _reshape_freely_(program: torch.export.ExportedProgram) -> None:
    """Let views copy where they must.

    The exporter replaces a fused attention by its textbook form, whose result has other strides;
    a view that was fine on the former then fails (seen on T5).
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _name_axes_(value: Any, axes: Mapping[str, str]) -> None:
    for place, size in enumerate(value.shape or ()):
        if isinstance(size, int) or size.value is None:
            continue
        words = re.sub(r"\w+", lambda m: axes.get(m[0], m[0]), str(size.value))
        value.shape[place] = type(size)(words)


def _inexpressible(program: torch.export.ExportedProgram, said: str) -> tuple[str, str, str]:
    """Say which operator of which module has no counterpart, and what to do."""
    found = re.search(r"<OpOverload\(op='([^']+)', overload='([^']+)'\)>", said)
    if found is None:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        at = next((i for i, line in enumerate(lines) if "Exception summary" in line), -1)
        return (
            f"the model cannot be written as ONNX: {lines[at + 1].rstrip('.')}.",
            "torch.onnx.export",
            "export with to='torch_export', which keeps torch's own operators.",
        )
    name = f"{found[1].replace('::', '.')}.{found[2]}"
    return (
        f"ONNX has no operator for {name}.",
        _place(program, name),
        "write that module with other operations, or export with to='torch_export'.",
    )


def _place(program: torch.export.ExportedProgram, operator: str) -> str:
    """Name the module that calls an operator; it may appear only once others are taken apart."""
    for looked in (program, program.run_decompositions()):
        for node in looked.graph.nodes:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            if str(node.target) == operator and stack:
                path, kind = stack[-1]
                kind = kind if isinstance(kind, str) else kind.__name__
                path = str(path).removeprefix("model").removeprefix(".")
                return f"{path or 'the model itself'} ({kind.rpartition('.')[2]})"
    return "the model"


class Session:
    """An ONNX file that answers on the CPU.

    Where ONNX Runtime has no kernel for a type, such as bfloat16 or a convolution in float64,
    ONNX's own reference answers: slow, and by the book.

    Args:
        path: the file.

    Raises:
        StructureError: if neither can run it.
    """

    def __init__(self, path: Path) -> None:
        runtime: Any = needed("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # fatal alone; what is wrong is raised as well
        self.by = "ONNX Runtime"
        try:
            self.session: Any = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.names = [value.name for value in self.session.get_inputs()]
        except Exception as error:  # its errors share no base class
            if not _lacks_kernel(str(error)):
                raise StructureError(
                    f"ONNX Runtime cannot load the file: {_last(error)}.",
                    where="onnxruntime.InferenceSession, on the CPU",
                    fix="export with to='torch_export', or another opset.",
                ) from error
            reference: Any = needed("onnx.reference", "onnx")
            self.session, self.by = reference.ReferenceEvaluator(str(path)), "ONNX's reference"
            self.names = list(self.session.input_names)

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the file.

        Args:
            inputs: name to tensor; those that the file has no use for may be in it.

        Returns:
            its outputs, in order.
        """
        found = self.session.run(None, {name: _array(inputs[name]) for name in self.names})
        return [_tensor(array) for array in found]


def _array(tensor: Tensor) -> Any:
    host = tensor.detach().cpu().contiguous()
    if host.dtype != torch.bfloat16:
        return host.numpy()
    types: Any = needed("ml_dtypes", "onnx")  # numpy has no such type
    return host.view(torch.int16).numpy().view(types.bfloat16)


def _tensor(array: Any) -> Tensor:
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _lacks_kernel(said: str) -> bool:
    return "tensor(bfloat16)" in said or "Could not find an implementation" in said


def _last(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].rsplit(" : ", 1)[-1].rstrip(".")
