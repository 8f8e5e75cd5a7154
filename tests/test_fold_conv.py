"""Two affine layers in one: the table of exactness, row by row, in float64."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.errors import StructureError
from torch_otprune.fold import (
    BiasMap,
    Folded,
    absorbed,
    commuted,
    compose,
    constant,
    with_shortcut,
)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ODD = (2, 4, 11, 14)  # samples, channels, and no square


def conv(into: int, out: int, taps: int, *, axes: int = 2, **options: Any) -> nn.Module:
    """Make a convolution in float64."""
    return CONVS[axes](into, out, taps, **options).double()


@torch.no_grad()
def norm(channels: int, axes: int = 2, **options: Any) -> nn.Module:
    """Make a batch-norm that does something."""
    made = NORMS[axes](channels, **options).double().eval()
    made.running_mean.normal_()
    made.running_var.uniform_(0.2, 2)
    if made.affine:
        made.weight.normal_()
        made.bias.normal_()
    return made


def inputs(*shape: int) -> Tensor:
    """Draw an input."""
    return torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def off(first: nn.Module, second: nn.Module, folded: Folded, x: Tensor) -> Tensor:
    """Measure how far the fold is from the pair, position by position."""
    expected, got = second(first(x)), folded.module(x)
    assert got.shape == expected.shape
    return (got - expected).abs() / expected.abs().max()


def inner(x: Tensor, border: tuple[int, ...]) -> Tensor:
    """Take the border off."""
    for axis, width in enumerate(border, start=2):
        x = x.narrow(axis, min(width, x.shape[axis]), max(x.shape[axis] - 2 * width, 0))
    return x


def assert_exact(first: nn.Module, second: nn.Module, *shape: int) -> Folded:
    """Fold a pair and hold it to its promise everywhere."""
    folded = compose(first, second)
    assert folded.certificate.kind == "exact"
    assert off(first, second, folded, inputs(*shape or ODD)).max() < 1e-12
    return folded


def assert_interior(first: nn.Module, second: nn.Module, border: tuple[int, ...]) -> Folded:
    """Fold a pair and hold it to its promise: right inside, and wrong on the whole border."""
    folded = compose(first, second)
    assert folded.certificate.kind == "interior"
    assert folded.certificate.border == border
    error = off(first, second, folded, inputs(*ODD))
    assert inner(error, border).max() < 1e-12
    assert error[:, :, 0, :].amax() > 1e-6 and error[:, :, :, 0].amax() > 1e-6
    return folded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [*product([1, 2, 3], [1, 2], [0, 2])])
def test_a_second_layer_without_padding_is_exact_after_any_first(
    stride: int, dilation: int, padding: int, groups: int, bias: bool
) -> None:
    options = {"stride": stride, "padding": padding, "bias": bias, "groups": groups}
    first = conv(4, 6, 3, dilation=dilation, **options)
    folded = assert_exact(first, conv(6, 4, 2, stride=2, dilation=dilation), 2, 4, 19, 22)
    g = (folded.module.kernel_size[0] - 1) * folded.module.dilation[0] + 1
    assert g == 2 * dilation + 1 + dilation * stride  # K = k1 + (k2 - 1) s1
    assert folded.module.stride == (2 * stride, 2 * stride)
    assert folded.module.padding == (padding, padding)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_second_layer_of_one_tap_is_exact(axes: int) -> None:
    first = conv(4, 6, 3, axes=axes, padding=1, stride=2)
    folded = assert_exact(first, conv(6, 5, 1, axes=axes), 2, 4, *(7, 6, 5)[:axes])
    assert folded.module.kernel_size == (3,) * axes


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_one_tap_without_a_shift_is_exact_before_any_padding(stride: int, padding: int) -> None:
    first = conv(4, 6, 1, bias=False, stride=stride, padding=padding)
    assert_exact(first, conv(6, 3, 3, padding=1, stride=2))


def test_a_bias_of_zeros_is_no_shift() -> None:
    first = conv(4, 6, 1)
    nn.init.zeros_(first.bias)
    assert_exact(first, conv(6, 3, 3, padding=1))


def test_one_tap_with_a_shift_is_wrong_on_the_border_alone() -> None:
    assert_interior(conv(4, 6, 1), conv(6, 3, 3, padding=1), (1, 1))


def test_a_batch_norm_counts_as_a_shift() -> None:
    folded = compose(conv(4, 6, 1, bias=False), norm(6)).module
    assert_interior(folded, conv(6, 3, 3, padding=1), (1, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_several_taps_before_padding_are_wrong_on_the_border(bias: bool) -> None:
    assert_interior(conv(4, 6, 3, padding=1, bias=bias), conv(6, 3, 3, padding=1), (1, 1))


@pytest.mark.parametrize(("padding", "stride", "ring"), [(1, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_the_border_is_as_wide_as_the_second_padding_over_its_stride(
    padding: int, stride: int, ring: int
) -> None:
    second = conv(6, 3, 5, padding=padding, stride=stride)
    folded = assert_interior(conv(4, 6, 3, padding=1, bias=False), second, (ring, ring))
    assert folded.module.padding == (1 + padding, 1 + padding)


def test_a_first_layer_padded_to_the_full_sees_nothing_beyond_its_edge() -> None:
    assert_exact(conv(4, 6, 3, padding=2, bias=False), conv(6, 3, 3, padding=1))


def test_only_the_padded_axis_has_a_border() -> None:
    folded = compose(conv(4, 6, 3), conv(6, 3, 3, padding=(0, 1)))
    assert folded.certificate.border == (0, 1)


def test_a_bias_map_is_exact_for_one_size() -> None:
    first, second = conv(4, 6, 1), conv(6, 3, 3, padding=1, stride=2)
    folded = compose(first, second, size=(11, 14), fixed=True)
    assert folded.certificate.kind == "exact"
    assert folded.certificate.size == (11, 14)
    assert isinstance(folded.module[1], BiasMap)
    assert off(first, second, folded, inputs(*ODD)).max() < 1e-12


def test_a_bias_map_refuses_another_size() -> None:
    folded = compose(conv(4, 6, 1), conv(6, 3, 3, padding=1), size=(5, 5), fixed=True)
    with pytest.raises(StructureError, match=r"bias map of size \(5, 5\) met \(11, 14\)"):
        folded.module(inputs(*ODD))


def test_patches_that_fill_the_input_leave_nothing_to_see_beyond() -> None:
    first, second = conv(4, 6, 2, stride=2, bias=False), conv(6, 3, 3, padding=1)
    assert compose(first, second).certificate.kind == "interior"
    folded = compose(first, second, size=(10, 14), fixed=True)
    assert folded.certificate.kind == "exact"
    assert isinstance(folded.module, nn.Conv2d)
    assert off(first, second, folded, inputs(2, 4, 10, 14)).max() < 1e-12


def test_no_map_of_biases_mends_what_depends_on_the_input() -> None:
    folded = compose(conv(4, 6, 3, padding=1), conv(6, 3, 3, padding=1), size=(9, 9), fixed=True)
    assert folded.certificate.kind == "interior"
    assert folded.certificate.size is None


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_copies_positions_is_exact_around_one_tap(mode: str) -> None:
    edge = conv(4, 4, 3, padding=2, padding_mode=mode)
    assert assert_exact(conv(4, 4, 1), edge).module.padding_mode == mode
    assert assert_exact(edge, conv(4, 4, 3)).module.padding_mode == mode


def test_padding_that_copies_positions_between_two_kernels_is_refused() -> None:
    with pytest.raises(StructureError, match="circular padding after zeros padding") as error:
        compose(conv(4, 4, 3), conv(4, 4, 3, padding=1, padding_mode="circular"))
    assert "kernel (3, 3)" in error.value.where


def test_padding_by_name_is_read_as_numbers() -> None:
    assert_exact(conv(4, 4, 3, padding="same"), conv(4, 4, 3, padding="valid"))


def test_padding_that_differs_at_the_ends_takes_up_a_norm_and_nothing_else() -> None:
    even = conv(4, 4, 4, padding="same")
    assert assert_exact(even, norm(4)).module.padding == "same"
    with pytest.raises(StructureError, match="differs at the two ends"):
        compose(even, conv(4, 4, 1, bias=False, stride=2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_batch_norm_folds_into_the_convolution_before_it(
    axes: int, affine: bool, bias: bool
) -> None:
    layer = norm(6, axes, affine=affine, eps=0.3)  # an eps of its own
    first = conv(4, 6, 3, axes=axes, padding=1, bias=bias)
    assert_exact(first, layer, 2, 4, *(7, 6, 5)[:axes])


def test_a_batch_norm_folds_into_the_layer_behind_it_where_that_does_not_pad() -> None:
    assert_exact(norm(4), conv(4, 6, 3, groups=2))
    assert_interior(norm(4), conv(4, 6, 3, padding=1), (1, 1))


def test_a_batch_norm_that_maps_zero_to_zero_folds_in_front_of_padding() -> None:
    layer = norm(4)
    with torch.no_grad():
        layer.running_mean.zero_()
        layer.bias.zero_()
    assert_exact(layer, conv(4, 6, 3, padding=1))


def test_a_batch_norm_folds_into_a_dense_layer_on_either_side() -> None:
    first, second = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    assert_exact(first, norm(6, 1), 5, 4)
    assert_exact(norm(6, 1), second, 5, 6)
    assert_exact(first, second, 5, 7, 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_folds_into_a_transposed_convolution(groups: int) -> None:
    first = nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=groups).double()
    assert_exact(first, norm(6))


def test_depthwise_after_depthwise_stays_depthwise() -> None:
    folded = assert_exact(conv(4, 4, 3, groups=4, padding=1), conv(4, 4, 3, groups=4))
    assert folded.module.groups == 4
    assert folded.module.weight.shape == (4, 1, 5, 5)


@pytest.mark.parametrize(("g1", "g2", "groups"), [(2, 4, 2), (4, 2, 2), (1, 4, 1), (4, 6, 2)])
def test_groups_keep_what_both_keep_apart(g1: int, g2: int, groups: int) -> None:
    folded = assert_exact(conv(4, 12, 3, groups=g1), conv(12, 12, 2, groups=g2))
    assert folded.module.groups == groups


def test_dilation_is_kept_where_all_taps_lie_on_it() -> None:
    folded = assert_exact(conv(4, 4, 3, dilation=2), conv(4, 4, 3, dilation=4), 2, 4, 15, 17)
    assert (folded.module.dilation, folded.module.kernel_size) == ((2, 2), (7, 7))
    folded = assert_exact(conv(4, 4, 3, dilation=3), conv(4, 4, 1, dilation=5))
    assert (folded.module.dilation, folded.module.kernel_size) == ((3, 3), (3, 3))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d((3, 2), stride=1, padding=1),
        nn.AvgPool2d(3, 2, divisor_override=5),
        nn.AvgPool2d(2, count_include_pad=False),
    ],
)
def test_average_pooling_is_a_depthwise_convolution(pool: nn.Module) -> None:
    layer = conv(4, 6, 3, bias=False)
    assert_exact(pool, layer)
    if not pool.padding:
        assert_exact(layer, pool)


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, padding=1, count_include_pad=False)],
)
def test_average_pooling_over_fewer_positions_at_the_border_is_refused(pool: nn.Module) -> None:
    with pytest.raises(StructureError, match="averages at the border are over fewer positions"):
        compose(conv(4, 6, 3), pool)


def test_global_pooling_moves_in_front_of_one_tap() -> None:
    layer, pool = conv(4, 6, 1), nn.AdaptiveAvgPool2d(1)
    folded = commuted(layer, pool)
    assert off(layer, pool, folded, inputs(*ODD)).max() < 1e-12
    with pytest.raises(StructureError, match="do not commute"):
        commuted(conv(4, 6, 1, stride=2), pool)
    with pytest.raises(StructureError, match="do not commute"):
        commuted(layer, nn.AdaptiveAvgPool2d(2))


@pytest.mark.parametrize(
    ("taps", "padding", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 2, 2), (1, 0, 1)]
)
@pytest.mark.parametrize("groups", [1, 4])
@torch.no_grad()
def test_a_residual_addition_folds_into_its_branch(
    taps: int, padding: int, dilation: int, groups: int
) -> None:
    branch = conv(4, 4, taps, padding=padding, dilation=dilation, groups=groups)
    folded, x = with_shortcut(branch), inputs(*ODD)
    torch.testing.assert_close(folded.module(x), branch(x) + x)
    assert folded.module.dilation == (dilation, dilation)


@pytest.mark.parametrize("padding", [1, 2])
@torch.no_grad()
def test_a_projection_lands_on_the_tap_that_the_padding_names(padding: int) -> None:
    taps = 2 * padding + 1
    branch = conv(4, 6, taps, padding=padding, stride=2, bias=False)
    shortcut, x = conv(4, 6, 1, stride=2), inputs(*ODD)
    for pair in ((branch, shortcut), (shortcut, branch)):
        folded = with_shortcut(*pair)
        torch.testing.assert_close(folded.module(x), branch(x) + shortcut(x))
        assert folded.module.padding == (padding, padding)


def test_branches_of_different_sizes_do_not_add() -> None:
    with pytest.raises(StructureError, match="do not add up to one layer"):
        with_shortcut(conv(4, 4, 3))


@torch.no_grad()
def test_a_branch_of_zeros_is_a_constant_that_the_next_layer_takes_up() -> None:
    branch, layer, x = conv(4, 4, 3, padding=1), conv(4, 6, 3), inputs(*ODD)
    assert constant(branch) is None
    assert constant(nn.ReLU()) is None
    nn.init.zeros_(branch.weight)
    value = constant(branch)
    new = absorbed(layer, torch.ones(4), value)
    torch.testing.assert_close(new(x), layer(x + branch(x)))


def test_a_constant_is_not_taken_up_across_padding() -> None:
    with pytest.raises(StructureError, match="takes up no shift exactly") as error:
        absorbed(conv(4, 6, 3, padding=1), torch.ones(4), torch.ones(4))
    assert "reorder_padding" in error.value.fix


def test_folding_writes_neither_layer() -> None:
    first, second = conv(4, 6, 3), norm(6)
    before = copy.deepcopy([m.state_dict() for m in (first, second)])
    folded = compose(first, second).module
    with torch.no_grad():
        folded.weight.zero_()
    for old, module in zip(before, (first, second), strict=True):
        torch.testing.assert_close(dict(module.state_dict()), dict(old), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_new_layer_keeps_dtype_layout_mode_and_gradient_flag(dtype: torch.dtype) -> None:
    first = conv(4, 6, 3).to(dtype=dtype, memory_format=torch.channels_last).eval()
    first.requires_grad_(False)
    folded = compose(first, norm(6).to(dtype)).module
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.training
    assert not folded.weight.requires_grad


def test_arithmetic_is_rounded_once() -> None:
    torch.manual_seed(3)
    first, second = conv(4, 64, 3), conv(64, 4, 3)
    exact = compose(first, second).module.weight
    first, second = first.float(), second.float()
    rounded = compose(first.double(), second.double()).module.weight.float()
    assert torch.equal(compose(first.float(), second.float()).module.weight, rounded)
    assert (exact - rounded).abs().max() < 1e-6


def test_costs_are_counted_before_and_after() -> None:
    folded = compose(
        conv(8, 8, 3, bias=False), conv(8, 8, 3, bias=False), size=(12, 12)
    ).certificate
    assert (folded.params.before, folded.params.after) == (2 * 9 * 64, 25 * 64)
    assert (folded.macs.before, folded.macs.after) == (9 * 64 * (100 + 64), 25 * 64 * 64)
    assert compose(conv(8, 8, 3), norm(8)).certificate.macs is None


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3)), "4 channels do not fit 5"),
        ((nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), "slide over different axes"),
        ((nn.Conv2d(3, 4, 3), nn.ReLU()), "ReLU does not fold"),
        ((nn.BatchNorm2d(4), nn.BatchNorm2d(4)), "a BatchNorm2d and a BatchNorm2d do not fold"),
        ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "each batch"),
        ((nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 1)), "only a scale and a shift"),
        ((nn.Linear(3, 4), nn.Linear(4, 4).half()), "differ in dtype or device"),
    ],
)
def test_what_does_not_fold_says_why(pair: tuple[nn.Module, nn.Module], words: str) -> None:
    with pytest.raises(StructureError, match=words) as error:
        compose(*pair)
    assert error.value.fix


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StructureError, match="fixed=True came without a size"):
        compose(conv(4, 4, 1), conv(4, 4, 3, padding=1), fixed=True)
    with pytest.raises(StructureError, match=r"size \(9,\) has 1 axes, the layers slide over 2"):
        compose(conv(4, 4, 1), conv(4, 4, 1), size=(9,))


def test_a_layer_that_is_not_as_torch_made_it_is_refused() -> None:
    class Mine(nn.Conv2d):
        """Overrides nothing yet."""

    hooked = conv(4, 4, 1)
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(conv(4, 4, 1))
    for layer, words in (
        (Mine(4, 4, 1).double(), "Mine has a forward of its own"),
        (hooked, "it carries hooks"),
        (normed, "its weights are parametrised"),
    ):
        with pytest.raises(StructureError, match=words):
            compose(layer, norm(4))


small = st.integers(1, 3)
layers = st.fixed_dictionaries(
    {
        "taps": st.tuples(small, small),
        "stride": st.tuples(small, small),
        "dilation": st.tuples(small, small),
        "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "groups": st.sampled_from([1, 2, 4]),
        "bias": st.booleans(),
    }
)


@given(a=layers, b=layers, size=st.tuples(st.integers(8, 17), st.integers(8, 17)))
def test_every_pair_keeps_the_promise_of_its_certificate(
    a: dict[str, Any], b: dict[str, Any], size: tuple[int, int]
) -> None:
    first, second = (
        conv(4, 4, d["taps"], **{k: v for k, v in d.items() if k != "taps"}) for d in (a, b)
    )
    x = inputs(2, 4, *size)
    try:
        second(first(x))
    except RuntimeError:
        assume(False)
    for folded in (compose(first, second), compose(first, second, size=size, fixed=True)):
        certificate = folded.certificate
        error = off(first, second, folded, x)
        error = inner(error, certificate.border) if certificate.kind == "interior" else error
        assert error.numel() == 0 or error.max() < 1e-12
