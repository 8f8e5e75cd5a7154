"""Pruned networks of four families through torch.export, ONNX Runtime and torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp

pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from benchmarks.portability import policy_of
from benchmarks.portability_nets import NETS
from torch_otprune.integrations.export import FORMATS
from torch_otprune.structure import flat_tensors, run

FAMILIES = ("ResNet", "ViT", "BERT", "Llama")


class Cut:
    """A network that lost channels, heads where it had any, and a layer."""

    def __init__(self, name: str) -> None:
        self.net = NETS[name]
        self.model = self.net.model()
        policy = policy_of(self.net, "both")
        self.report = otp.prune_(self.model, policy, [self.net.draw(16, 0)], timing=0)
        self.example = self.net.draw(4, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def cut(request: pytest.FixtureRequest) -> Cut:
    """Each family in turn."""
    return Cut(request.param)


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [t for t in flat_tensors(run(model, batch)) if t.is_floating_point()]


def test_the_cut_is_uneven_and_takes_a_layer(cut: Cut) -> None:
    kept = {len(c.keep) / c.units for c in cut.report.plan.cuts}
    assert len(kept) > 1
    assert len(cut.report.plan.drops) == 1


@pytest.mark.parametrize("to", FORMATS)
def test_a_pruned_network_can_be_exported(to: Any, cut: Cut, tmp_path: Path) -> None:
    found = otp.export(cut.model, tmp_path / "net", cut.example, to=to)
    assert found.error <= 1e-5
    assert found.inputs == tuple(cut.example)
    assert found.outputs == (("logits",) if cut.net.transformers else ("output",))
    assert found.dynamic == ("batch",)


def test_a_pruned_network_can_be_compiled_whole(cut: Cut) -> None:
    small = copy.deepcopy(cut.model)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    got, wanted = outputs(compiled, cut.example), outputs(cut.model, cut.example)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for out in (got, wanted):
        out[0].square().sum().backward()
    for one, other in zip(small.parameters(), cut.model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    cut.model.zero_grad()


@pytest.mark.slow
def test_a_pruned_network_runs_on_compiled_kernels(cut: Cut) -> None:
    if cut.net is not NETS["ResNet"]:
        pytest.skip("one family is enough for a compiler that takes long")
    with torch.no_grad():
        got = outputs(torch.compile(copy.deepcopy(cut.model)), cut.example)
        torch.testing.assert_close(got, outputs(cut.model, cut.example), rtol=1e-4, atol=1e-5)


def test_a_cache_is_left_out_and_stays_on(tmp_path: Path) -> None:
    net = NETS["Llama"]
    model: Any = net.model()
    assert model.config.use_cache
    found = otp.export(model, tmp_path / "net", net.draw(2, 1), to="torch_export")
    assert found.outputs == ("logits",)
    assert model.config.use_cache


def test_a_table_of_positions_limits_the_sequence(tmp_path: Path) -> None:
    net = NETS["BERT"]
    model: Any = net.model()
    settings: Any = {"to": "torch_export", "dynamic_sequence": True}
    found = otp.export(model, tmp_path / "net", net.draw(2, 1), **settings)
    assert found.dynamic == ("batch", "sequence")
    again = torch.export.load(tmp_path / "net").module()
    ids = torch.randint(3, 50, (3, 20))
    mask = torch.ones_like(ids)
    got = again(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(got["logits"], model(ids, mask).logits)
    longest = model.config.max_position_embeddings
    with pytest.raises(AssertionError):
        again(input_ids=torch.ones(2, longest + 1).long(), attention_mask=mask)


@pytest.mark.parametrize("name", ["Mixtral", "T5"])
def test_experts_and_two_stacks_can_go_to_onnx(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    model: Any = net.model()
    before = model.config._experts_implementation
    found = otp.export(model, tmp_path / "net.onnx", net.draw(2, 1))
    assert found.error <= 1e-5
    assert model.config._experts_implementation == before


def test_channels_last_survives_pruning_and_export(tmp_path: Path) -> None:
    net = NETS["ResNet"]
    model = net.model().to(memory_format=torch.channels_last)
    batch = {"x": net.draw(16, 0)["x"].to(memory_format=torch.channels_last)}
    otp.prune_(model, policy_of(net, "both"), [batch], timing=0)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    with torch.no_grad():
        assert model.get_submodule("body")(batch["x"]).is_contiguous(
            memory_format=torch.channels_last
        )
    assert otp.export(model, tmp_path / "net.onnx", batch).error <= 1e-5
    again = torch.export.export(model, (), batch).module()
    torch.testing.assert_close(again(**batch), model(**batch))


@pytest.mark.parametrize("name", ["ResNet", "Llama"])
def test_bfloat16_survives_pruning_and_export(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    model = net.model().bfloat16()
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in net.draw(16, 0).items()}
    otp.prune_(model, policy_of(net, "both"), [batch], timing=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    otp.export(model, tmp_path / "net.pt2", batch, to="torch_export")
    again = torch.export.load(tmp_path / "net.pt2")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
