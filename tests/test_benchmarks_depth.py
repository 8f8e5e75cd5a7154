"""The depth benchmarks choose, mend, count, resume and compare right; no download needed."""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import (
    cifar,
    cifar10_depth,
    depth_baselines,
    depth_harness,
    minilm_depth,
    minilm_texts,
    plot_cifar10_depth,
    plot_minilm_depth,
)

with_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
Spec = depth_harness.Spec


@pytest.fixture
def bench() -> cifar10_depth.Bench:
    return cifar10_depth.quick_bench()


def silence_(block: nn.Module, constant: float = 0.0) -> None:
    """Let a block's branch write the same number everywhere."""
    nn.init.zeros_(block.bn2.weight)
    nn.init.constant_(block.bn2.bias, constant)


@pytest.mark.parametrize(("blocks", "free", "total"), [(3, 7, 9), (5, 13, 15)])
def test_all_blocks_but_the_two_that_halve_can_go(blocks: int, free: int, total: int) -> None:
    model = cifar.ResNet(blocks=blocks, width=4)
    assert len(depth_baselines.blocks(model)) == total
    found = depth_baselines.removable(model)
    assert len(found) == free
    assert not {"layer2.0", "layer3.0"} & set(found)


@pytest.mark.parametrize("score", ["block_influence", "lacoot"])
def test_a_block_that_does_nothing_goes_first(bench: cifar10_depth.Bench, score: str) -> None:
    silence_(bench.model.layer2[1])
    scores = depth_baselines.SCORES[score](bench.model, bench.calibration(0), seed=0)
    assert depth_baselines.order(scores)[0] == "layer2.1"
    assert scores["layer2.1"] == pytest.approx(0, abs=1e-6)


def test_the_published_score_of_a_shift_is_its_largest_projection() -> None:
    taken = depth_baselines._Project(3, [], [])
    x, shift = torch.randn(40, 6), torch.arange(6.0)
    for part in x.split(16):
        taken(part, part.flip(0) + shift)
    assert taken.directions is not None
    torch.testing.assert_close(taken.directions.norm(dim=0), torch.ones(50))
    expected = (shift @ taken.directions).abs().max().item()
    assert taken.distance() == pytest.approx(expected, rel=1e-4)


def test_the_published_score_draws_other_directions_with_another_seed(
    bench: cifar10_depth.Bench,
) -> None:
    inputs = bench.calibration(0)
    first, again, other = (depth_baselines.lacoot(bench.model, inputs, seed=s) for s in (0, 0, 1))
    assert first == again
    assert all(first[path] != other[path] for path in first)


def test_magnitude_takes_the_smallest_weights(bench: cifar10_depth.Bench) -> None:
    with torch.no_grad():
        for conv in (bench.model.layer3[1].conv1, bench.model.layer3[1].conv2):
            conv.weight.mul_(0.1)
    scores = depth_baselines.magnitude(bench.model, bench.calibration(0), seed=0)
    assert depth_baselines.order(scores)[0] == "layer3.1"


def test_random_orders_repeat_by_seed_and_differ_between_seeds(bench: cifar10_depth.Bench) -> None:
    inputs = bench.calibration(0)
    orders = [
        depth_baselines.order(depth_baselines.random_order(bench.model, inputs, seed=s))
        for s in (0, 0, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] or orders[0] != orders[3]


def test_neighbours_go_as_one_span_behind_the_block_before_them() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert depth_baselines.spans(names, ["a", "c", "d"]) == [(None, "a"), ("b", "d")]
    assert depth_baselines.spans(names, []) == []


def test_removing_leaves_the_dense_network_alone(bench: cifar10_depth.Bench) -> None:
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    for repair in depth_baselines.REPAIRS:
        spec = Spec("baseline", "block_influence", repair)
        cifar10_depth.baseline(bench.model, spec, bench.calibration(0), removed=2, seed=0)
    after = bench.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("gone", [["layer2.1"], ["layer1.0", "layer1.1"]])
def test_plain_least_squares_is_exact_where_an_affine_map_is_enough(
    bench: cifar10_depth.Bench, gone: list[str]
) -> None:
    model, inputs = bench.model.double(), bench.calibration(0).double()
    writer = model.bn1 if gone[0] == "layer1.0" else model.layer2[0].bn2
    # Everything stays on, so that the ReLU between writer and block is linear here.
    nn.init.constant_(writer.bias, 30.0)
    for path in gone:
        silence_(model.get_submodule(path), 0.7)
    small = depth_baselines.remove(model, gone)
    assert (small(inputs) - model(inputs)).abs().max() > 1e-4
    depth_baselines.affine_(small, model, gone, inputs)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_a_folded_map_knows_the_statistics_of_what_it_writes() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).double(), nn.BatchNorm2d(4).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(32, 3, 8, 8).double()
    norm.momentum = None
    norm(conv(x))
    norm.eval()
    mixing, moments = torch.randn(4, 4).double(), depth_baselines.Moments()
    written = norm(conv(x)).detach()
    wanted = torch.einsum("oc,nchw->nohw", mixing, written) + 2.0
    moments.add(depth_baselines._rows(written), depth_baselines._rows(wanted))
    with torch.no_grad():
        depth_baselines._fold_(conv, norm, moments)
        torch.testing.assert_close(norm(conv(x)), wanted, rtol=1e-4, atol=1e-4)
        pixels = conv(x).mean(dim=(0, 2, 3)), conv(x).var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, pixels[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, pixels[1], rtol=1e-3, atol=1e-4)


def test_the_clock_compares_round_by_round() -> None:
    models = [nn.Identity(), nn.Identity()]
    pause = {id(models[0]): 0.02, id(models[1]): 0.01}
    found = depth_harness.paired_latency(
        *models, lambda model: time.sleep(pause[id(model)]), rounds=5
    )
    assert 0.3 < found["latency"] < 0.8
    assert found["latency_low"] <= found["latency"] <= found["latency_high"]


def counted(calls: list[int], seed: int, *, fail: bool = False) -> depth_harness.Cell:
    def work() -> dict[str, Any]:
        calls.append(seed)
        if fail:
            raise ValueError("no such thing\nand more")
        return {"accuracy": 1.0}

    return depth_harness.Cell("net", Spec("ours", "a", "b"), 1, seed, work)


def test_cells_are_written_one_by_one_and_measured_once(tmp_path: Path) -> None:
    out, calls = tmp_path / "rows.json", list[int]()
    depth_harness.run([counted(calls, 0)], out, question="Why?")
    depth_harness.run([counted(calls, 0), counted(calls, 1)], out, question="Why?")
    assert calls == [0, 1]
    payload = json.loads(out.read_text())
    assert [row["seed"] for row in payload["rows"]] == [0, 1]
    assert payload["question"] == "Why?"
    assert str(tmp_path) not in out.read_text()
    depth_harness.run([counted(calls, 0)], out, question="Why?", force=True)
    assert calls == [0, 1, 0]


def test_a_failing_cell_is_a_row_that_says_why_and_is_tried_again(tmp_path: Path) -> None:
    out, calls = tmp_path / "rows.json", list[int]()
    for _ in range(2):
        depth_harness.run([counted(calls, 0, fail=True)], out, question="")
    assert len(calls) == 2
    (row,) = json.loads(out.read_text())["rows"]
    assert row["error"] == "ValueError: no such thing"
    assert plot_cifar10_depth.summarise({"rows": [row]}) == []


def test_flags_survive_the_hexadecimal_form() -> None:
    flags = torch.tensor([True, False, False, True, True])
    text = cifar10_depth.hexed(flags)
    assert format(int(text, 16), "05b") == "10011"
    assert cifar10_depth.hexed(torch.ones(761).bool()) == format(2**761 - 1, "x")


def test_depths_beyond_the_removable_blocks_are_left_out(bench: cifar10_depth.Bench) -> None:
    found = cifar10_depth.cells(bench, [Spec("baseline", "lacoot")], range(1, 10), seeds=1)
    assert [cell.removed for cell in found] == [0, 1, 2, 3, 4]


def test_what_data_cannot_change_has_one_seed_and_random_choice_many(
    bench: cifar10_depth.Bench,
) -> None:
    specs = [Spec("baseline", "magnitude"), Spec("baseline", "random"), Spec("baseline", "lacoot")]
    found = list(cifar10_depth.cells(bench, specs, [1], seeds=3))
    counts = [sum(cell.spec == spec for cell in found) for spec in specs]
    assert counts == [1, cifar10_depth.RANDOM_DRAWS, 3]


def test_a_method_that_removes_too_few_blocks_is_no_number(
    bench: cifar10_depth.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cifar10_depth.SIDES, "ours", lambda model, *_, **__: model)
    with pytest.raises(ValueError, match="0 blocks are gone, not 2"):
        cifar10_depth.measure(bench, Spec("ours"), removed=2, seed=0)


def test_the_blocks_that_are_gone_are_named_though_others_move_up(
    bench: cifar10_depth.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        small = copy.deepcopy(model)
        del small.layer1[0]
        return small

    monkeypatch.setitem(cifar10_depth.SIDES, "ours", first)
    row = cifar10_depth.measure(bench, Spec("ours"), removed=1, seed=0)
    assert row["gone"] == ["layer1.0"]


def row(side: str, choice: str, accuracy: float, right: str, **more: Any) -> dict[str, Any]:
    fixed = {"net": "n", "repair": "r", "method": f"{choice}/r", "seed": 0, "removed": 3}
    fixed |= {"test_images": 16, "latency": 0.5, "macs_kept": 0.5, "seconds": 1.0, "blocks": 9}
    return fixed | {"side": side, "choice": choice, "accuracy": accuracy, "right": right} | more


ROWS = [
    row("dense", "none", 100.0, "ffff", removed=0),
    row("baseline", "a", 50.0, "00ff"),
    row("baseline", "b", 25.0, "000f"),
    row("ours", "c", 75.0, "0fff"),
]


def test_the_ratio_divides_our_loss_by_the_best_baselines() -> None:
    scores = plot_cifar10_depth.summarise({"rows": ROWS})
    against = plot_cifar10_depth.best(scores, "baseline")
    assert against["n", 3].method == "a/r"
    ours = plot_cifar10_depth.best(scores, "ours")["n", 3]
    assert plot_cifar10_depth.ratio(ours, against) == pytest.approx(25 / 50)


def test_methods_are_compared_image_by_image() -> None:
    scores = plot_cifar10_depth.summarise({"rows": ROWS})
    ours, base = (plot_cifar10_depth.best(scores, side)["n", 3] for side in ("ours", "baseline"))
    gap, error = plot_cifar10_depth.paired(ours, base)
    assert gap == pytest.approx(25.0)  # 4 of 16 won, none lost
    assert error == pytest.approx(100 * ((4 / 16 - (4 / 16) ** 2) / 16) ** 0.5)


def test_the_quick_run_measures_baselines_and_ours_and_plots(tmp_path: Path) -> None:
    out = tmp_path / "depth.json"
    words = ["--quick", "--seeds", "1", "--removed", "2", "--out", str(out)]
    cifar10_depth.main([*words, "--which", "baselines"])
    cifar10_depth.main([*words, "--which", "ours", "--only", "affine.least_squares"])
    rows = json.loads(out.read_text())["rows"]
    assert [row for row in rows if "error" in row] == []
    assert {row["side"] for row in rows} == {"dense", "baseline", "ours"}
    assert all(len(row["gone"]) == row["removed"] for row in rows)
    assert all(row["macs_kept"] < 1 for row in rows[1:])
    plot_cifar10_depth.main(["--json", str(out)])
    assert "block_influence" in out.with_suffix(".md").read_text()
    for name in ("depth.png", "depth_latency.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_data_folder_is_asked_for() -> None:
    with pytest.raises(SystemExit):
        cifar10_depth.main([])


def test_docstrings_are_read_once_and_no_source_is_run(tmp_path: Path) -> None:
    long = "Open the file and hand back what stands in its first line."
    source = f'"""{long}\n\nAnother paragraph."""\nraise SystemExit\n'
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text(f'def f():\n    """{long}"""\n\ndef g():\n    """Short."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(source.replace("Open", "Shut"))
    assert minilm_texts.docstrings(tmp_path) == [long]


def test_no_text_is_in_two_parts_of_one_seed() -> None:
    texts = [f"text {i}" for i in range(1200)]
    parts = minilm_texts.split(texts, 2, samples=300)
    for seed in range(2):
        both = parts["calibration", seed] + parts["validation", seed] + parts["test", 0]
        assert len(both) == len(set(both))
        assert len(parts["calibration", seed]) == 300
    assert parts["calibration", 0] != parts["calibration", 1]


def test_more_texts_are_the_rest_and_others_but_none_that_is_tested() -> None:
    texts = [f"text {i}" for i in range(1200)]
    others = texts[:900] + [f"other {i // 2}" for i in range(80)]  # some again, some twice
    parts = minilm_texts.split(texts, 2, samples=300, others=others)
    for seed in range(2):
        named = [parts[n, seed] for n in ("calibration", "validation", "more")]
        every = [text for part in [*named, parts["test", 0]] for text in part]
        assert len(every) == len(set(every)) == 1200 + 40
    assert parts["test", 0] == minilm_texts.split(texts, 1, samples=100)["test", 0]


def test_fidelity_of_a_copy_is_full_and_of_a_rotation_keeps_neighbours() -> None:
    x = nn.functional.normalize(torch.randn(40, 8).double(), dim=1)
    assert minilm_depth.fidelity(x, x) == {"cosine": 1.0, "top1": 100.0, "top10": 100.0}
    turned = minilm_depth.fidelity(-x, x)
    assert turned == {"cosine": -1.0, "top1": 100.0, "top10": 100.0}


def test_unrelated_embeddings_agree_by_chance_alone() -> None:
    torch.manual_seed(0)
    x, y = (nn.functional.normalize(torch.randn(300, 64), dim=1) for _ in range(2))
    found = minilm_depth.fidelity(x, y)
    assert found["top10"] == pytest.approx(100 * 10 / 299, abs=1.5)


@pytest.fixture
def encoder() -> minilm_depth.Bench:
    return minilm_depth.quick_bench()


def chosen(bench: minilm_depth.Bench, choice: str, removed: int) -> list[int]:
    from benchmarks.minilm_baselines import CHOICES

    parts = {p: bench.batches[p, 0] for p in ("calibration", "validation")}
    return CHOICES[choice](bench.model, removed, **parts)


@with_transformers
@pytest.mark.parametrize(("removed", "gone"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5])])
def test_uniform_removal_is_evenly_spaced(
    encoder: minilm_depth.Bench, removed: int, gone: list[int]
) -> None:
    assert chosen(encoder, "uniform", removed) == gone


@with_transformers
def test_no_subset_is_closer_than_the_best(encoder: minilm_depth.Bench) -> None:
    from benchmarks.minilm_baselines import embed, remove

    texts = encoder.batches["validation", 0]
    wanted = embed(encoder.model, texts)

    def cosine(gone: list[int]) -> float:
        return minilm_depth.fidelity(embed(remove(encoder.model, gone), texts), wanted)["cosine"]

    best = cosine(chosen(encoder, "best_subset", 1))
    assert all(cosine([i]) <= best for i in range(6))


@with_transformers
def test_a_layer_that_turns_nothing_goes_first(encoder: minilm_depth.Bench) -> None:
    layer = encoder.model.encoder.layer[2]
    with torch.no_grad():
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight.zero_()
    assert chosen(encoder, "block_influence", 1) == [2]
    assert chosen(encoder, "contiguous", 1) == [2]
    # Two in a row: one of the pairs around it.
    assert 2 in chosen(encoder, "contiguous", 2)


def flat(embedding: Tensor) -> Tensor:
    return embedding.flatten()


@with_transformers
def test_the_embedding_does_not_read_padding(encoder: minilm_depth.Bench) -> None:
    from benchmarks.minilm_baselines import embed

    batch = encoder.batches["test", 0][0]
    other = dict(batch, input_ids=batch["input_ids"] + (1 - batch["attention_mask"]))
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    pair = [embed(encoder.model, [b]) for b in (batch, other)]
    torch.testing.assert_close(flat(pair[0]), flat(pair[1]))


@with_transformers
def test_what_the_library_sees_is_the_embedding_that_is_judged(
    encoder: minilm_depth.Bench,
) -> None:
    from benchmarks.minilm_baselines import embed

    texts = encoder.batches["test", 0]
    seen = minilm_depth.Sentences(encoder.model).eval()
    torch.testing.assert_close(torch.cat([seen(**t) for t in texts]), embed(encoder.model, texts))
    torch.testing.assert_close(embed(encoder.model, texts).norm(dim=1), torch.ones(64))


@with_transformers
def test_steps_towards_the_dense_encoder_read_more_texts_and_end_in_a_plain_bert(
    encoder: minilm_depth.Bench,
) -> None:
    from benchmarks.minilm_baselines import embed, layers

    spec = Spec("ours", "transport", "affine+reconstruct")
    refit = Spec("ours", "transport", "affine+least_squares")
    encoder.steps = 200
    small, plain = (minilm_depth.ours(encoder, s, removed=2, seed=0) for s in (spec, refit))
    assert type(small) is type(encoder.model)
    assert len(layers(small)) == small.config.num_hidden_layers == 4
    texts = encoder.batches["more", 0]
    wanted = embed(encoder.model, texts)
    near, far = (minilm_depth.fidelity(embed(m, texts), wanted)["cosine"] for m in (small, plain))
    assert near > far


@with_transformers
def test_only_methods_without_gradient_steps_are_drawn_over_all_seeds(
    encoder: minilm_depth.Bench,
) -> None:
    specs = [*minilm_depth.BASELINES, *minilm_depth.OURS]
    found = Counter(
        cell.spec.method for cell in minilm_depth.cells(encoder, specs, [1, 2], seeds=3, slow=2)
    )
    assert found["transport/affine+reconstruct"] == 4
    assert found["uniform/none"] == 2
    assert found["transport/affine+least_squares"] == found["best_subset/affine"] == 6


@with_transformers
def test_plain_least_squares_brings_the_calibration_embedding_closer(
    encoder: minilm_depth.Bench,
) -> None:
    from benchmarks.minilm_baselines import affine_, embed, remove

    texts = encoder.batches["calibration", 0]
    wanted, gone = embed(encoder.model, texts), [2, 3, 5]
    small = remove(encoder.model, gone)
    before = minilm_depth.fidelity(embed(small, texts), wanted)["cosine"]
    affine_(small, encoder.model, gone, texts)
    after = minilm_depth.fidelity(embed(small, texts), wanted)["cosine"]
    assert after > before + 0.1
    assert small.config.num_hidden_layers == 3


@with_transformers
def test_the_quick_encoder_run_measures_baselines_and_plots(tmp_path: Path) -> None:
    out = tmp_path / "minilm.json"
    words = ["--quick", "--removed", "1,2", "--which", "baselines", "--out", str(out)]
    minilm_depth.main(words)
    rows = json.loads(out.read_text())["rows"]
    assert [row for row in rows if "error" in row] == []
    assert rows[0]["cosine"] == pytest.approx(1.0)
    plot_minilm_depth.main(["--json", str(out)])
    assert "best_subset" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
