"""The benchmark harness runs, resumes and counts right, on random data; no download needed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cifar, cifar10_width, common, peers, plot_cifar10_width

DATA = os.environ.get("OTPRUNE_DATA", "")
REAL = Path(DATA) / "cifar10-original-subset.npz"
with_data = pytest.mark.skipif(
    not DATA or not REAL.exists(),
    reason="real data absent: set OTPRUNE_DATA to the folder of cifar10-original-subset.npz",
)
LIBRARY = importlib.util.find_spec("torch_otprune.pipeline") is not None
with_library = pytest.mark.skipif(not LIBRARY, reason="torch_otprune.pipeline is not there yet")
PEER = cifar10_width.Spec("peer", "magnitude", "inner", "local", "norm")
OURS = cifar10_width.Spec("ours", "transport", "inner", "uniform", "least_squares")


def images(count: int, seed: int) -> cifar.Split:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return cifar.Split(pixels, torch.randint(0, 10, (count,), generator=generator))


@pytest.fixture(scope="module")
def bench() -> cifar10_width.Bench:
    torch.manual_seed(0)
    model = cifar.ResNet(blocks=1, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Spread the scales, or criteria tie and any choice is right.
            nn.init.uniform_(module.weight, 0.5, 1.5)
    train, test = images(200, 1), images(64, 2)
    return cifar10_width.Bench("tiny", model.eval(), train, test, samples=150)


def case(bench: cifar10_width.Bench, spec: cifar10_width.Spec, seed: int = 0) -> Any:
    return cifar10_width.Case(bench, spec, 50, seed)


def widths(model: nn.Module) -> list[int]:
    found = [m.conv1.out_channels for m in model.modules() if isinstance(m, cifar.BasicBlock)]
    return [int(width) for width in found]


def test_macs_of_a_convolution_and_a_linear_layer_are_the_textbook_products() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 36, 5))
    macs = common.macs_by_module(model, torch.zeros(1, 4, 8, 8))
    assert macs == {"0": 6 * 36 * 2 * 9, "2": 6 * 36 * 5}


def test_resnet20_has_the_published_size() -> None:
    model = cifar.ResNet(blocks=3)
    assert common.count_params(model) == 269_722
    assert common.count_macs(model, torch.zeros(1, 3, 32, 32)) == 40_551_040


def test_counting_leaves_the_training_flag_alone() -> None:
    model = cifar.ResNet(blocks=1, width=8).train()
    common.count_macs(model, torch.zeros(1, 3, 8, 8))
    assert model.training
    assert model.bn1.training


def test_calibration_and_validation_images_are_disjoint() -> None:
    numbered = cifar.Split(torch.zeros(50, 3, 1, 1, dtype=torch.uint8), torch.arange(50))
    seen, held_out = cifar.draw(numbered, seed=3, samples=20)
    assert len(seen) == 20
    assert sorted([*seen.labels.tolist(), *held_out.labels.tolist()]) == list(range(50))


def test_augmentation_only_moves_mirrors_and_pads_with_zeros() -> None:
    ones = cifar.Split(torch.ones(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16).long())
    moved = cifar._augment(ones, torch.Generator().manual_seed(0)).images
    assert moved.shape == ones.images.shape
    filled = moved[:, 0].bool()
    # What is left of a shifted square is a rectangle.
    rectangle = filled.any(dim=2)[:, :, None] & filled.any(dim=1)[:, None, :]
    assert torch.equal(filled, rectangle)


def test_the_zip_reader_takes_classes_in_alphabetical_order(tmp_path: Path) -> None:
    from PIL import Image

    with zipfile.ZipFile(tmp_path / "cifar10-jpeg.zip", "w") as archive:
        for name, shade in (("cat", 200), ("airplane", 10)):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (shade, 0, 0)).save(buffer, "JPEG", quality=95)
            archive.writestr(f"test/{name}/0000.jpg", buffer.getvalue())
    split = cifar.load_split(tmp_path, "jpeg", "test")
    assert split.labels.tolist() == [0, 1]
    assert split.images.shape == (2, 3, 32, 32)
    assert split.images[0, 0].float().mean() < 50 < split.images[1, 0].float().mean()


def test_the_taught_shortcut_computes_the_same(bench: cifar10_width.Bench) -> None:
    taught = cifar.ResNet(blocks=1, width=8).eval()
    taught.load_state_dict(bench.model.state_dict())
    peers._teach_shortcuts(taught)
    assert sum(isinstance(m, peers.Pick) for m in taught.modules()) == 2
    x = bench.test.inputs()
    torch.testing.assert_close(taught(x), bench.model(x))


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("groups", peers.GROUPS)
@pytest.mark.parametrize("importance", peers.IMPORTANCES)
def test_every_peer_runs_under_the_target(
    bench: cifar10_width.Bench, importance: str, groups: str, ranking: str
) -> None:
    peer, data = peers.Peer(importance, groups, ranking), bench.calibration(0)
    target = bench.macs * 6 // 10
    ratio = peers.find_ratio(bench.model, peer, data, target=target)
    smaller = peers.prune(bench.model, peer, data, ratio=ratio)
    assert common.count_macs(smaller, bench.example) <= target
    assert smaller(bench.test.inputs()).shape == (64, 10)


def test_inner_peers_leave_the_residual_stream_alone(bench: cifar10_width.Bench) -> None:
    peer, data = peers.Peer("magnitude", "inner", "local"), bench.calibration(0)
    smaller = peers.prune(bench.model, peer, data, ratio=0.5)
    assert widths(smaller) == [4, 8, 16]
    streams = [m.conv2.out_channels for m in smaller.modules() if isinstance(m, cifar.BasicBlock)]
    assert streams == [8, 16, 32]


def test_peers_leave_the_dense_network_alone(bench: cifar10_width.Bench) -> None:
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    cifar10_width.run_peer(case(bench, replace(PEER, criterion="taylor")))
    after = bench.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in bench.model.parameters())


def test_reestimated_norms_hold_the_statistics_of_their_inputs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(200, 3, 4, 4) * 3 + 5
    peers.renorm_(model, x)
    torch.testing.assert_close(model[0].running_mean, x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, x.var(dim=(0, 2, 3)))
    assert model[0].momentum == 0.1
    assert not model.training


def test_uniform_widths_are_the_widths_of_the_uniform_peer(bench: cifar10_width.Bench) -> None:
    target = int(0.51 * bench.macs)
    ours = cifar10_width.uniform_widths(bench.model, bench.example, target=target)
    peer, data = peers.Peer("magnitude", "inner", "local"), bench.calibration(0)
    ratio = peers.find_ratio(bench.model, peer, data, target=target)
    assert list(ours.values()) == widths(peers.prune(bench.model, peer, data, ratio=ratio))


def test_rows_are_written_resumed_and_summarised(
    bench: cifar10_width.Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    pairs = [(PEER, 50), (replace(PEER, repair="none"), 50)]
    cifar10_width.run(cifar10_width.cases_of(bench, pairs, seeds=range(2)), out)
    first = json.loads(out.read_text())
    # Dense, two seeds with data, one without.
    assert [row["seed"] for row in first["rows"]] == [0, 0, 1, 0]
    assert all(row["macs_kept"] <= 0.51 for row in first["rows"][1:])
    assert {row["environment"] for row in first["rows"]} == set(first["environments"])

    capsys.readouterr()
    cifar10_width.run(cifar10_width.cases_of(bench, pairs, seeds=range(2)), out)
    assert capsys.readouterr().out == ""  # nothing measured twice
    assert json.loads(out.read_text())["rows"] == first["rows"]

    plot_cifar10_width.main(["--json", str(out)])
    assert "magnitude/inner/local" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_failing_method_is_a_row_that_says_why_and_is_tried_again(
    bench: cifar10_width.Bench, tmp_path: Path
) -> None:
    out, broken = tmp_path / "results.json", replace(PEER, criterion="nonsense")
    for _ in range(2):
        cifar10_width.run([case(bench, broken)], out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["error"] for row in rows] == ["KeyError: 'nonsense'"]
    assert plot_cifar10_width.summarise({"rows": rows}) == []


def test_the_results_name_no_machine(bench: cifar10_width.Bench, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    cifar10_width.run([case(bench, PEER)], out)
    text = out.read_text()
    assert str(Path.cwd()) not in text
    assert str(tmp_path) not in text
    (recorded,) = json.loads(text)["environments"].values()
    assert "node" not in recorded
    assert recorded["system"] == os.uname().sysname


def test_the_ratio_divides_our_loss_by_the_best_peers() -> None:
    row = {"net": "n", "epochs": 0.0, "budget": 50, "seed": 0, "labels": False}
    row |= {"macs_kept": 0.5, "seconds": 1.0, "peak_mib": 1.0}
    accuracies = {("peer", "a"): 60.0, ("peer", "b"): 50.0, ("ours", "c"): 80.0}
    rows = [row | {"side": s, "method": m, "accuracy": a} for (s, m), a in accuracies.items()]
    rows.append(row | {"side": "dense", "method": "d", "accuracy": 90.0, "budget": 100})
    best = plot_cifar10_width.best_peers({"rows": rows})
    assert best["n", 0.0, 50].method == "a"
    scores = plot_cifar10_width.summarise({"rows": rows})
    ours = next(score for score in scores if score.side == "ours")
    assert plot_cifar10_width.ratio(ours, best) == pytest.approx(10 / 30)


def test_fine_tuning_learns_the_images_it_sees() -> None:
    torch.manual_seed(0)
    flat = torch.arange(0, 250, 25, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 8, 8)
    data = cifar.Split(flat.repeat(26, 1, 1, 1), torch.arange(10).repeat(26))
    model = cifar.ResNet(blocks=1, width=8)
    before = cifar.accuracy(model, data)
    cifar.finetune_(model, data, epochs=15, seed=0)
    assert cifar.accuracy(model, data) > before + 20
    assert not model.training


def test_a_fine_tuned_row_says_so(bench: cifar10_width.Bench) -> None:
    short = cifar10_width.Bench("tiny", bench.model, bench.train, bench.test, tuning=150)
    row = cifar10_width.measure(case(short, replace(PEER, epochs=1.0)))
    assert (row["epochs"], row["tuning_images"], row["labels"]) == (1.0, 150, True)
    assert row["macs_kept"] <= 0.51


def test_fine_tuning_takes_the_best_peer_and_our_default(tmp_path: Path) -> None:
    row = {"net": "n", "epochs": 0.0, "budget": 50, "seed": 0, "labels": False, "side": "peer"}
    row |= {"macs_kept": 0.5, "seconds": 1.0, "peak_mib": 1.0}
    rows = [row | {"method": PEER.method, "accuracy": 60.0}]
    rows += [row | {"method": replace(PEER, repair="none").method, "accuracy": 20.0}]
    rows += [row | {"side": "dense", "method": "d", "accuracy": 90.0, "budget": 100}]
    out = tmp_path / "results.json"
    out.write_text(json.dumps({"rows": rows}))
    pairs = cifar10_width.tuned("n", out, [50])
    assert [spec.side for spec, _ in pairs] == ["dense", "peer", "ours"]
    assert {spec.epochs for spec, _ in pairs} == {1.0}
    assert pairs[1][0].method == PEER.method
    with pytest.raises(SystemExit, match="no peers of n at 30 % yet"):
        cifar10_width.tuned("n", out, [30])


@with_library
@pytest.mark.parametrize("widths_by", ["uniform", "budget"])
def test_ours_runs_under_the_target(bench: cifar10_width.Bench, widths_by: str) -> None:
    row = cifar10_width.measure(case(bench, replace(OURS, widths=widths_by)))
    assert 0.4 < row["macs_kept"] <= 0.51


@with_data
@pytest.mark.parametrize(("net", "expected"), [("resnet20", 91.72), ("resnet32", 93.17)])
def test_dense_accuracy_is_the_one_on_record(net: str, expected: float) -> None:
    folder = Path(DATA)
    bench = cifar10_width.load_bench(net, folder, folder)
    assert cifar.accuracy(bench.model, bench.test) == pytest.approx(expected, abs=0.01)
