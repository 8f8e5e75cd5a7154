"""The benchmark of space folds runs on a tiny network and writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import space_folds


def test_it_writes_numbers_tables_and_pictures(tmp_path: Path) -> None:
    space_folds.main(["--quick", "--folder", str(tmp_path)])
    payload = json.loads((tmp_path / "space_folds.json").read_text())
    assert payload["net"] == "tiny"
    assert set(payload["correlations"]) == set(space_folds.VARIANTS)
    assert len(payload["truth"]["rows"]) == len(payload["folds"][0]["layers"]) > 8
    assert "Expected before measuring" in payload["question"]
    assert "| raw fold score |" in (tmp_path / "space_folds.md").read_text()
    for name in ("space_folds.png", "space_folds_layers.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert str(tmp_path) not in (tmp_path / "space_folds.json").read_text()


def test_only_the_chosen_rectifier_is_replaced() -> None:
    x = torch.tensor([-1.0, 2.0])
    with space_folds.Lined(1, lambda z: z * 10):
        found = [torch.relu(x), torch.nn.functional.relu(x), torch.relu(x)]
    assert [y.tolist() for y in found] == [[0, 2], [-10, 20], [0, 2]]


def test_data_are_asked_for() -> None:
    with pytest.raises(SystemExit):
        space_folds.main([])
