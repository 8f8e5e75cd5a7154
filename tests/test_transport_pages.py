"""The pages about transport say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plot_transport, transport
from benchmarks.common import read_json
from torch_otprune.transport.dispatch import TABLE

DOCS = Path(__file__).parent.parent / "docs"


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
