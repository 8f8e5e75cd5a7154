"""What is proved is true, what is false is refuted, and the rest is said to be open."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import torch_otprune as otp
from tests.zoo.net import Net
from torch_otprune.certify import Certificate, certify
from torch_otprune.certify.study import study
from torch_otprune.errors import StructureError
from torch_otprune.nn import FICNN, ICLRNN, ICLSTM, ICRNN, PICNN, InputConvex

FEW: dict[str, Any] = {"pairs": 512, "steps": 5}


def spread(net: InputConvex, seed: int = 1) -> InputConvex:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.double().parameters():
            p.add_(torch.randn_like(p) * 0.3)
    net.project_()
    return net


def how(net: nn.Module, x: Any = None, **more: Any) -> tuple[str, str, str]:
    found = certify(net, x, **(FEW | more))
    return found.convex.how, found.monotone.how, found.lipschitz.how


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(lambda t: net(t).flatten(), x)
    return found.reshape(-1, x.numel())


# -- the nets that we bring ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_nets_of_one_step_and_sound_recurrent_ones_are_proved(seed: int) -> None:
    assert how(spread(FICNN(4, (7, 6), 2), seed))[0] == "structural"
    assert how(spread(ICRNN(3, 6, 2), seed))[0] == "structural"
    assert how(spread(ICLRNN(3, 6, 2), seed))[0] == "structural"
    assert how(spread(ICLSTM(3, 6, 2, gates="exp"), seed))[0] == "structural"


def test_a_partial_net_is_proved_in_its_first_argument_only() -> None:
    net = spread(PICNN(3, 4, (6, 5)))
    assert how(net) == ("structural", "refused", "refused")
    example = net.example()
    assert certify(net, example, wrt=1, **FEW).convex.how != "structural"


def test_without_the_negated_input_a_recurrent_net_is_monotone() -> None:
    assert how(spread(ICRNN(3, 6, 2, doubled=False))) == ("structural",) * 3
    found = certify(spread(ICRNN(3, 6, 2)), **FEW)
    assert found.monotone.how == "refused"
    assert "doubled=False" in found.monotone.reasons[0].text


def test_the_published_lstm_is_proved_over_one_step_and_not_over_two() -> None:
    net = spread(ICLSTM(3, 6, 2))
    assert how(net, net.example(1))[0] == "structural"
    assert how(net, net.example(2))[0] in {"empirical", "refused"}
    reason = certify(net, net.example(2), **FEW).convex.reasons[0]
    assert reason.module == "cells.0" and "are multiplied" in reason.text


def test_the_counterexample_with_free_inputs_is_refuted() -> None:
    net = ICLSTM(1, 1, 1, layers=1).double()
    cell = net.cells[0]
    with torch.no_grad():
        for name in ("bf", "bi", "bc"):
            getattr(cell, name).zero_()
        for name in ("df", "di", "dc"):
            getattr(cell, name).fill_(1.0)
        cell.do.zero_()
        cell.bo.fill_(1.0)
        cell.w.weight.zero_()
        cell.u.weight.copy_(torch.tensor([[1.0, 0.0]]))
        cell.v.weight.copy_(torch.tensor([[1.0], [0.0]]))
        cell.v.bias.zero_()
        net.out.weight.copy_(torch.tensor([[1.0, 1.0]]))  # the skip's x and -x cancel
        net.out.bias.zero_()

    def f(a: float, b: float) -> float:
        with torch.no_grad():
            return float(net(torch.tensor([[[a], [b]]], dtype=torch.float64))[0, 1, 0])

    assert (f(4, 0), f(0, 1), f(2, 0.5)) == (0.0, 1.0, 2.25)
    found = certify(net, net.example(2), **FEW)
    assert found.convex.how == "refused"
    worst = found.convex.violation
    assert worst is not None and worst.found > worst.allowed and worst.share > 0


def test_the_counterexample_with_one_repeated_input_is_refuted() -> None:
    net = ICLSTM(2, 2, 1, layers=1, doubled=False).double()
    cell = net.cells[0]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for name in ("di", "dc"):
            getattr(cell, name).fill_(1.0)
        cell.df.copy_(torch.tensor([50.0, 1.0]))
        cell.do.copy_(torch.tensor([0.0, 1.0]))
        cell.bo.copy_(torch.tensor([1.0, 0.0]))
        cell.u.weight.copy_(torch.eye(2))
        cell.w.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        cell.v.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        net.out.weight.copy_(torch.tensor([[1.0, 0.0]]))

    def repeated(m: Any, x: Tensor) -> Tensor:
        # less the skip, which is affine and so changes no violation
        return m.net(x[:, None].expand(-1, 2, -1))[:, 1] - torch.relu(x[:, :1])

    model = Net(repeated, net=net)
    points = torch.tensor([[2.966, 1.292], [0.709, 2.985]], dtype=torch.float64)
    with torch.no_grad():
        ends, middle = model(points), model(points.mean(0, keepdim=True))
    torch.testing.assert_close(ends.flatten().tolist(), [2279.2, 1430.1], rtol=5e-3, atol=0)
    torch.testing.assert_close(float(middle), 2094.9, rtol=5e-3, atol=0)
    found = certify(model, points, pairs=2000, steps=0)
    assert found.convex.how == "refused"


# -- what is proved is true ------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    activation=st.sampled_from(["relu", "softplus", "leaky_relu", "elu"]),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_a_proof_is_never_refuted_and_the_bound_holds(
    seed: int, activation: str, widths: list[int]
) -> None:
    torch.manual_seed(seed)
    net = spread(FICNN(3, widths, 2, activation=activation), seed)
    found = study(net, torch.zeros(1, 3, dtype=torch.float64))
    assert found.holds("convex") and found.bound is not None
    a, b = torch.randn(2, 200, 3, dtype=torch.float64) * 3
    with torch.no_grad():
        assert bool((net((a + b) / 2) <= (net(a) + net(b)) / 2 + 1e-9).all())
    for x in a[:10]:
        assert float(torch.linalg.matrix_norm(jacobian(net, x[None]), 2)) <= found.bound + 1e-9


def test_the_bound_is_the_norm_of_the_product_of_matrices() -> None:
    net = spread(FICNN(4, (7, 6), 3))
    w = [z.weight for z in net.z]
    straight = [net.first.weight.abs(), *(y.weight.abs() for y in net.y)]
    m = w[1] @ (w[0] @ straight[0] + straight[1])
    # the output has no rectifier: what is added there is signed, and bounded from both sides
    low, high = net.y[1].weight - m, net.y[1].weight + m
    with torch.no_grad():
        bound = certify(net, **FEW).bound
        assert bound is not None
        assert bound <= float(torch.linalg.matrix_norm(m + straight[2], 2)) + 1e-9
        assert (
            bound <= float(torch.linalg.matrix_norm(torch.maximum(low.abs(), high.abs()), 2)) + 1e-9
        )


def test_the_bound_is_tighter_than_the_product_of_norms_and_above_every_slope() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(24, 24), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(24, 2)).double()
    with torch.no_grad():
        for layer in layers[2::2]:
            layer.weight.abs_()
        net[-1].weight.abs_()
    found = certify(net, torch.zeros(1, 6, dtype=torch.float64), **FEW)
    assert found.convex.how == "structural" and found.bound is not None
    norms = [torch.linalg.matrix_norm(m.weight, 2) for m in net if isinstance(m, nn.Linear)]
    assert found.bound < float(torch.stack(norms).prod().detach())
    slopes = [
        torch.linalg.matrix_norm(jacobian(net, x[None]), 2) for x in torch.randn(20, 6).double()
    ]
    assert found.bound >= float(torch.stack(slopes).max())


def test_the_gain_of_a_unit_recurrence_is_that_of_the_triangle_of_ones() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, said = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            h = torch.relu(step + h)
            said.append(h)
        return torch.stack(said, 1)

    found = certify(Net(forward), torch.zeros(1, 10, 1, dtype=torch.float64), **FEW)
    exact = 1 / (2 * torch.sin(torch.tensor(torch.pi / 42, dtype=torch.float64)))
    assert found.bound == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_never_grows_when_units_go(seed: int) -> None:
    torch.manual_seed(seed)
    net = spread(FICNN(3, (6, 6), 2), seed)
    before = study(net, net.example().double()).bound
    with torch.no_grad():
        for unit in torch.randperm(6)[:3]:
            net.z[0].weight[:, unit] = 0
            net.z[1].weight[:, (unit + seed) % 6] = 0
    after = study(net, net.example().double())
    assert before is not None and after.bound is not None
    assert after.bound <= before + 1e-12 and after.holds("convex")


# -- operation by operation ------------------------------------------------------------------

X = torch.zeros(1, 4)
W = [[1.0], [2.0], [0.0], [0.5]]
RULES: list[tuple[str, Callable[[Tensor], Tensor], tuple[bool, bool, bool]]] = [
    ("affine", lambda x: 3 * x - 1, (True, True, True)),
    ("falls", lambda x: -x, (True, False, True)),
    ("relu", torch.relu, (True, True, True)),
    ("negated relu", lambda x: -torch.relu(x), (False, False, True)),
    ("softplus", F.softplus, (True, True, True)),
    ("elu", F.elu, (True, True, True)),
    ("steep elu", lambda x: F.elu(x, 2.0), (False, True, True)),
    ("leaky", lambda x: F.leaky_relu(x, 0.2), (True, True, True)),
    ("leaky the other way", lambda x: F.leaky_relu(x, 2.0), (False, True, True)),
    ("exp", torch.exp, (True, True, False)),
    ("square", lambda x: x**2, (True, False, False)),
    ("square of a positive", lambda x: torch.relu(x).square(), (True, True, False)),
    ("abs", torch.abs, (True, False, True)),
    ("tanh", torch.tanh, (False, True, True)),
    ("sigmoid", torch.sigmoid, (False, True, True)),
    ("gelu", F.gelu, (False, False, True)),
    ("silu", F.silu, (False, False, True)),
    ("clamped below", lambda x: x.clamp(min=-1), (True, True, True)),
    ("clamped above", lambda x: x.clamp(max=1), (False, True, True)),
    ("relu6", F.relu6, (False, True, True)),
    ("sum", lambda x: torch.relu(x).sum(-1), (True, True, True)),
    ("mean", lambda x: torch.relu(x).mean(1, keepdim=True), (True, True, True)),
    ("difference", lambda x: torch.relu(x) - torch.relu(x - 1), (False, False, True)),
    ("minus a constant", lambda x: torch.relu(x) - 2, (True, True, True)),
    ("from a constant", lambda x: 2 - torch.relu(x), (False, False, True)),
    ("scaled", lambda x: torch.relu(x) / 4, (True, True, True)),
    ("divided by itself", lambda x: 1 / (1 + torch.relu(x)), (False, False, False)),
    ("product", lambda x: torch.relu(x[:, :1]) * torch.relu(x[:, 1:2]), (False, True, False)),
    ("product of one scalar", lambda x: torch.relu(x) * F.softplus(x), (True, True, False)),
    ("product of exps", lambda x: x[:, :1].exp() * x[:, 1:2].exp(), (True, True, False)),
    ("added product", lambda x: torch.addcmul(x, torch.relu(x), torch.ones(4)), (True, True, True)),
    ("maximum", lambda x: torch.maximum(x[:, :1], x[:, 1:2] ** 2), (True, False, False)),
    ("minimum", lambda x: torch.minimum(x[:, :1], x[:, 1:2]), (False, True, True)),
    ("log-add-exp", lambda x: torch.logaddexp(x[:, :1], x[:, 1:2]), (True, True, True)),
    ("log-sum-exp", lambda x: torch.logsumexp(x, -1), (True, True, True)),
    ("largest", lambda x: torch.relu(x).amax(-1), (True, True, True)),
    ("softmax", lambda x: x.softmax(-1), (False, False, False)),
    ("matrix", lambda x: torch.relu(x) @ torch.tensor(W), (True, True, True)),
    ("matrix with signs", lambda x: torch.relu(x) @ -torch.tensor(W), (False, False, True)),
    ("slices", lambda x: torch.cat([torch.relu(x[:, ::2]), x[:, 1:2]], -1), (True, True, True)),
    ("stacked", lambda x: torch.stack(torch.relu(x).unbind(1)).sum(0), (True, True, True)),
    ("dropout that sleeps", lambda x: F.dropout(torch.relu(x), 0.5, False), (True, True, True)),
    ("a loop over rows", lambda x: sum(torch.relu(r) for r in x.T), (True, True, True)),
    ("cast", lambda x: torch.relu(x).double().to(torch.float32), (True, True, True)),
    ("transposed", lambda x: torch.relu(x).T.reshape(1, -1), (True, True, True)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "function", "expected"), RULES, ids=[r[0] for r in RULES])
def test_an_operation_keeps_exactly_what_it_should(
    said: str, function: Callable[[Tensor], Tensor], expected: tuple[bool, bool, bool]
) -> None:
    found = study(Net(lambda m, x: function(x)), X)
    kinds = ("convex", "monotone", "lipschitz")
    assert tuple(found.holds(kind) for kind in kinds) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("said", "function", "expected"), RULES, ids=[r[0] for r in RULES])
def test_what_an_operation_is_said_to_keep_is_never_refuted(
    said: str, function: Callable[[Tensor], Tensor], expected: tuple[bool, bool, bool]
) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 300, 4, dtype=torch.float64) * 2
    rows = [
        torch.cat([function(r[None].float()).double().flatten()[None] for r in t]) for t in (a, b)
    ]
    middle = torch.cat([function(r[None].float()).double().flatten()[None] for r in (a + b) / 2])
    if expected[0]:
        assert bool((middle <= (rows[0] + rows[1]) / 2 + 1e-4 * (1 + middle.abs())).all())
    if expected[1]:
        up = torch.cat([function(r[None].float()).double().flatten()[None] for r in a + b.abs()])
        assert bool((up >= rows[0] - 1e-4 * (1 + up.abs())).all())


def test_one_negative_weight_is_named() -> None:
    net = spread(FICNN(4, (7, 6), 2))
    with torch.no_grad():
        net.z[1].weight[1, 2] = -0.25
    found = certify(net, **FEW)
    assert found.convex.how == "refused" and found.convex.violation is not None
    (reason,) = found.convex.reasons
    assert reason.module == "z.1"
    assert "`z.1.weight` has 1 negative entry" in reason.text and "-0.25" in reason.text


def test_a_negative_weight_that_reads_an_affine_signal_is_no_obstacle() -> None:
    net = spread(FICNN(4, (7,), 2))
    with torch.no_grad():
        net.first.weight.neg_()
    assert how(net)[0] == "structural"


def test_a_convolution_and_a_batch_norm_are_followed() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
                        nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    with torch.no_grad():
        net[3].weight.abs_()
    x = torch.randn(8, 2, 5, 5)
    assert how(net.eval(), x)[0] == "structural"
    with torch.no_grad():
        net[3].weight[0, 1].neg_()
    assert how(net, x)[0] == "refused"
    with torch.no_grad():
        net[3].weight.abs_()
        net[1].weight.neg_()  # before the rectifier any sign will do
    assert how(net, x)[0] == "structural"


def test_pytorchs_own_lstm_is_refuted() -> None:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.r(x)[0], r=nn.LSTM(3, 5, batch_first=True))
    assert how(net, torch.zeros(1, 4, 3))[0] == "refused"


def test_reading_a_value_makes_a_proof_impossible() -> None:
    net = Net(lambda m, x: torch.relu(x) if float(x.sum()) > -1 else -torch.relu(x))
    found = certify(net, X, **FEW)
    assert found.convex.how == "refused"
    assert "reads values" in found.convex.reasons[0].text


def test_a_tensor_of_unknown_origin_is_not_taken_for_a_constant() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return -x.abs()

    net = Net(lambda m, x: torch.relu(x) + Doubled.apply(x))
    assert not study(net, X).holds("convex")


def test_writing_in_place_forgets_what_other_views_were() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        view = y[:, :2]
        view.mul_(-1)
        return y

    assert not study(Net(forward), X).holds("convex")


def test_what_depends_on_other_inputs_only_may_be_anything() -> None:
    def forward(m: Any, y: Tensor, x: Tensor) -> Tensor:
        gate = torch.softmax(torch.tanh(x).cumsum(-1), -1).relu()
        return torch.relu(y) * gate + x.sigmoid()

    found = study(Net(forward), (X, X.clone()))
    assert found.holds("convex") and found.holds("monotone") and not found.holds("lipschitz")


def test_a_random_factor_is_no_constant() -> None:
    assert not study(Net(lambda m, x: torch.relu(x) * torch.randn(4)), X).holds("convex")


def test_giving_a_tensor_other_memory_forgets_what_it_was() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        y.data = -torch.relu(x)
        return y

    assert not study(Net(forward), X).holds("convex")


def test_a_number_to_the_power_of_the_input_is_left_open() -> None:
    assert not study(Net(lambda m, x: torch.pow(2.0, x)), X).holds("convex")


def test_reshaping_in_place_is_left_open() -> None:
    assert not study(Net(lambda m, x: torch.relu(x).unsqueeze_(0)), X).holds("convex")


def test_rectifying_in_place_is_followed() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    assert study(net, X).holds("convex")


def test_the_model_is_left_as_it_was() -> None:
    net = FICNN(3, (4,)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    certify(net, torch.randn(5, 3), **FEW)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_an_open_case_says_how_hard_it_was_looked_at() -> None:
    net = Net(lambda m, x: torch.relu(x) - torch.relu(x).mul(0.5) * 1.0)
    found = certify(net, X, pairs=700, steps=3)
    assert found.convex.how == "empirical"
    assert found.convex.text == (
        "not proved, and no violation among 700 pairs and 3 steps of ascent"
    )


def test_many_inputs_leave_the_bound_out_and_keep_the_rest() -> None:
    net = FICNN(20_000, (4,))
    found = certify(net, torch.zeros(1, 20_000), pairs=8, steps=1)
    assert found.convex.how == "structural" and found.bound is None
    assert found.lipschitz.text == "too many inputs to keep a slope for each"


def test_a_certificate_prints_and_goes_through_json() -> None:
    found = certify(ICLSTM(2, 3, gates="exp"), **FEW)
    assert str(found).startswith("as a function of input 0 (3 x 2)\nconvex     structural: ")
    assert Certificate.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["convex"]["how"] == "structural"
    assert found.finding("monotone") is found.monotone
    assert otp.certify is certify


def test_the_same_seed_finds_the_same() -> None:
    net, x = spread(ICLSTM(2, 4, 2)), torch.randn(9, 3, 2).double()
    assert certify(net, x, **FEW) == certify(net, x, **FEW)


@pytest.mark.parametrize("wrt", [3, "z"])
def test_an_input_that_is_not_there_is_refused(wrt: int | str) -> None:
    with pytest.raises(StructureError) as caught:
        certify(FICNN(3, (4,)), wrt=wrt)
    assert f"{wrt!r} is no input of floating-point numbers" in caught.value.problem
    assert "inputs: 0" in caught.value.where


def test_a_net_of_the_users_own_needs_an_example() -> None:
    with pytest.raises(StructureError) as caught:
        certify(nn.Linear(3, 2))
    assert caught.value.problem == "a Linear does not say what it takes."
    assert "one calibration batch" in caught.value.fix


def test_an_input_can_be_named() -> None:
    net = PICNN(3, 4, (6,))
    y, x = net.example()
    assert certify(net, {"y": y, "x": x}, wrt="y", **FEW).convex.how == "structural"
