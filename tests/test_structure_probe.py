"""What the probe says of a layer's output until something else uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_otprune.structure.graph import Tail
from torch_otprune.structure.probe import probe, summands


class Net(nn.Module):
    """Two layers, a norm, and whatever is done with them."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm, self.drop, self.same = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self, x))


def tails(way: Callable[[Net, Tensor], Tensor]) -> dict[str, Tail]:
    """Probe a net that goes a way."""
    return probe(Net(way).double(), torch.randn(5, 4, dtype=torch.float64)).tails


def preactivation(net: Net, x: Tensor) -> Tensor:
    """Read the stem's output twice: once by the block, once by the addition."""
    x = net.a(x)
    return x + net.b(torch.relu(x))


def swapped(net: Net, x: Tensor) -> Tensor:
    """Add first, read again later."""
    y = net.a(x)
    return torch.relu(y + x) * y


def twice(net: Net, x: Tensor) -> Tensor:
    """Feed two additions."""
    y = net.a(x)
    return (y + x) * (y + 2 * x)


def itself(net: Net, x: Tensor) -> Tensor:
    """Add a tensor to itself."""
    y = net.a(x)
    return y + y


def inplace(net: Net, x: Tensor) -> Tensor:
    """Write over the output before it is added."""
    return net.relu(net.a(x)) + x


def given_back(net: Net, x: Tensor) -> Tensor:
    """Hand the output to a second layer."""
    y = net.a(x)
    return (y + x) + net.b(y)


def scaled(net: Net, x: Tensor) -> Tensor:
    """Add a share."""
    return torch.add(x, net.a(x), alpha=0.1)


def named(net: Net, x: Tensor) -> Tensor:
    """Name an operand."""
    return torch.add(net.a(x), other=x)


def number(net: Net, x: Tensor) -> Tensor:
    """Add a number."""
    return net.a(x) + 1.0


@pytest.mark.parametrize(
    "way",
    [preactivation, swapped, twice, itself, inplace, given_back, scaled, named, number],
)
def test_an_output_that_not_only_one_plain_addition_reads_is_not_added(
    way: Callable[[Net, Tensor], Tensor],
) -> None:
    assert tails(way)["a"] == Tail()


def test_the_block_of_a_preactivation_network_is_still_added() -> None:
    assert tails(preactivation)["b"] == Tail(added=True)


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: y + x,
        lambda y, x: x + y,
        torch.add,
        lambda y, x: torch.add(x, y, alpha=1),
        Tensor.add_,
        lambda y, x: y.__iadd__(x),
    ],
)
def test_every_spelling_of_a_plain_addition_is_one(add: Callable[..., Tensor]) -> None:
    assert tails(lambda net, x: add(net.norm(net.a(x)), x))["a"] == Tail(("norm",), added=True)


def test_what_comes_after_an_addition_in_place_is_not_the_layers_output() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y += x
        return torch.relu(y) * y

    assert tails(way)["a"] == Tail(added=True)


def test_layers_and_functions_that_hand_the_tensor_on_do_not_use_it() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = F.dropout(net.same(net.drop(net.norm(net.a(x)))), 0.5, training=False)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        return y.contiguous() + x

    assert tails(way)["a"] == Tail(("norm", "drop", "same"), added=True)


def test_a_second_reader_ends_the_tail_before_the_norm() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return (net.norm(y) + x) * torch.relu(y)

    def other(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return torch.relu(y) * (net.norm(y) + x)

    assert tails(way)["a"] == tails(other)["a"] == Tail()


def test_what_the_model_returns_is_used() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return y, self.head(y + x)

    found = probe(Both(number).double(), torch.randn(5, 4, dtype=torch.float64))
    assert found.tails["a"] == Tail()


def test_a_layer_called_by_keyword_is_noted() -> None:
    found = probe(Net(lambda net, x: net.a(input=x)).double(), torch.randn(5, 4).double())
    assert found.positions["a"] == 1


def test_probing_works_on_inference_tensors() -> None:
    with torch.inference_mode():
        assert tails(lambda net, x: net.relu(net.a(x)) + x)["a"] == Tail()
        assert tails(lambda net, x: net.norm(net.a(x)) + x)["a"] == Tail(("norm",), added=True)


def test_a_sum_is_read_off_its_operands() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert summands(torch.add, (x, y), None) == (x, y)
    assert summands(torch.add, (x, y), {"alpha": 2}) is None
    assert summands(torch.add, (x,), {"other": y}) is None
    assert summands(torch.add, (x, x), {}) is None
    assert summands(torch.sub, (x, y), {}) is None
