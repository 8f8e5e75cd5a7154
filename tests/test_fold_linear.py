"""Scales and shifts per channel fold into their neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold import rescaled, unscaled


def lines(channels: int) -> tuple[Tensor, Tensor]:
    """Draw a scale and a shift."""
    return torch.randn(2, channels, dtype=torch.float64).unbind()


def stirred(norm: nn.Module) -> nn.Module:
    """Give a norm numbers that do something."""
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.3, 2)
    return norm.double().eval()


CASES = {
    "dense": (nn.Linear(5, 6), (3, 4, 5), -1),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 9), 1),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, 2, groups=2, bias=False), (2, 4, 7), 1),
    "circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7), 1),
    "batch norm": (nn.BatchNorm2d(6), (2, 6, 5, 5), 1),
    "batch norm without parameters": (nn.BatchNorm2d(6, affine=False), (2, 6, 5, 5), 1),
    "layer norm": (nn.LayerNorm(6), (2, 3, 6), -1),
    "layer norm without a bias": (nn.LayerNorm(6, bias=False), (2, 3, 6), -1),
    "layer norm without parameters": (nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6), -1),
    "group norm": (nn.GroupNorm(2, 6), (2, 6, 5), 1),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_line_behind_a_layer_folds_into_it(name: str) -> None:
    layer, shape, axis = CASES[name]
    layer, x = stirred(layer), torch.randn(shape, dtype=torch.float64)
    scale, shift = lines(6)
    expected = (layer(x).movedim(axis, -1) * scale + shift).movedim(-1, axis)
    new = rescaled(layer, scale, shift)
    torch.testing.assert_close(new(x), expected)
    assert type(new) is type(layer)


@torch.no_grad()
def test_an_rms_norm_takes_up_a_scale_and_no_shift() -> None:
    norm, x = stirred(nn.RMSNorm(6)), torch.randn(3, 6, dtype=torch.float64)
    scale, shift = lines(6)
    torch.testing.assert_close(rescaled(norm, scale, shift * 0)(x), norm(x) * scale)
    with pytest.raises(StructureError, match="an RMSNorm has no shift"):
        rescaled(norm, scale, shift)


def test_the_best_line_of_a_relu_folds_into_the_batch_norm_in_front() -> None:
    norm = stirred(nn.BatchNorm1d(6))
    scale, shift = lines(6)
    new = rescaled(norm, scale, shift)
    torch.testing.assert_close(new.weight.detach(), norm.weight.detach() * scale)
    torch.testing.assert_close(new.bias.detach(), norm.bias.detach() * scale + shift)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ReLU(), "a ReLU takes up no scale"),
        (nn.Linear(4, 5), r"shapes \(6,\), \(6,\); the layer has 5 channels"),
        (nn.LayerNorm((2, 6)), "over 2 axes has no channels"),
        (nn.BatchNorm1d(6, track_running_stats=False), "the statistics of each batch"),
    ],
)
def test_what_takes_up_no_line_says_why(layer: nn.Module, words: str) -> None:
    with pytest.raises(StructureError, match=words):
        rescaled(layer, *lines(6))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_line_of_a_norm_folds_into_the_dense_layer_behind(norm: nn.Module, bias: bool) -> None:
    norm, layer = stirred(norm), nn.Linear(6, 4, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    folded = unscaled(norm, layer)
    torch.testing.assert_close(folded.module(x), layer(norm(x)))
    assert not list(folded.modules[0].parameters())
    assert folded.certificate.kind == "exact"


def test_a_norm_without_a_line_has_nothing_to_fold() -> None:
    with pytest.raises(StructureError, match="has no scale and shift to fold"):
        unscaled(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4))
    with pytest.raises(StructureError, match="along the last axis"):
        unscaled(nn.LayerNorm((2, 6)), nn.Linear(6, 4))
