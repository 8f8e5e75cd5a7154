"""Rules about weights, from the declaration to the report and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import torch_otprune as otp
from torch_otprune.errors import (
    BudgetError,
    CalibrationError,
    OTPruneError,
    PlanError,
    PolicyError,
    StructureError,
    VerificationError,
)
from torch_otprune.policy.registry import WEIGHT_CRITERIA
from torch_otprune.surgery.thin import check_zeros, matrices, shaped

KINDS = [k for k in WEIGHT_CRITERIA if not getattr(WEIGHT_CRITERIA[k], "learns", False)]


class Convs(nn.Module):
    """Convolutions with norms, a group, a stream and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        x = torch.relu(x + self.two(x))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))  # type: ignore[no-any-return]


def mlp(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4)).double().eval()


def convs() -> Convs:
    torch.manual_seed(0)
    model = Convs().double()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 4, 6, 6).double())
    return model.eval()


def data(*shape: int, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(32, *shape, generator=generator).double() for _ in range(batches)]


def pruned(
    model: nn.Module, rule: otp.Weights | Sequence[Any], batches: Sequence[Any] | None = None
) -> otp.Report:
    rules = [rule] if isinstance(rule, otp.Weights) else list(rule)
    batches = data(8) if batches is None else batches
    return otp.prune_(model, otp.Policy(rules=rules), batches, timing=0)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_weights_of_every_layer_become_real_zeros(kind: str) -> None:
    model = mlp()
    report = pruned(model, otp.Weights(keep="50%", criterion=kind))
    for index in (0, 2, 4):
        weight = model[index].weight
        assert type(weight) is nn.Parameter and weight.layout is torch.strided
        assert int((weight != 0).sum()) <= weight.numel() // 2
    assert [z.layer for z in report.zeros] == ["0", "2", "4"]
    assert report.params.after == report.params.before and report.macs.after == report.macs.before


@pytest.mark.parametrize("kind", KINDS)
def test_undo_brings_every_bit_back(kind: str) -> None:
    model = mlp()
    before, parameter = state(model), model[0].weight
    report = pruned(model, otp.Weights(keep="30%", criterion=kind))
    assert not same(state(model), before)
    report.undo_()
    assert same(state(model), before) and model[0].weight is parameter


@pytest.mark.parametrize("kind", ["magnitude", "alps"])
def test_a_saved_model_loads_with_its_zeros_and_goes_back(kind: str, tmp_path: Path) -> None:
    model = mlp()
    dense, x = copy.deepcopy(model), data(8)[0]
    report = pruned(model, otp.Weights(pattern="2:4", criterion=kind))
    report.save_undo(tmp_path / "undo")
    otp.save(model, tmp_path / "model")
    loaded = otp.load(tmp_path / "model", factory=mlp)
    assert torch.equal(loaded(x), model(x))
    assert int((loaded[2].weight == 0).sum()) >= loaded[2].weight.numel() // 2
    otp.undo_(loaded, tmp_path / "undo")
    assert same(state(loaded), state(dense))


def test_a_plan_says_how_many_stay_and_survives_json() -> None:
    model = mlp()
    with otp.attach(model, otp.Policy(rules=[otp.Weights(keep=0.25)])) as attached:
        model(data(8)[0])
        plan = attached.plan()
    assert [(t.layer, t.weights, t.keep) for t in plan.thinned] == [
        ("0", 128, 32),
        ("2", 256, 64),
        ("4", 64, 16),
    ]
    assert otp.Plan.from_json(plan.to_json()) == plan
    assert "weights 2: alps, unstructured: 64 of 256 stay" in str(plan)
    assert any("params and MACs count them" in note for note in plan.notes)
    report = otp.apply_(model, plan, data(8), timing=0)
    assert report.plan == plan


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "ntk"])
def test_masked_equals_zeroed(kind: str) -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    pruned(model, otp.Weights(keep="50%", criterion=kind))
    for index in (0, 2, 4):
        mask = model[index].weight != 0
        assert torch.equal(model[index].weight, dense[index].weight * mask)
        assert torch.equal(model[index].bias, dense[index].bias)


def test_fitting_what_stays_brings_the_output_nearer_than_zeros_alone() -> None:
    errors = {
        kind: pruned(mlp(), otp.Weights(keep="50%", criterion=kind)).output_error
        for kind in ("alps", "sparsegpt", "wanda")
    }
    assert errors["alps"].after_repair < 0.7 * errors["alps"].before_repair
    assert errors["sparsegpt"].after_repair < 0.7 * errors["sparsegpt"].before_repair
    assert errors["alps"].after_repair < errors["wanda"].after_repair


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_are_thinned_tap_by_tap_and_group_by_group(kind: str) -> None:
    model, batches = convs(), data(4, 6, 6, batches=2)
    before = state(model)
    report = pruned(model, otp.Weights(pattern="2:4", criterion=kind, ignore="wide"), batches)
    for name, width in (("one", 4), ("two", 4)):
        weight = getattr(model, name).weight
        near = (weight != 0).view(8, width // 4, 4, 9).sum(2)  # of four channels, at every tap
        assert int(near.max()) <= 2
    assert report.output_error.after_repair < 0.8
    report.undo_()
    assert same(state(model), before)


def test_matrices_keep_neighbours_side_by_side_and_go_back() -> None:
    model = convs()
    for module in (model.one, model.two, model.wide, model.head):
        laid = matrices(module)
        assert torch.equal(shaped(module, laid), module.weight.detach())
    assert torch.equal(matrices(model.one)[0, 0, :4], model.one.weight[0, :, 0, 0])


def test_a_bias_is_refitted_so_that_the_mean_output_stays() -> None:
    model = mlp()
    x = torch.cat(data(8)) + 3
    dense = copy.deepcopy(model)
    pruned(model, otp.Weights(targets="0", keep="30%", criterion="sparsegpt"), [x])
    torch.testing.assert_close(model[0](x).mean(0), dense[0](x).mean(0))
    assert not torch.equal(model[0].bias, dense[0].bias)


def test_a_batch_norm_takes_up_what_a_layer_without_bias_cannot() -> None:
    model, batches = convs(), data(4, 4, 4, batches=2)  # few positions: all of them are read
    dense = copy.deepcopy(model)
    pruned(model, otp.Weights(targets="one", keep="30%"), batches)
    x = torch.cat(batches)
    assert not torch.equal(model.norm.running_mean, dense.norm.running_mean)
    ours, theirs = (net.norm(net.one(x)).mean((0, 2, 3)) for net in (model, dense))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_gpt2_layers_whose_weights_lie_across_are_thinned_along_their_inputs() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (8, 12))}
    report = pruned(model, otp.Weights(pattern="2:4"), [batch])
    weight = model.transformer.h[0].mlp.c_fc.weight  # inputs by outputs
    assert int((weight != 0).view(4, 4, -1).sum(1).max()) <= 2
    assert [r.group for r in report.plan.refused] == ["lm_head"]  # tied to the embedding
    assert "shares its weight" in report.plan.refused[0].reason


def test_channels_go_first_and_weights_of_what_is_left_after() -> None:
    model = mlp()
    rules = [otp.Channels(keep="50%"), otp.Weights(keep="50%")]
    report = pruned(model, rules)
    assert model[2].weight.shape == (8, 8)
    assert [(t.layer, t.weights, t.keep) for t in report.plan.thinned][1] == ("2", 64, 32)
    assert int((model[2].weight != 0).sum()) <= 32
    report.undo_()
    assert same(state(model), state(mlp()))


@pytest.mark.parametrize("refits", [True, False])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_bound_at_the_output_holds_on_link_normalised_nets(mode: str, refits: bool) -> None:
    """Theorems 1 and 2: radii add up in parallel; in a cascade they grow by roots of gamma."""
    for seed in range(3):
        model = mlp(seed, width=12)
        with torch.no_grad():
            for index in (0, 2, 4):
                model[index].weight /= model[index].weight.abs().sum()
                model[index].bias.zero_()
        dense, x = copy.deepcopy(model), torch.cat(data(8))
        setting = {"kind": "net_trim", "radius": 0.1, "mode": mode, "refit": refits, "gamma": 1.2}
        report = pruned(model, otp.Weights(criterion=setting), [x])
        far = float((model(x) - dense(x)).square().sum(1).mean().sqrt().detach())
        radii = [z.radius for z in report.zeros]
        assert report.bound is not None and report.bound.certified is not None
        assert report.bound.promised is not None
        assert far <= report.bound.certified * (1 + 1e-6) <= report.bound.promised * (1 + 1e-2)
        if mode == "parallel":
            assert far <= sum(r for r in radii if r is not None)
        assert any(z.left < z.weights for z in report.zeros)


def test_the_bound_holds_for_every_criterion_on_any_chain() -> None:
    for kind in ("wanda", "sparsegpt", "alps"):
        for mode in ("parallel", "cascade") if kind != "wanda" else ("",):
            model, x = mlp(3), torch.cat(data(8))
            dense = copy.deepcopy(model)
            setting = {"kind": kind, **({"mode": mode} if mode else {})}
            rule = otp.Weights(targets=["0", "2"], keep=0.5, criterion=setting)
            report = pruned(model, rule, [x])
            far = float((model(x) - dense(x)).square().sum(1).mean().sqrt().detach())
            assert report.bound is not None and report.bound.certified is not None
            assert far <= report.bound.certified * (1 + 1e-6)


def test_a_declared_w2_of_every_layer_is_in_the_report_and_kept() -> None:
    model, x = mlp(), torch.cat(data(8))
    dense = copy.deepcopy(model)
    report = pruned(model, otp.Weights(criterion={"kind": "net_trim", "w2": 0.3}), [x])
    for depth, entry in zip((2, 4, 5), report.zeros, strict=True):
        far = (model[:depth](x) - dense[:depth](x)).square().sum(1).mean().sqrt()
        assert entry.radius == pytest.approx(0.3)
        assert float(far.detach()) <= (entry.distance or 0) + 1e-9 <= 0.3 * 1.002
    assert report.bound is not None and report.bound.promised == pytest.approx(0.3)


def test_a_radius_that_a_cascade_cannot_keep_is_widened_and_said() -> None:
    rules = [
        otp.Weights(targets=name, criterion={"kind": "net_trim", "radius": radius})
        for name, radius in (("0", 0.5), ("2", 0.01))
    ]
    report = pruned(mlp(), rules)
    first, behind = report.zeros
    assert first.growth is None and "what went in front" not in first.note
    assert behind.growth is not None
    told = f"costs more than radius 0.01, so W2 {behind.radius:.3g} is what is kept to"
    assert told in behind.note and told in " ".join(str(report).split())


def test_a_chain_that_is_none_has_no_bound_and_says_why() -> None:
    report = pruned(convs(), otp.Weights(keep=0.5), data(4, 6, 6, batches=1))
    assert report.bound is not None and report.bound.certified is None
    assert "'one' is no dense layer" in report.bound.reason
    assert "there is no bound at the output: 'one' is no dense layer" in str(report)
    blind = pruned(mlp(), otp.Weights(keep=0.5, criterion="magnitude"))
    assert blind.bound is not None and "looked at no data" in blind.bound.reason


def test_the_report_names_zeros_and_survives_json(tmp_path: Path) -> None:
    report = pruned(mlp(), otp.Weights(keep=0.5))
    assert otp.Report.from_json(report.to_json()) == report
    assert "50.0% of the weights in 3 layers are zero" in str(report)
    assert "only kernels that skip zeros run faster" in " ".join(str(report).split())
    assert "<h2>Zeros</h2>" in report.write(tmp_path).read_text()


def test_few_rows_are_named_in_the_report() -> None:
    report = pruned(mlp(), otp.Weights(keep=0.5), [data(8)[0][:6]])
    assert "'2': only 6 rows for 16 inputs" in str(report)


def test_batches_do_not_matter() -> None:
    x = torch.cat(data(8))
    one, many = mlp(), mlp()
    pruned(one, otp.Weights(keep=0.5), [x])
    pruned(many, otp.Weights(keep=0.5), list(x.split(16)))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def quoted(rule: otp.Weights, **more: Any) -> int:
    policy = otp.Policy(rules=[rule], calibration=otp.Calibration(**more))
    with otp.attach(mlp(width=64), policy, example=data(8)[0][:2]) as attached:
        return attached.bytes


def test_the_memory_of_what_layers_read_is_quoted_before_data() -> None:
    free = quoted(otp.Weights(keep=0.5, criterion="magnitude"))
    masks, fits = (quoted(otp.Weights(keep=0.5, criterion=kind)) for kind in ("wanda", "alps"))
    gram = 8 * 65 * 65  # of the layer that takes most
    assert free == 0 and 3 * gram < masks < fits
    small = quoted(otp.Weights(targets="0", keep=0.5))
    assert small < fits


def test_layers_that_would_not_fit_are_refused_before_data() -> None:
    with pytest.raises(CalibrationError, match="the weights of '2'") as error:
        quoted(otp.Weights(keep=0.5), memory=1e-4)
    assert "raise Calibration.memory" in error.value.fix
    assert quoted(otp.Weights(keep=0.5, ignore=["2"], criterion="wanda"), memory=1e-3) > 0


def test_all_or_nothing_where_a_radius_cannot_be_kept() -> None:
    model = mlp()
    before = state(model)
    rules = [
        otp.Weights(targets="0", keep=0.1, criterion="magnitude"),
        otp.Weights(targets="2", criterion={"kind": "net_trim", "w2": 1e-4}),
    ]
    with pytest.raises(CalibrationError, match="no weight keeps the answers of '2' within W2"):
        pruned(model, rules)
    assert same(state(model), before)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "does not say how many weights stay; a budget counts zeros as parameters"),
    ({"keep": 300}, "is a number of weights, and layers differ in size"),
    ({"keep": 0.5, "pattern": "2:4"}, "keep and the pattern 2:4 both say"),
    ({"pattern": "4:2"}, "'4:2' is no pattern"),
    ({"pattern": "4:4"}, "'4:4' is no pattern"),
    ({"pattern": "0:4"}, "'0:4' is no pattern"),
    ({"pattern": "dense"}, "'dense' is no pattern"),
    ({"pattern": 4}, "4 is no pattern"),
    ({"keep": 0.5, "criterion": "alp"}, "'alp' is no known weight criterion"),
    ({"keep": 0.5, "criterion": {"kind": "net_trim", "radius": 0.1}}, "both say how many weights"),
    (
        {"pattern": "2:4", "criterion": {"kind": "net_trim", "w2": 0.1}},
        "both say how many weights",
    ),
    ({"keep": 0.5, "repair": "norm"}, "a repair would fill the zeros again"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_a_rule_that_makes_no_sense_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError) as error:
        otp.Weights(**words)
    assert said in error.value.problem and error.value.fix


def refuse(policy: otp.Policy, model: nn.Module | None = None) -> OTPruneError:
    with pytest.raises(OTPruneError) as error:
        otp.prune_(model or mlp(), policy, data(8), timing=0)
    return error.value


def test_a_budget_cannot_be_met_by_zeros() -> None:
    policy = otp.Policy(rules=[otp.Weights(keep=0.5)], budget=otp.Budget(params="50%"))
    error = refuse(policy)
    assert "a zero is a parameter and costs its MAC" in error.problem and "params" in error.problem


def test_layers_and_weights_are_not_pruned_by_one_policy() -> None:
    error = refuse(otp.Policy(rules=[otp.Weights(keep=0.5), otp.Layers(drop=1)]))
    assert "weights and about layers do not go together" in error.problem


def test_weights_do_not_go_in_rounds() -> None:
    policy = otp.Policy(rules=[otp.Weights(keep=0.5)], schedule=otp.Schedule(at=[1, 2]))
    assert "weights go at once" in refuse(policy).problem


def test_keeping_everything_is_refused() -> None:
    assert "keeps 100 %" in str(_error(lambda: otp.Policy(rules=[otp.Weights(keep=1.0)])))


def _error(call: Any) -> OTPruneError:
    with pytest.raises(OTPruneError) as error:
        call()
    return error.value


def test_a_layer_named_whose_width_is_no_multiple_is_an_error_and_one_among_others_a_note() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    batches = [torch.randn(16, 6).double()]
    with pytest.raises(StructureError, match="no multiple of 4") as error:
        pruned(model, otp.Weights(targets="0", pattern="2:4"), batches)
    assert "'0'" in error.value.problem and "ignore the layer" in error.value.fix
    report = pruned(model, otp.Weights(pattern="2:4"), batches)
    assert [r.group for r in report.plan.refused] == ["0"]
    assert "6 input channels per group" in report.plan.refused[0].reason


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_tied_and_computed_weights_are_refused_by_name() -> None:
    with pytest.raises(StructureError, match="shares its weight with another layer"):
        pruned(Tied().double(), otp.Weights(targets="a", keep=0.5))
    model = mlp()
    weight_norm(model[2])
    with pytest.raises(StructureError, match="a parametrisation computes its weight") as error:
        pruned(model, otp.Weights(targets="2", keep=0.5))
    assert "remove_parametrizations" in error.value.fix


def test_quantised_weights_are_refused_by_name() -> None:
    model = mlp()
    model[2].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)

    class Cast(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[4](torch.relu(self.net[0](x)))  # type: ignore[no-any-return]

    with pytest.raises(StructureError, match="its weight is quantised"):
        pruned(Cast(model), otp.Weights(targets="net.2", keep=0.5, criterion="magnitude"))


class Twice(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(torch.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_a_layer_that_runs_twice_needs_a_criterion_without_data() -> None:
    with pytest.raises(StructureError, match="runs more than once") as error:
        pruned(Twice().double(), otp.Weights(targets="a", keep=0.5))
    assert "criterion='magnitude'" in error.value.fix
    model = Twice().double()
    pruned(model, otp.Weights(targets="a", keep=0.5, criterion="magnitude"))
    assert int((model.a.weight != 0).sum()) == 32


def test_weights_that_are_nan_name_their_layer() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(OTPruneError, match=r"(?i)nan"):
        pruned(model, otp.Weights(keep=0.5, criterion="magnitude"))


def test_a_rule_that_reaches_no_weights_is_an_error() -> None:
    with pytest.raises(StructureError, match="reaches no weights that can go"):
        pruned(mlp(), otp.Weights(targets="ReLU", keep=0.5))


def test_an_edited_plan_is_refused() -> None:
    model = mlp()
    with otp.attach(model, otp.Policy(rules=[otp.Weights(keep=0.5)])) as attached:
        model(data(8)[0])
        plan = attached.plan()
    entry = plan.thinned[0]
    for update, said in (
        ({"layer": "1"}, "is no layer with weights"),
        ({"criterion": "wanda"}, "is not pruned as its rule says"),
        ({"keep": 1000}, "keeps more weights than it has"),
    ):
        edited = plan.model_copy(update={"thinned": (entry.model_copy(update=update),)})
        with pytest.raises(PlanError, match=said):
            otp.apply_(model, edited, data(8), timing=0)


def test_zeros_that_are_not_there_fail_verification() -> None:
    model = mlp()
    with otp.attach(model, otp.Policy(rules=[otp.Weights(pattern="2:4")])) as attached:
        model(data(8)[0])
        plan = attached.plan()
    with pytest.raises(VerificationError, match="has 128 weights of 128"):
        check_zeros(model, plan.thinned)
    with torch.no_grad():
        model[0].weight[:, 4:] = 0
    with pytest.raises(VerificationError, match="'0' breaks its pattern 2:4"):
        check_zeros(model, plan.thinned[:1])


def test_a_share_of_everything_in_all_layers_removes_nothing() -> None:
    rules = [otp.Weights(keep=0.5, targets="0"), otp.Weights(keep=1.0, targets=["2", "4"])]
    report = pruned(mlp(), rules)
    assert [t.layer for t in report.plan.thinned] == ["0"]
    with pytest.raises((BudgetError, PolicyError)):
        otp.prune_(mlp(), otp.Policy(rules=[otp.Weights(keep=1.0)]), data(8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_with_weights_survives_yaml(kind: str) -> None:
    policy = otp.Policy(rules=[otp.Weights(keep="30%", criterion=kind, ignore="head")])
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy


def test_the_structured_form_certifies_what_its_cut_moves() -> None:
    model, x = mlp(width=24), torch.cat(data(8))
    dense = copy.deepcopy(model)
    rule = otp.Channels(targets="2", keep="50%", criterion="net_trim")
    report = pruned(model, [rule], [x])
    reason = report.plan.cuts[0].reason
    promised = float(reason.rpartition("'4' by ")[2])
    far = float((model(x) - dense(x)).square().sum(1).mean().sqrt().detach())
    assert "refitted, this cut alone moves W2 at most: '4' by" in reason
    assert far <= promised * 1.02


def test_a_certificate_is_about_one_cut_alone() -> None:
    """Two cuts on one path move more than the last one's certificate: that is what alone means."""
    model, x = mlp(width=24), torch.cat(data(8))
    dense = copy.deepcopy(model)
    rule = otp.Channels(targets=["0", "2"], keep="50%", criterion="net_trim")
    report = pruned(model, [rule], [x])
    assert all("this cut alone moves W2 at most" in cut.reason for cut in report.plan.cuts)
    promised = float(report.plan.cuts[-1].reason.rpartition("'4' by ")[2])
    far = float((model(x) - dense(x)).square().sum(1).mean().sqrt().detach())
    assert far > promised


@pytest.mark.parametrize("kind", ["alps", "sparsegpt", "net_trim"])
@pytest.mark.parametrize("x", [torch.full((32, 8), 3.3), torch.randn(1, 8)], ids=["same", "one"])
def test_inputs_that_never_vary_are_an_error_and_no_constant(kind: str, x: Tensor) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(CalibrationError, match="no input of '0' varies") as error:
        pruned(model, otp.Weights(keep=0.5, criterion=kind), [x.double()])
    assert "criterion='magnitude'" in error.value.fix and same(state(model), before)


def test_wanda_needs_inputs_that_are_not_all_zero() -> None:
    rule = otp.Weights(keep=0.5, criterion="wanda")
    with pytest.raises(CalibrationError, match="no input of '0' varies"):
        pruned(mlp(), rule, [torch.zeros(8, 8).double()])
    assert pruned(mlp(), rule, [torch.ones(8, 8).double()]).zeros[0].left == 64


def test_some_inputs_that_never_vary_are_counted_in_the_report() -> None:
    x = torch.cat(data(8))
    x[:, 2:5] = 7.5
    report = pruned(mlp(), otp.Weights(targets="0", keep=0.5), [x])
    assert "'0': 3 of 8 inputs never vary on the calibration data" in str(report)


def test_a_layer_that_is_left_without_weights_is_named() -> None:
    report = pruned(mlp(), otp.Weights(targets="2", criterion={"kind": "net_trim", "w2": 1e3}))
    assert report.zeros[0].left == 0
    assert "'2': no weight is left, so it writes a constant" in str(report)


def test_few_rows_are_no_matter_of_a_criterion_that_fits_nothing() -> None:
    report = pruned(mlp(), otp.Weights(keep=0.5, criterion="wanda"), [data(8)[0][:6]])
    assert not any("rows for" in entry.note for entry in report.zeros)


def test_errors_of_net_trim_are_measured_behind_the_rectifier() -> None:
    model, x = mlp(), torch.cat(data(8))
    dense = copy.deepcopy(model)
    setting = {"kind": "net_trim", "mode": "parallel"}
    (entry,) = pruned(model, otp.Weights(targets="2", keep=0.5, criterion=setting), [x]).zeros
    ours, theirs = (net[:4](x).detach() for net in (model, dense))
    assert entry.error is not None and entry.masked is not None and entry.distance is not None
    # a unit that is on may be written below zero, where the rectifier hides the rest
    assert float((ours - theirs).norm() / theirs.norm()) <= entry.error < entry.masked
    assert entry.distance == pytest.approx(entry.error * float(theirs.norm()) / len(x) ** 0.5)


def test_two_rules_that_fit_equally_closely_name_the_layer() -> None:
    error = refuse(otp.Policy(rules=[otp.Weights(keep=0.5), otp.Weights(keep=0.3)]))
    assert "two rules fit '0' equally closely" in error.problem
