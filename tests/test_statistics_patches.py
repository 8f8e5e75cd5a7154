"""A layer's input as rows: the layer becomes a matrix product, whatever its geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.statistics.patches import (
    columns,
    full_weight,
    output_rows,
    pick,
    positions,
    rows,
    supported,
)


def rebuilt(module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """Compute the layer's output from rows."""
    out = rows(module, x, at) @ full_weight(module).T
    return out if module.bias is None else out + module.bias


def agree(module: nn.Module, x: Tensor) -> None:
    """Compare all positions with the layer itself."""
    module = module.double()
    at = torch.arange(positions(module, x))
    expected = output_rows(module, module(x), at)
    assert expected.shape == (len(x) * len(at), columns(module) and full_weight(module).shape[0])
    torch.testing.assert_close(rebuilt(module, x, at), expected)


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    bias=st.booleans(),
)
def test_rows_times_weight_is_the_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    mode: str,
    bias: bool,
) -> None:
    module = nn.Conv2d(
        4, 8, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode
    )
    agree(module, torch.randn(3, 4, 7, 6, dtype=torch.float64))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_may_be_a_word(padding: str) -> None:
    module = nn.Conv2d(3, 4, (4, 3), padding=padding, dilation=(1, 2))
    agree(module, torch.randn(2, 3, 8, 9, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_rows_times_weight_is_the_convolution_in_one_dimension(mode: str) -> None:
    module = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode)
    agree(module, torch.randn(3, 4, 9, dtype=torch.float64))


def test_a_strided_view_is_read_as_it_is() -> None:
    x = torch.randn(3, 7, 6, 4, dtype=torch.float64).permute(0, 3, 1, 2)
    agree(nn.Conv2d(4, 5, 3, padding=1), x)
    agree(nn.Conv2d(4, 5, 2), x.expand(3, 4, 7, 6)[:, :, ::2])


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_a_dense_layer_has_one_position_per_token(shape: tuple[int, ...]) -> None:
    agree(nn.Linear(4, 6), torch.randn(shape, dtype=torch.float64))


def test_positions_may_be_few() -> None:
    module, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    at = torch.tensor([0, 5, 15])
    torch.testing.assert_close(rebuilt(module, x, at), output_rows(module, module(x), at))


def test_positions_are_chosen_once_and_for_all() -> None:
    assert torch.equal(pick(100, 10, "a", 0), pick(100, 10, "a", 0))
    assert not torch.equal(pick(100, 10, "a", 0), pick(100, 10, "b", 0))
    assert not torch.equal(pick(100, 10, "a", 0), pick(100, 10, "a", 1))
    assert torch.equal(pick(5, 10, "a", 0), torch.arange(5))


def test_choosing_positions_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    pick(100, 10, "a", 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_laid_out_in_rows_says_so() -> None:
    assert not supported(nn.ConvTranspose2d(3, 4, 3))
    assert not supported(nn.Conv3d(3, 4, 3))
    assert supported(nn.Conv1d(3, 4, 3)) and supported(nn.Linear(3, 4))
