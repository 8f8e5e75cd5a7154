"""A report shows which layers went, what stands in for them, and the budget they were under."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report_model import a_plan, a_report

import torch_otprune.criteria  # noqa: F401  (fills the table that policies name)
from torch_otprune.plan.model import Cost, Drop, Folding, Line, Plan
from torch_otprune.policy import Budget, Layers, Policy
from torch_otprune.report import Report
from torch_otprune.report.pictures import draw
from torch_otprune.report.table import depth_sections
from torch_otprune.structure.graph import Swap


def a_shallower(removed: int = 2, **changes: Any) -> Report:
    drops = tuple(
        Drop(
            block=f"layers.<{i}>",
            rule=0,
            criterion="transport",
            replace="affine",
            reason="transport: dropping it moves the output by 12.00%",
            error=0.12,
            swaps=(Swap(f"layers.<{i}>", "skip"),),
        )
        for i in range(removed)
    )
    rule = Layers(repair=())
    update: dict[str, Any] = {
        "policy": Policy(rules=rule, budget=Budget(layers="50%")),
        "cuts": (),
        "drops": drops,
        "layers": Cost(before=2 * removed, after=removed),
        "compacted": tuple(drop.block for drop in drops),
    }
    return a_report(plan=a_plan().model_copy(update=update), **changes)


def test_removed_layers_are_in_the_table_with_what_stands_in() -> None:
    text = str(a_shallower())
    assert "removed layer" in text and "affine" in text and "0.120" in text
    assert "layers.<0>" in text and "layers.<1>" in text


def test_many_removed_layers_are_counted_not_listed() -> None:
    text = str(a_shallower(30))
    assert "layers.<9>" in text and "layers.<10>" not in text and "and 20 more" in text


def test_layers_are_a_line_of_the_totals_only_where_some_were_on_offer() -> None:
    assert "layers on offer" in str(a_shallower())
    assert "layers on offer" not in str(a_report())


@pytest.mark.parametrize(("after", "state"), [(2, "within"), (3, "over")])
def test_a_budget_of_layers_has_a_verdict(after: int, state: str) -> None:
    report = a_shallower()
    plan = report.plan.model_copy(update={"layers": Cost(before=4, after=after)})
    said = report.model_copy(update={"plan": plan}).verdicts
    assert f"{state} budget: {after} layers kept ({after / 4:.1%}), 2 allowed (50.0%)" in said


def test_the_page_lists_removed_layers_and_the_entries_that_move_up(tmp_path: Path) -> None:
    text = a_shallower().write(tmp_path).read_text()
    assert "<h2>Removed layers</h2>" in text and "dropping it moves the output by 12.00%" in text
    assert "Taken out of their lists" in text
    assert "layers.&lt;1&gt;" in text and "layers.<1>" not in text


def test_a_plan_without_removed_layers_has_no_such_section(tmp_path: Path) -> None:
    assert "Removed layers" not in a_report().write(tmp_path).read_text()


def test_the_picture_of_totals_has_a_bar_for_layers() -> None:
    with_layers, without = draw(a_shallower()), draw(a_report(plan=a_plan(0)))
    assert height(with_layers["totals"]) > height(without["totals"])
    assert "widths" not in with_layers


def height(png: bytes) -> int:
    return int.from_bytes(png[20:24], "big")


def test_a_report_of_removed_layers_survives_json() -> None:
    report = a_shallower()
    assert Report.from_json(report.to_json()) == report
    assert Plan.from_json(report.plan.to_json()) == report.plan
    (section,) = depth_sections(report.plan)
    assert [row[:2] for row in section.rows] == [
        ("layers.<0>", "affine"),
        ("layers.<1>", "affine"),
    ]


def test_linear_activations_and_folds_are_shown_with_their_price(tmp_path: Path) -> None:
    line = Line(
        site="features.<1>",
        rule=0,
        criterion="stein",
        surrogate="affine",
        into="features.0",
        reason="stein: the best line misses 3%",
        error=0.03,
        params=0,
    )
    folding = Folding(
        layers=("features.0", "features.2"),
        into="features.0",
        idle=(),
        lines=("features.<1>",),
        writes="features.2",
        kind="exact",
        reason="nothing is padded",
        params=Cost(before=300, after=200),
        macs=Cost(before=5000, after=4000),
    )
    update = {"lines": (line,), "foldings": (folding,), "cuts": ()}
    report = a_report(plan=a_plan().model_copy(update=update))
    text, page = str(report), report.write(tmp_path).read_text()
    assert "features.<1>" in text and "0.030" in text
    assert "features.0 + features.2" in text and "5,000 -> 4,000" in text
    assert "<h2>Activations made linear</h2>" in page and "the best line misses 3%" in page
    assert "<h2>Folds</h2>" in page and "nothing is padded" in page
