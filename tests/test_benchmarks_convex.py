"""The convex refit's benchmark runs, and says what it measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import convex_refit
from benchmarks.common import read_json


def test_the_quick_run_writes_rows_a_table_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "convex.json"
    convex_refit.main(["--quick", "--out", str(out)])
    rows = read_json(out)["rows"]
    assert [r["method"] for r in rows] == [
        "as pruned",
        "convex, logistic",
        "SGD, logistic",
        *list(convex_refit.CONVEX)[1:],
    ]
    for row in rows:
        assert 0 <= row["test"] <= 100
        if "objective" in row:
            assert row["objective"] <= row["before"]
    assert "convex, hinge" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 0
