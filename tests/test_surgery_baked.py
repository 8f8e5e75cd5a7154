"""Weights that are computed: what a cut keeps of that, and what it says it cannot keep."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torch_otprune as otp
from torch_otprune.surgery import baked


def model() -> nn.Module:
    """One layer under a spectral norm, one under a weight-norm."""
    torch.manual_seed(0)
    first = parametrizations.spectral_norm(nn.Linear(5, 8))
    second = parametrizations.weight_norm(nn.Linear(8, 6))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(6, 2))


def planned(net: nn.Module) -> otp.Plan:
    """Plan to cut both."""
    with otp.attach(net, otp.Policy(rules=otp.Channels(keep=0.5))) as attached:
        return otp.observe(attached, [torch.randn(64, 5)]).plan()


SAID = (
    "SpectralNorm of '0.weight' cannot be kept: the weight is baked in as it is, and trains on "
    "without it"
)


def test_the_plan_says_which_weights_are_baked_in() -> None:
    plan = planned(model())
    assert [note for note in plan.notes if "baked in" in note] == [SAID]
    assert list(baked(model(), plan.cuts)) == [SAID] and f"note: {SAID}" in str(plan)


def test_a_model_without_computed_weights_hears_nothing_of_it() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = planned(net)
    assert not [note for note in plan.notes if "baked in" in note]


def test_what_was_baked_in_once_is_not_told_twice() -> None:
    net = model()
    otp.apply_(net, planned(net), [torch.randn(64, 5)], timing=0)
    assert parametrize.is_parametrized(net[2], "weight")
    assert not [note for note in planned(net).notes if "baked in" in note]


def test_a_spectral_norm_that_trains_is_cut_without_a_warning() -> None:
    net = model().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otp.apply_(net, planned(net), [torch.randn(64, 5)], timing=0)
    assert net[0].weight.shape == (4, 5) and net[2].training
