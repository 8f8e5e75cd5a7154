"""The benchmark of masks that training finds runs on noise, resumes, and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import dtp_cifar10, plot_dtp_cifar10

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dtp_cifar10.json"


def test_every_method_trains_and_lands_below_its_budget(tmp_path: Path) -> None:
    out = tmp_path / "dtp.json"
    dtp_cifar10.main(["--quick", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == list(dtp_cifar10.METHODS)
    assert not any("error" in row for row in rows)
    assert all(row["macs_kept"] <= 0.5 for row in rows if row["method"] != "dense")
    before = out.read_text()
    dtp_cifar10.main(["--quick", "--out", str(out)])
    assert out.read_text() == before  # what is there is not measured again
    plot_dtp_cifar10.main(["--results", str(out)])
    assert "quick schedule, 50 % of MACs: dtp" in out.with_suffix(".md").read_text()


def test_the_threshold_is_timed_and_reads_at_most_eight_times() -> None:
    found = dtp_cifar10.solve(200_000, "cpu", costs=True)
    assert found["passes"] <= 8
    assert found["missed"] < 1e-6
    assert found["bytes"] == 800_000


def test_the_data_folder_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dtp_cifar10.main([])
    assert "--data is needed" in capsys.readouterr().err


def test_the_generated_part_of_the_page_is_what_the_json_makes() -> None:
    payload = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    assert RESULTS.with_suffix(".md").read_text() == plot_dtp_cifar10.report(payload) + "\n"
    page = (ROOT / "docs" / "howto" / "dtp.md").read_text()
    assert "<!-- generated: results dtp_cifar10 -->" in page


def test_what_was_not_measured_says_how_to() -> None:
    said = plot_dtp_cifar10.report({})
    assert plot_dtp_cifar10.COMMAND in said
    assert plot_dtp_cifar10.SOLVER in said
