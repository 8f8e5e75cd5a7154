"""Nothing is certified that a number refutes: calls that look harmless and are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_otprune as otp
from torch_otprune.certify.study import study
from torch_otprune.errors import StructureError
from torch_otprune.nn import FICNN, ICLSTM, ICRNN, PICNN

ROW = torch.tensor([[0.3, -0.7, 1.1]])


class Net(nn.Module):
    def __init__(self, run: Callable[..., Any], **held: Tensor) -> None:
        super().__init__()
        self.run = run
        for name, value in held.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def _stale(m: Any, x: Tensor) -> Tensor:
    h = x * 1.0
    view = h.view(-1)
    F.relu(h, inplace=True)
    return -view


def _listed(m: Any, x: Tensor) -> Tensor:
    h = F.relu(x)
    torch._foreach_mul_([h], -1.0)
    return h


def _other_order(m: Any, x: Tensor) -> Tensor:
    return torch.batch_norm(F.relu(x), -m.one, m.zero, m.zero, m.one, False, 0.1, 1e-5, False)


ONE, ZERO = torch.ones(3), torch.zeros(3)

NOT_CONVEX: dict[str, Net] = {
    "a negative integer": Net(lambda m, x: (F.relu(x) + m.w) ** 2, w=torch.tensor([-5, -5, -5])),
    "an infinite weight": Net(lambda m, x: x * m.w, w=torch.full((3,), float("inf"))),
    "weights without a value": Net(lambda m, x: x * (m.w / m.w), w=ZERO),
    "a falling softplus": Net(lambda m, x: F.softplus(x, beta=-1)),
    "a softplus that jumps": Net(lambda m, x: F.softplus(x, 1, 0)),
    "a celu of negative alpha": Net(lambda m, x: F.celu(x, -0.5)),
    "a clamp that is constant and negative": Net(lambda m, x: (x.clamp(0, -1) + F.relu(x)) ** 2),
    "a filled tensor": Net(lambda m, x: torch.full_like(x, -F.relu(x).sum())),
    "a draw around the input": Net(lambda m, x: torch.normal(-F.relu(x), 0.1)),
    "a draw with the input's odds": Net(lambda m, x: torch.bernoulli(torch.sigmoid(x))),
    "a random sign": Net(lambda m, x: F.relu(x) * torch.zeros(3).normal_()),
    "a random weight": Net(lambda m, x: F.relu(x) * F.dropout(m.w, 0.5, True), w=-ONE),
    "a view of what is rectified": Net(_stale),
    "a list that is written": Net(_listed),
    "arguments in another order": Net(_other_order, one=ONE, zero=ZERO),
    "a gain of the input": Net(
        lambda m, x: F.batch_norm(x, m.zero, m.one, weight=-F.relu(x[0])), one=ONE, zero=ZERO
    ),
    "a negative divisor": Net(
        lambda m, x: F.avg_pool2d(F.relu(x).expand(1, 3, 3), 3, divisor_override=-1)
    ),
    "a logarithm of what may be negative": Net(lambda m, x: -torch.log(x)),
    "the same bits as other numbers": Net(lambda m, x: x.double().view(torch.float32)),
}


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_what_only_looks_convex_is_not_proved(name: str) -> None:
    found = study(NOT_CONVEX[name], ROW)
    assert not found.holds("convex")


def test_the_value_of_another_input_is_not_taken_for_a_setting() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x**y

    assert not study(Power(), (ROW, torch.tensor([[2.0]]))).holds("convex")


def test_a_slope_without_bound_stays_so_behind_tiny_weights() -> None:
    assert study(Net(lambda m, x: torch.exp(x.double() * 1e-75)), ROW).bound is None


def test_sound_settings_are_still_proved() -> None:
    nets = (
        Net(lambda m, x: F.softplus(x, 2.0) + F.celu(x, 0.5)),
        Net(lambda m, x: (F.relu(x) + m.w) ** 2, w=torch.tensor([5, 5, 5])),
        Net(lambda m, x: torch.full_like(x, 3.0) + torch.sqrt(m.w) * F.relu(x, True), w=ONE),
    )
    assert all(study(net, ROW).holds("convex") for net in nets)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_no_numbers_are_an_error(name: str) -> None:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        getattr(net, name).view(-1)[0] = float("nan")
    with pytest.raises(StructureError) as caught:
        otp.certify(net, ROW)
    assert caught.value.problem == f"'{name}' has 1 entries that are not a number."


@pytest.mark.parametrize("out", [lambda m, x: x.argmax(-1), lambda m, x: "text"])
def test_without_an_output_nothing_is_certified(out: Callable[..., Any]) -> None:
    with pytest.raises(StructureError, match="without floating-point numbers"):
        otp.certify(Net(out), ROW)


@pytest.mark.parametrize("example", [ROW[:0], ROW * float("nan")])
def test_an_example_without_numbers_is_an_error(example: Tensor) -> None:
    with pytest.raises(StructureError, match="the example is empty, or holds"):
        otp.certify(nn.Linear(3, 2), example)


def test_a_negative_number_of_pairs_is_an_error() -> None:
    with pytest.raises(StructureError, match="-1 pairs and 5 steps cannot be tried"):
        otp.certify(nn.Linear(3, 2), ROW, pairs=-1, steps=5)


def test_one_number_for_a_whole_batch_is_followed() -> None:
    found = otp.certify(Net(lambda m, x: F.relu(x).sum()), ROW, pairs=50, steps=1)
    assert found.convex.how == "structural"
    assert found.bound == pytest.approx(3**0.5)
    open_case = otp.certify(Net(lambda m, x: torch.sin(x).sum()), ROW, pairs=50, steps=1)
    assert open_case.convex.how == "refused"


def test_samples_that_mix_do_not_refute_one_another() -> None:
    # alone, a sample is its own mean, and the net is constant
    net = Net(lambda m, x: torch.sin(x - x.mean(0)))
    assert otp.certify(net, ROW, pairs=50, steps=1).convex.how == "empirical"


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: FICNN(-1, (3,)), "FICNN.inputs"),
        (lambda: FICNN(3, (3,), 0), "FICNN.outputs"),
        (lambda: FICNN(3, 8), "FICNN.hidden"),  # type: ignore[arg-type]
        (lambda: PICNN(3, 0), "PICNN.context"),
        (lambda: ICRNN(3, 0), "ICRNN.hidden"),
        (lambda: ICLSTM(3, 4, layers=0), "ICLSTM.layers"),
    ],
)
def test_a_net_without_units_is_an_error(build: Callable[[], nn.Module], where: str) -> None:
    with pytest.raises(StructureError) as caught:
        build()
    assert caught.value.where == where


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 5)])
def test_what_is_no_sequence_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(StructureError, match="is no batch of sequences with 3 inputs a step"):
        ICRNN(3, 4)(torch.zeros(shape))
