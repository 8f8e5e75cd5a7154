"""Analysis and plan of a deep network, in forward passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import growth

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "growth.json"
MOST = 20  # forward passes, of a text of 128 tokens through 64 layers


def test_the_benchmark_writes_ratios_and_the_power_of_growth(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    asked = ["--layers", "1", "3", "--tokens", "8", "--repeats", "1", "--out", str(out)]
    growth.main(asked)
    found = json.loads(out.read_text())
    assert [(row["layers"], row["tokens"]) for row in found["rows"]] == [(1, 8), (3, 8)]
    for row in found["rows"]:
        assert row["all per forward"] == pytest.approx(
            row["seconds"]["all"] / row["seconds"]["forward"], abs=0.01
        )
    assert found["environment"]["threads"] == 1
    assert set(found["exponents"]["8"]) == {"forward", "analysis", "all"}


def test_a_time_that_is_a_power_of_the_layers_has_that_exponent() -> None:
    rows = [{"layers": n, "seconds": {"all": 3.0 * n**1.5}} for n in (8, 16, 64)]
    assert growth.exponent(rows, "all") == 1.5


@pytest.mark.zoo
def test_analysis_and_plan_of_64_layers_take_at_most_20_forward_passes() -> None:
    # in a process of its own: in this one every call is type-checked
    code = "import torch; torch.set_num_threads(1); from benchmarks import growth; "
    code += "print(growth.row(64, 128, repeats=5)['all per forward'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert float(said.stdout.split()[-1]) <= MOST


def test_the_published_table_stays_below_20_forward_passes_and_grows_linearly() -> None:
    payload = json.loads(RESULTS.read_text())
    assert {row["layers"] for row in payload["rows"]} == set(growth.LAYERS)
    assert all(row["all per forward"] <= MOST for row in payload["rows"])
    assert all(found["all"] <= 1.1 for found in payload["exponents"].values())
    assert RESULTS.with_suffix(".md").read_text() == growth.page(payload)
