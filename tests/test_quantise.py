"""Pruned networks and quantisers: widths are multiples as asked for, and answers stay near."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from benchmarks.portability_nets import NETS
from torch_otprune.errors import LoadError

transformers: Any = pytest.importorskip("transformers", reason="Transformers is not installed")

GROUP, HEADS = 32, 2  # of four-bit weights; of heads


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Both quantisers warn of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tokens(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 60, (16, 7), generator=generator)}


def pruned(*rules: Any, params: str = "60%") -> tuple[nn.Module, Any]:
    model = llama()
    policy = otp.Policy(rules=rules, budget=otp.Budget(params=params))
    return model, otp.prune_(model, policy, [tokens(0)], timing=0)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A Llama whose widths are multiples of the group that four-bit weights share a scale in."""
    channels, heads = otp.Channels(multiple_of=GROUP), otp.Heads(multiple_of=4)
    return pruned(channels, heads)[0]


def far(model: nn.Module, other: nn.Module) -> float:
    """Measure how far two models' answers are apart, relative to their size."""
    with torch.no_grad():
        one, two = (m(**tokens(1)).logits for m in (model, other))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize(
    ("rules", "step"),
    [
        ((otp.Channels(multiple_of=8),), 8),
        ((otp.Channels(multiple_of=GROUP),), GROUP),
        ((otp.Heads(multiple_of=HEADS),), HEADS),
        ((otp.Hidden(multiple_of=16),), 16),
    ],
)
def test_widths_under_a_budget_are_multiples(rules: Any, step: int) -> None:
    _, report = pruned(*rules, params="85%")
    assert report.plan.cuts
    assert all(len(cut.keep) % step == 0 for cut in report.plan.cuts)
    assert report.plan.params.after <= 0.85 * report.plan.params.before


def test_heads_count_as_heads_and_leave_whole_ones() -> None:
    model, report = pruned(otp.Heads(multiple_of=HEADS), params="85%")
    for cut in report.plan.cuts:
        layer = model.get_submodule(cut.group)
        assert layer.out_features == 8 * len(cut.keep)


def test_rules_of_several_kinds_keep_their_own_multiples() -> None:
    rules = otp.Channels(multiple_of=8), otp.Heads(multiple_of=HEADS)
    _, report = pruned(*rules)
    steps = {"channels": 8, "heads": HEADS}
    kinds = {
        cut.group: "heads" if cut.group.endswith("q_proj") else "channels"
        for cut in report.plan.cuts
    }
    assert set(kinds.values()) == {"channels", "heads"}
    assert all(len(cut.keep) % steps[kinds[cut.group]] == 0 for cut in report.plan.cuts)


@settings(max_examples=5, deadline=None)
@given(step=st.sampled_from([1, 2, 3, 4, 5, 8]), kept=st.integers(50, 90))
def test_convolutions_keep_multiples_or_stay_whole(step: int, kept: int) -> None:
    net = NETS["ResNet"]
    policy = otp.Policy(
        rules=[otp.Channels(multiple_of=step, criterion="magnitude", repair="none")],
        budget=otp.Budget(macs=kept / 100),
    )
    report = otp.prune_(net.model(), policy, [net.draw(8, 0)], timing=0)
    assert all(len(c.keep) % step == 0 or len(c.keep) == c.units for c in report.plan.cuts)


def test_torchs_own_dynamic_int8_takes_a_pruned_model(small: nn.Module) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(module) for module in quantised.modules()}
    assert torch.ao.nn.quantized.dynamic.Linear in kinds
    assert 0 < far(quantised, small) < 0.1


def test_torchaos_int8_takes_a_pruned_model(small: nn.Module) -> None:
    ao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantised = copy.deepcopy(small)
    ao.quantize_(quantised, ao.Int8DynamicActivationInt8WeightConfig())
    assert type(quantised.model.layers[1].mlp.gate_proj.weight) is not nn.Parameter
    assert 0 < far(quantised, small) < 0.1


def _four_bits(model: nn.Module) -> nn.Module:
    ao: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantised = copy.deepcopy(model)
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))
    ao.quantize_(quantised, config)
    return quantised


def test_four_bit_groups_take_a_model_pruned_to_their_multiples(small: nn.Module) -> None:
    assert 0 < far(_four_bits(small), small) < 0.5


def test_four_bit_groups_refuse_other_widths() -> None:
    other, report = pruned(otp.Channels(multiple_of=10))
    assert any(len(cut.keep) % GROUP for cut in report.plan.cuts)
    with pytest.raises(AssertionError, match="divisible"):
        _four_bits(other)


def test_what_was_saved_and_loaded_can_be_quantised(small: nn.Module, tmp_path: Any) -> None:
    otp.save(small, tmp_path / "small")
    again = otp.load(tmp_path / "small", factory=llama)
    quantised = torch.ao.quantization.quantize_dynamic(again, {nn.Linear}, dtype=torch.qint8)
    assert 0 < far(quantised, small) < 0.1


def test_onnx_runtimes_quantiser_takes_a_pruned_model(small: nn.Module, tmp_path: Any) -> None:
    runtime: Any = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    tools: Any = pytest.importorskip("onnxruntime.quantization", reason="it has no quantiser")
    otp.export(small, tmp_path / "net.onnx", tokens(0))
    tools.quantize_dynamic(tmp_path / "net.onnx", tmp_path / "int8.onnx")
    session = runtime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(["logits"], {"input_ids": tokens(1)["input_ids"].numpy()})
    with torch.no_grad():
        wanted = small(**tokens(1)).logits
    gap = float((torch.from_numpy(found) - wanted).norm() / wanted.norm())
    assert 0 < gap < 0.1


def test_a_quantised_model_is_not_saved_and_the_error_says_when_to(tmp_path: Any) -> None:
    quantization: Any = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    policy = otp.Policy(rules=[otp.Channels(multiple_of=32, keep="50%")])
    otp.prune_(model, policy, [torch.randn(64, 64)], timing=0)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(LoadError) as raised:
        otp.save(model, tmp_path / "m")
    assert "made of several tensors, which safetensors cannot hold" in raised.value.problem
    assert "save the model before quantising it" in raised.value.fix
    assert not (tmp_path / "m").exists()
