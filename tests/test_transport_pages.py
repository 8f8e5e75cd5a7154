"""The pages about transport say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plot_transport, transport
from benchmarks.common import read_json
from torch_otprune.transport.dispatch import TABLE, Problem, choose

DOCS = Path(__file__).parent.parent / "docs"
GRID = read_json(plot_transport.RESULTS).get("grid", {})
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
