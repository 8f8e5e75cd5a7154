"""Dead, constant, tiny and broken groups: an error that says so, or a network that still works."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from benchmarks.methods import methods
from torch_otprune.errors import CalibrationError, OTPruneError
from torch_otprune.policy.registry import CRITERIA, WEIGHT_CRITERIA

METHODS = methods()
KINDS = sorted(set(CRITERIA) - {"random"})
REPAIRS = ["none", "norm", "bias", "coupling", "least_squares"]
FUSIONS: list[dict[str, Any]] = [
    {"kind": "coupling", "target": target, "marginals": marginals, "scale": "none"}
    for target in ("topk", "kmeans", "barycenter")
    for marginals in ("uniform", "importance", "unbalanced", "semi_relaxed")
]


def net(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 3, 3, padding=1),
    ).eval()


def data(samples: int = 24) -> list[Tensor]:
    return [torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(1))]


def prune(model: nn.Module, criterion: Any, repair: Any, **said: Any) -> otp.Report:
    rule = otp.Channels(targets=("0",), criterion=criterion, repair=repair, **said)
    return otp.prune_(model, otp.Policy(rules=[rule]), data(), timing=0)


@torch.no_grad()
def silence_(model: nn.Sequential, *units: int) -> None:
    """Let some channels be zero whatever comes in."""
    for unit in units:
        model[0].weight[unit], model[0].bias[unit] = 0.0, 0.0
        model[1].weight[unit], model[1].bias[unit] = 0.0, 0.0


@torch.no_grad()
def freeze_(model: nn.Sequential, *units: int) -> None:
    """Let some channels be the same positive number whatever comes in."""
    for unit in units:
        model[1].weight[unit], model[1].bias[unit] = 0.0, 2.0


def works(model: nn.Module) -> bool:
    with torch.no_grad():
        out = model(data()[0])
    return bool(out.isfinite().all()) and float(out.std(0).max()) > 1e-4


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_dead_and_constant_channels_break_no_method(name: str, repair: str) -> None:
    model = net(8)
    silence_(model, 1, 6)
    freeze_(model, 3)
    prune(model, METHODS[name].criterion, repair, keep=4)
    assert works(model)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random", "fpgm", "bn_scale"}))
def test_dead_channels_go_before_live_ones(name: str) -> None:
    model = net(8)
    silence_(model, 1, 6)
    report = prune(model, METHODS[name].criterion, "none", keep=6)
    assert report.plan.cuts[0].keep == (0, 2, 3, 4, 5, 7)


def test_the_methods_try_every_registered_criterion() -> None:
    tried = {METHODS[name].criterion["kind"] for name in METHODS}
    assert tried | {"dtp"} == set(CRITERIA)  # masks have tests of their own


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_in_which_nothing_tells_units_apart_is_named(kind: str) -> None:
    model = net(8)
    silence_(model, *range(8))
    plan = prune(model, kind, "none", keep=4).plan
    said = ("order says nothing", "dead channels go first", "their kernel is zero", "no training")
    assert any("group '0'" in note and any(s in note for s in said) for note in plan.notes)


@pytest.mark.parametrize("kind", [k for k in KINDS if CRITERIA.resolve(k).needs])
def test_a_single_sample_is_enough_to_plan_and_named(kind: str) -> None:
    model = net(8)
    rule = otp.Channels(targets=("0",), criterion=kind, repair="none", keep=4)
    report = otp.prune_(model, otp.Policy(rules=[rule]), data(1), timing=0)
    assert any("only 1 calibration samples were seen" in note for note in report.plan.notes)
    assert works(model) or float(model(data()[0]).abs().max()) > 0


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_groups_of_two_and_three_channels_are_cut(name: str, width: int, repair: str) -> None:
    model = net(width)
    report = prune(model, METHODS[name].criterion, repair, keep="50%")
    assert len(report.plan.cuts[0].keep) == width // 2 and works(model)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: f"{f['target']}-{f['marginals']}")
def test_every_fusion_survives_zero_rows_and_tiny_groups(fusion: dict[str, Any]) -> None:
    for width, silent in ((8, (1, 6)), (3, (0,)), (2, ())):
        model = net(width)
        silence_(model, *silent)
        prune(model, "transport", fusion, keep="50%")
        assert works(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_that_are_not_finite_are_refused_by_every_method(name: str, bad: float) -> None:
    model = net(6)
    with torch.no_grad():
        model[0].weight[2, 1] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OTPruneError) as error:
        prune(model, METHODS[name].criterion, "none", keep=3)
    assert error.value.problem and error.value.where and error.value.fix
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


def test_a_score_that_is_no_number_names_the_unit_and_the_group() -> None:
    class Lost(CRITERIA["magnitude"]):  # type: ignore[misc]
        def score(self, evidence: Any) -> Tensor:
            found = evidence.producers.norm(dim=1)
            found[4] = math.nan
            return found

    rule = otp.Channels(targets=("0",), keep=3, criterion="magnitude", repair="none")
    lost = rule.model_copy(update={"criterion": Lost()})
    model = net(6)
    with pytest.raises(CalibrationError) as error:
        otp.prune_(model, otp.Policy(rules=[rule]).model_copy(update={"rules": (lost,)}), data())
    assert error.value.problem == "unit 4 scored nan." and error.value.where == "group '0'"
    assert error.value.fix == "look for NaN or infinity in the weights or the calibration data."


# single weights


def mlp(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4)).double().eval()


def rows(samples: int) -> Tensor:
    return torch.randn(samples, 8, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def odd(kind: str) -> tuple[nn.Sequential, Tensor]:
    """Make a network and data that something is wrong with."""
    model, x = mlp(int(kind) if kind in "23" else 6), rows(3 if kind == "few rows" else 32)
    if kind == "dead input":
        x[:, 2] = 0
    elif kind == "constant input":
        x[:, 2] = 3
    elif kind == "zero rows":
        model[0].weight[1], model[2].weight[3] = 0, 0
    elif kind == "dead units":
        model[0].weight[:3], model[0].bias[:3] = 0, -1
    elif kind == "all alike":
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model, x


ODD = ["dead input", "constant input", "zero rows", "dead units", "all alike", "few rows", "2", "3"]
SETTINGS = [{"kind": kind} for kind in sorted(WEIGHT_CRITERIA)]


def thin(model: nn.Module, criterion: Any, x: Tensor, keep: float | None = 0.5) -> otp.Report:
    rule = otp.Weights(criterion=criterion, keep=keep)
    return otp.prune_(model, otp.Policy(rules=[rule]), [x], timing=0)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("criterion", SETTINGS, ids=lambda c: c["kind"])
def test_odd_layers_lose_their_weights_and_the_report_says_what_is_odd(
    criterion: dict[str, Any], kind: str
) -> None:
    model, x = odd(kind)
    looks = criterion["kind"] not in ("magnitude", "dtp")
    fits = criterion["kind"] in ("alps", "sparsegpt", "net_trim")
    report = thin(model, criterion, x)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert all(entry.left <= entry.weights // 2 for entry in report.zeros)
    said = [entry.note for entry in report.zeros]
    if looks and kind == "dead input":
        assert "1 of 8 inputs never vary" in said[0]
    if fits and kind == "constant input":
        assert "1 of 8 inputs never vary" in said[0]
    if looks and kind == "dead units":
        assert "3 of 6 inputs never vary" in said[1]
    if fits and kind == "few rows":
        assert all("only 3 rows for" in note for note in said)


@pytest.mark.parametrize("criterion", SETTINGS, ids=lambda c: c["kind"])
def test_data_that_never_vary_are_refused_where_they_would_decide(
    criterion: dict[str, Any],
) -> None:
    model, x = mlp(), rows(1).expand(8, -1).clone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if criterion["kind"] not in ("alps", "sparsegpt", "net_trim"):
        thin(model, criterion, x)  # looks at sizes, not at what varies
        return
    with pytest.raises(CalibrationError, match="no input of '0' varies on the calibration data"):
        thin(model, criterion, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_zeros_in_front_have_silenced_is_told_from_one_without_data() -> None:
    model, x = mlp(2), rows(32)
    with pytest.raises(CalibrationError) as error:
        thin(model, {"kind": "net_trim", "radius": 0.3}, x, keep=None)
    assert "no input of '4' varies any more behind the zeros" in error.value.problem
    assert "let more weights stay in the layers in front" in error.value.fix


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weights", "data"])
@pytest.mark.parametrize("criterion", SETTINGS, ids=lambda c: c["kind"])
def test_numbers_that_are_none_are_refused_by_every_weight_criterion(
    criterion: dict[str, Any], where: str, bad: float
) -> None:
    model, x = mlp(), rows(32)
    with torch.no_grad():
        (model[2].weight if where == "weights" else x)[1, 1] = bad
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OTPruneError) as error:
        thin(model, criterion, x)
    assert error.value.problem and error.value.where and error.value.fix
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)
