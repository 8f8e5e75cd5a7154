"""What escapes a follower that only reads names: unseen writes, sizes, draws, random programs."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_otprune as otp
from tests.test_certify_sound import ROW, Net
from torch_otprune.certify.study import study


@torch.jit.script
def _negated_unseen(y: Tensor) -> None:
    y.neg_()


def _unseen(m: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    _negated_unseen(y)
    return y


def _threaded(m: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    thread = threading.Thread(target=y.neg_)
    thread.start()
    thread.join()
    return y


def _exchanged(m: Any, x: Tensor) -> Tensor:
    y, z = F.relu(x), -F.relu(x)
    torch.utils.swap_tensors(y, z)
    return y


def _other_memory(m: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    y.set_(-F.relu(x))
    return y


def _eight_bits(m: Any, x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def _counted(x: Tensor) -> int:
    return -1 if torch.nonzero(x > 0).shape[0] > 1 else 1


def _slice_bounds(x: Tensor) -> int:
    end = (x.sum() > 0).long() + 1
    return 2 - torch.ones(3)[:end].numel()


def _raised(x: Tensor) -> int:
    try:
        torch.linalg.cholesky(torch.diag(x[0] + 1))
    except RuntimeError:
        return -1
    return 1


ESCAPES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a compiled function that writes": _unseen,
    "another thread that writes": _threaded,
    "two tensors that are exchanged": _exchanged,
    "a tensor that is given other memory": _other_memory,
    "numbers of eight bits": _eight_bits,
    "a count of hits": lambda m, x: F.relu(x) * _counted(x),
    "the size of what a mask leaves": lambda m, x: F.relu(x) * (1 - x[x > 0].numel()),
    "the number of different signs": lambda m, x: F.relu(x) * (2 - len(torch.unique(x.sign()))),
    "where a slice ends": lambda m, x: F.relu(x) * _slice_bounds(x),
    "a size given as a tensor": lambda m, x: F.relu(x) * (1 - torch.ones((x > 0).sum()).numel()),
    "an error that is caught": lambda m, x: F.relu(x) * _raised(x),
    "a number in a text": lambda m, x: F.relu(x) * (1 if f"{x.sum():.1f}" > "0" else -1),
    "a number in memory": lambda m, x: F.relu(x) * x.untyped_storage().tolist()[0],
    "whole numbers beside others": lambda m, x: (
        F.relu(x) * torch.cat([x, torch.tensor([[-5, -5, -5]])], -1)[:, 3:]
    ),
    "a setting without a name": lambda m, x: torch._C._nn.elu(x, 1.0, -1.0),
    "what is drawn and added": lambda m, x: F.relu(x) + torch.rand(3),
    "what Python draws": lambda m, x: F.relu(x) * random.choice([-1, 1]),
    "a count of calls": lambda m, x: F.relu(x) * next(m.signs),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_what_is_not_followed_is_not_proved(name: str) -> None:
    net = Net(ESCAPES[name])
    net.signs = itertools.cycle([1, -1])
    found = study(net, ROW)
    assert not found.holds("convex") and found.reasons("convex")


def test_a_scratch_tensor_that_is_filled_is_known() -> None:
    assert study(Net(lambda m, x: F.relu(x) * torch.empty(3).fill_(2.0)), ROW).holds("convex")


def test_what_compiled_code_hands_out_has_a_reason() -> None:
    traced = torch.jit.trace(nn.ReLU(), ROW)
    (reason,) = otp.certify(traced, ROW, pairs=10, steps=0).convex.reasons
    assert reason.text == "what comes out of compiled or foreign code is not followed"


def test_another_output_for_the_same_input_is_said() -> None:
    reason = study(Net(ESCAPES["what Python draws"]), ROW).reasons("convex")[0]
    assert reason.text == "another call on the same input may give another output"


def test_an_output_that_is_not_a_number_is_nothing() -> None:
    net = nn.BatchNorm1d(3).eval()
    net.running_var.fill_(-1.0)
    found = study(net, ROW)
    assert not found.holds("convex") and found.bound is None
    assert found.reasons("convex")[0].text == "what comes out for the example is not a number"


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Less(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return 2 * b - a

    found = study(Less(), (ROW, ROW))
    assert found.bound == pytest.approx(1.0) and not found.holds("monotone")


def test_the_example_is_left_as_it_was() -> None:
    x = ROW.clone()
    found = otp.certify(Net(lambda m, x: F.relu_(x)), x, pairs=50, steps=1)
    assert torch.equal(x, ROW) and found.convex.how == "structural"
    open_case = Net(lambda m, x: F.relu_(x).sub(F.relu(x).mul(0.5).mul(1.0)))
    assert otp.certify(open_case, x, pairs=50, steps=1).convex.how == "empirical"


def test_rounding_of_what_cancels_is_no_violation() -> None:
    # nothing, but for some 1e-17
    net = Net(lambda m, x: F.relu(x) * 0.1 * 3 - F.relu(x) * 0.3)
    assert otp.certify(net, ROW, pairs=500, steps=5).convex.how == "empirical"


def _program(seed: int) -> Net:
    """Draw a net of a few steps that mix known and unknown, in place and not."""
    torch.manual_seed(seed)
    w, c = torch.randn(3, 3).double(), torch.randn(3).double()
    if seed % 2:
        w, c = w.abs(), c.abs()
    steps: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, b: a @ w, lambda a, b: F.linear(a, w, c), lambda a, b: F.relu(a),
        lambda a, b: F.softplus(a), lambda a, b: a.abs(), lambda a, b: a.square(),
        lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a * c,
        lambda a, b: (a * 0.1).exp(), lambda a, b: torch.maximum(a, b), lambda a, b: a.tanh(),
        lambda a, b: torch.minimum(a, b), lambda a, b: a.clone().mul_(c), lambda a, b: a.flip(1),
        lambda a, b: a.clamp(min=-1), lambda a, b: a.clamp(max=1), lambda a, b: a.clone().sub_(b),
        lambda a, b: torch.cat([a[:, :1], b[:, 1:]], 1), lambda a, b: F.relu(a) * F.relu(a + 1),
        lambda a, b: torch.where(a > 0, a, b), lambda a, b: a.softmax(1),
        lambda a, b: F.elu(a, 2.0), lambda a, b: a.cumsum(1), lambda a, b: a.sort(1).values,
        lambda a, b: F.relu(a.clone(), True), lambda a, b: F.leaky_relu(a, 0.2),
        lambda a, b: torch.logsumexp(a, 1, True) + b, lambda a, b: a / c, lambda a, b: F.silu(a),
    ]  # fmt: skip
    steps += steps[:4] * 2  # or hardly any would be convex
    chosen = [int(i) for i in torch.randint(len(steps), (4,))]

    def run(m: Any, x: Tensor) -> Tensor:
        before, now = x, x
        for step in chosen:
            before, now = now, steps[step](now, before)
        return now

    return Net(run, w=w, c=c)  # what is not held is of unknown origin


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_programs_are_never_certified_wrongly(first: int) -> None:
    proved = 0
    for seed in range(first, first + 50):
        net = _program(seed)
        found = study(net, ROW.double())
        a, b = torch.randn(2, 128, 3).double() * 2
        one, two, middle, up = net(a), net(b), net((a + b) / 2), net(a + (b - a).abs())
        size = 1e-9 * (1 + one.abs() + two.abs() + up.abs())
        if found.holds("convex"):
            assert bool((middle <= (one + two) / 2 + size).all()), seed
        if found.holds("monotone"):
            assert bool((up >= one - size).all()), seed
        if found.bound is not None:
            grown = (one - two).norm(dim=1) - found.bound * (a - b).norm(dim=1)
            assert float(grown.max()) <= 1e-6, seed
        proved += found.holds("convex")
    assert proved >= 5
