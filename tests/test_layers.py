"""Whole layers go: found in the data flow, priced, taken out, made up for, brought back."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_otprune as otp
from tests.depth_cases import BUILDS, Mlp, Stack, build, data, pruned
from torch_otprune.policy import LAYER_CRITERIA, REPLACEMENTS
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import trace
from torch_otprune.structure.mute import muted

LAYERS = {
    "list": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "sequential": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "pre_norm": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "named": ["first", "second", "third"],
    "pictures": ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2"],
    "transformer": ["layers.0", "layers.1", "layers.2", "layers.3"],
    "tuples": ["layers.0", "layers.1", "layers.2"],
}


def layers(name: str) -> list[str]:
    graph = trace(build(name), data(name, 2))
    return [block.name for block in graph.blocks if block.level == "layer"]


@pytest.mark.parametrize("name", BUILDS)
def test_every_residual_layer_is_found(name: str) -> None:
    assert layers(name) == LAYERS[name]


def test_the_halves_of_a_transformer_layer_are_found_with_their_norms() -> None:
    graph = trace(build("transformer"), data("transformer", 2))
    halves = {b.name: [s.path for s in b.swaps] for b in graph.blocks if b.kind == "branch"}
    assert halves["layers.1.o"][:2] == ["layers.1.o", "layers.1.ln1"]
    assert halves["layers.1.mlp"] == ["layers.1.mlp", "layers.1.ln2"]


def test_a_layer_that_strides_is_listed_as_stuck_with_its_shapes() -> None:
    (stuck,) = trace(build("pictures"), data("pictures", 2)).stuck
    assert stuck.name == "layer2.0"
    assert stuck.reason == "it reads [4, 8, 8] and writes [8, 4, 4] per sample"


def test_layers_that_follow_one_another_are_one_chain() -> None:
    graph = trace(build("pictures"), data("pictures", 2))
    chained = {b.name: (b.chain, b.place) for b in graph.blocks if b.level == "layer"}
    assert chained["layer1.2"] == ("layer1.0", 2)
    assert chained["layer2.2"] == ("layer2.1", 1)


@pytest.mark.parametrize("name", BUILDS)
def test_pruned_equals_masked_when_nothing_is_repaired(name: str) -> None:
    dense, small, report = pruned(name, drop=2, replace="identity", repair=())
    x = data(name, 8, seed=3)
    swaps = [drop.swaps[0] for drop in report.plan.drops]
    with torch.no_grad(), muted(dense, swaps):
        expected = dense(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("targets", ["layers.*.o", "layers.*.mlp", "layers.2.mlp"])
def test_a_muted_half_equals_the_masked_one(targets: str) -> None:
    drop = 1
    dense, small, report = pruned(
        "transformer", targets=targets, drop=drop, replace="identity", repair=()
    )
    x = data("transformer", 8, seed=3)
    with torch.no_grad(), muted(dense, [d.swaps[0] for d in report.plan.drops]):
        expected = dense(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected, rtol=1e-10, atol=1e-10)
    assert report.params.after < report.params.before


@pytest.mark.parametrize("name", BUILDS)
def test_predicted_costs_are_the_measured_ones(name: str) -> None:
    _, small, report = pruned(name, drop=1)
    plan = report.plan
    assert plan.params.after == count_params(small) < plan.params.before
    assert plan.macs.after == count_macs(small, data(name, 4)) < plan.macs.before
    assert plan.layers.after == plan.layers.before - 1 == len(LAYERS[name]) - 1


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_every_replacement_keeps_its_promise_on_every_network(name: str, kind: str) -> None:
    dense, small, report = pruned(name, drop=1, replace=kind)
    assert report.output_error.after_repair <= report.output_error.before_repair
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    report.undo_()
    assert list(small.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in small.state_dict().items())
    x = data(name, 4)
    with torch.no_grad():
        assert torch.equal(small(x), dense(x))


def constant(block: Mlp) -> None:
    """Let a block write the same everywhere."""
    with torch.no_grad():
        block.up.weight.zero_()
        block.up.bias.fill_(1.0)


@pytest.mark.parametrize("drop", [1, 2])
@pytest.mark.parametrize("repair", [(), ("least_squares",)])
def test_a_block_that_the_layer_in_front_can_write_costs_nothing(
    drop: int, repair: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    dense = Stack().double().eval()
    for block in list(dense.blocks)[1 : 1 + drop]:
        constant(block)  # type: ignore[arg-type]
    small = copy.deepcopy(dense)
    policy = otp.Policy(rules=[otp.Layers(drop=drop, repair=repair)])
    report = otp.prune_(small, policy, list(data("list", 64).split(16)), timing=0)
    assert [d.block for d in report.plan.drops] == [f"blocks.{i + 1}" for i in range(drop)]
    x = data("list", 16, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=0, atol=1e-4)


def scaled(dense: Stack) -> None:
    """Let the third block double what it reads, where the stream is positive."""
    with torch.no_grad():
        block = dense.blocks[2]
        assert isinstance(block, Mlp)
        block.up.weight.zero_()
        block.up.weight[:6] = torch.eye(6)
        block.up.bias.fill_(100.0)  # the rectifier is always on
        block.down.weight.zero_()
        block.down.weight[:, :6] = torch.eye(6)
        block.down.bias.fill_(-100.0)


@pytest.mark.parametrize("kind", ["scale", "low_rank"])
def test_a_block_that_scales_is_replaced_exactly(kind: str) -> None:
    torch.manual_seed(0)
    dense = Stack().double().eval()
    scaled(dense)
    small = copy.deepcopy(dense)
    rule = otp.Layers(targets="blocks.2", drop=1, replace=kind, repair=())
    batches = list(data("list", 64).split(16))
    otp.prune_(small, otp.Policy(rules=[rule]), batches, timing=0)
    x = data("list", 16, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_saved_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, small, _ = pruned(name, drop=2, replace={"kind": "low_rank", "rank": 2})
    otp.save(small, tmp_path / "model")
    again = otp.load(tmp_path / "model", factory=lambda: BUILDS[name]().double())
    x = data(name, 8)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_it_loads_in_a_fresh_process(tmp_path: Path) -> None:
    _, small, _ = pruned("transformer", drop=2)
    otp.save(small, tmp_path / "model")
    x = data("transformer", 8)
    with torch.no_grad():
        torch.save(small(x), tmp_path / "expected.pt")
    code = (
        "import torch, torch_otprune as otp; from tests.depth_cases import BUILDS, data;"
        "make = lambda: BUILDS['transformer']().double();"
        f"m = otp.load({str(tmp_path / 'model')!r}, factory=make);"
        f"e = torch.load({str(tmp_path / 'expected.pt')!r});"
        "assert torch.equal(m(data('transformer', 8)), e); assert len(m.layers) == 2"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["list", "pictures", "transformer"])
def test_layers_leave_their_list_and_the_rest_move_up(name: str) -> None:
    _, small, report = pruned(name, drop=1)
    assert report.plan.compacted == (report.plan.drops[0].block,)
    held = [m for m in small.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    assert not any(type(m).__name__ == "Skip" for box in held for m in box)


def test_a_named_layer_becomes_a_placeholder_without_weights() -> None:
    _, small, report = pruned("named", drop=1)
    gone = small.get_submodule(report.plan.drops[0].block)
    assert not list(gone.parameters())
    assert report.plan.compacted == ()


@pytest.mark.parametrize("kind", sorted(LAYER_CRITERIA))
@pytest.mark.parametrize("name", ["pictures", "sequential"])
def test_every_criterion_drops_what_it_was_asked_to(kind: str, name: str) -> None:
    _, _, report = pruned(name, drop=2, criterion=kind)
    assert len(report.plan.drops) == 2
    assert all(drop.criterion == kind for drop in report.plan.drops)


def test_a_plan_is_the_same_every_time() -> None:
    plans = [pruned("pictures", drop=2)[2].plan for _ in range(2)]
    assert plans[0].hash == plans[1].hash
    assert otp.Plan.from_json(plans[0].to_json()) == plans[0]


def test_a_budget_of_layers_is_kept() -> None:
    model = build("transformer")
    policy = otp.Policy(rules=[otp.Layers()], budget={"layers": "50%"})
    report = otp.prune_(model, policy, list(data("transformer").split(16)), timing=0)
    assert report.plan.layers.after == 2
    assert len(model.layers) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["70%", "40%"])
def test_width_and_depth_share_one_budget(budget: str) -> None:
    model = build("pictures")
    policy = otp.Policy(rules=[otp.Channels(), otp.Layers()], budget={"macs": budget})
    report = otp.prune_(model, policy, list(data("pictures").split(16)), timing=0)
    assert report.plan.macs.after == count_macs(model, data("pictures", 2))
    assert report.plan.macs.ratio <= float(budget[:-1]) / 100
    inside = {cut.group.rpartition(".")[0] for cut in report.plan.cuts}
    assert not inside & {drop.block for drop in report.plan.drops}


def test_width_and_depth_together_lose_no_more_than_either_alone() -> None:
    predicted = {}
    for name, rules in {
        "width": [otp.Channels()],
        "both": [otp.Channels(), otp.Layers()],
    }.items():
        model = build("pictures")
        with otp.attach(model, otp.Policy(rules=rules, budget={"macs": "60%"})) as attached:
            plan = otp.observe(attached, list(data("pictures").split(16))).plan()
        predicted[name] = sum(c.error**2 for c in (*plan.cuts, *plan.drops))
    assert predicted["both"] <= predicted["width"] * 1.01


@pytest.mark.parametrize("extra", ["none", "handed"])
def test_what_a_layer_hands_through_still_arrives(extra: str) -> None:
    torch.manual_seed(0)
    from tests.depth_cases import Tuples

    model = Tuples(extra=extra).double().eval()
    x = data("tuples", 48)
    batches = [{"x": part, "bias": part[:, :1]} for part in x.split(16)]
    policy = otp.Policy(rules=[otp.Layers(targets="layers.1", drop=1)])
    otp.prune_(model, policy, batches, timing=0)
    assert len(model.layers) == 2


def test_penalties_run_through_the_handle_while_training() -> None:
    model, x = build("list").float(), data("list", 32).float()
    rule = otp.Layers(drop=1, penalty={"kind": "max_sliced", "weight": 1.0, "ascent": 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with otp.attach(model, otp.Policy(rules=[rule]), example=x[:2]) as attached:
        losses = []
        for _ in range(30):
            model.train()
            penalty = attached.penalty() if model(x) is not None else None
            assert penalty is not None
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
            attached.step()
            losses.append(float(penalty.detach()))
        assert losses[-1] < 0.5 * losses[0]
        otp.observe(attached, [x])
        plan = attached.plan()
    report = otp.apply_(model, plan, [x], timing=0)
    assert len(report.plan.drops) == 1


def test_a_penalty_without_an_example_is_refused() -> None:
    rule = otp.Layers(drop=1, penalty="max_sliced")
    with pytest.raises(otp.OTPruneError, match="needs an example to find its blocks"):
        otp.attach(build("list"), otp.Policy(rules=[rule]))


class Attending(nn.Module):
    """A pre-norm layer around torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.att(y, y, y)[0]
        return x + self.mlp(self.norm2(x))


def test_a_half_without_linear_layers_of_its_own_is_made_up_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), *(Attending() for _ in range(3)), nn.Linear(8, 3)).eval()
    x = list(torch.randn(48, 4, 5).split(16))
    rule = otp.Layers(targets=["1.att", "2.att", "3.att"], drop=1)
    report = otp.prune_(model, otp.Policy(rules=[rule]), x, timing=0)
    assert report.repairs
    assert report.output_error.after_repair < report.output_error.before_repair


def test_a_model_that_does_not_run_with_placeholders_loses_a_layer_all_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(5, 8), encoder, nn.Linear(8, 3)).eval()
    x = list(torch.randn(48, 4, 5).split(16))
    otp.prune_(model, otp.Policy(rules=[otp.Layers(drop=1)]), x, timing=0)
    assert len(encoder.layers) == 2
