"""What README and docs print is what the committed JSON says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import publish
from benchmarks.plot_cifar10_width import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_the_results_block_of_the_readme_is_generated_from_the_json() -> None:
    payload = json.loads((RESULTS / "cifar10_width.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert publish.readme(text, payload) == text
    assert "best peer" in text


def test_the_table_of_the_benchmarks_page_is_generated_from_the_json() -> None:
    payload = json.loads((RESULTS / "cifar10_width.json").read_text())
    assert (RESULTS / "cifar10_width.md").read_text() == table(payload) + "\n"


def test_every_row_names_its_environment_and_seed() -> None:
    for path in RESULTS.glob("cifar10_width.json"):
        payload = json.loads(path.read_text())
        for row in payload["rows"]:
            assert row["environment"] in payload["environments"]
            assert row["seed"] >= 0
