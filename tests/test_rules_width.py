"""Heads and the residual stream are units as channels are: chosen, cut, repaired, refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import StructureError
from torch_otprune.policy import CRITERIA
from torch_otprune.structure import trace
from torch_otprune.surgery import disagreement

HEADS, EACH, GROUPS = 6, 3, 3


class Layer(nn.Module):
    """A pre-norm layer: grouped queries, rotated pairs, a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, HEADS * EACH)
        self.k, self.v = (nn.Linear(width, GROUPS * EACH) for _ in range(2))
        self.o = nn.Linear(HEADS * EACH, width)
        self.gate, self.up = nn.Linear(width, 10), nn.Linear(width, 10)
        self.down = nn.Linear(10, width)
        self.register_buffer("angle", torch.rand(EACH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            f(y).view(*x.shape[:2], -1, EACH).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        turn = (self.angle * torch.arange(x.shape[1], device=x.device)[:, None]).cos()
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k * turn, v))
        mixed = nn.functional.scaled_dot_product_attention(q * turn, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Encoder(nn.Module):
    """Two layers between an embedding and a head."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.layers = nn.Sequential(Layer(width), Layer(width))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.last(self.layers(self.embed(ids))).mean(1))


def encoder() -> nn.Module:
    """Build one, alive, in float64."""
    torch.manual_seed(0)
    model = Encoder().double().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
    return model


def batches() -> list[Tensor]:
    """Draw token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 30, (32, 7), generator=generator) for _ in range(4)]


def plan(rules: object, **fields: object) -> tuple[nn.Module, otp.Plan]:
    """Plan on the encoder."""
    model = encoder()
    with otp.attach(model, otp.Policy(rules=rules, **fields)) as attached:
        return model, otp.observe(attached, batches()).plan()


def test_the_analysis_tells_heads_streams_and_channels_apart() -> None:
    graph = trace(encoder(), batches()[0])
    assert {(g.name, g.kind, g.units) for g in graph.groups} == {
        ("embed", "hidden", 14),
        ("layers.0.q", "heads", GROUPS),
        ("layers.0.gate", "channels", 10),
        ("layers.1.q", "heads", GROUPS),
        ("layers.1.gate", "channels", 10),
    }


@pytest.mark.parametrize("rule", [otp.Heads, otp.Hidden, otp.Channels])
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"bn_scale"}))
def test_every_criterion_ranks_every_kind_and_the_cut_is_the_masked_model(
    rule: type[otp.Heads], criterion: str
) -> None:
    model, found = plan(rule(keep=0.67, criterion=criterion, repair="none"))
    assert found.cuts
    assert disagreement(model, found.cuts, batches()[0]) < 1e-12


def test_a_group_of_queries_goes_with_its_keys_and_values() -> None:
    _, found = plan(otp.Heads(targets="layers.0", keep=2))
    (cut,) = found.cuts
    kept = {piece.path: len(piece.keep) for piece in cut.slices}
    assert kept == {
        "layers.0.q": 2 * HEADS // GROUPS * EACH,
        "layers.0.k": 2 * EACH,
        "layers.0.v": 2 * EACH,
        "layers.0.o": 2 * HEADS // GROUPS * EACH,
    }


def test_a_narrower_stream_narrows_everything_on_it() -> None:
    model = encoder()
    otp.prune_(model, otp.Policy(rules=otp.Hidden(keep=8)), batches())
    assert model.embed.weight.shape == (30, 8)
    assert model.last.normalized_shape == (8,)
    assert model.layers[1].norm1.normalized_shape == (8,)
    assert model.layers[0].down.weight.shape == (8, 10)
    assert model(batches()[0]).shape == (32, 5)


def test_one_budget_trades_heads_width_and_channels() -> None:
    model = encoder()
    rules = [otp.Heads(), otp.Hidden(), otp.Channels()]
    policy = otp.Policy(rules=rules, budget=otp.Budget(params="60%"))
    report = otp.prune_(model, policy, batches())
    left = sum(p.numel() for p in model.parameters())
    assert left == report.plan.params.after <= 0.6 * report.plan.params.before


def test_repair_lowers_the_error_of_cut_heads() -> None:
    errors = {}
    for repair in ("none", "least_squares"):
        model = encoder()
        dense = model(batches()[0])
        otp.prune_(model, otp.Policy(rules=otp.Heads(keep=2, repair=repair)), batches())
        errors[repair] = float((model(batches()[0]) - dense).square().mean())
    assert errors["least_squares"] < 0.7 * errors["none"]


def test_a_rule_for_channels_that_meets_heads_names_the_rule_for_them() -> None:
    _, found = plan(otp.Channels(keep=0.5))
    said = {refusal.group: (refusal.reason, refusal.fix) for refusal in found.refused}
    assert said["layers.0.q"][1] == "cut them by a rule otp.Heads."
    assert said["embed"][1] == "cut the stream's width by a rule otp.Hidden."


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (otp.Heads(keep=0.5), "no attention with several heads among the targets"),
        (otp.Hidden(keep=0.5), "no stream that a norm takes as one among the targets"),
    ],
)
def test_a_network_without_them_says_so(rule: object, said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StructureError, match=said):
        otp.prune_(model, otp.Policy(rules=rule), [torch.randn(16, 4)])


def test_both_kinds_are_spelled_in_yaml() -> None:
    text = (
        "rules: [{kind: heads, keep: 0.5}, {kind: hidden, multiple_of: 8}]\nbudget: {params: 0.9}"
    )
    policy = otp.Policy.from_yaml(text)
    assert [rule.kind for rule in policy.rules] == ["heads", "hidden"]
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy


def test_channels_that_are_positions_of_another_layer_take_its_work_with_them() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 5)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            mixed = self.down(self.up(x.mT).relu()).mT  # each channel is a position here
            return self.head(mixed).mean(1)

    torch.manual_seed(0)
    model = Mixer().double().eval()
    batch = torch.randn(32, 5, 3, dtype=torch.float64)
    report = otp.prune_(model, otp.Policy(rules=otp.Channels(targets="embed", keep=4)), [batch])
    assert model.head.weight.shape == (2, 4)
    assert report.macs.after < report.plan.macs.after


def test_a_plan_says_whose_products_its_macs_leave_out() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.l(x)[0])

    model, batch = Tagger(), torch.randn(32, 5, 3)
    with otp.attach(model, otp.Policy(rules=otp.Channels(keep=0.5))) as attached:
        found = otp.observe(attached, [batch]).plan()
    said = "MACs leave out the products inside 'l'; parameters count them"
    assert said in found.notes
    assert said in otp.doctor(model, batch).notes


def test_one_head_is_one_head_and_all_is_a_share() -> None:
    assert otp.Heads(keep=1).widths(4) == (1,)
    assert otp.Heads(keep="100%").widths(4) == (4,)
    assert otp.Experts(keep=1).widths(4) == (1,)
    assert otp.Channels(keep=1).widths(4) == (4,)


def test_a_stream_that_is_the_output_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8))
    with pytest.raises(StructureError, match="they reach the model's output"):
        otp.prune_(model, otp.Policy(rules=otp.Hidden(keep=4)), [torch.randint(0, 9, (16, 5))])
