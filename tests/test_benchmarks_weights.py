"""The benchmark of weight methods runs on random images, resumes, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import weights_mlp_cifar as bench


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods and two amounts are enough to see it run."""
    names = ("magnitude", "alps, cascade", "sparsegpt, sequential")
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in names})
    monkeypatch.setattr(bench, "ZEROS", ("50", "2:4"))


@pytest.mark.usefixtures("few")
def test_it_runs_resumes_and_writes_table_and_picture(tmp_path: Path) -> None:
    out = tmp_path / "weights.json"
    bench.main(["--quick", "--seeds", "0", "--only", "magnitude", "--out", str(out)])
    assert len(json.loads(out.read_text())["rows"]) == 3  # dense, and two amounts
    bench.main(["--quick", "--seeds", "0", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 7
    assert all(r["left"] <= 0.5 and r["seconds"] >= 0 for r in rows if r["method"] != "dense")
    lines = out.with_suffix(".md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["dense", *bench.METHODS]
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize("method", list(bench.METHODS))
def test_every_method_is_a_rule_at_every_amount(method: str) -> None:
    for zeros in bench.ZEROS:
        share = bench.rule(method, zeros).share
        assert share == pytest.approx(0.5 if ":" in zeros else 1 - int(zeros) / 100)


def test_published_recipes_are_among_the_methods() -> None:
    assert set(bench.PUBLISHED) <= set(bench.METHODS)
