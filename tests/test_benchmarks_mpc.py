"""The control benchmark runs small, resumes, and its page says what its rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from benchmarks import mpc, mpc_plant, plot_mpc
from torch_otprune.nn import ICRNN


def test_the_plant_rests_at_its_steady_state() -> None:
    held = mpc_plant.advance(np.zeros((1, 2)), np.zeros((1, 2)))
    assert np.abs(held[0, -1]).max() < 0.05


def test_the_plant_is_integrated_as_scipy_does_it() -> None:
    state, u = np.array([0.5, -20.0]), np.array([1.0, 2e5])
    found = solve_ivp(
        lambda _, s: mpc_plant._slope(s, u), (0, mpc_plant.PERIOD), state, rtol=1e-10, atol=1e-10,
        t_eval=np.linspace(0, mpc_plant.PERIOD, mpc_plant.STEPS + 1)[1:],
    )  # fmt: skip
    ours = mpc_plant.advance(state[None], u[None])[0]
    np.testing.assert_allclose(ours, found.y.T, rtol=1e-6, atol=1e-7)


def test_training_data_lie_between_zero_and_one() -> None:
    data = mpc_plant.make_data(24)
    assert float(data.x.min()) >= 0 and float(data.y.max()) <= 1 + 1e-6
    assert data.x.shape[1:] == (10, 4) and data.y.shape[1:] == (10, 2)
    assert data.noisy(0.4, 1).sub(data.y).std().item() == pytest.approx(0.4, rel=0.05)


WORDS = ["--quick", "--seeds", "0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One net trained, pruned and put in control."""
    path = tmp_path_factory.mktemp("mpc") / "mpc.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpc, "NETS", {"ICRNN": mpc.NETS["ICRNN"]})
        mpc.main([*WORDS, "--json", str(path), "--nets", str(path.parent / "nets")])
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def test_a_small_run_measures_dense_and_pruned_nets(results: Path) -> None:
    found = rows(results)
    assert [row["kept"] for row in found] == [1.0, *mpc.SHARES]
    assert [row["convex"] for row in found] == ["structural"] * 3
    sizes = [row["params"] for row in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] <= 0.1 * sizes[0]
    assert all(row["seconds_per_step"] > 0 for row in found)


def test_what_is_written_is_not_run_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "mpc.json"
    copy.write_text(results.read_text())
    monkeypatch.setattr(mpc, "NETS", {"ICRNN": None})  # would fail if it were built
    mpc.main([*WORDS, "--json", str(copy)])
    assert rows(copy) == rows(results)


def test_only_the_row_that_is_missing_is_run(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mpc, "NETS", {"ICRNN": mpc.NETS["ICRNN"]})
    monkeypatch.setattr(mpc, "train", None)  # would fail if it were called
    copy, payload = tmp_path / "mpc.json", json.loads(results.read_text())
    whole = payload["rows"]
    copy.write_text(json.dumps(payload | {"rows": whole[:2]}))
    mpc.main([*WORDS, "--json", str(copy), "--nets", str(results.parent / "nets")])
    assert rows(copy)[:2] == whole[:2] and rows(copy)[2]["test_mse"] == whole[2]["test_mse"]


def test_control_is_timed_again_without_training(
    results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mpc, "NETS", {"ICRNN": mpc.NETS["ICRNN"]})
    monkeypatch.setattr(mpc, "train", None)
    monkeypatch.setattr(mpc, "judged", None)
    copy = tmp_path / "mpc.json"
    copy.write_text(results.read_text())
    mpc.main([*WORDS, "--time", "--json", str(copy), "--nets", str(results.parent / "nets")])
    for old, new in zip(rows(results), rows(copy), strict=True):
        assert new["seconds_per_step"] != old["seconds_per_step"]
        assert new["closed_loop_cost"] == pytest.approx(old["closed_loop_cost"], rel=1e-9)


def test_the_graph_prices_a_plan_as_numpy_does_step_by_step() -> None:
    data, horizon = mpc_plant.make_data(24), 3
    torch.manual_seed(0)
    net = ICRNN(4, 8, 2).double()
    plans = np.random.default_rng(0).uniform(-1, 1, (4 * horizon + 1, 2 * horizon))
    found, x = np.zeros(len(plans)), np.repeat(mpc.STARTS[:1], len(plans), 0)
    target = -data.scales.out_low / data.scales.out_span
    for period in range(horizon):
        u = plans[:, 2 * period : 2 * period + 2]
        row = torch.from_numpy(data.scales.inputs(x, u * mpc_plant.LIMITS))
        with torch.no_grad():
            out = net(row[:, None].expand(-1, mpc_plant.STEPS, -1)).numpy()
        found += ((out - target) ** 2 * mpc.WEIGHTS).sum((1, 2)) + mpc.EFFORT * (u**2).sum(1)
        x = data.scales.state(out[:, -1])
    controller = mpc.Controller(net, data, horizon)
    np.testing.assert_allclose(controller.costs(mpc.STARTS[0], plans), found, rtol=1e-12)


def test_the_page_has_a_line_per_row_a_verdict_and_a_picture(results: Path) -> None:
    plot_mpc.main(["--json", str(results)])
    page = results.with_suffix(".md").read_text()
    assert page.count("| ICRNN |") == 3 and "structural" in page
    assert "certificate unchanged: structural (yes)" in page
    assert results.with_suffix(".png").stat().st_size > 5000


def test_no_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run mpc\.py first"):
        plot_mpc.main(["--json", str(tmp_path / "none.json")])
