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
from torch_otprune.policy.registry import CRITERIA

METHODS = methods()
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
