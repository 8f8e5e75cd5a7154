"""The coverage benchmark: tools run side by side, resume, and the published table is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage, plot_coverage
from benchmarks.coverage import TOOLS
from tests.zoo import ENTRIES

pytest.importorskip("transformers", reason="Transformers is not installed")

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "coverage.json"
OURS = ("ours, at random", "ours, planned")
PEER = "Torch-Pruning"
FEW = "^(conv1d_causal|channel_shuffle)$"


def run(out: Path, *words: str) -> list[dict[str, Any]]:
    coverage.main(["--out", str(out), *words])
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def published(tool: str) -> list[dict[str, Any]]:
    return [r for r in json.loads(RESULTS.read_text())["rows"] if r["tool"] == tool]


def test_every_tool_meets_the_same_nets_and_known_rows_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    rows = run(out, "--only", FEW)
    names = {row["name"] for row in rows}
    assert names
    assert {(r["name"], r["tool"]) for r in rows} == {(n, t) for n in names for t in TOOLS}
    assert {r["status"] for r in rows if r["tool"] in OURS} == {"exact"}
    before = out.read_text()
    assert run(out, "--only", FEW) == rows
    assert json.loads(before)["rows"] == rows
    assert "Torch-Pruning" in plot_coverage.summary(json.loads(before))


def test_what_takes_too_long_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(case: Any) -> dict[str, Any]:
        while True:
            pass

    monkeypatch.setitem(TOOLS, PEER, turn)
    row = coverage.measure("conv1d_causal", PEER, 0.5)
    assert row == {"status": "hangs", "said": "stopped after 0.5 s of processor time"}


def test_a_process_that_dies_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, PEER, lambda case: os._exit(3))
    row = coverage.measure("conv1d_causal", PEER, 5.0)
    assert row == {"status": "crashes", "said": "the process died"}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_published_table_has_every_net_of_the_zoo_once(tool: str) -> None:
    assert sorted(row["name"] for row in published(tool)) == sorted(ENTRIES)


@pytest.mark.parametrize("tool", OURS)
def test_nine_nets_in_ten_are_exact_and_none_is_wrong_or_hangs(tool: str) -> None:
    rows = published(tool)
    assert {row["status"] for row in rows} <= {"exact", "refused"}
    assert sum(row["status"] == "exact" for row in rows) >= 0.9 * len(rows)


def test_whatever_is_refused_has_a_reason() -> None:
    for tool in OURS:
        for row in published(tool):
            if row["status"] == "refused":
                reasons = row.get("refused") or {"": row.get("said", "")}
                assert all(reasons.values()), row["name"]
