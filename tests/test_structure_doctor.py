"""The doctor: every parameter accounted for, with its reason."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CASES
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.doctor.text import pattern, tables
from torch_otprune.errors import StructureError
from torch_otprune.fold import segments
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import trace
from torch_otprune.structure.doctor import FATES


class Mixed(nn.Module):
    """Channels that may go, a stream that a sort blocks, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(x).relu())).sort(-1).values)


@pytest.fixture
def found() -> otp.Diagnosis:
    """The diagnosis of the mixed model."""
    return otp.doctor(Mixed(), torch.randn(3, 4))


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_three_fates_are_all_parameters(name: str) -> None:
    model = CASES[name].model()
    found = otp.doctor(model, CASES[name].batch())
    total = sum(p.numel() for p in model.parameters())
    assert sum(found.elements(fate) for fate in FATES) == found.params == total
    assert [f.parameter for f in found.findings] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_prunable_parameter_shrinks_with_its_group_and_no_other_does(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    graph, found = trace(model, batch), otp.doctor(model, batch)
    terms = {term.owner: term for term in graph.costs["params"].terms}
    for finding in found.findings:
        for group in graph.groups:
            less = graph.full() | {group.name: group.units - 1}
            shrinks = terms[finding.parameter].at(less) < finding.elements
            assert shrinks == (group.name in finding.groups)


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_stays_has_a_reason(name: str) -> None:
    found = otp.doctor(CASES[name].model(), CASES[name].batch())
    assert all(bool(f.reason) == (f.fate != "prunable") for f in found.findings)


def test_each_fate_is_told_with_its_reason(found: otp.Diagnosis) -> None:
    fates = {f.parameter: (f.fate, f.reason) for f in found.findings}
    assert fates["up.weight"] == ("prunable", "")
    assert fates["norm.weight"][0] == "blocked" and "they are sorted" in fates["norm.weight"][1]
    assert fates["head.bias"][0] == "fixed" and "model's output" in fates["head.bias"][1]
    assert fates["spare.weight"] == ("fixed", "'spare' (Linear) did not run on the example")


def test_a_group_says_what_goes_together_and_what_one_unit_frees(found: otp.Diagnosis) -> None:
    (group,) = found.groups
    assert (group.producers, group.carriers, group.consumers) == (("up",), (), ("down",))
    assert group.params_per_unit == 4 + 1 + 5  # a row, its bias, a column
    assert group.macs_per_unit == 4 + 5


def test_the_shares_sum_to_one(found: otp.Diagnosis) -> None:
    assert sum(found.share(fate) for fate in FATES) == pytest.approx(1)


def test_the_text_names_every_group_and_everything_that_stays(found: otp.Diagnosis) -> None:
    text = str(found)
    assert "group up: 6 units" in text
    stays = [f.parameter for f in found.findings if f.fate != "prunable"]
    assert all(name.rpartition(".")[0] in text for name in stays)
    assert all(name in found.listed() for name in stays)


def test_json_loses_nothing(found: otp.Diagnosis) -> None:
    content = json.loads(found.to_json())
    totals = content.pop("totals")
    assert otp.Diagnosis.model_validate(content) == found
    assert totals == {fate: found.elements(fate) for fate in FATES}


def test_a_diagnosis_is_frozen(found: otp.Diagnosis) -> None:
    with pytest.raises(ValueError, match="frozen"):
        found.params = 0  # type: ignore[misc]


def test_the_model_is_left_as_it_was() -> None:
    model = Mixed().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    otp.doctor(model, torch.randn(3, 4))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_example_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(StructureError, match="does not run on the example"):
        otp.doctor(Mixed(), torch.randn(3, 7))


# Depth


class Stack(nn.Module):
    """Residual blocks with a convolution and a norm in front; some cannot go."""

    def __init__(self, depth: int = 3, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(Half(act) for _ in range(depth))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class Half(nn.Module):
    """Two convolutions with an activation between."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Conv2d(4, 6, 1), act(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Twice(Stack):
    """Runs its first block once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layers[0](self.norm(self.stem(x))).mean()


def images() -> Tensor:
    """A batch."""
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_doctor_lists_what_the_analysis_found_in_depth(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    graph, found = trace(model, batch), otp.doctor(model, batch)
    assert {b.block for b in found.blocks} <= {b.name for b in graph.blocks}
    told = {b.block for b in found.blocks} | {s.name for s in found.stuck}
    assert {b.name for b in (*graph.blocks, *graph.stuck)} == told
    assert [a.name for a in found.activations] == [s.name for s in graph.sites]


def test_what_a_block_frees_is_what_is_gone_once_it_is_removed() -> None:
    for place in range(3):
        model = Stack().eval()
        block = otp.doctor(model, images()).blocks[place]
        assert (block.params.before, block.macs.before) == (
            count_params(model),
            count_macs(model, images()),
        )
        rule = otp.Layers(targets=block.block, drop=1, replace="identity", repair=())
        otp.prune_(model, otp.Policy(rules=rule), [images()], timing=0)
        assert count_params(model) == block.params.after
        assert count_macs(model, images()) == block.macs.after


def test_blocks_that_follow_one_another_share_a_chain() -> None:
    blocks = otp.doctor(Stack(), images()).blocks
    assert [(b.block, b.chain, b.place, b.level, b.kind, b.channels) for b in blocks] == [
        (f"layers.{i}", "layers.0", i, "layer", "block", 4) for i in range(3)
    ]


class Halves(nn.Module):
    """A layer that adds twice to its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        out: Tensor = x + self.mlp(x)
        return out


def test_the_halves_of_a_layer_are_parts_and_free_less_than_the_layer() -> None:
    model = nn.Sequential(Halves(), Halves(), nn.Linear(8, 3))
    found = otp.doctor(model, torch.randn(2, 5, 8))
    whole = {b.block: b for b in found.blocks if b.level == "layer"}
    parts = [b for b in found.blocks if b.level == "part"]
    assert set(whole) == {"0", "1"} and len(parts) == 4
    for part in parts:
        layer = whole[part.block.split(".")[0]]
        assert layer.params.after < part.params.after < part.params.before


def test_halves_that_their_layer_looks_into_are_stuck_as_the_plan_would_say() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Linear(8, 2)).eval(),
        [torch.randn(8, 5, 8)],
    )
    found = otp.doctor(model, x[0])
    assert {b.block for b in found.blocks if b.level == "layer"} == {"0.layers.1", "0.layers.2"}
    assert not [b for b in found.blocks if b.kind == "branch"]
    stuck = {s.name: s for s in found.stuck}
    halves = {f"0.layers.{i}.{half}" for i in range(3) for half in ("self_attn", "linear2")}
    assert halves | {"0.layers.0"} <= set(stuck)  # nn.TransformerEncoder looks into its first layer
    for name in ("0.layers.0", *sorted(halves)):
        assert stuck[name].reason.startswith("without it the model does not run: ")
        assert stuck[name].fix.startswith("leave it, or let the model use and return nothing")
        with pytest.raises(StructureError) as error:
            otp.prune_(model, otp.Policy(rules=otp.Layers(targets=name, drop=1)), x, timing=0)
        assert stuck[name].reason in error.value.problem


def test_looking_for_what_can_go_leaves_the_model_as_it_was() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    modules, flags = dict(model.named_modules()), [m.training for m in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    otp.doctor(model, torch.randn(2, 5, 8))
    assert dict(model.named_modules()) == modules and [m.training for m in model.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 8), *(Halves() for _ in range(4))),
            "4 in 1 run: 1 ... 4",
        ),
        (
            lambda: nn.Sequential(Halves(), nn.Linear(8, 8), nn.Linear(8, 8), Halves(), Halves()),
            "3 in 2 runs",
        ),
    ],
)
def test_a_run_without_gaps_is_written_from_its_first_number_to_its_last(
    model: Any, said: str
) -> None:
    rows = tables(otp.doctor(model(), torch.randn(2, 5, 8)))["blocks"]
    assert rows[0][:2] == ("*", said)


def test_only_the_numbers_that_differ_become_stars_and_a_module_s_tensors_share_a_row() -> None:
    model = nn.Sequential(nn.Sequential(*(Halves() for _ in range(3))), nn.Linear(8, 2))
    model.register_parameter("loose", nn.Parameter(torch.zeros(3)))
    rows = tables(otp.doctor(model, torch.randn(2, 5, 8)))
    assert {row[0] for row in rows["blocks"] if "branch" in row[2]} == {"0.*.mix", "0.*.mlp"}
    stays = {row[0]: row[1] for row in rows["stays"]}
    assert stays["0.*.mix.0.weight|bias"] == "6"
    assert "loose" in stays


def test_a_parameter_says_with_which_block_it_goes() -> None:
    found = {f.parameter: f.blocks for f in otp.doctor(Stack(), images()).findings}
    assert found["layers.1.up.weight"] == ("layers.1",)
    assert found["head.weight"] == ()


def test_a_block_that_runs_twice_is_stuck_with_the_fix() -> None:
    found = otp.doctor(Twice(), images())
    (stuck,) = (s for s in found.stuck if s.name == "layers.0")
    assert stuck.reason == "it runs 2 times per forward pass, with one set of weights"
    assert stuck.fix.startswith("give every repetition a module of its own")
    assert "layers.0" not in {b.block for b in found.blocks}


def test_blocks_that_share_a_tensor_are_stuck() -> None:
    model = Stack()
    model.layers[2].up.weight = model.layers[0].up.weight
    found = otp.doctor(model, images())
    assert [b.block for b in found.blocks] == ["layers.1"]
    assert {s.name: (s.reason, s.fix) for s in found.stuck} == {
        f"layers.{i}": (f"'layers.{i}.up' shares a tensor with another layer", "untie the weights.")
        for i in (0, 2)
    }


def test_an_activation_says_whether_it_can_become_linear() -> None:
    sites = {a.name: a for a in otp.doctor(Stack(), images()).activations}
    assert sites["layers.0.act"].between == ("layers.0.up", "layers.0.down")
    assert (sites["layers.0.act"].reason, sites["layers.0.act"].functional) == ("", False)
    called = sites[":relu"]
    assert called.functional and "functional F.relu in Stack.forward" in called.reason
    assert called.fix == "write it as nn.ReLU."


def test_what_folds_now_and_what_would_are_told_apart() -> None:
    model = Stack()
    found = otp.doctor(model, images()).segments
    assert found == segments(model, images())
    when = {s.layers: s.activations for s in found}
    assert when["stem", "norm"] == ()
    assert when["layers.1.up", "layers.1.down"] == ("layers.1.act",)


def test_no_segment_needs_an_activation_that_cannot_become_linear() -> None:
    found = otp.doctor(Stack(act=nn.PReLU), images())
    assert [s.layers for s in found.segments] == [("stem", "norm")]


def test_a_hundred_layers_are_a_page_and_the_full_list_is_longer() -> None:
    found = otp.doctor(Stack(100), images())
    text = str(found)
    assert len(text.splitlines()) < 50 and "layers.*" in text
    assert "100 in 1 run" in text and "layers.57" not in text
    assert all(f"\nlayers.{i} " in found.listed() for i in range(100))


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_entry_is_counted_in_exactly_one_row(name: str) -> None:
    found = otp.doctor(CASES[name].model(), CASES[name].batch())
    short, full = tables(found), tables(found, every=True)
    counts = {title: sum(int(row[1].split()[0]) for row in rows) for title, rows in short.items()}
    assert counts == {title: len(rows) for title, rows in full.items()}
    assert counts["blocks"] == len(found.blocks) and counts["stuck"] == len(found.stuck)
    assert counts["activations"] == len(found.activations)
    assert counts["segments"] == len(found.segments)


def test_a_row_for_several_is_a_target_for_all_of_them() -> None:
    model = Stack(4).eval()
    (row,) = tables(otp.doctor(model, images()))["blocks"]
    rule = otp.Layers(targets=row[0], drop=1)
    with otp.attach(model, otp.Policy(rules=rule)) as attached:
        model(images())
        assert attached.plan().layers.before == 4


def test_numbers_in_a_sentence_are_no_paths() -> None:
    said = "it runs 3 times, reads [6, 8] and 'a.0.b' (x2)"
    assert pattern(said) == "it runs 3 times, reads [6, 8] and 'a.*.b' (x2)"


class Twofold(nn.Module):
    """Channels with two ops in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.head(y.sort(-1).values + y.cumsum(-1))


def test_a_reason_that_is_long_is_told_once_and_counted_elsewhere() -> None:
    found = otp.doctor(
        nn.Sequential(*(Twofold() for _ in range(3)), nn.Linear(4, 2)), torch.randn(2, 4)
    )
    short, full = tables(found)["stays"], tables(found, every=True)["stays"]
    assert len(short) < len(full) == len(found.stays())
    assert any("(and 1 more reason)" in row[4] for row in short)
    assert [row[4] for row in full] == [reason for _, _, reason, _ in found.stays()]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_what_a_weight_is_computed_from_goes_with_it(kind: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    getattr(nn.utils.parametrizations, kind)(net[2])
    found = otp.doctor(net, torch.randn(3, 4))
    fates = {
        f.parameter.rpartition(".")[2]: f for f in found.findings if "parametriz" in f.parameter
    }
    if kind == "weight_norm":  # the length of a row knows nothing of the columns
        assert fates["original0"].groups == ("2",)
        assert fates["original1"].groups == ("0", "2")
    else:
        assert fates["original"].groups == ("0", "2")
    assert {f.fate for f in fates.values()} == {"prunable"}
    fixed = [f.parameter for f in found.findings if f.fate == "fixed"]
    assert fixed == ["4.bias"]


def test_what_a_blocked_weight_is_computed_from_is_blocked_with_it() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    found = otp.doctor(nn.Sequential(nn.Linear(5, 4), net), torch.randn(3, 5))
    assert {f.parameter: f.reason for f in found.findings}[
        "1.parametrizations.weight.original0"
    ] == "they reach the model's output"
