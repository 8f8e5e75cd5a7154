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
    Perceptron,
    Skip,
    Wiring,
    Zero,
    check_wiring,
    wired,
)
from torch_otprune.structure.flow import Visit
from torch_otprune.structure.wiring import stream_of, wiring_of

TOKENS, PICTURE = (2, 5, 6), (2, 6, 4, 4)
STANDINS: dict[str, Callable[[], nn.Module]] = {
    "skip": Skip,
    "zero": lambda: Zero(6),
    "scale": lambda: ChannelScale(6),
    "low_rank": lambda: LowRank(6, 2),
    "hidden": lambda: Perceptron(6, 4),
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


@pytest.mark.parametrize(
    "build", [lambda: ChannelScale(6), lambda: LowRank(6, 2), lambda: Perceptron(6, 4)]
)
def test_what_has_parameters_starts_as_the_identity(build: Callable[[], nn.Module]) -> None:
    x = tokens()
    torch.testing.assert_close(build().double()(x), x, rtol=0, atol=0)


def test_two_units_of_opposite_sign_make_a_linear_map() -> None:
    low, bent = LowRank(6, 2).double(), Perceptron(6, 4).double()
    low.up.data.normal_()
    with torch.no_grad():
        bent.up.copy_(torch.cat([low.up, -low.up], dim=1))
        bent.down.copy_(torch.cat([low.down, -low.down]))
    x = tokens()
    torch.testing.assert_close(bent(x), low(x))


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
        (Perceptron(4, 2, 1), "Perceptron(4, hidden=2, axis=1)"),
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
    args: tuple[Any, ...] = (tokens(), torch.arange(2), torch.arange(3))
    kwargs = {"mask": torch.arange(4), "memory": torch.arange(5)}
    values = {**dict(enumerate(args)), **kwargs, None: None}
    output = tuple(args[0] + 1 if e == 0 else values[e] for e in order)
    wiring = described(args, kwargs, output)
    assert wiring is not None
    returned = wired(wiring, output[order.index(0)], args, kwargs)
    assert all(a is b for a, b in zip(returned, output, strict=True))


def described(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, stream: bool = True
) -> Wiring | None:
    return wiring_of(Visit("", 0, args, kwargs, {}, output=output), stream=stream)


def test_a_block_that_does_nothing_still_returns_its_stream() -> None:
    x = tokens()
    assert described((x,), {}, x) == "tensor"
    assert described((x,), {}, (x, None)) == ("x", None)


def test_what_a_branch_hands_out_besides_comes_back_as_none() -> None:
    x = tokens()
    assert described((x,), {}, (x[..., :3], torch.ones(2, 2)), stream=False) == ("x", None)


@pytest.mark.parametrize(
    "output",
    [
        (torch.ones(TOKENS), torch.ones(2, 3)),  # a side output
        {"a": torch.ones(TOKENS)},
        (torch.arange(2), torch.ones(TOKENS)),
    ],
)
def test_what_no_stand_in_could_return_has_no_wiring(output: Any) -> None:
    assert described((tokens(),), {}, output) is None


def test_an_input_that_is_called_x_is_not_taken_for_the_stream() -> None:
    first, second = tokens(), torch.ones(2)
    assert described((first,), {"x": second}, (first + 1, second)) is None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.ones(2), torch.zeros(2)), {}),
        ((torch.arange(2), torch.ones(2)), {}),
        ((), {"mask": torch.zeros(2), "hidden_states": torch.ones(2)}),
        ((None,), {"states": torch.ones(2)}),
        ((torch.ones(2, dtype=torch.complex64),), {"states": torch.ones(2)}),
    ],
)
def test_the_stream_is_the_first_floating_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    found = stream_of(args, kwargs)
    assert found is not None
    torch.testing.assert_close(found, torch.ones(2))


# -- errors -----------------------------------------------------------------------------


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
        (lambda: Perceptron(4, 0), "hidden is 0."),
    ],
)
def test_a_size_that_is_none_is_refused(build: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(StructureError) as caught:
        build()
    assert caught.value.problem == problem
