"""What would fold, read off one run of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import CASES
from torch_otprune.errors import StructureError
from torch_otprune.fold import fold_, functional_activations, segments


def example(*shape: int) -> Tensor:
    """Draw a batch."""
    return torch.randn(shape, dtype=torch.float64)


def inverted() -> nn.Sequential:
    """An inverted residual branch: wide in the middle."""
    return nn.Sequential(
        nn.Conv2d(4, 24, 1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU6(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        nn.BatchNorm2d(24),
        nn.Dropout(0.1),
        nn.ReLU6(),
        nn.Conv2d(24, 4, 1, bias=False),
    ).double()


def layers(found: tuple[Any, ...]) -> list[tuple[str, ...]]:
    """List their layers."""
    return [segment.layers for segment in found]


def test_a_segment_runs_through_its_activations_with_its_cost() -> None:
    whole, now, later = segments(inverted(), example(2, 4, 8, 8))
    assert whole.layers == ("0", "1", "3", "4", "7")
    assert whole.activations == ("2", "6")
    assert whole.certificate.macs.before == 64 * (2 * 4 * 24 + 9 * 24)
    assert whole.certificate.macs.after == 64 * 9 * 16
    assert whole.certificate.params.after == 9 * 16 + 4
    assert (now.layers, later.layers) == (("0", "1"), ("3", "4"))
    assert now.activations == later.activations == ()
    assert now.certificate.kind == "exact"


def test_the_certificate_of_a_segment_sees_the_shift_of_a_norm() -> None:
    model = inverted()
    assert segments(model, example(2, 4, 8, 8))[0].certificate.kind == "exact"
    nn.init.ones_(model[1].bias)
    certificate = segments(model, example(2, 4, 8, 8))[0].certificate
    assert (certificate.kind, certificate.border) == ("interior", (1, 1))
    assert "would give its shift" in certificate.reason


def test_only_the_named_activations_are_taken_for_linear() -> None:
    found = segments(inverted(), example(2, 4, 8, 8), linear=["2"])
    assert layers(found) == [("0", "1", "3", "4"), ("0", "1"), ("3", "4")]
    assert layers(segments(inverted(), example(2, 4, 8, 8), linear=())) == [("0", "1"), ("3", "4")]


def test_an_unknown_activation_is_an_error_that_names_the_closest() -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(4, 4, 1))
    model.add_module("relu1", nn.ReLU())
    model.add_module("last", nn.Conv2d(4, 4, 1))
    with pytest.raises(StructureError, match="'relu' is no activation") as error:
        segments(model, torch.randn(2, 4, 8, 8), linear=["relu"])
    assert "relu1" in error.value.where


class Net(nn.Module):
    """Two layers and a way to use them."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1).double() for _ in range(3))
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def both(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is inside."""
    y = net.a(x)
    return net.b(y), y


@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: net.b(F.relu(net.a(x))),
        lambda net, x: net.b(y := net.a(x)) + y,
        lambda net, x: net.b(net.a(x) + 1),
        lambda net, x: net.b(net.a(x).flip(1)),
        lambda net, x: net.b(net.a(x)) + net.a(x),
        lambda net, x: net.b(y := net.a(x)) + net.c(y),
        both,
    ],
)
def test_an_output_that_something_else_reads_ends_a_segment(way: Any) -> None:
    assert segments(Net(way), example(2, 4, 5, 5)) == ()


def test_branches_of_one_input_are_segments_of_their_own() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.b(net.drop(net.a(x))) + net.c(x)

    assert layers(segments(Net(way), example(2, 4, 5, 5))) == [("a", "b")]


def test_an_activation_that_writes_in_place_is_inside() -> None:
    (found,) = segments(Net(lambda net, x: net.b(net.relu(net.a(x)))), example(2, 4, 5, 5))
    assert found.activations == ("relu",)


def test_a_dropout_or_an_activation_that_serves_two_places_ends_a_segment() -> None:
    def dropped(net: Net, x: Tensor) -> Tensor:
        return net.drop(net.b(net.drop(net.a(x))))

    def activated(net: Net, x: Tensor) -> Tensor:
        return net.relu(net.b(net.relu(net.a(x))))

    assert segments(Net(dropped), example(2, 4, 5, 5)) == ()
    assert segments(Net(activated), example(2, 4, 5, 5)) == ()


def test_a_hook_on_a_module_around_reads_what_it_takes_and_gives() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1)).double()
    assert len(segments(model, example(2, 4, 5, 5))) == 1
    model[0].register_forward_hook(lambda *_: None)
    assert segments(model, example(2, 4, 5, 5)) == ()


def test_a_batch_norm_on_tokens_does_not_act_on_the_features_of_a_dense_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double()
    assert len(segments(model, example(3, 5))) == 1
    assert segments(model, example(3, 6, 5)) == ()


def test_functional_activations_are_named_with_the_module_that_calls_them() -> None:
    def way(net: Net, x: Tensor) -> Tensor:
        return net.b(torch.sigmoid(F.gelu(net.relu(net.a(x)))).relu_())

    found = functional_activations(nn.Sequential(Net(way)), example(2, 4, 5, 5))
    assert [f.function for f in found] == ["gelu", "sigmoid", "relu"]
    assert {(f.module, f.kind) for f in found} == {("0", "Net")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_model_can_be_read_and_folded_and_then_is_folded(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    keys = set(model.state_dict())
    now = {s.layers for s in segments(model, batch) if not s.activations}
    assert set(model.state_dict()) == keys
    done = {f.layers for f in fold_(model, batch, gate="none") if f.accepted}
    assert {path for layers in done for path in layers} <= {p for layers in now for p in layers}
    assert not any(f.accepted for f in fold_(model, batch, gate="none"))
