"""Learning from the dense network: nothing before a pruning, the teacher's answers after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_rebind import data, net, take
from torch_otprune.errors import CalibrationError, OTPruneError
from torch_otprune.training import Distill

POLICY = otp.Policy(
    rules=otp.Channels(criterion="magnitude", repair="none"),
    budget=otp.Budget(params=0.35),
    calibration=otp.Calibration(samples=64, probe=16),
    schedule=otp.Schedule(at=3),
)


class Says(nn.Module):
    """Returns what it is told to return."""

    def __init__(self, wrap: Any = lambda x: x) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(6, 4, dtype=torch.float64), wrap

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.wrap(self.layer(x))


def pair(wrap: Any = lambda x: x) -> tuple[Says, Says]:
    torch.manual_seed(0)
    return Says(wrap).train(), Says(wrap)


def test_it_is_exactly_zero_until_something_was_pruned() -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, POLICY) as attached:
        for step in range(1, 5):
            loss = F.cross_entropy(model(data()[0]), data()[1])
            pull = attached.distill()
            assert (float(pull.detach()) == 0.0) == (step <= 3)
            (loss + pull).backward()
            optimizer.step()
            attached.step(optimizer)


def test_a_model_that_says_the_same_is_not_pulled() -> None:
    model, teacher = pair()
    teacher.load_state_dict(model.state_dict())
    with Distill(model, teacher) as distill:
        model(data()[0])
        for match in ("auto", "values"):
            assert float(distill(match=match).detach()) == 0.0  # type: ignore[arg-type]


def test_logits_are_compared_as_softened_answers() -> None:
    model, teacher = pair()
    x = data()[0]
    with Distill(model, teacher) as distill:
        out = model(x)
        got = distill(0.5, temperature=4.0)
    wanted = F.kl_div(
        F.log_softmax(out / 4, 1), F.softmax(teacher(x) / 4, 1), reduction="batchmean"
    )
    torch.testing.assert_close(got.double(), 0.5 * 16 * wanted, rtol=1e-5, atol=1e-7)
    got.backward()
    assert model.layer.weight.grad is not None and teacher.layer.weight.grad is None


@pytest.mark.parametrize("wrap", [lambda x: (x, x), lambda x: {"a": x, "b": x, "n": 1}])
def test_other_outputs_are_compared_by_their_relative_squared_distance(wrap: Any) -> None:
    model, teacher = pair(wrap)
    x = data()[0]
    with Distill(model, teacher) as distill:
        model(x)
        got = distill()
    a, b = model.layer(x), teacher.layer(x)
    wanted = (a - b).square().sum() / b.square().sum()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


def test_padding_does_not_count() -> None:
    model, teacher = pair(lambda x: {"logits": x})
    x = data()[0].view(8, 8, 6)
    mask = torch.ones(8, 8)
    mask[:, 5:] = 0
    with Distill(model, teacher) as distill:
        model(x, attention_mask=mask)
        got = distill()
        model(x[:, :5])
        torch.testing.assert_close(got, distill())


def test_what_the_model_writes_on_its_input_does_not_reach_the_teacher() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)).double().train()
    teacher = copy.deepcopy(model)[1:]  # reads the input as it came
    x = data()[0]
    with Distill(model, nn.Sequential(*teacher)) as distill:
        model(x.clone())
        got = distill(match="values")
    a, b = model(x.clone()), teacher(x)
    torch.testing.assert_close(got.double(), (a - b).square().sum() / b.square().sum())


def agreement(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == dense(x).argmax(1)).double().mean())


def test_it_brings_the_pruned_network_back_to_the_dense_one_without_labels() -> None:
    found = {}
    x, _ = data(256)
    fresh = torch.randn(512, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for taught in (False, True):
        model = net().train()
        first = torch.optim.AdamW(model.parameters(), lr=0.01)
        take(model, first, 100)
        dense = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 if taught else 0.0)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        with otp.attach(model, POLICY, data=[x]) as attached:
            for _ in range(200):
                model(x)
                loss = attached.distill()
                optimizer.zero_grad()
                if loss.requires_grad:
                    loss.backward()
                optimizer.step()
                attached.step(optimizer)
        found[taught] = agreement(model, dense, fresh)
    assert found[True] > 0.75 and found[False] < 0.5


def test_who_did_not_ask_before_the_first_round_is_told() -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, POLICY, data=[data()[0]]) as attached:
        for _ in range(3):
            take(model, optimizer)
            attached.step(optimizer)
        with pytest.raises(CalibrationError) as error:
            attached.distill()
    assert error.value.problem.startswith("no dense network was kept")


def test_without_a_pass_there_is_nothing_to_compare() -> None:
    model, teacher = pair()
    with Distill(model, teacher) as distill:
        model.eval()(data()[0])
        with pytest.raises(CalibrationError) as error:
            distill()
    assert error.value.problem.startswith("there is nothing to compare")


def test_outputs_without_a_common_shape_are_refused() -> None:
    model, teacher = pair(lambda x: (x,))
    teacher.wrap = lambda x: (x[:2],)
    with Distill(model, teacher) as distill:
        model(data()[0])
        with pytest.raises(CalibrationError) as error:
            distill()
    assert error.value.problem.startswith("the outputs have no floating tensor")


def test_a_copy_of_the_model_has_no_teacher_and_leaving_leaves_no_hook() -> None:
    model, teacher = pair()
    with Distill(model, teacher):
        twin = copy.deepcopy(model)
        assert all(hook.distill is None for hook in twin._forward_hooks.values())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_teacher_survives_a_checkpoint() -> None:
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, POLICY, data=[data()[0]]) as attached:
        for _ in range(4):
            model(data()[0])
            attached.distill()
            take(model, optimizer)
            attached.step(optimizer)
        state, weights = attached.state_dict(), copy.deepcopy(model.state_dict())
        model(data()[0])
        wanted = attached.distill()
    again = net().train()
    with otp.attach(again, POLICY, data=[data()[0]]) as attached:
        attached.load_state_dict(state)
        again.load_state_dict(weights)
        again(data()[0])
        torch.testing.assert_close(attached.distill(), wanted)


def test_a_round_that_is_taken_back_takes_its_teacher_along() -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stranger = torch.optim.SGD(net().parameters(), lr=0.01)
    once = POLICY.model_copy(update={"schedule": otp.Schedule(at=1)})
    with otp.attach(model, once, data=[data()[0]]) as attached:
        attached.distill()
        with pytest.raises(OTPruneError, match="trains no parameter"):
            attached.step(stranger)
        take(model, optimizer)
        assert attached.distill() == 0
        dense = copy.deepcopy(model.state_dict())  # it has learnt on since the first attempt
        assert attached.step(optimizer) is not None
        taught = attached.state_dict()["teacher"]
        assert all(torch.equal(taught[name], value) for name, value in dense.items())
    assert not model._forward_hooks
