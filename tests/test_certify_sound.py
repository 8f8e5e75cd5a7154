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
from torch_otprune.nn import FICNN, ICLRNN, ICLSTM, ICRNN, PICNN

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
    with pytest.raises(StructureError, match="the example is empty, has no values, or holds"):
        otp.certify(nn.Linear(3, 2), example)


@pytest.mark.parametrize(
    ("name", "size"),
    [("pairs", -1), ("pairs", "many"), ("pairs", 1.5), ("steps", True), ("steps", None)],
)
def test_what_is_no_number_of_pairs_or_steps_is_an_error(name: str, size: Any) -> None:
    with pytest.raises(StructureError, match=f"{size!r} is no number of {name}"):
        otp.certify(nn.Linear(3, 2), ROW, **{name: size})


@pytest.mark.parametrize("seed", ["x", 1 << 70])
def test_what_is_no_seed_is_an_error(seed: Any) -> None:
    with pytest.raises(StructureError, match=f"{seed!r} is no seed"):
        otp.certify(nn.Tanh(), ROW, seed=seed)


@pytest.mark.parametrize("model", [None, "net", torch.relu, nn.Linear])
def test_what_is_no_module_is_an_error(model: Any) -> None:
    with pytest.raises(StructureError) as caught:
        otp.certify(model, ROW)
    assert caught.value.problem.startswith("the model is of type")
    assert caught.value.fix == "pass a torch.nn.Module."


@pytest.mark.parametrize("example", [torch.zeros(1, 5), torch.tensor(1.0), ROW.double()])
def test_an_example_that_does_not_fit_is_an_error(example: Tensor) -> None:
    with pytest.raises(StructureError) as caught:
        otp.certify(nn.Linear(3, 2), example)
    assert caught.value.problem.startswith("the model does not run on the example: ")
    assert caught.value.where == f"Linear, given {tuple(example.shape)}"


def test_weights_without_values_are_an_error() -> None:
    with pytest.raises(StructureError, match="'weight' is on the meta device"):
        otp.certify(nn.Linear(3, 2, device="meta"), ROW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_followed_in_full(dtype: torch.dtype) -> None:
    net, x = FICNN(3, (4,)).to(dtype), ROW.to(dtype)
    found = otp.certify(net, x, pairs=20, steps=1)
    assert found.convex.how == "structural" and found.bound is not None
    with torch.no_grad():
        net.z[0].weight[0, 0] = -1.0
    assert otp.certify(net, x, pairs=200, steps=1).convex.how == "refused"


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda m, x: m.dense(x.float()).tanh(), "must have the same dtype"),
        (lambda m, x: 1 / (x.tanh() if float(x[0, 0]) == float(ROW[0, 0]) else None), "NoneType"),
    ],
)
def test_a_net_that_runs_on_the_example_only_is_left_open(
    run: Callable[..., Any], why: str
) -> None:
    net = Net(run)
    net.dense = nn.Linear(3, 3)
    found = otp.certify(net, ROW, pairs=20, steps=1).convex
    assert found.how == "empirical" and why in found.text
    assert found.text.startswith("not proved, and not tried: the model does not run on inputs near")


def test_a_training_net_is_read_as_it_is_served() -> None:
    net = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 1)
    )
    with torch.no_grad():
        net[4].weight.abs_()
    assert otp.certify(net, ROW, pairs=20, steps=1).convex.how == "structural" and net.training


def test_a_layer_used_three_times_is_followed_each_time() -> None:
    one = nn.Linear(3, 3)
    net = nn.Sequential(one, nn.ReLU(), one, nn.ReLU(), one)
    with torch.no_grad():
        one.weight.abs_()
        assert study(net, ROW).holds("convex")
        one.weight[0, 0] = -1.0  # the first reads the input and may be; the others may not
        assert not study(net, ROW).holds("convex")


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
        (lambda: FICNN(3, "ab"), "FICNN.hidden"),  # type: ignore[arg-type]
        (lambda: FICNN(3, (4.5,)), "FICNN.hidden"),  # type: ignore[list-item,arg-type]
        (lambda: FICNN(3.5, (4,)), "FICNN.inputs"),  # type: ignore[arg-type]
        (lambda: ICRNN("3"), "ICRNN.inputs"),  # type: ignore[arg-type]
        (lambda: ICLRNN(3, layers=1.5), "ICLRNN.layers"),  # type: ignore[arg-type]
        (lambda: ICRNN(3, doubled="no"), "ICRNN.doubled"),  # type: ignore[arg-type]
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
