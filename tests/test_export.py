"""Files that other programs run: they agree with the model, or they are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import OTPruneError, StructureError, VerificationError
from torch_otprune.integrations import calls
from torch_otprune.integrations import export as exporting
from torch_otprune.integrations.export import FORMATS
from torch_otprune.structure.forward import Call

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
every_format = pytest.mark.parametrize("to", FORMATS)


class Small(nn.Module):
    """A convolution, a norm, a mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Outer(nn.Module):
    """A model around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@dataclass
class Record:
    """What some models return."""

    scores: Tensor
    states: tuple[Tensor, ...]
    cache: object = None


class Function(nn.Module):
    """A linear layer, and whatever a test wants of it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


class Pair(nn.Module):
    """Two inputs, one of them optional, and a setting that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0, more: Any = None) -> Tensor:
        out = self.layer(x) * scale + shift
        return out if more is None else out + more["a"]


class AnyWords(nn.Module):
    """A forward that names nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.layer(sum((*xs, *more.values())))


def made(function: Any) -> nn.Module:
    """Build a model with fixed weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return function()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Draw numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def served(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run an ONNX file without this library."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return [torch.from_numpy(array) for array in found]


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_an_onnx_file_answers_as_the_model_on_any_number_of_samples(
    samples: int, tmp_path: Path
) -> None:
    model, x = made(Small).eval(), drawn(samples, 3, 8, 8, seed=9)
    otp.export(model, tmp_path / "net.onnx", drawn(1, 3, 8, 8))
    torch.testing.assert_close(served(tmp_path / "net.onnx", {"x": x})[0], model(x))


def test_a_program_of_torch_answers_as_the_model_on_any_number_of_samples(tmp_path: Path) -> None:
    model, x = made(Small).eval(), drawn(5, 3, 8, 8, seed=9)
    otp.export(model, tmp_path / "net.pt2", drawn(2, 3, 8, 8), to="torch_export")
    again = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(again(x), model(x))


@every_format
def test_what_was_made_says_names_axes_and_the_difference(to: Any, tmp_path: Path) -> None:
    found = otp.export(made(Small), tmp_path / "net", drawn(2, 3, 8, 8), to=to)
    assert found.inputs == ("x",)
    assert found.outputs == ("output",)
    assert found.dynamic == ("batch",)
    assert found.checked == (2, 3, 1)
    assert 0 <= found.error <= 1e-5


def test_the_axes_of_an_onnx_file_have_names(tmp_path: Path) -> None:
    otp.export(made(Small), tmp_path / "net.onnx", drawn(2, 3, 8, 8))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    assert session.get_outputs()[0].shape == ["batch", 4]


@every_format
def test_a_fixed_batch_stays_fixed(to: Any, tmp_path: Path) -> None:
    fixed = made(lambda: Function(lambda layer, x: layer(x.view(3, 4))))
    found = otp.export(fixed, tmp_path / "net", drawn(3, 4), to=to, dynamic_batch=False)
    assert found.dynamic == ()
    assert found.checked == (3,)


def test_a_batch_that_is_written_down_is_named(tmp_path: Path) -> None:
    fixed = made(lambda: Function(lambda layer, x: layer(x.view(2, 4))))
    with pytest.raises(StructureError) as raised:
        otp.export(fixed, tmp_path / "net.onnx", drawn(2, 4))
    assert "one size of the axis 'batch' only" in raised.value.problem
    assert "dynamic_batch=False" in raised.value.fix
    assert not list(tmp_path.iterdir())


@every_format
def test_several_inputs_go_by_their_names(to: Any, tmp_path: Path) -> None:
    found = otp.export(made(Pair), tmp_path / "net", (drawn(2, 4), drawn(2, 3)), to=to)
    assert found.inputs == ("x", "shift")


@every_format
def test_what_is_no_tensor_becomes_a_constant(to: Any, tmp_path: Path) -> None:
    model = made(Pair).eval()
    batch = {"x": drawn(2, 4), "shift": drawn(2, 3), "scale": 3.0, "more": {"a": drawn(2, 1)}}
    found = otp.export(model, tmp_path / "net", batch, to=to)
    assert found.inputs == ("x", "shift", "more_a")
    if to == "onnx":
        inputs = {"x": batch["x"], "shift": batch["shift"], "more_a": batch["more"]["a"]}
        torch.testing.assert_close(served(tmp_path / "net", inputs)[0], model(**batch))


@every_format
@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ((drawn(2, 4), drawn(2, 4)), ("xs_0", "xs_1")),
        ({"a": drawn(2, 4), "b": drawn(2, 4)}, ("a", "b")),
    ],
)
def test_a_forward_that_names_nothing_can_go_too(
    batch: Any, names: tuple[str, ...], to: Any, tmp_path: Path
) -> None:
    assert otp.export(made(AnyWords), tmp_path / "net", batch, to=to).inputs == names


OUTCOMES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "tuple": (lambda layer, x: (layer(x), x * 2), ("output_0", "output_1")),
    "dict": (lambda layer, x: {"a": layer(x), "b": {"c": x * 2}}, ("a", "b_c")),
    "record": (
        lambda layer, x: Record(layer(x), (x + 1, x * 2)),
        ("scores", "states_0", "states_1"),
    ),
    "whole numbers": (lambda layer, x: {"best": layer(x).argmax(-1)}, ("best",)),
    "named as the input": (lambda layer, x: {"x": layer(x)}, ("x_out",)),
}


@every_format
@pytest.mark.parametrize("kind", OUTCOMES)
def test_every_kind_of_result_has_named_outputs(kind: str, to: Any, tmp_path: Path) -> None:
    function, names = OUTCOMES[kind]
    model = made(lambda: Function(function))
    found = otp.export(model, tmp_path / "net", drawn(2, 4), to=to)
    assert found.outputs == names
    if to == "onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "net"))
        assert tuple(value.name for value in session.get_outputs()) == names


@pytest.mark.parametrize("to", FORMATS)
def test_a_branch_on_values_is_named_with_its_module(to: Any, tmp_path: Path) -> None:
    model = made(lambda: Outer(Function(lambda layer, x: layer(x) if x.sum() > 0 else x)))
    with pytest.raises(StructureError) as raised:
        otp.export(model, tmp_path / "net", drawn(2, 4), to=to)
    assert "torch.export cannot trace this" in raised.value.problem
    assert raised.value.where == "inner (Function)"
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_lacks_is_named_with_its_module(tmp_path: Path) -> None:
    model = made(lambda: Outer(Function(lambda layer, x: torch.linalg.svdvals(layer(x)[:, None]))))
    with pytest.raises(StructureError) as raised:
        otp.export(model, tmp_path / "net.onnx", drawn(2, 4))
    assert "ONNX has no operator for aten." in raised.value.problem
    assert raised.value.where == "inner (Function)"
    assert "torch_export" in raised.value.fix
    assert not list(tmp_path.iterdir())
    assert otp.export(model, tmp_path / "net.pt2", drawn(2, 4), to="torch_export").error <= 1e-5


@every_format
def test_a_file_that_disagrees_replaces_nothing(
    to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "net", exporting.Program.write
    path.write_text("older")

    def wrong(program: Any, *args: Any, **settings: Any) -> Any:
        ask = write(program, *args, **settings)
        return replace(ask, answer=lambda call: [out * 1.001 for out in ask.answer(call)])

    monkeypatch.setattr(exporting.Program, "write", wrong)
    with pytest.raises(VerificationError) as raised:
        otp.export(made(Small), path, drawn(2, 3, 8, 8), to=to)
    assert "'output' is off by 1.0e-03 of its largest value" in raised.value.problem
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_misses_an_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting.Program.write
    monkeypatch.setattr(
        exporting.Program, "write", lambda *a, **k: replace(write(*a, **k), answer=lambda call: [])
    )
    with pytest.raises(VerificationError, match="it has 0 outputs, the model 1"):
        otp.export(made(Small), tmp_path / "net", drawn(2, 3, 8, 8), to="torch_export")


def test_a_tolerance_can_be_asked_for(tmp_path: Path) -> None:
    net = made(Small)
    assert otp.export(net, tmp_path / "a.onnx", drawn(2, 3, 8, 8), tolerance=1e-3).error > 0
    with pytest.raises(VerificationError, match="more than 1e-20"):
        otp.export(net, tmp_path / "b.onnx", drawn(2, 3, 8, 8), tolerance=1e-20)


def test_batches_to_compare_on_are_run(tmp_path: Path) -> None:
    more = [drawn(4, 3, 8, 8), drawn(6, 3, 8, 8)]
    found = otp.export(
        made(Small), tmp_path / "a", drawn(2, 3, 8, 8), to="torch_export", check=more
    )
    assert found.checked == (2, 3, 1, 4, 6)


def test_not_a_number_is_compared_as_well() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert exporting._gap(nan, nan) == 0.0
    assert exporting._gap(nan, one) == float("inf")
    assert exporting._gap(one, nan) == float("inf")
    assert exporting._gap(one, torch.ones(3)) == float("inf")


@every_format
def test_the_model_is_left_as_it_was(to: Any, tmp_path: Path) -> None:
    model = made(Small).train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = set(vars(model))
    otp.export(model, tmp_path / "net", drawn(2, 3, 8, 8), to=to)
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == keys
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@every_format
def test_nothing_is_said(to: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    otp.export(made(Small), tmp_path / "net", drawn(2, 3, 8, 8), to=to)
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision_goes(to: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    found = otp.export(made(Small).to(dtype), tmp_path / "net", drawn(2, 3, 8, 8).to(dtype), to=to)
    assert found.error <= {torch.float64: 1e-12}.get(dtype, 4e-2)


def test_what_onnx_runtime_has_no_kernel_for_is_checked_by_the_reference(tmp_path: Path) -> None:
    x = drawn(2, 3, 8, 8)
    found = otp.export(made(Small).bfloat16(), tmp_path / "a.onnx", x.bfloat16())
    assert found.by == "ONNX's reference"
    assert otp.export(made(Small), tmp_path / "b.onnx", x).by == "ONNX Runtime"


def test_channels_last_goes(tmp_path: Path) -> None:
    model = made(Small).to(memory_format=torch.channels_last)
    x = drawn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert otp.export(model, tmp_path / "net.onnx", x).error <= 1e-5
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_directories_above_the_file_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "net"
    assert otp.export(made(Small), path, drawn(2, 3, 8, 8), to="torch_export").path == path
    assert path.is_file()


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path, drawn(2, 3, 8, 8), to="torch_export")
    assert "this is a directory" in raised.value.problem
    assert "model.pt2" in raised.value.fix


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path / "file" / "net", drawn(2, 3, 8, 8), to="torch_export")
    assert "the file cannot be written" in raised.value.problem


def test_weights_in_a_file_of_their_own_come_along(tmp_path: Path) -> None:
    with exporting._aside(tmp_path / "net.onnx") as draft:
        draft.write_text("graph")
        draft.with_name("net.onnx.data").write_text("weights")
    assert (tmp_path / "net.onnx").read_text() == "graph"
    assert (tmp_path / "net.onnx.data").read_text() == "weights"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **settings: object) -> None:
        Path(str(args[1])).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OTPruneError, match="No space left on device"):
        otp.export(made(Small), tmp_path / "net", drawn(2, 3, 8, 8), to="torch_export")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    wrong: Any = "tflite"
    with pytest.raises(OTPruneError) as raised:
        otp.export(made(Small), tmp_path / "net", drawn(2, 3, 8, 8), to=wrong)
    assert str(raised.value).splitlines()[0] == "'tflite' is no format."
    assert "onnx, torch_export" in raised.value.fix


def test_a_batch_that_does_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OTPruneError, match="the model does not run on the example"):
        otp.export(made(Small), tmp_path / "net", drawn(2, 5), to="torch_export")


def test_a_watched_model_is_refused(tmp_path: Path) -> None:
    model = made(Small)
    with (
        otp.attach(model, otp.Policy(rules=[otp.Channels(keep="50%")])),
        pytest.raises(StructureError, match="a policy is attached"),
    ):
        otp.export(model, tmp_path / "net", drawn(2, 3, 8, 8), to="torch_export")


def test_a_sequence_is_needed_for_its_axis(tmp_path: Path) -> None:
    with pytest.raises(OTPruneError, match="no input is a sequence"):
        otp.export(made(Small), tmp_path / "net.onnx", drawn(2, 3, 8, 8), dynamic_sequence=True)


def test_other_values_are_as_valid_as_the_first() -> None:
    ids, mask = torch.tensor([[3, 9, 5], [4, 4, 8]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    first = Call((ids, drawn(2, 3)), {"mask": mask, "zeros": torch.zeros(4, 2)})
    other = calls.fresh(first, torch.Generator().manual_seed(0))
    assert 3 <= int(other.args[0].min()) <= int(other.args[0].max()) <= 9
    assert not torch.equal(other.args[0], ids)
    assert torch.equal(other.args[1].flatten().sort().values, drawn(2, 3).flatten().sort().values)
    assert not torch.equal(other.args[1], drawn(2, 3))
    assert torch.equal(other.kwargs["mask"], mask)
    assert other.kwargs["zeros"].abs().min() > 0
