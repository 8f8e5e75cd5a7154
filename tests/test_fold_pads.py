"""Moving all padding to the front: exact to fold afterwards, at a price that is measured."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import nn

from torch_otprune.errors import StructureError
from torch_otprune.fold import compose, reorder_padding


def row() -> list[nn.Module]:
    """Three convolutions with all that may stand between them."""
    layers = [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1),
    ]
    return [layer.double().eval() for layer in layers]


def test_the_first_convolution_gets_all_padding_and_the_output_its_size() -> None:
    x = torch.randn(2, 3, 33, 30, dtype=torch.float64)
    new = reorder_padding(row(), x).layers
    assert new[0].padding == (1 + 2 * 2 + 1 * 4, 1 + 2 * 2 + 1 * 4)
    assert new[3].padding == new[5].padding == (0, 0)
    assert nn.Sequential(*new)(x.clone()).shape == nn.Sequential(*row())(x.clone()).shape


@torch.no_grad()
def test_the_reordered_row_folds_exactly_without_its_activation() -> None:
    x = torch.randn(2, 3, 33, 30, dtype=torch.float64)
    new = [layer for layer in reorder_padding(row(), x).layers if not isinstance(layer, nn.ReLU)]
    folded = reduce(lambda a, b: compose(a, b).module, new)
    assert isinstance(folded, nn.Conv2d)
    torch.testing.assert_close(folded(x), nn.Sequential(*new)(x))


@torch.no_grad()
def test_the_change_is_measured_and_is_the_borders() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1).double(), nn.Conv2d(4, 4, 3, padding=1).double()]
    changes = []
    for size in (4, 40):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        edit = reorder_padding(layers, x)
        before, after = nn.Sequential(*layers)(x), nn.Sequential(*edit.layers)(x)
        torch.testing.assert_close(after[:, :, 1:-1, 1:-1], before[:, :, 1:-1, 1:-1])
        assert edit.change == pytest.approx(float((after - before).norm() / before.norm()))
        changes.append(edit.change)
    assert 0 < changes[1] < changes[0]


def test_a_single_tap_without_bias_makes_the_edit_free() -> None:
    layers = [nn.Conv1d(3, 4, 1, bias=False).double(), nn.Conv1d(4, 4, 3, padding=1).double()]
    assert reorder_padding(layers, torch.randn(2, 3, 9, dtype=torch.float64)).change < 1e-15


def test_the_given_layers_are_left_as_they_were() -> None:
    layers = row()
    reorder_padding(layers, torch.randn(2, 3, 33, 30, dtype=torch.float64))
    assert [x.padding for x in layers if isinstance(x, nn.Conv2d)] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (nn.MaxPool2d(2), "padding does not move past MaxPool2d"),
        (nn.AvgPool2d(3, padding=1), "padding does not move past AvgPool2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "does not move past Conv2d"),
    ],
)
def test_padding_does_not_move_past_what_treats_the_border_apart(
    between: nn.Module, words: str
) -> None:
    layers = [nn.Conv2d(3, 4, 3), between, nn.Conv2d(4, 4, 3)]
    with pytest.raises(StructureError, match=words):
        reorder_padding(layers, torch.randn(2, 3, 12, 12))


def test_one_convolution_has_no_padding_to_move() -> None:
    with pytest.raises(StructureError, match="there is no padding to move"):
        reorder_padding([nn.Conv2d(3, 4, 3)], torch.randn(2, 3, 12, 12))
