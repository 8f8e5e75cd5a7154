"""The LaCoOT benchmark runs every arm, counts as published, and resumes; no download needed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import lacoot, lacoot_nets, lacoot_train
from benchmarks.common import count_macs
from torch_otprune.training import EntropySchedule

CPU = torch.device("cpu")


def test_the_network_and_what_is_left_of_it_have_the_published_macs() -> None:
    model, example = lacoot_nets.ResNet18(), torch.zeros(1, 3, 32, 32)
    assert round(count_macs(model, example) / 1e6, 2) == 140.19
    for path in lacoot_nets.BLOCKS:
        model = lacoot_train.remove(model, path)
    assert round(count_macs(model, example) / 1e6, 2) == 64.69


def test_every_activation_has_the_layer_that_feeds_it() -> None:
    model = lacoot_nets.ResNet18(width=8)
    schedule = EntropySchedule(model, lacoot_nets.SITES)
    with schedule.observe():
        model(torch.randn(4, 3, 32, 32))
    assert len(schedule.entropies) == 17
    assert all(value > 0 for value in schedule.entropies.values())


def test_removing_a_block_leaves_the_network_alone() -> None:
    model = lacoot_nets.ResNet18(width=8)
    smaller = lacoot_train.remove(model, "layer2.1")
    assert isinstance(smaller.get_submodule("layer2.1"), nn.Identity)
    assert isinstance(model.get_submodule("layer2.1"), lacoot_nets.Block)


def test_crops_are_windows_of_the_padded_image() -> None:
    images = lacoot_nets.Images.of(lacoot_nets.noise(20, 0), CPU)
    index = torch.arange(20)
    x = images.augmented(index, torch.Generator().manual_seed(0))
    assert x.shape == (20, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(images.plain(index), (4, 4, 4, 4), value=float("nan"))
    for crop, image in zip(x, padded, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        both = torch.cat([windows, windows.flip(-1)])
        known = ~both.isnan()
        assert bool((((both - crop).abs() < 1e-5) | ~known).flatten(1).all(1).any())


@pytest.mark.parametrize("form", ["batches", "npz"])
def test_the_published_batches_and_an_npz_file_are_read(form: str, tmp_path: Path) -> None:
    pixels = np.random.randint(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5, 9]
    where = tmp_path
    if form == "npz":
        where = tmp_path / "cifar.npz"
        np.savez(where, train_images=pixels, train_labels=np.array(labels))
    else:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for row, name in enumerate(names):
            content = {b"data": pixels[row].reshape(1, -1), b"labels": [labels[row]]}
            (folder / name).write_bytes(pickle.dumps(content))
    split = lacoot_nets.load(where, "train")
    count = 6 if form == "npz" else 5
    assert torch.equal(split.images, torch.from_numpy(pixels[:count]))
    assert split.labels.tolist() == labels[:count]


@pytest.mark.slow
def test_the_smoke_version_runs_every_arm_and_none_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "smoke.json"
    words = ["--smoke", "--device", "cpu", "--epochs", "1", "--out", str(out)]
    lacoot.main([*words, "--arms", "plain,lacoot,ours"])
    lacoot.main(words)
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == list(lacoot.ARMS)
    for row in rows:
        assert [len(point["removed"]) for point in row["curve"]] == [0, 1, 2, 3, 4]
        macs = [point["macs"] for point in row["curve"]]
        assert macs == sorted(macs, reverse=True) and len(set(macs)) == 5
        assert "width 8 instead of 64" in row["deviations"]
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["lacoot"]["penalty"]["weight"] == 5.0
    assert by_arm["ours"]["weight"] > 0
    assert by_arm["egp"]["rounds"][0]["pruned"]
    assert by_arm["easier"]["rounds"][0]["linearised"]

    capsys.readouterr()
    lacoot.main(words)
    assert capsys.readouterr().out == ""
    assert str(tmp_path) not in out.read_text()


def test_epochs_are_fitted_to_the_minutes() -> None:
    given = lacoot.arguments(["--smoke", "--epochs", "160"])
    bench, _ = lacoot.prepare(given, "pool")
    bench.epochs = 160
    timed = lacoot.fit_(bench, ["plain"], 0.2)
    expected = lacoot.SPARE * 12 / (timed["plain"] * bench.steps / bench.epochs)
    assert bench.epochs == min(160, int(expected))
    assert "epochs instead of 160" in " ".join(lacoot.deviations(bench, "published"))


def test_an_unknown_arm_and_missing_data_are_said() -> None:
    with pytest.raises(SystemExit, match="no arm dtp; there are plain"):
        lacoot.main(["--smoke", "--arms", "dtp"])
    with pytest.raises(SystemExit, match="give --data"):
        lacoot.main(["--arms", "plain", "--device", "cpu", "--out", "/nonexistent/x.json"])
