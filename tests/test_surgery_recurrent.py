"""Recurrent layers, attention and computed weights: cut, run, undone, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_zoo_patterns import SHELVES
from tests.zoo.net import Net
from tests.zoo.oracle import Case, random_cut
from torch_otprune.nn.attention import SlimAttention
from torch_otprune.structure import flat_tensors, run
from torch_otprune.surgery import Snapshot, cut_

NETS = (
    "lstm_two_layers",
    "lstm_projected_deep",
    "gru_bidirectional",
    "lstm_cell_in_a_loop",
    "multihead_attention",
    "multihead_attention_kdim",
    "multihead_attention_bias_kv",
    "transformer",
    "weight_norm",
    "spectral_norm",
    "bilinear",
    "depthwise_multiplier",
    "layer_norm_over_pictures",
)


def cut_in_place(case: Case, ratio: float = 0.5) -> None:
    """Cut random units of every group."""
    generator = torch.Generator().manual_seed(3)
    cut_(case.model, [random_cut(group, ratio, generator) for group in case.graph.groups])


def outputs(case: Case) -> list[Tensor]:
    with torch.no_grad():
        return flat_tensors(run(case.model, case.example))


def described(model: nn.Module) -> list[tuple[str, type, str]]:
    """List modules, their classes and what they print."""
    return [(name, type(m), m.extra_repr()) for name, m in model.named_modules()]


@pytest.mark.parametrize("name", NETS)
def test_an_undone_cut_leaves_no_trace(name: str) -> None:
    case = Case(SHELVES[name])
    before, state, said = outputs(case), dict(case.model.state_dict()), described(case.model)
    snapshot = Snapshot(case.model)
    cut_in_place(case)
    assert sum(p.numel() for p in case.model.parameters()) < sum(
        t.numel() for n, t in state.items() if "running" not in n and "num_b" not in n
    )
    snapshot.restore_()
    assert described(case.model) == said
    after = case.model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], state[n]) for n in state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(case), before, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_a_trial_leaves_the_dense_model_bit_for_bit(name: str) -> None:
    case = Case(SHELVES[name])
    state, before = {n: t.clone() for n, t in case.model.state_dict().items()}, outputs(case)
    case.compared(list(case.graph.groups), 0.5)
    after = case.model.state_dict()
    assert all(torch.equal(after[n], state[n]) for n in state)
    assert all(torch.equal(a, b) for a, b in zip(outputs(case), before, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_a_cut_model_still_learns(name: str) -> None:
    case = Case(SHELVES[name])
    cut_in_place(case)
    model = case.model.train()
    sum(t.sum() for t in flat_tensors(run(model, case.example))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_integers_of_a_recurrent_layer_follow() -> None:
    case = Case(SHELVES["lstm_projected_deep"])
    cut_in_place(case)
    layer: Any = case.model.r
    assert layer.hidden_size == layer.weight_ih_l0.shape[0] // 4 < 9
    assert layer.proj_size == layer.weight_hr_l1.shape[0] < 5
    assert layer.input_size == layer.weight_ih_l0.shape[1] == case.model.a.out_features
    weights = dict(layer.named_parameters())
    listed = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
    assert all(weight is weights[name] for name, weight in listed)


def test_a_weight_norm_stays_one_and_a_spectral_norm_is_baked() -> None:
    normed, spectral = Case(SHELVES["weight_norm"]), Case(SHELVES["spectral_norm"])
    cut_in_place(normed)
    cut_in_place(spectral)
    assert set(dict(normed.model[2].named_parameters())) == {
        "bias", "parametrizations.weight.original0", "parametrizations.weight.original1",
    }  # fmt: skip
    assert set(dict(spectral.model[2].named_parameters())) == {
        "bias", "parametrizations.weight.original",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lstm", "transformer_encoder", "multihead_attention_kdim"])
def test_a_pruned_model_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    case, fresh = Case(SHELVES[name]), Case(SHELVES[name])
    policy = otp.Policy(
        rules=[otp.Channels(keep="60%", criterion="magnitude", repair=[])]
        if name == "lstm"
        else [otp.Heads(keep="50%", criterion="magnitude", repair=[])]
    )
    otp.prune_(case.model, policy, [case.example], timing=0.0)
    otp.save(case.model, tmp_path / "small")
    loaded = otp.load(tmp_path / "small", factory=lambda: fresh.model)
    with torch.no_grad():
        again = flat_tensors(run(loaded, case.example))
    torch.testing.assert_close(again, outputs(case), rtol=1e-12, atol=1e-12)


def attend(**settings: Any) -> tuple[nn.MultiheadAttention, SlimAttention]:
    """Make PyTorch's attention and ours with the same tensors."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(12, 4, **settings).double().eval()
    return stock, SlimAttention(12, 4, 3, like=stock)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 7, "vdim": 5}],
)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": torch.triu(torch.ones(5, 6, dtype=torch.bool), 2)},
        {"attn_mask": drawn(8, 5, 6, seed=5)},
        {"key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])},
    ],
)
def test_our_attention_is_that_of_pytorch(
    first: bool, settings: dict[str, Any], call: dict[str, Any]
) -> None:
    stock, ours = attend(batch_first=first, **settings)
    q = drawn(2, 5, 12, seed=1)
    k, v = drawn(2, 6, stock.kdim, seed=2), drawn(2, 6, stock.vdim, seed=3)
    q, k, v = (t if first else t.transpose(0, 1) for t in (q, k, v))
    for wanted, got in zip(stock(q, k, v, **call), ours(q, k, v, **call), strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted)


def test_our_attention_takes_one_sample_without_its_batch_axis() -> None:
    stock, ours = attend()
    q, k = drawn(5, 12, seed=1), drawn(6, 12, seed=2)
    for wanted, got in zip(stock(q, k, k), ours(q, k, k), strict=True):
        torch.testing.assert_close(got, wanted)


def test_heads_of_pytorchs_transformer_go_in_evaluation_and_in_training() -> None:
    case = Case(SHELVES["transformer_encoder"])
    heads = [g for g in case.graph.groups if g.kind == "heads"]
    generator = torch.Generator().manual_seed(3)
    cut_(case.model, [random_cut(g, 0.5, generator) for g in heads])
    found = [m for m in case.model.modules() if isinstance(m, SlimAttention)]
    assert [m.num_heads for m in found] == [2, 2]
    quiet = outputs(case)
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in found:
        module.dropout = 0.0
    loud = flat_tensors(run(case.model.train(), case.example))
    torch.testing.assert_close(quiet, loud)


def test_an_attention_shared_by_two_parents_stays_shared() -> None:
    attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x, x, x, need_weights=False)[0]
        return m.o(m.second(y, y, y, need_weights=False)[0])

    net = Net(forward, first=attention, second=attention, o=nn.Linear(12, 5)).double().eval()
    graph = otp.doctor(net, drawn(2, 5, 12, seed=1))
    assert graph is not None
    from torch_otprune.structure import trace

    heads = [g for g in trace(net, drawn(2, 5, 12, seed=1)).groups if g.kind == "heads"]
    cut_(net, [random_cut(g, 0.5, torch.Generator().manual_seed(1)) for g in heads])
    assert net.first is net.second


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_one_time_step_is_enough(kind: str, settings: dict[str, Any]) -> None:
    wide = 16 if "bidirectional" in settings else 8

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.r(x)[0][:, -1])

    def built() -> nn.Module:
        layer = getattr(nn, kind)(6, 8, batch_first=True, **settings)
        return Net(forward, r=layer, o=nn.Linear(wide, 3)).double().eval()

    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair="none", criterion="random")])
    kept = []
    for steps in (1, 3):
        model = built()
        report = otp.prune_(model, policy, [drawn(32, steps, 6, seed=steps)], timing=0)
        kept.append(report.params.after)
        assert model(drawn(5, 4, 6, seed=9)).shape == (5, 3)
    assert kept[0] == kept[1]


def test_one_step_of_an_lstm_with_a_projection_is_enough() -> None:
    net = nn.LSTM(6, 8, proj_size=4, batch_first=True)
    model = Net(lambda m, x: m.o(m.r(x)[0][:, -1]), r=net, o=nn.Linear(4, 3)).double().eval()
    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair="none")])
    report = otp.prune_(model, policy, [drawn(32, 1, 6, seed=1)], timing=0)
    assert len(report.plan.keep()) == 2
    assert model(drawn(5, 4, 6, seed=9)).shape == (5, 3)


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_one_step_of_a_cell_is_enough(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = None
        for step in range(x.shape[1]):
            h = m.r(x[:, step], h)
        return m.o(h[0] if isinstance(h, tuple) else h)

    model = Net(forward, r=getattr(nn, kind)(6, 8), o=nn.Linear(8, 3)).double().eval()
    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair="none")])
    otp.prune_(model, policy, [drawn(32, 1, 6, seed=1)], timing=0)
    assert model.r.hidden_size == 4 and model(drawn(5, 4, 6, seed=9)).shape == (5, 3)
