"""Which criterion to trust, and width or depth: measured right, resumed, judged and published."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks import (
    cifar,
    depth_criteria,
    minilm_depth,
    plot_depth_criteria,
    plot_width_or_depth,
    width_or_depth,
)
from torch_otprune.policy.registry import LAYER_CRITERIA

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
with_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def silence_(block: nn.Module) -> None:
    """Let a block's branch write nothing."""
    for name in ("weight", "bias"):
        nn.init.zeros_(block.get_parameter(f"bn2.{name}"))


@pytest.fixture
def bench() -> depth_criteria.Bench:
    return depth_criteria.quick_bench()


@pytest.mark.parametrize(
    ("name", "plot"),
    [("depth_criteria", plot_depth_criteria), ("width_or_depth", plot_width_or_depth)],
)
def test_the_generated_part_of_the_page_is_what_the_json_makes(name: str, plot: Any) -> None:
    path = RESULTS / f"{name}.json"
    payload = json.loads(path.read_text()) if path.exists() else {}
    assert (RESULTS / f"{name}.md").read_text() == plot.report(payload) + "\n"
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert f"<!-- generated: results {name} -->" in page


@pytest.mark.parametrize("module", [depth_criteria, width_or_depth])
def test_the_data_folder_is_asked_for(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main([])
    assert "--data is needed" in capsys.readouterr().err


def test_what_was_not_measured_says_how_to() -> None:
    for plot in (plot_depth_criteria, plot_width_or_depth):
        assert plot.COMMAND in plot.report({})
        assert "pictures/" not in plot.report({})


# Which criterion to trust.


def test_all_blocks_that_keep_their_shape_are_scored(bench: depth_criteria.Bench) -> None:
    assert bench.blocks == ("layer1.0", "layer1.1", "layer2.1", "layer3.1")


@pytest.mark.parametrize("kind", ["transport", "block_influence", "loss_delta", "gaussian"])
def test_a_block_that_does_nothing_scores_nothing(bench: depth_criteria.Bench, kind: str) -> None:
    silence_(bench.model.get_submodule("layer2.1"))
    found = depth_criteria.score(bench, kind, 0)["scores"]
    assert found["layer2.1"] == pytest.approx(0, abs=1e-9)
    assert all(value > 0 for block, value in found.items() if block != "layer2.1")


def test_the_score_of_a_block_is_what_losing_it_does(bench: depth_criteria.Bench) -> None:
    found = depth_criteria.score(bench, "loss_delta", 0)["scores"]["layer3.1"]
    small = depth_criteria.remove(bench, "layer3.1", "none", 0)
    x = torch.cat(list(bench.data.calibration(0)))
    with torch.no_grad():
        dense, now = bench.model(x).double(), small(x).double()
    whole = float((now - dense).square().sum() / dense.square().sum())
    # The criterion probes 64 of the 128 images.
    assert found == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("repair", depth_criteria.REPAIRS)
def test_losing_a_block_that_does_nothing_changes_nothing(
    bench: depth_criteria.Bench, repair: str
) -> None:
    silence_(bench.model.get_submodule("layer2.1"))
    row = depth_criteria.truth(bench, "layer2.1", repair, 0)
    assert row["accuracy_change"] == 0
    assert row["loss_change"] == pytest.approx(0, abs=1e-4)
    assert row["output_error"] == pytest.approx(0, abs=1e-3)


def test_one_block_goes_and_the_dense_network_stays(bench: depth_criteria.Bench) -> None:
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    small = depth_criteria.remove(bench, "layer1.1", "default", 0)
    kinds = [(n, m) for n, m in small.named_modules() if isinstance(m, cifar.BasicBlock)]
    assert len(kinds) == 5  # of six
    assert all(torch.equal(before[k], v) for k, v in bench.model.state_dict().items())


def test_the_truth_is_read_on_images_that_calibration_did_not_draw() -> None:
    pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 2, 2)
    data = depth_criteria.Images(cifar.Split(pixels, torch.arange(50)), samples=20)
    shade = cifar.Split(pixels, torch.arange(50)).inputs()[:, 0, 0, 0].tolist()
    seen = torch.cat(list(data.calibration(3)))[:, 0, 0, 0].tolist()
    drawn = {shade.index(value) for value in seen}
    assert drawn | set(data.held_out(3).labels.tolist()) == set(range(50))
    assert not drawn & set(data.held_out(3).labels.tolist())


def test_an_output_error_is_relative_to_the_dense_output() -> None:
    one, none = torch.ones(4, 3), torch.empty(0).bool()
    dense = depth_criteria.Grade(0.0, 0.0, one, none)
    assert depth_criteria.Grade(0.0, 0.0, 1.5 * one, none).error(dense) == pytest.approx(0.5)
    assert depth_criteria.Grade(0.0, 0.0, 0 * one, none).error(dense) == 1.0


def test_probes_are_spread_over_sorted_batches() -> None:
    batches = [torch.full((32, 1), i) for i in range(64)]
    taken = depth_criteria.thinned(batches, 256)
    assert [int(batch[0]) for batch in taken] == list(range(0, 64, 8))
    assert depth_criteria.thinned(batches[:2], 256) == batches[:2]


@with_transformers
def test_layers_of_an_encoder_are_scored_and_judged_by_the_embedding() -> None:
    encoder = minilm_depth.quick_bench()
    bench = depth_criteria.Bench("tiny", encoder.model, depth_criteria.Texts(encoder))
    assert bench.blocks == tuple(f"encoder.layer.{i}" for i in range(6))
    assert bench.before(0).loss == pytest.approx(0, abs=1e-6)
    assert bench.before(0).accuracy == 100
    row = depth_criteria.truth(bench, "encoder.layer.2", "none", 0)
    assert row["loss_change"] > 1e-3
    # Of embeddings of length one, the squared distance is twice what the cosine lacks.
    assert row["output_error"] ** 2 == pytest.approx(2 * row["loss_change"], rel=1e-2)


def test_rank_correlation_agrees_with_scipy_on_ties() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 5, (2, 9)).tolist()
        expected = float(spearmanr(x, y).statistic)
        assert plot_depth_criteria.spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert plot_depth_criteria.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_the_bootstrap_of_three_seeds_is_their_range() -> None:
    assert plot_depth_criteria.bootstrap([0.1, 0.9, 0.4]) == pytest.approx((0.1, 0.9))
    assert plot_depth_criteria.bootstrap([0.3]) == pytest.approx((0.3, 0.3))


def test_chance_agrees_with_the_published_tables() -> None:
    # Zar 1972, one-sided 5 %: 0.829 for six, 0.714 for seven.
    assert plot_depth_criteria.chance(6) == pytest.approx(0.829, abs=0.06)
    assert plot_depth_criteria.chance(13) == pytest.approx(0.484, abs=0.01)


BLOCKS = ["a", "b", "c", "d"]


def scored(kind: str, scores: list[float], *, net: str = "n", seed: int = 0) -> dict[str, Any]:
    found = dict(zip(BLOCKS, scores, strict=True))
    row = {"net": net, "side": "score", "choice": kind, "repair": "none", "seed": seed}
    return row | {"scores": found, "seconds": 1.0}


def happened(changes: list[float], *, net: str = "n", seed: int = 0) -> list[dict[str, Any]]:
    row = {"net": net, "side": "truth", "seed": seed}
    dense = row | {"side": "dense", "repair": "none", "blocks": BLOCKS, "held_out": 10}
    rows = [
        row
        | {"choice": b, "block": b, "repair": repair, "loss_change": sign * change}
        | {"accuracy_change": sign * change, "output_error": change}
        for b, change in zip(BLOCKS, changes, strict=True)
        for repair, sign in (("none", 1.0), ("default", -1.0))
    ]
    return [dense, *rows]


def test_a_criterion_is_compared_with_the_changes_of_its_own_seed_and_repair() -> None:
    rows = happened([1, 2, 3, 4]) + happened([4, 3, 2, 1], seed=1)
    rows += [scored("x", [1, 2, 3, 4]), scored("x", [1, 2, 3, 4], seed=1)]
    found = {(s.repair, s.measure): s for s in plot_depth_criteria.summarise({"rows": rows})}
    assert found["none", "loss_change"].values == pytest.approx((1.0, -1.0))
    assert found["default", "loss_change"].values == pytest.approx((-1.0, 1.0))
    assert found["default", "output_error"].values == pytest.approx((1.0, -1.0))


def test_the_mean_over_networks_needs_all_of_them() -> None:
    rows = happened([1, 2, 3, 4]) + happened([1, 2, 4, 3], net="m")
    rows += [scored("x", [1, 2, 3, 4]), scored("x", [1, 2, 3, 4], net="m")]
    rows += [scored("y", [1, 2, 3, 4])]
    found = plot_depth_criteria.summarise({"rows": rows})
    means = [s for s in found if s.net == "all networks" and s.repair == "none"]
    assert {s.kind for s in means} == {"x"}
    assert means[0].mean == pytest.approx((1.0 + 0.8) / 2)


def test_a_block_without_truth_leaves_the_criterion_out() -> None:
    rows = [*happened([1, 2, 3, 4])[:-1], scored("x", [1, 2, 3, 4])]
    assert {s.repair for s in plot_depth_criteria.summarise({"rows": rows})} == {"none"}


@pytest.mark.parametrize(
    ("first", "expected"),
    [("transport", "This is as expected."), ("other", "This is not what was expected.")],
)
def test_the_verdict_follows_the_numbers(first: str, expected: str) -> None:
    last = {"transport": "other", "other": "transport"}[first]
    truth = happened([1, 2, 3, 4])
    for row in truth[1:]:
        row["loss_change"] = abs(row["loss_change"])
    rows = [*truth, scored(first, [1, 2, 3, 4]), scored("loss_delta", [1, 2, 4, 3])]
    rows.append(scored(last, [4, 3, 2, 1]))
    said = plot_depth_criteria.verdict({"rows": rows})
    assert said.count(expected) == 2


def test_a_criterion_that_refuses_is_named_once_with_its_reason() -> None:
    error = {"net": "n", "side": "score", "choice": "x", "error": "CalibrationError: no row."}
    rows = [error | {"seed": 0}, error | {"seed": 1}]
    expected = "- `x` gives no score on n: CalibrationError: no row."
    assert plot_depth_criteria.failures({"rows": rows}) == expected


def test_the_quick_run_scores_every_criterion_and_plots(tmp_path: Path) -> None:
    out = tmp_path / "criteria.json"
    depth_criteria.main(["--quick", "--seeds", "1", "--which", "truth", "--out", str(out)])
    words = ["--quick", "--seeds", "1", "--which", "scores", "--out", str(out)]
    depth_criteria.main([*words, "--only", "^(?!max_sliced)"])  # the slow one
    rows = json.loads(out.read_text())["rows"]
    assert {row["choice"] for row in rows if row["side"] == "score"} == {
        kind for kind in LAYER_CRITERIA if kind != "max_sliced"
    }
    # Published for the last position of a sequence; an image may be sampled without it.
    assert {row["choice"] for row in rows if "error" in row} <= {"angular"}
    assert sum(row["side"] == "truth" for row in rows) == 8
    plot_depth_criteria.main(["--json", str(out)])
    text = out.with_suffix(".md").read_text()
    assert text.count("| tiny |") >= 11
    assert out.with_suffix(".png").stat().st_size > 1000
    assert str(tmp_path) not in out.read_text()


# Width or depth.


def measured(way: str, right: str, *, error: float = 0.1, **more: Any) -> dict[str, Any]:
    row = {"net": "n", "side": "ours", "choice": way, "removed": 50, "seed": 0, "gone": ["a"]}
    row |= {"held_out_right": right, "test_right": right, "output_error": error, "blocks": 4}
    row |= {"held_out_images": 16, "test_images": 16, "latency": 0.5, "macs_kept": 0.5}
    row |= {"latency_low": 0.4, "latency_high": 0.6, "predicted": 0.1, "unrepaired": 0.1}
    count = 100 * int(right, 16).bit_count() / 16
    return row | {"held_out": count, "test": count, "seconds": 1.0} | more


def judged(*rows: dict[str, Any]) -> plot_width_or_depth.Verdict:
    return plot_width_or_depth.judge(plot_width_or_depth.summarise({"rows": rows}))


def test_two_ways_are_compared_image_by_image() -> None:
    rows = [measured("both", "0fff"), measured("width", "00ff"), measured("depth", "0fff")]
    both, width = (
        next(s for s in plot_width_or_depth.summarise({"rows": rows}) if s.way == way)
        for way in ("both", "width")
    )
    gap, error = plot_width_or_depth.gap(both, width, "test")
    assert gap == pytest.approx(25.0)  # 4 of 16 won, none lost
    assert error == pytest.approx(100 * ((4 / 16 - (4 / 16) ** 2) / 16) ** 0.5)


def test_a_mixed_plan_that_is_never_behind_is_said_to_be_so() -> None:
    found = judged(measured("both", "0fff"), measured("width", "00ff"), measured("depth", "0fff"))
    assert found.compared == 2
    assert not (found.error or any(found.accuracy.values()) or found.clock)
    assert "never behind at equal MACs, as expected" in plot_width_or_depth.words(found)


def test_a_mixed_plan_that_is_behind_is_named_with_what_beats_it() -> None:
    found = judged(
        measured("both", "00ff", error=0.2, latency=0.6),
        measured("width", "0fff", error=0.3, latency=0.7),
        measured("depth", "000f", error=0.1, latency=0.4),
    )
    assert found.error == ("n at 50 %, depth only",)
    assert found.accuracy == dict.fromkeys(("held_out", "test"), ("n at 50 %, width only",))
    assert found.clock == ()
    said = plot_width_or_depth.words(found)
    assert "behind in 1 of 2 comparisons at equal MACs: n at 50 %, depth only." in said
    assert "which was not expected" in said


def test_on_the_clock_a_plan_of_another_budget_may_win() -> None:
    found = judged(
        measured("both", "00ff", latency=0.6), measured("depth", "0fff", latency=0.4, removed=60)
    )
    assert found.compared == 0
    assert found.clock == ("n at 50 %",)


def test_a_difference_within_one_standard_error_is_not_behind() -> None:
    found = judged(measured("both", "00ff"), measured("width", "037f"))  # 1 won, 2 lost
    assert not any(found.accuracy.values())


def test_ways_without_a_common_seed_are_not_compared() -> None:
    found = judged(measured("both", "00ff"), measured("width", "0fff", seed=1))
    assert found.compared == 0
    scores = plot_width_or_depth.summarise(
        {"rows": [measured("both", "00ff"), measured("width", "0fff", seed=1)]}
    )
    with pytest.raises(ValueError, match="width and both share no seed"):
        plot_width_or_depth.gap(scores[0], scores[1], "test")


def test_a_budget_that_cannot_be_met_is_a_row_with_the_librarys_words() -> None:
    bench = width_or_depth.quick_bench()
    row = width_or_depth.measure(bench, "depth", removed=95, seed=0)
    assert re.search(r"a budget of .* macs .* cannot be reached: the least is", row["unmet"])
    assert "accuracy" not in row
    place = {"net": "n", "side": "ours", "choice": "depth", "removed": 95, "seed": 0}
    rows = [measured("both", "00ff"), place | row]
    dense = {"net": "n", "side": "dense", "held_out": 1.0, "test": 1.0, "seed": 0}
    table = plot_width_or_depth.table({"rows": [*rows, dense]})
    assert f"| n | 5 % | depth only | cannot be met: {row['unmet']} |" in table
    assert judged(*rows).compared == 0


def test_the_dense_network_is_at_no_distance_from_itself() -> None:
    row = width_or_depth.measure(width_or_depth.quick_bench(), "none", removed=0, seed=0)
    assert (row["output_error"], row["macs_kept"], row["params_kept"]) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("way", width_or_depth.WAYS)
def test_every_way_says_what_may_go(way: str) -> None:
    policy = width_or_depth.policy_of(way, removed=30, samples=64, seed=2)
    kinds = {"width": ["channels"], "depth": ["layers"], "both": ["layers", "channels"]}
    assert [rule.kind for rule in policy.rules] == kinds[way]
    assert policy.budget is not None
    assert policy.budget.macs is not None
    assert policy.budget.macs.value == pytest.approx(0.7)


def test_the_quick_run_measures_three_ways_resumes_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "front.json"
    words = ["--quick", "--budgets", "60", "--out", str(out)]
    width_or_depth.main(words)
    rows = json.loads(out.read_text())["rows"]
    assert [row["choice"] for row in rows] == ["none", "width", "depth", "both"]
    assert not [row for row in rows if "error" in row]
    assert all(row["macs_kept"] <= 0.6 for row in rows[1:])
    assert [bool(row["gone"]) for row in rows[1:3]] == [False, True]
    capsys.readouterr()
    width_or_depth.main(words)
    assert capsys.readouterr().out == ""  # nothing measured twice
    plot_width_or_depth.main(["--json", str(out)])
    assert "| tiny | 60 % | both, one budget |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
