"""PyTorch's own encoder, which packs padded batches, after its heads or channels are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.structure import trace
from torch_otprune.surgery.oracle import disagreement


class Reader(nn.Module):
    """An encoder at its defaults that is given a padding mask."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **settings)
        self.t = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings)
        self.g = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.g(self.t(self.e(ids), src_key_padding_mask=ids == 0)[:, 0])


def reader(**settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reader(**settings).double().eval()


def texts(*, padded: bool = True) -> Tensor:
    ids = torch.randint(1, 20, (16, 7), generator=torch.Generator().manual_seed(1))
    if padded:
        ids[::2, 5:] = 0
    return ids


RULES = {
    "heads": otp.Heads(keep=2, repair="none"),
    "hidden": otp.Hidden(keep="50%", repair="none"),
    "channels": otp.Channels(keep="50%", repair="none"),
    "layers": otp.Layers(drop=1, repair="none"),
    "uneven heads": otp.Heads(targets="t.layers.0*", keep=2, repair="none"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_pruned_encoder_computes_the_same_with_and_without_gradients(
    rule: str, padded: bool
) -> None:
    model, ids = reader(), texts(padded=padded)
    otp.prune_(model, otp.Policy(rules=[RULES[rule]]), [texts()], timing=0)
    wanted = model(ids)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            torch.testing.assert_close(model(ids), wanted)


@pytest.mark.parametrize("rule", ["heads", "channels"])
def test_a_pruned_encoder_is_the_dense_one_without_what_went(rule: str) -> None:
    model = reader()
    with otp.attach(model, otp.Policy(rules=[RULES[rule]])) as attached:
        plan = otp.observe(attached, [texts()]).plan()
    assert trace(model, texts()).groups
    with torch.no_grad():
        assert disagreement(model, plan.cuts, texts()) < 1e-10


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_undo_lets_an_encoder_pack_again_and_a_file_does_not(tmp_path: Path) -> None:
    model, ids = reader(), texts()
    with torch.no_grad():
        before = model(ids)
    report = otp.prune_(model, otp.Policy(rules=[RULES["hidden"]]), [ids], timing=0)
    otp.save(model, tmp_path / "small")
    loaded = otp.load(tmp_path / "small", factory=reader)
    assert not (model.t.use_nested_tensor or loaded.t.use_nested_tensor)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)
        report.undo_()
        assert model.t.use_nested_tensor and model.t.enable_nested_tensor
        torch.testing.assert_close(model(ids), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_whose_attention_is_whole_packs_as_before() -> None:
    model = reader()
    otp.prune_(model, otp.Policy(rules=[RULES["channels"]]), [texts()], timing=0)
    assert model.t.use_nested_tensor
