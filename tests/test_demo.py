"""The demo, trained a little, and the command lines of the documentation on what it leaves."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import torch_otprune as otp
from torch_otprune import demo
from torch_otprune.cli import app
from torch_otprune.errors import OTPruneError, VerificationError

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def commands() -> list[str]:
    """List the command lines of the documentation, in order."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything in the documentation was run."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def outputs(place: Path) -> dict[str, str]:
    """Every command line of the documentation, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        printed = {}
        for line in commands():
            done = CliRunner().invoke(app, line.split()[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            printed[line.split()[1]] = done.stdout
        return printed


def test_every_command_of_the_documentation_runs(outputs: dict[str, str]) -> None:
    names = ["demo", "doctor", "plan", "compare", "apply", "verify", "export", "schema"]
    assert list(outputs) == names


def test_the_demo_prunes_to_half_the_macs_within_one_percent(
    place: Path, outputs: dict[str, str]
) -> None:
    report = otp.Report.from_json((place / "report/report.json").read_text())
    assert 0.49 < report.macs.ratio <= 0.5


def test_the_demo_says_what_it_measured(outputs: dict[str, str]) -> None:
    for words in ("pruned and repaired", "without repair", "bit for bit", "test images", "macs: "):
        assert words in outputs["demo"]


def test_the_demo_leaves_page_pictures_and_model(place: Path, outputs: dict[str, str]) -> None:
    names = {path.name for path in (place / "report").iterdir()}
    assert {"report.html", "totals.png", "widths.png", "layers.png", "model"} <= names
    model = otp.load(place / "report/model", factory=demo.digits_net)
    assert torch.isfinite(model(demo.digits_loader()[0])).all()


def test_the_command_line_makes_the_plan_that_the_demo_made(
    place: Path, outputs: dict[str, str]
) -> None:
    plans = [place / "report/plan.json", place / "plan.json"]
    assert plans[0].read_text() == plans[1].read_text()


def test_repair_keeps_more_than_the_yardstick_without(place: Path, outputs: dict[str, str]) -> None:
    dense = demo.digits_net()
    dense.load_state_dict(load_file(place / "report/dense.safetensors"))
    small = otp.load(place / "report/model", factory=demo.digits_net)
    lost = demo.accuracy(dense.eval()) - demo.accuracy(small.eval())
    assert lost < 0.1
    rows = re.findall(r"^(pruned|magnitude without)[^\d]*([\d.]+)%", outputs["demo"], re.MULTILINE)
    values = {name: float(value) for name, value in rows}
    assert values["pruned"] > values["magnitude without"]


def outcome(place: Path, **accuracies: float) -> demo.Outcome:
    """Make up results beside a real report."""
    report = otp.Report.from_json((place / "report/report.json").read_text())
    dense, pruned, other = (demo.Result(n, a, 1) for n, a in accuracies.items())
    return demo.Outcome(report, dense, pruned, (other,), {})


def test_the_verdict_is_honest_when_the_yardstick_wins(
    place: Path, outputs: dict[str, str]
) -> None:
    said = outcome(place, dense=500 / 597, pruned=262 / 597, other=322 / 597).verdicts()
    assert "pruning costs 238 of 597 test images" in said[0]
    assert "answers 60 fewer of them than other" in said[1]
    assert "not well trained" in said[-1]


def test_the_outcome_is_json(place: Path, outputs: dict[str, str]) -> None:
    found = json.loads(outcome(place, dense=0.99, pruned=0.98, other=0.1).to_json())
    assert found["pruned"]["accuracy"] == 0.98


def test_a_model_that_changes_on_disk_is_noticed(place: Path, outputs: dict[str, str]) -> None:
    with pytest.raises(VerificationError, match="other logits than here"):
        demo._check_elsewhere(place / "report/model", "0" * 64)


def test_a_model_that_does_not_load_elsewhere_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="not the same in a new process"):
        demo._check_elsewhere(tmp_path, "0" * 64)


def test_no_test_image_is_trained_or_calibrated_on() -> None:
    train, _, test, _ = demo._digits()
    same = (train.flatten(1)[:, None] == test.flatten(1)[None]).all(dim=2)
    assert not same.any()
    torch.testing.assert_close(torch.cat(demo.digits_loader()), train, rtol=0, atol=0)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OTPruneError, match=r"torch-otprune\[demo\]"):
        demo.digits_loader()


def test_the_demo_refuses_a_directory_that_is_someone_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "it holds something else" in done.stderr
