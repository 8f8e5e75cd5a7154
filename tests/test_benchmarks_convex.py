"""The convex refit's benchmark runs, and says what it measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks import convex_refit
from benchmarks.common import read_json, write_json


def test_the_quick_run_writes_rows_table_and_pictures_and_goes_on_where_it_stopped(
    tmp_path: Path,
) -> None:
    out = tmp_path / "convex.json"
    convex_refit.main(["--quick", "--out", str(out)])
    rows = read_json(out)["rows"]
    assert [(r["method"], r["rounds"]) for r in rows] == [
        ("as pruned", 0),
        *(
            (f"{way}, {name}", count)
            for count in convex_refit.QUICK_ROUNDS
            for name in convex_refit.KINDS
            for way in ("convex", "SGD")
        ),
    ]
    for row in rows:
        assert 0 <= row["test"] <= 100
        if "objective" in row:
            assert row["objective"] <= row["before"]
    assert "convex, hinge" in out.with_suffix(".md").read_text()
    for name in ("convex.png", "convex_attacks.png"):
        assert (tmp_path / name).stat().st_size > 0
    write_json(out, read_json(out) | {"rows": rows[:7]})  # as if it had stopped there
    convex_refit.main(["--quick", "--out", str(out)])
    again = read_json(out)["rows"]
    assert again[:7] == rows[:7]
    assert [r["method"] for r in again] == [r["method"] for r in rows]


def test_rows_of_other_settings_are_not_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "convex.json"
    write_json(out, {"settings": {"units": 3}, "rows": [{"seed": 0}]})
    assert convex_refit._before(out, {"units": 4}) == []
    assert convex_refit._before(out, {"units": 3}) == [{"seed": 0}]
