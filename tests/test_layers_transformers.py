"""Transformers models lose layers in one call and stay models that Transformers knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_otprune as otp
from tests.transformers_cases import CASES, DEPTH
from torch_otprune.structure.forward import flat_tensors, run

pytestmark = pytest.mark.filterwarnings("ignore")
WRITERS = sorted(name for name, case in CASES.items() if case.generates)
# By what the halves of a layer are called: the attention, the hidden layer.
HALVES = {
    "bert": ("encoder.layer.*.attention", "encoder.layer.*.output"),
    "vit": ("layers.*.attention", "layers.*.mlp"),
    "gpt2": ("transformer.h.*.attn", "transformer.h.*.mlp"),
    "llama": ("model.layers.*.self_attn", "model.layers.*.mlp"),
    "qwen2": ("model.layers.*.self_attn", "model.layers.*.mlp"),
    "modernbert": ("layers.*.attn", "layers.*.mlp"),
}


def batches(name: str) -> list[dict[str, Any]]:
    """Draw calibration batches of eight samples."""
    shapes = {k: (8, *shape[1:]) for k, shape in CASES[name].batch.items()}
    case = copy.copy(CASES[name])
    object.__setattr__(case, "batch", shapes)
    return [case.example(seed=seed, dtype=torch.float32) for seed in range(4)]


def pruned(name: str, **rule: Any) -> tuple[Any, Any, otp.Report]:
    dense = CASES[name].model(dtype=torch.float32)
    small = copy.deepcopy(dense)
    policy = otp.Policy(rules=[otp.Layers(**rule)])
    return dense, small, otp.prune_(small, policy, batches(name), timing=0)


@torch.no_grad()
def outputs(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    return flat_tensors(run(model, batch))


def depth(model: Any, name: str) -> dict[str, int]:
    found = {}
    for stack, field in CASES[name].counts.items():
        assert len(model.get_submodule(stack)) == getattr(model.config, field)
        found[stack] = getattr(model.config, field)
    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_layers_go_and_the_configuration_says_so(name: str, tmp_path: Path) -> None:
    dense, small, report = pruned(name, drop=2)
    assert sum(depth(small, name).values()) == sum(depth(dense, name).values()) - 2
    assert report.output_error.after_repair <= report.output_error.before_repair
    batch = batches(name)[0]
    expected = outputs(small, batch)
    if any("save it with otp.save" in note for note in report.plan.notes):
        otp.save(small, tmp_path / "model")  # its configuration cannot say what is left
        again = otp.load(tmp_path / "model", factory=lambda: copy.deepcopy(dense)).eval()
    else:
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(again, batch), expected, rtol=1e-5, atol=1e-5)
    report.undo_()
    assert depth(small, name) == depth(dense, name)
    for one, other in zip(outputs(small, batch), outputs(dense, batch), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", WRITERS)
def test_writing_with_a_cache_equals_writing_without(name: str) -> None:
    _, small, _ = pruned(name, drop=2)
    ids = batches(name)[0]["input_ids"][:2]
    texts = [
        small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("name", sorted(HALVES))
def test_halves_go_one_by_one(name: str, half: int) -> None:
    _, small, report = pruned(name, targets=HALVES[name][half], drop=1)
    assert [drop.swaps[0].by for drop in report.plan.drops] == ["zero"]
    assert report.params.after < report.params.before
    assert sum(depth(small, name).values()) == DEPTH
    if CASES[name].generates:
        ids = batches(name)[0]["input_ids"][:2]
        texts = [
            small.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache)
            for cache in (True, False)
        ]
        assert torch.equal(*texts)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_they_save_and_load_with_the_plan(name: str, tmp_path: Path) -> None:
    dense, small, _ = pruned(name, drop=2)
    otp.save(small, tmp_path / "model")
    again = otp.load(tmp_path / "model", factory=lambda: copy.deepcopy(dense)).eval()
    for one, other in zip(
        outputs(again, batches(name)[0]), outputs(small, batches(name)[0]), strict=True
    ):
        assert torch.equal(one, other)
    assert again.config.num_hidden_layers == DEPTH - 2


def test_padding_does_not_count() -> None:
    dense = CASES["bert"].model(dtype=torch.float32)
    plain = batches("bert")
    masked = []
    for batch in plain:
        ids = batch["input_ids"]
        extra = torch.full_like(ids, 7)
        ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
        masked.append(
            {
                "input_ids": torch.cat([ids, extra], 1),
                "attention_mask": torch.cat([ones, zeros], 1),
            }
        )
    results = []
    for data in (plain, masked):
        small = copy.deepcopy(dense)
        rule = otp.Layers(targets="encoder.layer.2", drop=1)
        otp.prune_(small, otp.Policy(rules=[rule]), data, timing=0)
        results.append(small.encoder.layer[1].output.dense.weight)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
