"""`otprune export`: from a saved model to a file, or three lines and a code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import torch_otprune as otp
from torch_otprune.cli import app

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 6), torch.zeros(8)) for _ in range(4)]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of models, and a pruned one in `out/model`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("nets.py").write_text(NETS)
    sys.modules.pop("nets", None)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    policy = otp.Policy(rules=[otp.Channels(keep="50%")])
    otp.prune_(model, policy, [torch.randn(32, 6)], timing=0)
    otp.save(model, "out/model")
    yield tmp_path
    sys.modules.pop("nets", None)


def otprune(*words: str) -> Result:
    return CliRunner().invoke(app, ["export", *words])


@pytest.mark.parametrize("directory", ["out", "out/model"])
def test_a_saved_model_is_written_beside_itself_and_compared(directory: str, place: Path) -> None:
    done = otprune(directory, "-f", "nets:net", "-d", "nets:data", "--to", "torch_export", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["inputs"] == ["input"]
    assert told["dynamic"] == ["batch"]
    assert told["checked"][:3] == [2, 3, 1]
    assert told["error"] <= 1e-5
    program = torch.export.load(place / "out" / "model.pt2").module()
    model, x = otp.load("out/model", factory=_net), torch.randn(5, 6)
    torch.testing.assert_close(program(x), model(x))


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def test_onnx_is_what_is_written_by_default(place: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    done = otprune("out", "-f", "nets:net", "-d", "nets:data", "-o", "served/net.onnx")
    assert done.exit_code == 0, done.output
    assert "ONNX Runtime" in done.stdout
    assert (place / "served" / "net.onnx").is_file()


def test_a_fixed_batch_has_the_size_of_the_first(place: Path) -> None:
    words = ("-f", "nets:net", "-d", "nets:data", "--to", "torch_export", "--fixed-batch", "--json")
    done = otprune("out", *words)
    assert json.loads(done.stdout)["dynamic"] == []


def test_an_unknown_format_is_refused(place: Path) -> None:
    done = otprune("out", "-f", "nets:net", "-d", "nets:data", "--to", "tflite")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[:2] == ["'tflite' is no format.", "  where: --to tflite"]


def test_without_the_extra_its_name_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = otprune("out", "-f", "nets:net", "-d", "nets:data")
    assert done.exit_code == 1
    assert "pip install 'torch-otprune[onnx]'" in done.stderr
    assert not (place / "out" / "model.onnx").exists()


def test_the_ending_of_the_file_says_the_format(place: Path) -> None:
    done = otprune("out", "-f", "nets:net", "-d", "nets:data", "-o", "net.pt2", "--json")
    assert json.loads(done.stdout)["format"] == "torch_export"


def test_an_ending_that_says_another_format_is_refused(place: Path) -> None:
    done = otprune("out", "-f", "nets:net", "-d", "nets:data", "-o", "a.pt2", "--to", "onnx")
    assert done.exit_code == 1
    assert "'a.pt2' has the ending of torch_export, and onnx is asked for." in done.stderr
    assert "where: --to onnx" in done.stderr


@pytest.mark.parametrize("command", ["verify", "export"])
def test_a_factory_that_there_is_not_is_told_once(command: str, place: Path) -> None:
    data = ["-d", "nets:data"] if command == "export" else []
    done = CliRunner().invoke(app, [command, "out", "-f", "nope:nope", *data])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[0] == "there is no module 'nope'."
    assert done.stderr.count("fix:") == 1


OTHER = """
def other():
    net_ = net()
    net_[1] = nn.GELU()
    return net_

def odd():
    net_ = net()
    net_[1].inplace = True
    return net_
"""


@pytest.mark.parametrize("command", ["verify", "export"])
def test_a_changed_factory_is_told_in_the_words_of_a_shell(command: str, place: Path) -> None:
    sys.modules.pop("nets", None)
    Path("nets.py").write_text(NETS + OTHER)
    words = [command, "out", "-f", "nets:odd"]
    words += ["-d", "nets:data", "--to", "torch_export"] if command == "export" else []
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 10
    assert "inplace True in the factory's model" in done.stderr
    assert "or --no-strict to let" in done.stderr
    assert "strict=False" not in done.stderr
    assert CliRunner().invoke(app, [*words, "--no-strict"]).exit_code == 0


def test_a_changed_class_is_warned_of_where_that_was_asked_for(place: Path) -> None:
    sys.modules.pop("nets", None)
    Path("nets.py").write_text(NETS + OTHER)
    words = ["-f", "nets:other", "-d", "nets:data", "--to", "torch_export", "--no-strict"]
    with pytest.warns(UserWarning, match="'1' is a GELU in the loaded model, a ReLU in the saved"):
        assert otprune("out", *words).exit_code == 0


def test_what_is_no_saved_model_is_refused(place: Path) -> None:
    done = otprune("nothing", "-f", "nets:net", "-d", "nets:data")
    assert done.exit_code == 10
