"""Input-convex nets compute their published equations, and project what must not be negative."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.nn import FICNN, ICLRNN, ICLSTM, ICRNN, PICNN, InputConvex, NonNegative

relu = torch.relu


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(net: InputConvex) -> InputConvex:
    """Move every parameter, biases too, and project."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.double().parameters():
            p.add_(torch.randn_like(p) * 0.3)
    net.project_()
    return net


def test_a_ficnn_is_equation_two() -> None:
    net, y = spread(FICNN(5, (7, 6), 2)), drawn(4, 5)
    a, w = [net.first, *net.y], [z.weight for z in net.z]
    z = relu(y @ a[0].weight.T + a[0].bias)
    z = relu(z @ w[0].T + y @ a[1].weight.T + a[1].bias)
    torch.testing.assert_close(net(y), z @ w[1].T + y @ a[2].weight.T + a[2].bias)


def test_a_picnn_is_equation_three() -> None:
    net, y, x = spread(PICNN(3, 4, (6,), outputs=2)), drawn(5, 3), drawn(5, 4, seed=1)
    first, last = net.blocks
    z = relu((y * first.pick(x)) @ first.past.weight.T + first.shift(x))
    u = relu(net.u[0](x))
    gated = z * relu(last.gate(u))
    expected = gated @ last.through.weight.T
    expected = expected + (y * last.pick(u)) @ last.past.weight.T + last.shift(u)
    torch.testing.assert_close(net(y, x), expected)


def test_an_icrnn_is_its_equations() -> None:
    net, x = spread(ICRNN(2, 4, 3, layers=1)), drawn(5, 3, 2)
    cell, seen = net.cells[0], torch.cat([x, -x], -1)
    h = before = None
    for t in range(3):
        now = seen[:, t]
        a = now @ cell.u.weight.T
        b = now @ cell.d3.weight.T
        if h is not None:
            a = a + h @ cell.w.weight.T + before @ cell.d2.weight.T
            b = b + h @ cell.d1.weight.T
        h, before = relu(a), now
        y = relu(h @ cell.v.weight.T + b)
        torch.testing.assert_close(net(x)[:, t], relu(net.out(y)))


def test_an_iclrnn_is_its_equations() -> None:
    net, x = spread(ICLRNN(2, 4, 3, layers=1)), drawn(5, 3, 2)
    cell, h = net.cells[0], torch.zeros(5, 4, dtype=torch.float64)
    for t in range(3):
        now = torch.cat([x, -x], -1)[:, t]
        h = relu(now @ cell.u.weight.T + cell.u.bias + h @ cell.w.weight.T)
        torch.testing.assert_close(net(x)[:, t], relu(net.out(h)))


def test_an_iclstm_is_its_published_equations() -> None:
    net, x = spread(ICLSTM(2, 4, 3, layers=1)), drawn(5, 3, 2)
    cell = net.cells[0]
    h = c = torch.zeros(5, 4, dtype=torch.float64)
    for t in range(3):
        now = torch.cat([x, -x], -1)[:, t]
        a = now @ cell.u.weight.T + h @ cell.w.weight.T
        f, i, o, g = (
            relu(getattr(cell, f"d{k}") * a + getattr(cell, f"b{k}")) for k in ("f", "i", "o", "c")
        )
        c = f * c + i * g
        h = o * relu(c)
        y = relu(h @ cell.v.weight.T + cell.v.bias) + now
        torch.testing.assert_close(net(x)[:, t], relu(net.out(y)))


def test_log_convex_gates_are_exponentials_on_logarithms() -> None:
    net, x = spread(ICLSTM(2, 4, 3, layers=1, gates="exp")), drawn(5, 3, 2) * 0.3
    cell = net.cells[0]
    h = c = torch.zeros(5, 4, dtype=torch.float64)
    for t in range(3):
        now = torch.cat([x, -x], -1)[:, t]
        a = now @ cell.u.weight.T + torch.log1p(h) @ cell.w.weight.T
        f, i, o, g = (
            (getattr(cell, f"d{k}") * a + getattr(cell, f"b{k}")).exp()
            for k in ("f", "i", "o", "c")
        )
        c = f * c + i * g
        h = o * c
        y = relu(torch.log1p(h) @ cell.v.weight.T + cell.v.bias) + now
        torch.testing.assert_close(net(x)[:, t], relu(net.out(y)))


def test_the_published_recurrent_net_has_the_published_size() -> None:
    assert sum(p.numel() for p in ICRNN(4, 64, 2).parameters()) == 38_530


NETS = {
    "ficnn": lambda: FICNN(3, (5,)),
    "picnn": lambda: PICNN(3, 2, (5,)),
    "icrnn": lambda: ICRNN(3, 5),
    "iclrnn": lambda: ICLRNN(3, 5),
    "iclstm": lambda: ICLSTM(3, 5),
    "iclstm_exp": lambda: ICLSTM(3, 5, gates="exp"),
}


@pytest.mark.parametrize("name", NETS)
def test_projection_clamps_all_that_must_not_be_negative_and_nothing_else(name: str) -> None:
    net = NETS[name]()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(-0.01)
    net.project_()
    bound = {name for name, _ in net.constrained()}
    assert bound and bound < {name for name, _ in net.named_parameters()}
    for path, p in net.named_parameters():
        assert bool((p == (0 if path in bound else torch.tensor(-0.01))).all()), path


@pytest.mark.parametrize("name", NETS)
def test_a_net_starts_without_negative_weights_and_copies(name: str) -> None:
    net = copy.deepcopy(NETS[name]())
    assert all(bool((t >= 0).all()) for _, t in net.constrained())


def test_the_lipschitz_net_caps_norms_and_never_raises_them() -> None:
    net = ICLRNN(3, 5)
    with torch.no_grad():
        net.cells[0].w.weight.mul_(1e-3)
        net.cells[1].w.weight.fill_(7.0)
    small = net.cells[0].w.weight.clone()
    net.project_()
    assert torch.equal(net.cells[0].w.weight, small)
    norm = torch.linalg.matrix_norm(net.cells[1].w.weight.double(), 2)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-6, atol=0)


def test_a_non_negative_layer_is_a_dense_layer() -> None:
    layer = NonNegative(4, 3)
    assert isinstance(layer, nn.Linear)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    "build",
    [
        lambda: FICNN(3, activation="tanh"),
        lambda: PICNN(3, 2, activation="tanh"),
        lambda: ICRNN(3, activation="tanh"),
    ],
)
def test_an_activation_that_is_not_convex_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(StructureError) as caught:
        build()
    assert caught.value.problem.startswith("'tanh' is not known as convex")
    assert ".activation" in caught.value.where
    assert caught.value.fix.startswith("use one of relu, softplus")


def test_unknown_gates_are_refused() -> None:
    with pytest.raises(StructureError) as caught:
        ICLSTM(3, gates="sigmoid")  # type: ignore[arg-type]
    assert "'sigmoid' is no kind of gate" in caught.value.problem
    assert "'exp' to be convex over several steps" in caught.value.fix


@pytest.mark.parametrize("hidden", [(), (4, 0)])
def test_widths_that_are_none_are_refused(hidden: tuple[int, ...]) -> None:
    with pytest.raises(StructureError) as caught:
        FICNN(3, hidden)
    assert "is no list of widths" in caught.value.problem
