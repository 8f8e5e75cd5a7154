"""The benchmarks of transport maps run, resume and tell what they measured; no download needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import domain_shift, maps, plot_maps


def test_maps_are_measured_in_one_run_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--nets", "tiny", "--out", str(tmp_path / "maps.json")]
    names = "nothing;affine, pairs;affine, laws;sparse_map 1/4, pairs"
    maps.main([*words, "--maps", names])
    payload = json.loads((tmp_path / "maps.json").read_text())
    rows = payload["rows"]
    assert [row["choice"] for row in rows] == ["none", *names.split(";")]
    assert not any("error" in row for row in rows)
    assert "Expected before measuring" in payload["question"]
    assert all("channels moved" in note["note"] for row in rows[2:] for note in row["notes"])
    capsys.readouterr()
    maps.main([*words, "--maps", names])
    assert capsys.readouterr().out == ""  # nothing measured twice
    plot_maps.main(["--folder", str(tmp_path)])
    table = (tmp_path / "maps.md").read_text()
    assert "| tiny | sparse_map 1/4, pairs |" in table
    assert (tmp_path / "maps.png").stat().st_size > 1000
    assert str(tmp_path) not in (tmp_path / "maps.json").read_text()


def test_every_map_of_the_benchmark_is_a_replacement() -> None:
    import torch_otprune as otp

    for name, declared in maps.MAPS.items():
        assert otp.Layers(drop=1, replace=declared).replace.kind, name  # type: ignore[attr-defined]


def test_only_blocks_with_a_layer_in_front_go() -> None:
    (bench,) = maps.quick_benches(texts=False)
    assert bench.gone() == ("layer1.1",)


def test_every_way_back_from_a_shift_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "domain_shift.json"
    chosen = [
        "nothing",
        "batch-norm re-estimation",
        "variances, out",
        "variances, out + coupled with home classes",
        "pairs found by transport, out",
        "all pairs found by transport, in",
        "monge_map, out",
    ]
    domain_shift.main(["--quick", "--methods", ";".join(chosen), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert not [row["error"] for row in rows if "error" in row]
    assert [row["choice"] for row in rows] == [domain_shift.TUNED, *chosen]
    told = capsys.readouterr().out
    domain_shift.main(["--quick", "--methods", ";".join(chosen), "--out", str(out)])
    assert told and capsys.readouterr().out == ""  # nothing measured twice
    plot_maps.main(["--folder", str(tmp_path)])
    assert "| variances, out |" in (tmp_path / "domain_shift.md").read_text()


def test_pairs_that_are_found_are_pairs_and_no_validation_image_is_among_them() -> None:
    bench = domain_shift.quick_bench()
    home, away = bench.matched(0)
    assert len(home) > 10
    assert torch.equal(home.images - home.images % 32, away.images)
    held = {image.numpy().tobytes() for image in bench.held(0).images}
    assert not held & {image.numpy().tobytes() for image in away.images}


def test_without_results_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there are no rows"):
        plot_maps.main(["--folder", str(tmp_path)])
