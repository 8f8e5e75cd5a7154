"""Several policies, one table: is the best the best, on data that none of them saw?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp

FIT = torch.randn(96, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
HELD = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).double()


def policy(criterion: str = "transport", *, keep: float = 0.5, repair: str = "none") -> otp.Policy:
    rule = otp.Channels(criterion=criterion, repair=repair, keep=keep)
    return otp.Policy(rules=rule, calibration=otp.Calibration(samples=96))


def test_errors_are_those_of_the_networks_that_prune_makes() -> None:
    model = net()
    policies = {"a": policy("random"), "b": policy(repair="least_squares")}
    found = otp.compare(model, policies, [FIT], held=[HELD])
    with torch.no_grad():
        dense = model(HELD)
        for one in found.standings:
            small = copy.deepcopy(model)
            otp.prune_(small, policies[one.name], [FIT], timing=0)
            expected = (small(HELD) - dense).norm() / dense.norm()
            assert one.output_error == pytest.approx(float(expected), rel=1e-12)
            assert one.macs.after == 8 * 6 + 8 * 5
    assert found.best == "b"
    assert found.samples == 50
    assert found.standings[0].behind == 0


def test_behind_counts_standard_errors_of_the_paired_difference() -> None:
    model, policies = net(), {"a": policy("random"), "b": policy(repair="least_squares")}
    errors = {}
    with torch.no_grad():
        for name, one in policies.items():
            small = copy.deepcopy(model)
            otp.prune_(small, one, [FIT], timing=0)
            errors[name] = (small(HELD) - model(HELD)).square().sum(1)
    gap = errors["a"] - errors["b"]
    expected = float(gap.mean() / (gap.std(correction=0) / len(gap) ** 0.5))
    found = otp.compare(model, policies, [FIT], held=HELD.split(7))
    assert found.standings[1].behind == pytest.approx(expected, rel=1e-9)


def test_equal_policies_are_level_and_a_useless_one_is_not() -> None:
    policies = {"a": policy(repair="least_squares"), "b": policy(repair="least_squares")}
    policies["c"] = policy(keep=0.1)
    found = otp.compare(net(), policies, [FIT], held=[HELD])
    level = {one.name: one.level for one in found.standings}
    assert level == {"a": True, "b": True, "c": False}
    assert "level" in str(found)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    policies = {str(k): policy(keep=k, repair="least_squares") for k in (0.25, 0.5, 0.75)}
    policies["poor"] = policy("random", keep=0.75)
    found = otp.compare(net(), policies, [FIT], held=[HELD])
    assert found.front == ("0.75", "0.5", "0.25")


def test_the_model_stays_as_it_was() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    otp.compare(model, {"a": policy()}, [FIT], held=[HELD])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_fails_is_listed_with_its_reason() -> None:
    policies = {
        "good": policy(),
        "bad": otp.Policy(rules=otp.Channels(targets=("nowhere",), keep=0.5)),
    }
    found = otp.compare(net(), policies, [FIT], held=[HELD])
    assert [one.name for one in found.standings] == ["good"]
    assert "nowhere" in found.failed["bad"]
    assert "bad failed" in str(found)


def test_where_all_fail_the_first_error_is_raised() -> None:
    bad = otp.Policy(rules=otp.Channels(targets=("nowhere",), keep=0.5))
    with pytest.raises(otp.OTPruneError, match="nowhere"):
        otp.compare(net(), {"bad": bad}, [FIT], held=[HELD])


@pytest.mark.parametrize(
    ("policies", "held", "said"),
    [
        ({}, [HELD], "nothing to compare"),
        ({"a": policy()}, [], "held"),
        ({"a": "transport"}, [HELD], "a Policy each"),
        ([policy()], [HELD], "names"),
    ],
)
def test_bad_input_is_one_clear_error(policies: object, held: list[Tensor], said: str) -> None:
    with pytest.raises(otp.OTPruneError, match=said):
        otp.compare(net(), policies, [FIT], held=held)  # type: ignore[arg-type]


def test_a_comparison_survives_json() -> None:
    found = otp.compare(net(), {"a": policy(), "b": policy("random")}, [FIT], held=[HELD])
    assert otp.Comparison.model_validate_json(found.model_dump_json()) == found


def test_outputs_without_samples_first_are_judged_batch_by_batch() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).t()

    found = otp.compare(Summed(), {"a": policy(), "b": policy("random")}, [FIT], held=[HELD])
    assert len(found.standings) == 2
