"""What is asked of an export and cannot be done: one sentence each, and no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_export import Function, Outer, Pair, Small, drawn, made
from torch_otprune.errors import CalibrationError, OTPruneError, StructureError, VerificationError
from torch_otprune.integrations import asked

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

X = drawn(4, 3, 8, 8)
ROWS = drawn(4, 4)


class Rows(nn.Module):
    """A parameter with as many rows as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.place = nn.Linear(4, 2), nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.place)


def four(layer: nn.Module, x: Tensor) -> Tensor:
    if len(x) != 4:
        raise ValueError("four samples, please")
    return layer(x)


FIXED: dict[str, Any] = {
    "a view": lambda: Function(lambda layer, x: layer(x).view(4, 4)),
    "a parameter": Rows,
    "a check": lambda: Function(four),
}


@pytest.mark.parametrize("to", ["onnx", "torch_export"])
@pytest.mark.parametrize("kind", FIXED)
def test_a_batch_size_in_the_forward_is_told(kind: str, to: Any, tmp_path: Path) -> None:
    model = made(FIXED[kind])
    with pytest.raises(StructureError) as raised:
        otp.export(model, tmp_path / "net", ROWS, to=to)
    assert "works for one size of the axis 'batch' only" in raised.value.problem
    assert "dynamic_batch=False" in raised.value.fix
    assert not list(tmp_path.iterdir())
    assert otp.export(model, tmp_path / "net", ROWS, to=to, dynamic_batch=False).checked == (4,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_prove_nothing(value: float, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        otp.export(made(Small), tmp_path / "net.onnx", X * value)
    assert "answers the example with numbers that are not finite" in raised.value.problem
    assert not list(tmp_path.iterdir())


def test_answers_to_a_check_must_be_numbers_too(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"answers check\[1\] with numbers that are not"):
        otp.export(made(Small), tmp_path / "net.onnx", X, check=[X, X * float("nan")])


def test_drawn_values_without_any_finite_answer_prove_nothing(tmp_path: Path) -> None:
    # The first column is the larger one in the example, and not in what is drawn from it.
    model = made(lambda: Function(lambda layer, x: (x[:, 0].min() - 9).sqrt() + layer(x)))
    with pytest.raises(VerificationError, match="no value of 'output' is finite"):
        otp.export(model, tmp_path / "net.onnx", ROWS.sign() + torch.tensor([12.0, 0, 0, 0]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [17, 99, 0, -1, True, "18"])
def test_an_opset_that_there_is_not_is_refused(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path / "net.onnx", X, opset=opset)
    assert f"opset {opset!r} cannot be written: versions are 18 to " in raised.value.problem
    assert not list(tmp_path.iterdir())


def test_an_opset_that_there_is_is_written(tmp_path: Path) -> None:
    otp.export(made(Small), tmp_path / "net.onnx", X, opset=20)
    found = onnx.load(tmp_path / "net.onnx").opset_import
    assert [entry.version for entry in found if not entry.domain] == [20]


def test_an_opset_that_torch_cannot_reach_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = torch.onnx.export

    def stays(*args: Any, **settings: Any) -> Any:
        return export(*args, **{**settings, "opset_version": 18})

    monkeypatch.setattr(torch.onnx, "export", stays)
    with pytest.raises(StructureError, match="with opset 18, and cannot turn that into 20"):
        otp.export(made(Small), tmp_path / "net.onnx", X, opset=20)
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch_has_no_opset(tmp_path: Path) -> None:
    with pytest.raises(OTPruneError, match="torch_export knows no versions"):
        otp.export(made(Small), tmp_path / "net.pt2", X, opset=20)


def test_the_ending_says_the_format(tmp_path: Path) -> None:
    assert otp.export(made(Small), tmp_path / "net.pt2", X).to == "torch_export"
    assert otp.export(made(Small), tmp_path / "net.onnx", X).to == "onnx"


@pytest.mark.parametrize(("name", "to"), [("net.pt2", "onnx"), ("net.onnx", "torch_export")])
def test_an_ending_that_says_another_format_is_refused(name: str, to: Any, tmp_path: Path) -> None:
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path / name, X, to=to)
    assert f"'{name}' has the ending of " in raised.value.problem
    assert f"and {to} is asked for" in raised.value.problem


def test_an_ending_that_says_nothing_needs_a_format(tmp_path: Path) -> None:
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path / "net.bin", X)
    assert "the ending of 'net.bin' says no format" in raised.value.problem
    assert ".onnx or .pt2" in raised.value.fix


@pytest.mark.parametrize("tolerance", [-1, "1", float("nan"), True])
def test_a_tolerance_that_is_none_is_refused(tolerance: Any) -> None:
    with pytest.raises(OTPruneError, match="is no relative difference"):
        asked.check_numbers("torch_export", tolerance=tolerance, opset=None)


def test_a_function_is_no_model() -> None:
    with pytest.raises(StructureError, match="the model is of type function"):
        asked.check_module(lambda x: x)


@pytest.mark.parametrize("example", [None, np.ones((2, 3)), "text"])
def test_an_example_without_tensors_is_refused(example: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        otp.export(made(Small), tmp_path / "net.pt2", example)
    assert f"no tensor: it is a {type(example).__name__}" in raised.value.problem


def test_an_example_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="the example holds no sample"):
        otp.export(made(Small), tmp_path / "net.pt2", X[:0])


def test_a_key_that_no_argument_has_is_told(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        otp.export(made(Small), tmp_path / "net.pt2", {"img": X})
    assert "keys img" in raised.value.where
    assert "its arguments are x" in raised.value.fix


def test_an_argument_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        otp.export(made(Pair), tmp_path / "net.pt2", {"x": ROWS})
    assert "'shift'" in raised.value.problem
    assert "its arguments are x, shift, scale, more" in raised.value.fix


def test_a_check_of_another_shape_is_told_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as raised:
        otp.export(made(Small), tmp_path / "net.pt2", X, check=[X, drawn(2, 3, 9, 9)])
    assert "check[1] has shapes (2, 3, 9, 9), the example has (4, 3, 8, 8)" in raised.value.problem


def test_a_batch_alone_is_no_list_to_check(tmp_path: Path) -> None:
    batch: Any = {"x": X}
    with pytest.raises(CalibrationError, match="check is a dict, not a list of batches"):
        asked.calls_of(made(Small), X, batch, batch=True, sequence=False)


def test_a_branch_on_values_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = made(lambda: Outer(Function(lambda layer, x: layer(x) if x.sum() > 0 else x)))
    with pytest.raises(StructureError, match=r"torch\.export cannot trace this"):
        otp.export(model, tmp_path / "net.pt2", ROWS)
    said = capfd.readouterr()
    assert said.out == said.err == ""
