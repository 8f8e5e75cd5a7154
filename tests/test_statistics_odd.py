"""Statistics on odd ground: functions as data, shared inputs, NaN and who made it, keywords."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics import Recorder, blame, collect, sense
from torch_otprune.statistics.patches import pick
from torch_otprune.statistics.sensitivity import generators_of, own_signs
from torch_otprune.structure.forward import called

BLIND = otp.Policy(
    rules=otp.Channels(criterion="magnitude", repair="none"),
    budget=otp.Budget(macs=0.5, weighting="uniform"),
)
SEEING = otp.Policy(rules=otp.Channels(), budget=otp.Budget(macs=0.5))


def net() -> nn.Sequential:
    """Three layers with a batch-norm."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )


class Shared(nn.Module):
    """Two consumers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) + 2 * self.c(input=h)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Make every tensor without a device useless."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_function_runs_the_model_in_evaluation_mode_and_changes_nothing() -> None:
    model, x = net().train(), torch.randn(8, 4) + 3
    before, random = [v.clone() for v in model.state_dict().values()], torch.get_rng_state()
    collect(model, lambda m: [m(x + torch.randn(8, 4)) for _ in range(3)], 99)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


def test_a_function_may_fill_one_buffer_again_and_again() -> None:
    def feed(model: nn.Module) -> None:
        buffer = torch.empty(2, 4)
        for value in range(3):
            model(buffer.fill_(value))

    found = collect(net(), feed, 99)
    assert [float(call.args[0][0, 0]) for call in found] == [0, 1, 2]


def test_a_tensor_for_a_list_of_tensors_is_one_batch() -> None:
    x = torch.randn(9, 4)
    (batch,) = collect(net(), x, 8)
    assert torch.equal(batch, x[:8])
    with otp.attach(net(), BLIND) as attached:
        assert otp.observe(attached, x).samples == 9


def test_a_function_s_batches_are_kept_no_longer_than_needed() -> None:
    kept: list[Any] = []

    def feed(model: nn.Module) -> None:
        for _ in range(5):
            model(torch.zeros(2, 4))
        kept.extend(
            h
            for h in model._forward_pre_hooks.values()
            if len(h.calls) > 2  # type: ignore[attr-defined]
        )

    assert len(collect(net(), feed, 4)) == 2
    assert not kept


def test_consumers_of_one_tensor_have_gradients_of_their_own() -> None:
    model, x = Shared().double(), torch.randn(20, 4, dtype=torch.float64)
    felt = sense(model, {"b": None, "c": None}, [x], draws=1, seed=0)
    with torch.no_grad():
        h = torch.relu(model.a(x))
    signs = own_signs(model(x), generators_of(x, 0))
    for path, scale in (("b", 1), ("c", 2)):
        own = scale * signs @ model.get_submodule(path).weight.detach()
        torch.testing.assert_close(felt.inputs[path], (h * own).square().sum(0))


def test_what_signs_get_wrong_cancels_between_samples() -> None:
    model = Shared().double()
    x = torch.randn(400, 4, dtype=torch.float64)
    felt = sense(model, {"b": None, "c": None}, [x[:100], x[100:]], draws=4, seed=0)
    with torch.no_grad():
        h = torch.relu(model.a(x))
    for path, scale in (("b", 1), ("c", 2)):
        weight = scale * model.get_submodule(path).weight.detach()
        exact = (h[:, None, :] * weight).square().sum((0, 1))
        # four vectors for all samples alike would be some 40 % off, however many samples there are
        assert ((felt.inputs[path] / 4 - exact).abs() < 0.12 * exact.max()).all()
    again = sense(model, {"b": None, "c": None}, [x], draws=4, seed=0)
    torch.testing.assert_close(again.inputs["b"], felt.inputs["b"])


def test_an_activation_in_place_feels_the_same() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        parts = [nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)]
        model, x = nn.Sequential(*parts), torch.randn(8, 4)
        felt = sense(model, {"1": None, "3": None}, [x], draws=2, seed=0)
        found.append([value for table in felt.tables() for value in table.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_under_the_user_s_no_grad_are_left_out() -> None:
    class Inner(Shared):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = torch.relu(self.a(x))
            with torch.no_grad():
                off = self.c(h)
            return self.b(h + 1) + off

    felt = sense(Inner(), {"b": None, "c": None}, [torch.randn(8, 4)], draws=1, seed=0)
    assert felt.feel("c") is None


def test_a_layer_called_by_keyword_is_seen() -> None:
    model, x = Shared(), torch.randn(8, 4)
    recorder = Recorder(model, ("b", "c"), samples=8, rows_per_column=8, seed=0)
    model(x)
    torch.testing.assert_close(recorder.moments["b"].product, recorder.moments["c"].product)


def test_only_the_first_rows_of_a_window_count() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(10, 4, dtype=torch.float64)
    recorder = Recorder(layer, ("",), samples=4, rows_per_column=8, seed=0)
    recorder.look(10, 4)
    recorder.see("", layer, x)
    torch.testing.assert_close(recorder.moments[""].total, x[:4].sum(0))
    recorder.look(5, 2)  # two rows per sample: windows, patches
    recorder.see("", layer, x)
    torch.testing.assert_close(recorder.moments[""].total, 2 * x[:4].sum(0))


def test_large_finite_inputs_are_fine() -> None:
    layer = nn.Linear(4, 2)
    recorder = Recorder(layer, ("",), samples=4, rows_per_column=8, seed=0)
    recorder.see("", layer, torch.full((99, 4), 1e37))
    assert recorder.moments[""].count == 99


@pytest.mark.parametrize("policy", [BLIND, SEEING])
@pytest.mark.parametrize(
    ("name", "seen"), [("0.weight", "the input of '3'"), ("5.bias", "the model's output")]
)
def test_nan_in_a_weight_names_the_weight(policy: otp.Policy, name: str, seen: str) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with otp.attach(model, policy) as attached, pytest.raises(CalibrationError) as error:
        otp.observe(attached, [torch.randn(8, 4)])
    assert error.value.problem == f"'{name}' holds NaN or infinity."
    assert policy is BLIND or error.value.where.endswith(seen)


def test_nan_that_a_layer_makes_names_the_layer() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Linear(4, 6), Root(), nn.Linear(6, 3))
    with otp.attach(model, BLIND, example=torch.randn(2, 4)), pytest.raises(CalibrationError) as e:
        model(torch.randn(8, 4))
    assert e.value.problem == "the output of '1' holds NaN or infinity."


@pytest.mark.parametrize("policy", [BLIND, SEEING])
def test_nan_in_a_batch_is_refused_whatever_the_policy_needs(policy: otp.Policy) -> None:
    model = net()
    with otp.attach(model, policy):
        model(torch.zeros(8, 4))
        with pytest.raises(CalibrationError) as error:
            model(torch.full((8, 4), torch.nan))
    assert error.value.problem == "the input holds NaN."
    assert "batch 1" in error.value.where and "[0, 0]" in error.value.where


def test_infinity_in_a_batch_is_blamed_on_the_batch() -> None:
    model = net().eval()
    with otp.attach(model, BLIND), pytest.raises(CalibrationError) as error:
        model(torch.full((8, 4), torch.inf))
    assert "the input holds infinity" in error.value.where


def test_infinity_in_a_mask_is_fine() -> None:
    class Masked(Shared):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward((x + mask).softmax(1))

    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf]).expand(8, 4)
    model = Masked()
    with otp.attach(model, SEEING) as attached:
        otp.observe(attached, [(torch.randn(8, 4), mask)])
        assert attached.observation().samples == 8


def test_labels_that_forward_does_not_take_may_hold_nan() -> None:
    labels = torch.full((8,), float("nan"))
    assert len(collect(net(), [(torch.zeros(8, 4), labels)], 8)) == 1


def test_what_nobody_can_be_blamed_for_says_so() -> None:
    error = blame(net().eval(), torch.zeros(8, 4), "the model's output")
    assert error.problem == "the model's output holds NaN or infinity."
    assert "no single module" in error.where


def test_optional_arguments_are_not_fed_with_labels() -> None:
    class Optional(nn.Linear):
        def forward(self, input: Tensor, features: bool = False) -> Tensor:
            assert features is False
            return super().forward(input)

    batch = (torch.zeros(8, 4), torch.arange(8))
    assert len(called(Optional(4, 2), batch).args) == 1
    assert len(collect(Optional(4, 2), [batch], 8)) == 1


def test_batches_made_in_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        [batch] = collect(nn.Linear(4, 2), [torch.zeros(8, 4)], 4)
    assert not batch.is_inference() and len(batch) == 4


def test_positions_do_not_depend_on_the_default_device(meta_by_default: None) -> None:
    assert pick(9, 4, "a", 0).device.type == "cpu"


def test_a_default_device_does_not_move_the_statistics(meta_by_default: None) -> None:
    with torch.device("cpu"):
        model, x = net(), torch.randn(8, 4)
    with otp.attach(model, SEEING) as attached:
        found = otp.observe(attached, [x]).observation()
    assert found.sensitivity is not None and found.sensitivity.mean_power > 0


class Counting(nn.Module):
    """A forward that writes the size of its batch as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(4, -1))


def _in_one(model: nn.Module, policy: otp.Policy, batches: list[Tensor]) -> None:
    otp.prune_(model, policy, batches, timing=0)


def _in_two(model: nn.Module, policy: otp.Policy, batches: list[Tensor]) -> None:
    free = policy.model_copy(update={"rules": (otp.Channels(keep="50%", criterion="random"),)})
    with otp.attach(model, free) as attached:
        for batch in batches:
            model(batch)
        plan = attached.plan()
    otp.apply_(model, plan, batches, timing=0)


@pytest.mark.parametrize("prune_", [_in_one, _in_two])
def test_a_forward_that_counts_samples_by_a_number_is_told_where_and_what_to_write(
    prune_: Callable[[nn.Module, otp.Policy, list[Tensor]], None],
) -> None:
    policy = otp.Policy(rules=otp.Channels(keep="50%"))
    model, before = Counting(), [p.clone() for p in Counting().parameters()]
    with pytest.raises(otp.OTPruneError) as caught:
        prune_(model, policy, [torch.randn(4, 3, 4, 4) for _ in range(3)])
    assert caught.value.problem.startswith("the model runs on 4 samples, but not on 2 of them: ")
    assert "Counting at test_statistics_odd.py:" in caught.value.where
    assert caught.value.fix.startswith("write -1 or x.shape[0] where forward")
    assert [p.shape for p in model.parameters()] == [p.shape for p in before]
    assert not model._forward_hooks and not model._forward_pre_hooks
