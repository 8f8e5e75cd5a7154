"""Where the story could go wrong: odd modes, edited plans, second prunings, cached tensors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import OTPruneError, PlanError
from torch_otprune.plan import Plan
from torch_otprune.store import plan_of

HALF = otp.Policy(rules=otp.Channels(), budget=otp.Budget(macs="50%"))


def net() -> nn.Sequential:
    """Build a plain convolutional net."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def images(size: int = 8) -> list[Tensor]:
    """Draw two batches of images."""
    return [torch.randn(16, 3, size, size) for _ in range(2)]


def planned(model: nn.Module, policy: otp.Policy = HALF) -> Plan:
    """Plan on two batches."""
    with otp.attach(model, policy) as attached:
        otp.observe(attached, images())
        return attached.plan()


def test_a_model_pruned_under_inference_mode_can_still_be_trained_and_undone() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        report = otp.prune_(model, HALF, images(), timing=0)
    assert not any(p.is_inference() for p in model.parameters())
    model(images()[0]).sum().backward()
    report.undo_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_plan_with_an_edited_slice_is_refused_before_any_write() -> None:
    model = net()
    plan = planned(model)
    cut = plan.cuts[0]
    piece = cut.slices[0].model_copy(update={"keep": cut.slices[0].keep[:-1]})
    edited = cut.model_copy(update={"slices": (piece, *cut.slices[1:])})
    widths = [tuple(p.shape) for p in model.parameters()]
    with pytest.raises(PlanError, match="does not fit the model") as error:
        otp.apply_(model, plan.model_copy(update={"cuts": (edited, *plan.cuts[1:])}), images())
    assert cut.group in error.value.problem
    assert [tuple(p.shape) for p in model.parameters()] == widths


def test_a_plan_may_be_applied_on_inputs_of_another_size() -> None:
    model = net()
    report = otp.apply_(model, planned(model), images(12), timing=0)
    assert any("other inputs" in verdict for verdict in report.verdicts)


def test_repairs_run_in_the_order_of_each_rule() -> None:
    rules = (
        otp.Channels(targets="0", keep="50%", repair="norm"),
        otp.Channels(targets="3", keep="50%", repair=("least_squares", "norm")),
    )
    report = otp.prune_(net(), otp.Policy(rules=rules), images(), timing=0)
    kinds = list(dict.fromkeys(note.kind for note in report.repairs))
    assert kinds == ["norm", "least_squares"]
    assert report.repairs[-1].kind == "norm"


def test_undoing_the_second_pruning_brings_the_first_plan_back() -> None:
    model = net()
    first = otp.prune_(model, HALF, images(), timing=0)
    second = otp.prune_(model, HALF, images(), timing=0)
    assert plan_of(model) == second.plan
    second.undo_()
    assert plan_of(model) == first.plan


def test_a_pickled_report_has_lost_the_way_back_and_says_so() -> None:
    report = otp.prune_(net(), HALF, images(), timing=0)
    copy = pickle.loads(pickle.dumps(report))
    assert copy == report
    with pytest.raises(OTPruneError, match="undo"):
        copy.undo_()


def test_weights_laid_out_channels_last_stay_so() -> None:
    model = net().to(memory_format=torch.channels_last)
    otp.prune_(model, HALF, images(), timing=0)
    for module in (model[0], model[3]):
        assert module.weight.is_contiguous(memory_format=torch.channels_last)


class Caches(nn.Module):
    """Keep the last hidden signal, as probes and some attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.hidden = net(), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Run the net and remember."""
        self.hidden = self.net[:3](x)
        return self.net[3:](self.hidden)


def test_a_model_that_keeps_an_activation_can_be_pruned() -> None:
    model = Caches().eval()
    model(images()[0])
    report = otp.prune_(model, HALF, images(), timing=0)
    assert report.macs.ratio <= 0.5


def test_a_group_that_multiple_of_leaves_whole_is_named() -> None:
    rules = (
        otp.Channels(targets="0", keep="50%", multiple_of=16),
        otp.Channels(targets="3", keep="50%"),
    )
    plan = planned(net(), otp.Policy(rules=rules))
    assert any("group '0' stays whole" in note for note in plan.notes)


def test_latency_is_left_out_where_no_time_is_given_for_it() -> None:
    assert otp.prune_(net(), HALF, images(), timing=0).latency is None


class ByKeyword(nn.Module):
    """Call every layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run both layers."""
        return self.second(input=self.first(input=x).relu())


def test_layers_that_are_called_by_keyword_are_pruned_like_others() -> None:
    model = ByKeyword().eval()
    report = otp.prune_(model, HALF, [torch.randn(32, 6)], timing=0)
    assert model.second.in_features < 8
    assert report.macs.ratio <= 0.5


@pytest.mark.parametrize("criterion", ["transport", "obs", "magnitude"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs_are_no_reason_to_crash(criterion: str, value: float) -> None:
    policy = otp.Policy(rules=otp.Channels(criterion=criterion), budget=otp.Budget(macs="50%"))
    report = otp.prune_(net(), policy, [torch.full((64, 3, 8, 8), value)], timing=0)
    assert report.output_error.after_repair < 1e-5


def test_a_policy_is_no_plan() -> None:
    with pytest.raises(PlanError, match="a Policy is no plan"):
        otp.apply_(net(), HALF, images())  # type: ignore[arg-type]


def test_prunings_are_undone_in_reverse_order_only() -> None:
    model = net()
    first = otp.prune_(model, HALF, images(), timing=0)
    second = otp.prune_(model, HALF, images(), timing=0)
    with pytest.raises(PlanError, match="pruned again since"):
        first.undo_()
    second.undo_()
    first.undo_()
    assert model[0].out_channels == 8


class Random(nn.Module):
    """Add noise in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        """Run the net and add noise."""
        return self.net(x) + torch.randn(4)


def test_a_model_whose_output_is_random_is_refused_as_such() -> None:
    with pytest.raises(OTPruneError, match="output is random"):
        otp.prune_(Random().eval(), HALF, images(), timing=0)


class TakesMapping(nn.Module):
    """Take the whole batch as one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Read one entry."""
        return self.second(self.first(batch["x"]).relu())


def test_a_model_that_takes_a_mapping_gets_it_whole() -> None:
    report = otp.prune_(TakesMapping().eval(), HALF, [{"x": torch.randn(40, 6)}], timing=0)
    assert report.macs.ratio <= 0.5


def test_a_repair_that_moves_the_output_away_is_taken_back_whole() -> None:
    rule = otp.Channels(keep="50%", repair=["least_squares", "bias", "norm"])
    data = images()
    alone = otp.Channels(keep="50%", repair="least_squares")
    torch.manual_seed(1)
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    both = otp.prune_(model, otp.Policy(rules=rule), data, timing=0)
    one = otp.prune_(twin, otp.Policy(rules=alone), data, timing=0)
    assert both.output_error.after_repair <= one.output_error.after_repair + 1e-6


def test_few_samples_are_named_in_the_plan() -> None:
    with otp.attach(net(), HALF) as attached:
        otp.observe(attached, [torch.randn(8, 3, 8, 8)])
        assert any("only 8 calibration samples" in note for note in attached.plan().notes)
