"""Heads and the residual stream are units as channels are: chosen, cut, repaired, refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import BudgetError, StructureError
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
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"bn_scale", "dtp"}))
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
    assert report.macs == report.plan.macs  # 5 · 3 · 4 + 2 · 4 · 5 · 6 + 5 · 4 · 2
    assert report.macs.after == 340


def test_one_head_is_one_head_and_all_is_a_share() -> None:
    assert otp.Heads(keep=1).widths(4) == (1,)
    assert otp.Heads(keep="100%").widths(4) == (4,)
    assert otp.Experts(keep=1).widths(4) == (1,)
    assert otp.Channels(keep=1).widths(4) == (4,)


def test_a_stream_that_is_the_output_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8))
    with pytest.raises(StructureError, match="they reach the model's output"):
        otp.prune_(model, otp.Policy(rules=otp.Hidden(keep=4)), [torch.randint(0, 9, (16, 5))])


class Mixture(nn.Module):
    """Four experts, of which the router chooses two."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 5, 6) / 3)
        self.down = nn.Parameter(torch.randn(4, 6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number in range(len(self.up)):
            rows, place = torch.where(chosen == number)
            hidden = nn.functional.linear(x[rows], self.up[number]).relu()
            made = nn.functional.linear(hidden, self.down[number])
            out.index_add_(0, rows, made * weights[rows, place, None])
        return out


def mixed() -> nn.Module:
    """A mixture between two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), Mixture(), nn.Linear(6, 2)).eval()


def test_fewer_experts_than_the_router_chooses_are_refused_with_all_three_counts() -> None:
    with pytest.raises(StructureError) as error:
        otp.prune_(mixed(), otp.Policy(rules=otp.Experts(keep=1)), [torch.randn(32, 3)])
    assert error.value.problem == (
        "keep is 1 of the 4 experts of '1', whose router chooses 2 for every token."
    )
    assert error.value.fix == "keep at least 2, or lower the model's top-k first."


def test_plan_and_doctor_say_how_many_experts_must_stay() -> None:
    x = torch.randn(32, 3)
    said = "of the 4 experts of '1' at least 2 stay: the router chooses 2 for every token"
    found = otp.doctor(mixed(), x)
    assert said in found.notes
    assert [group.least for group in found.groups if group.kind == "experts"] == [2]
    with otp.attach(mixed(), otp.Policy(rules=otp.Experts(keep="25%"))) as attached:
        made = otp.observe(attached, [x]).plan()
    assert said in made.notes and [len(cut.keep) for cut in made.cuts] == [2]


@pytest.mark.parametrize("keep", [GROUPS, 9])
def test_keeping_as_many_heads_as_there_are_names_both_counts(keep: int) -> None:
    with pytest.raises(BudgetError) as error:
        plan(otp.Heads(targets="layers.0", keep=keep))
    assert error.value.problem == (
        f"nothing would be removed: group 'layers.0.q' stays whole: rules[0] keeps {keep} heads, "
        f"and it has {GROUPS}."
    )
    assert error.value.fix == f"keep fewer than {GROUPS}."


def test_a_group_smaller_than_keep_is_noted_where_others_are_cut() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with otp.attach(model, otp.Policy(rules=otp.Channels(keep=6))) as attached:
        found = otp.observe(attached, [torch.randn(32, 3)]).plan()
    assert "group '0' stays whole: rules[0] keeps 6 channels, and it has 4" in found.notes


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        (otp.Heads(keep=0.5), "this model has channels: use otp.Channels."),
        (otp.Experts(keep=0.5), "this model has channels: use otp.Channels."),
        (otp.Channels(targets="1", keep=0.5), "target '0', or leave targets at auto."),
    ],
)
def test_a_rule_without_units_says_what_the_model_has(rule: object, kinds: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(StructureError) as error:
        otp.prune_(model, otp.Policy(rules=rule), [torch.randn(16, 3, 8, 8)])
    assert error.value.fix == kinds


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_what_no_data_was_seen_for_is_unknown_and_no_number(criterion: str) -> None:
    rule = otp.Channels(keep=0.5, criterion=criterion, repair="none")
    _, found = plan(rule)
    assert {cut.error for cut in found.cuts} == {None}
    assert "how much that changes is unknown" in found.cuts[0].reason
    assert otp.Plan.from_json(found.to_json()) == found and "  unknown  " in str(found)


def test_the_predicted_error_of_an_untrained_lstm_is_near_what_happens() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(128, 6, 3)
    dense = model(x).detach()
    policy = otp.Policy(rules=otp.Channels(), budget=otp.Budget(params=0.5))
    report = otp.prune_(model, policy, [x], timing=0)
    (cut,) = report.plan.cuts
    real = float((model(x).detach() - dense).norm() / dense.norm())
    assert real / 3 < cut.error < 3 * real
