"""The pages about transport say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plot_transport, transport
from benchmarks.common import read_json
from benchmarks.transport_thresholds import IN_FORCE, QUESTIONS, contradicts
from torch_otprune.transport.dispatch import TABLE, Problem, choose

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = read_json(plot_transport.RESULTS)
GRID, THRESHOLDS = RESULTS.get("grid", {}), RESULTS.get("thresholds", {})
MEASURED = [key for key, row in GRID.items() if key.endswith(" ours") and "seconds" in row]


def test_the_page_of_figures_is_the_one_the_results_make() -> None:
    page = (DOCS / "transport_dispatch.md").read_text()
    assert page == plot_transport.dispatch_page(read_json(plot_transport.RESULTS))


def test_the_page_of_figures_shows_the_table_in_force() -> None:
    page = (DOCS / "transport_dispatch.md").read_text()
    assert all(row.when in page for row in TABLE)


def test_every_verb_of_the_room_is_on_the_first_page() -> None:
    from torch_otprune import transport as room

    page = (DOCS / "transport.md").read_text()
    known = {"quantiles", "sqdist", "ground_cost", "principal", "explain", "divergence_report"}
    verbs = [name for name in room.__all__ if name[0].islower() and name not in known]
    assert not [name for name in verbs if f"`{name}`" not in page]


def test_a_cell_that_fails_says_why_and_stops_nothing() -> None:
    def broken() -> dict[str, object]:
        raise ValueError("no such solver")

    assert transport.alone(broken, 30) == {"skipped": "ValueError: no such solver"}


def test_a_cell_over_its_limit_is_stopped() -> None:
    import time

    def slow() -> dict[str, object]:
        time.sleep(30)
        return {}

    assert transport.alone(slow, 0.5) == {"skipped": "over the limit of 0.5 s"}


@pytest.mark.parametrize("name", ["ours", "scipy assignment", "POT exact"])
@pytest.mark.parametrize("purpose", transport.PURPOSES)
def test_exact_methods_agree_on_a_small_problem(name: str, purpose: str) -> None:
    x, y = transport.clouds(30, 4)
    want = transport.truth(30, 4)["value"]
    assert transport.METHODS[name].run(x, y, purpose).value == pytest.approx(want, rel=1e-5)


def test_the_verdict_compares_with_peers_of_equal_accuracy_only() -> None:
    def row(method: str, seconds: float, error: float) -> dict[str, object]:
        return {
            "n": 64, "d": 4, "purpose": "value", "method": method, "seconds": seconds,
            "error": error, "marginal": 0.0, "solver": "exact", "extra_mib": 0.0,
        }  # fmt: skip

    rows = [row("ours", 2.0, 1e-6), row("POT exact", 4.0, 0.0), row("geomloss online", 0.1, 0.2)]
    data = {"grid": dict(enumerate(rows)), "rates": {"gflops": 1.0, "gbytes": 1.0}}
    (found,) = transport.verdict(data)
    assert (found["peer"], found["ratio"]) == ("POT exact", 0.5)


def picked(n: int, d: int, purpose: str) -> str:
    return choose(Problem(n, n, d, purpose=purpose)).solver


# What the table picks at every place of the grid: a change of a threshold shows here.
@pytest.mark.parametrize("purpose", transport.PURPOSES)
@pytest.mark.parametrize("d", transport.DIMS)
@pytest.mark.parametrize("n", transport.SIZES)
def test_the_table_picks_one_known_solver_for_each_place(n: int, d: int, purpose: str) -> None:
    want = "line" if d == 1 else "exact" if n <= 8192 else "blocks"
    assert picked(n, d, purpose) == want


@pytest.mark.parametrize("key", MEASURED)
def test_no_other_solver_of_ours_was_faster_at_equal_accuracy(key: str) -> None:
    mine = GRID[key]
    place = (mine["n"], mine["d"], mine["purpose"])
    if mine["error"] is None:
        pytest.skip("no exact value was found at this size")
    enough = max(1.2 * mine["error"], 1e-5)
    others = [
        row
        for row in GRID.values()
        if (row["n"], row["d"], row["purpose"]) == place
        and row["method"].startswith("ours")
        and "seconds" in row
        and row["error"] <= enough
        and row["marginal"] <= max(mine["marginal"], 0.01)
    ]
    slower = [row["method"] for row in others if 1.5 * row["seconds"] < mine["seconds"]]
    assert not slower


@pytest.mark.parametrize("key", [key for key in MEASURED if " plan " in key])
def test_the_solver_that_was_measured_is_the_one_in_the_table(key: str) -> None:
    row = GRID[key]
    assert row["solver"] == picked(row["n"], row["d"], "plan")


def test_a_slow_method_is_not_tried_where_it_has_more_to_do() -> None:
    rows = {"8192 4 value geomloss online": {"skipped": "over the limit of 20 s"}}
    said = "over the limit of 20 s: at d = 4 already"
    assert transport.known_slow(rows, "geomloss online", 8192, 16) == said
    assert transport.known_slow(rows, "POT exact", 8192, 16) is None


@pytest.mark.parametrize("name", sorted(IN_FORCE))
def test_no_measured_place_speaks_against_a_threshold(name: str) -> None:
    rows = [row for row in THRESHOLDS.values() if row["threshold"] == name]
    if not rows:
        pytest.skip("the committed results were measured before this section was there")
    assert not [row for row in rows if contradicts(row, IN_FORCE[name])]


def test_every_threshold_is_measured_on_both_sides_or_up_to_what_fits() -> None:
    below = {name for name, asked in QUESTIONS.items() if min(asked[2]) <= IN_FORCE[name]}
    above = {name for name, asked in QUESTIONS.items() if max(asked[2]) > IN_FORCE[name]}
    assert below == set(IN_FORCE) - {"LOW_CPU"}  # at 0 there is nothing below it
    assert above == {"REPEAT", "PROGRAM", "LOW_CPU", "REDUCED"}  # more costs or points do not fit


@pytest.mark.parametrize(
    ("at", "low", "high", "wrong"),
    [(10, 1.0, 1.0, False), (10, 2.0, 1.0, True), (50, 1.0, 2.0, True), (50, 2.0, 1.0, False)],
)
def test_a_threshold_is_contradicted_by_the_side_that_it_refuses(
    at: int, low: float, high: float, wrong: bool
) -> None:
    row = {"at": at, "low_seconds": low, "high_seconds": high, "worth": 1.0}
    assert contradicts(row, 20) is wrong


def _known(**seconds: float) -> dict[str, object]:
    sizes = {int(key[1:]): value for key, value in seconds.items()}
    rows = {f"{n} 4 value POT exact": {"seconds": s} for n, s in sizes.items()}
    return {"grid": rows, "rates": {"gpairs": 0.5}}


def test_a_peer_is_foreseen_from_its_own_growth() -> None:
    found = transport.foreseen(_known(n512=0.01, n2048=0.64), "POT exact", 8192, 4, "value")
    assert found is not None
    assert found[0] == pytest.approx(0.64 * 4**3)


def test_a_peer_that_was_never_measured_is_tried() -> None:
    assert transport.foreseen({"grid": {}, "rates": {}}, "POT exact", 64, 4, "value") is None


def test_ours_is_foreseen_from_the_rate_of_the_machine_where_costs_do_not_fit() -> None:
    found = transport.foreseen(_known(), "ours", 100_000, 16, "plan")
    assert found is not None
    assert found[0] == pytest.approx(60 * 1e10 / 0.5e9)


def test_a_cell_far_over_the_limit_is_not_started_and_says_what_it_would_take() -> None:
    data = _known(n512=1.0, n2048=16.0)
    row = transport._cell(data, "POT exact", 8192, 4, "value", 20.0)
    assert row["estimate"] == pytest.approx(256.0)
    assert row["skipped"].startswith("not run: about 2.6e+02 s expected (16 s at n = 2048")


def test_a_cloud_that_does_not_fit_is_not_started() -> None:
    said = transport.fits(transport.METHODS["ours"], 100_000, 4096)
    assert said == "not run: clouds of 4e+08 numbers, with their copies, do not fit in memory"


def test_rows_for_a_gpu_say_why_they_are_empty() -> None:
    import torch

    from benchmarks.transport_cases import GPU, gpu

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here, and so figures")
    data: dict[str, object] = {}
    gpu(data)
    assert data["gpu"] == dict.fromkeys(GPU, "not run: this machine has no CUDA device")


def test_the_page_shows_where_thresholds_come_from_once_they_are_measured() -> None:
    row = {
        "threshold": "REPEAT", "at": 768, "low": "assignment of copies", "high": "linear program",
        "low_seconds": 0.1, "high_seconds": 0.2, "worth": 1.0,
    }  # fmt: skip
    page = plot_transport.dispatch_page(RESULTS | {"thresholds": {"REPEAT 768": row}})
    assert "| REPEAT | 1536 | 768 | assignment of copies | 0.1 | linear program | 0.2 | 1 |" in page
