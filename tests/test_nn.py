"""Stand-ins for blocks: what they return, and that they are ordinary modules."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from torch_otprune.errors import StructureError
from torch_otprune.nn import (
    ChannelScale,
    LowRank,
    Skip,
    Zero,
    check_wiring,
    stream_of,
    wired,
    wiring_of,
)

TOKENS, PICTURE = (2, 5, 6), (2, 6, 4, 4)
STANDINS: dict[str, Callable[[], nn.Module]] = {
    "skip": Skip,
    "zero": lambda: Zero(6),
    "scale": lambda: ChannelScale(6),
    "low_rank": lambda: LowRank(6, 2),
}


@pytest.fixture(params=sorted(STANDINS))
def standin(request: pytest.FixtureRequest) -> nn.Module:
    """Each stand-in, with parameters that do something."""
    module = STANDINS[request.param]().double()
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def tokens() -> Tensor:
    return torch.randn(TOKENS, dtype=torch.float64)


# -- what they compute ------------------------------------------------------------------


def test_a_skip_hands_its_input_on_untouched() -> None:
    x = tokens()
    assert Skip()(x) is x


@pytest.mark.parametrize(
    ("shape", "axis", "expected"), [(TOKENS, -1, (2, 5, 3)), (PICTURE, 1, (2, 3, 4, 4))]
)
def test_a_zero_has_its_own_width_on_the_channel_axis(
    shape: tuple[int, ...], axis: int, expected: tuple[int, ...]
) -> None:
    out = Zero(3, axis=axis)(torch.ones(shape, dtype=torch.float64))
    torch.testing.assert_close(out, torch.zeros(expected, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_scale_scales_and_shifts_every_channel(axis: int) -> None:
    module, x = ChannelScale(6, axis).double(), torch.randn(2, 6, 6, 6, dtype=torch.float64)
    module.scale.data.normal_()
    module.shift.data.normal_()
    rows = x.movedim(axis, -1) * module.scale + module.shift
    torch.testing.assert_close(module(x), rows.movedim(-1, axis))


def test_a_scale_keeps_the_memory_format() -> None:
    x = torch.randn(PICTURE).to(memory_format=torch.channels_last)
    assert ChannelScale(6, 1)(x).is_contiguous(memory_format=torch.channels_last)
    assert ChannelScale(6, 1)(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_low_rank_map_adds_up_down_x_and_the_bias(axis: int) -> None:
    module, x = LowRank(6, 2, axis).double(), torch.randn(2, 6, 6, 6, dtype=torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_()
    rows = x.movedim(axis, -1)
    expected = rows + rows @ (module.up @ module.down).T + module.bias
    torch.testing.assert_close(module(x), expected.movedim(-1, axis))


@pytest.mark.parametrize("build", [lambda: ChannelScale(6), lambda: LowRank(6, 2)])
def test_what_has_parameters_starts_as_the_identity(build: Callable[[], nn.Module]) -> None:
    x = tokens()
    torch.testing.assert_close(build().double()(x), x, rtol=0, atol=0)


def test_a_low_rank_map_can_be_trained_from_its_start() -> None:
    module = LowRank(6, 2)
    module(torch.randn(TOKENS)).pow(2).sum().backward()
    assert module.up.grad is not None
    assert module.up.grad.abs().max() > 0


# -- they are ordinary modules ----------------------------------------------------------


def test_a_skip_and_a_zero_add_nothing_to_a_state_dict() -> None:
    assert not nn.Sequential(Skip(), Zero(3)).state_dict()


def test_a_copy_and_a_pickle_compute_the_same(standin: nn.Module) -> None:
    x = tokens()
    for twin in (copy.deepcopy(standin), pickle.loads(pickle.dumps(standin))):
        torch.testing.assert_close(twin(x), standin(x), rtol=0, atol=0)


def test_an_exported_program_computes_the_same(standin: nn.Module) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = standin

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(hidden_states=x, mask=None) + 1
            return out

    x, block = tokens(), Block()
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_one_graph(standin: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6).double(), standin), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("build", [Skip, lambda: ChannelScale(6), lambda: LowRank(6, 2)])
def test_a_symbolic_trace_goes_through(build: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), build()).double(), tokens()
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Skip(), "Skip()"),
        (Skip(("x", None, 2)), "Skip(wiring=('x', None, 2))"),
        (Zero(3, ("x", None), axis=1), "Zero(3, axis=1, wiring=('x', None))"),
        (ChannelScale(4), "ChannelScale(4)"),
        (LowRank(4, 2, 1), "LowRank(4, rank=2, axis=1)"),
    ],
)
def test_the_repr_says_what_is_not_default(module: nn.Module, text: str) -> None:
    assert repr(module) == text


# -- wiring -----------------------------------------------------------------------------


def test_every_stand_in_returns_the_structure_of_its_block(standin: nn.Module) -> None:
    x, bias = tokens(), torch.ones(1)
    standin.wiring = check_wiring(("x", None, "bias", 1))
    out = standin(x, "second", bias=bias)
    assert type(out) is tuple
    assert out[1:] == (None, bias, "second")
    assert out[0].shape == x.shape


def test_an_input_that_is_absent_comes_back_as_none() -> None:
    x = tokens()
    assert Skip(("x", "bias", 3))(x) == (x, None, None)


ENTRIES = st.one_of(st.none(), st.integers(0, 4), st.text(min_size=1).filter(lambda t: t != "x"))


@given(st.lists(ENTRIES, max_size=4), st.integers(0, 4))
def test_a_wiring_survives_json(others: list[str | int | None], place: int) -> None:
    wiring = check_wiring([*others[:place], "x", *others[place:]])
    assert check_wiring(json.loads(json.dumps(wiring))) == wiring


@given(st.permutations([0, 1, 2, "mask", "memory", None]))
def test_what_a_wiring_describes_is_what_the_stand_in_returns(order: list[Any]) -> None:
    args: tuple[Any, ...] = (tokens(), torch.ones(2), torch.arange(3))
    kwargs = {"mask": torch.zeros(2), "memory": tokens()}
    values = {**dict(enumerate(args)), **kwargs, None: None}
    output = tuple(args[0] + 1 if e == 0 else values[e] for e in order)
    wiring = wiring_of(args, kwargs, output)
    returned = wired(wiring, output[order.index(0)], args, kwargs)
    assert all(a is b for a, b in zip(returned, output, strict=True))


def test_a_memory_of_the_stream_s_shape_is_not_taken_for_the_stream() -> None:
    x, memory = tokens(), tokens()
    assert wiring_of((x, memory), {}, (memory, x + 1)) == (1, "x")


def test_a_block_that_does_nothing_still_returns_its_stream() -> None:
    x = tokens()
    assert wiring_of((x,), {}, x) == "tensor"
    assert wiring_of((x,), {}, (x, None)) == ("x", None)


def test_a_branch_may_write_another_width() -> None:
    x = tokens()
    assert wiring_of((x,), {}, (x[..., :3].clone(), None), branch=True) == ("x", None)


def test_attention_weights_that_nobody_reads_come_back_as_none() -> None:
    x = tokens()
    assert wiring_of((x,), {}, (x + 1, torch.ones(2, 2)), unread=(1,)) == ("x", None)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(2), torch.zeros(2)), {}),
        ((torch.arange(2), torch.ones(2)), {}),
        ((), {"mask": torch.zeros(2), "hidden_states": torch.ones(2)}),
        ((None,), {"states": torch.ones(2)}),
    ],
)
def test_the_stream_is_the_first_floating_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    torch.testing.assert_close(stream_of(args, kwargs), torch.ones(2))


# -- errors -----------------------------------------------------------------------------


def test_a_side_output_is_named() -> None:
    x = tokens()
    with pytest.raises(StructureError) as caught:
        wiring_of((x,), {}, (x + 1, torch.ones(2, 3)))
    assert str(caught.value) == (
        "entry 1 of the block's return value is a (2, 3) tensor of torch.float32, neither its "
        "stream nor one of its inputs.\n"
        "  where: a block whose stream has shape (2, 5, 6)\n"
        "  fix:   keep this block, or turn the side output off in the model's configuration."
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"a": 1}, "of type dict"),
        ((torch.ones(2),), "a tuple of a (2,) tensor of torch.float32"),
        (torch.ones(3), "a (3,) tensor of torch.float32"),
        ((), "a tuple of nothing"),
    ],
)
def test_a_block_that_does_not_return_its_stream_is_refused(output: Any, said: str) -> None:
    with pytest.raises(StructureError, match="the block returns") as caught:
        wiring_of((tokens(),), {}, output)
    assert said in caught.value.problem


def test_an_input_called_x_that_is_not_the_stream_is_refused() -> None:
    first, second = tokens(), torch.ones(2)
    with pytest.raises(StructureError, match="entry 1"):
        wiring_of((first,), {"x": second}, (first + 1, second))


def test_a_block_without_a_stream_is_refused() -> None:
    with pytest.raises(StructureError, match="given no floating tensor") as caught:
        Skip()(torch.arange(3), mask=None)
    assert caught.value.where == "a call with 1 positional inputs and the names ['mask']"


@pytest.mark.parametrize(
    "wiring", ["x", "", (), (None,), ("x", "x"), ("x", -1), ("x", True), ("x", 1.0)]
)
def test_a_wiring_that_says_nothing_is_refused(wiring: Any) -> None:
    with pytest.raises(StructureError, match="does not say how a block returns its stream"):
        Skip(wiring)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: Zero(0), "size is 0."),
        (lambda: Zero(2, axis=2), "the channel axis is 2."),
        (lambda: ChannelScale(True), "channels is True."),
        (lambda: LowRank(4, -1), "rank is -1."),
    ],
)
def test_a_size_that_is_none_is_refused(build: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(StructureError) as caught:
        build()
    assert caught.value.problem == problem
