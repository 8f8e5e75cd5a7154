"""The portability benchmark: cells run, resume, say why not; tables say what the JSON says."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import plot_portability, portability
from benchmarks.portability_nets import NETS

pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def run(out: Path, *words: str) -> list[dict[str, Any]]:
    portability.main(["--out", str(out), *words])
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_two_architectures_go_everywhere_or_say_why_not(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    rows = run(out, "--nets", "^(VGG|BERT)$", "--kinds", "uneven width;depth")
    assert len(rows) == 2 * 2 * len(portability.PLACES)
    found = {(r["net"], r["kind"], r["place"]): r for r in rows}
    assert not [r for r in rows if r["status"] == "fails"]
    assert found["VGG", "uneven width", "from_pretrained"]["said"] == "no Transformers model"
    assert "no residual block" in found["VGG", "depth", "save/load"]["said"]
    assert all(r["status"] == "passes" for r in rows if r["net"] == "BERT")
    before = out.read_text()
    assert len(run(out, "--nets", "^(VGG|BERT)$", "--kinds", "uneven width;depth")) == len(rows)
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]


def test_what_takes_too_long_is_stopped() -> None:
    row = portability.measure("VGG", "uneven width", "save/load", 0.001)
    assert row == {"status": "fails", "said": "stopped after 0.001 s of processor time"}


@pytest.mark.parametrize("name", NETS)
def test_every_network_runs_and_has_a_loss_for_its_labels(name: str) -> None:
    net = NETS[name]
    model, batch = net.model(), net.draw(3, 1)
    labels = net.labels(3)
    if net.transformers:
        out = model(**batch, labels=labels)
        assert torch.isfinite(out.loss)
    else:
        out = portability.WithLoss(model)(**batch, labels=labels)
        assert torch.isfinite(out["loss"])


def test_a_wrong_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(directory: Path, *, factory: Any) -> nn.Module:
        model: nn.Module = factory()
        return model

    monkeypatch.setattr(portability.otp, "load", off)
    row = portability.outcome("LSTM", "uneven width", "save/load")
    assert row["status"] == "fails"
    assert row["said"].startswith("off by ")


PAYLOAD: dict[str, Any] = {
    "environment": {
        "seed": 0,
        "threads": 1,
        "cpu": "chip",
        "packages": dict.fromkeys(("torch", "transformers", "onnx", "onnxruntime"), "1"),
    },
    "rows": [
        {"net": "A", "kind": "both", "place": "x", "status": "passes", "said": "", "commit": "c"},
        {
            "net": "A",
            "kind": "both",
            "place": "y",
            "status": "cannot",
            "said": "why",
            "commit": "c",
        },
        {"net": "B", "kind": "both", "place": "x", "status": "fails", "said": "off", "commit": "c"},
    ],
}


def test_the_table_shows_every_cell_and_every_reason() -> None:
    lines = plot_portability.page(PAYLOAD).splitlines()
    assert "| x | 1 | 0 | 1 |" in lines
    assert "| all | 1 | 1 | 1 |" in lines
    assert "| A | both | passes | – 1 |" in lines
    assert "| B | both | **fails** 2 | not run |" in lines
    assert lines[lines.index("1. why") + 1] == "2. off"


def test_the_published_table_is_generated_from_the_json() -> None:
    if not (RESULTS / "portability.json").exists():
        pytest.skip("not measured yet")
    payload = json.loads((RESULTS / "portability.json").read_text())
    assert (RESULTS / "portability.md").read_text() == plot_portability.page(payload)
    assert all(row["commit"] for row in payload["rows"])


def test_the_published_table_is_full_and_no_cell_fails() -> None:
    rows = json.loads((RESULTS / "portability.json").read_text())["rows"]
    found = sorted((row["net"], row["kind"], row["place"]) for row in rows)
    assert found == sorted(product(NETS, portability.KINDS, portability.PLACES))
    assert len(NETS) == 12
    assert {row["status"] for row in rows} <= {"passes", "cannot"}
    assert all(row["said"] for row in rows if row["status"] == "cannot")
