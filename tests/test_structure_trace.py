"""What is found in a model: groups, blocked channels, costs, and models that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import CASES, Residual, cut, outputs, random_cuts
from torch_otprune.errors import StructureError
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import Graph, Group, trace
from torch_otprune.structure.layers import is_depthwise, is_linear
from torch_otprune.surgery import cut_


def traced(name: str) -> tuple[nn.Module, Any, Graph]:
    """Build a case and analyse it."""
    model, batch = CASES[name].model(), CASES[name].batch()
    return model, batch, trace(model, batch)


def names(group: Group, side: str) -> list[str]:
    """List the members on one side."""
    return [m.path for m in group.members if m.side == side]


def test_channels_added_up_live_and_die_together() -> None:
    _, _, graph = traced("residual")
    group = graph.group("blocks.1.conv2")
    assert names(group, "out") == ["blocks.1.conv2", "blocks.1.short.0"]
    assert names(group, "in") == ["head"]


def test_a_group_is_named_after_its_first_producer_in_order_of_execution() -> None:
    _, _, graph = traced("residual")
    assert list(graph.full()) == ["stem", "blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2"]


def test_a_flattened_channel_owns_all_its_positions() -> None:
    _, _, graph = traced("flatten")
    member = graph.group("0").consumers[0]
    assert member.index.tolist() == [list(range(9 * i, 9 * i + 9)) for i in range(6)]


def test_value_and_gate_of_a_chunk_go_together() -> None:
    _, _, graph = traced("gated")
    assert graph.group("conv").producers[0].index.tolist() == [[i, i + 6] for i in range(6)]


def test_a_normalisation_group_goes_whole() -> None:
    _, _, graph = traced("group_norm")
    assert graph.group("0").producers[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_grouped_convolution_loses_one_channel_of_every_group() -> None:
    _, _, graph = traced("grouped")
    assert graph.group("0").producers[0].index.tolist() == [[i, i + 4] for i in range(4)]
    assert graph.group("2").producers[0].index.tolist() == [[i, i + 6] for i in range(6)]


def test_a_depthwise_convolution_carries_channels() -> None:
    _, _, graph = traced("depthwise")
    assert names(graph.group("0"), "through") == ["1", "3", "4"]


def test_a_concatenation_keeps_its_parts_apart() -> None:
    _, _, graph = traced("concat")
    readers = {g.name: {m.path: m.index.min().item() for m in g.consumers} for g in graph.groups}
    assert readers["convs.1"] == {"convs.2": 7, "head": 7}


def test_bare_parameters_follow_the_channels_they_are_added_to() -> None:
    _, _, graph = traced("tokens")
    sizes = {m.path: m.size for m in graph.group("embed").members if m.side == "through"}
    assert sizes == {"place": 6, "scale": 6}


def test_a_dense_layer_on_tokens_is_no_obstacle() -> None:
    _, _, graph = traced("attention")
    assert names(graph.group("up"), "in") == ["down"]


@pytest.mark.parametrize(
    ("name", "member", "reason"),
    [
        ("plain", "10", "they reach the model's output"),
        ("option_a", "conv2", "they meet numbers that stay (op add"),
        ("attention", "q", "they only meet in a product of two activations"),
        ("tied", "head", "'embed.weight' and 'head.weight' are one tensor"),
    ],
)
def test_what_cannot_go_says_why(name: str, member: str, reason: str) -> None:
    _, _, graph = traced(name)
    assert any(member in b.modules and reason in b.reason and b.fix for b in graph.blocked)


@pytest.mark.parametrize("name", CASES)
def test_every_unit_owns_its_channels_alone(name: str) -> None:
    _, _, graph = traced(name)
    owned = [
        (m.path, m.side == "in", i)
        for g in graph.groups
        for m in g.members
        for i in m.index.flatten().tolist()
    ]
    assert len(owned) == len(set(owned))


@pytest.mark.parametrize("name", CASES)
def test_every_linear_layer_is_in_a_group_or_blocked(name: str) -> None:
    model, _, graph = traced(name)
    known = {m.path for g in graph.groups for m in g.members}
    known |= {path for b in graph.blocked for path in b.modules}
    assert {n for n, m in model.named_modules() if is_linear(m) or is_depthwise(m)} <= known


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_predicted_costs_are_those_of_the_smaller_model(name: str, seed: int) -> None:
    model, batch, graph = traced(name)
    cuts = random_cuts(graph, seed=seed)
    keep = graph.full() | {c.group: len(c.keep) for c in cuts}
    cut_(model, cuts)
    assert graph.costs["params"].at(keep) == count_params(model)
    assert graph.costs["macs"].at(keep) == count_macs(model, batch)


@pytest.mark.parametrize("name", CASES)
def test_the_batch_size_of_the_example_does_not_matter(name: str) -> None:
    case = CASES[name]
    one, many = (trace(case.model(), case.batch(n)) for n in (1, 6))
    assert one.costs == many.costs
    assert [b.reason for b in one.blocked] == [b.reason for b in many.blocked]


@pytest.mark.parametrize("name", CASES)
def test_analysis_leaves_no_trace(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    model.train()
    before, state, random = copy.deepcopy(model), marks(model), torch.get_rng_state()
    trace(model, batch)
    assert marks(model) == state
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def marks(model: nn.Module) -> list[tuple[object, ...]]:
    """Note all that an analysis might leave behind."""
    modules = [
        (n, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.named_modules()
    ]
    return [*modules, *((n, p.requires_grad, p.grad) for n, p in model.named_parameters())]


def test_a_frozen_trunk_can_be_cut() -> None:
    assert len(traced("frozen")[2].groups) == len(traced("plain")[2].groups)


def test_one_slope_for_all_channels_stays_one() -> None:
    model, batch, graph = traced("prelu")
    cut_(model, [cut(graph, "2", torch.tensor([0, 3]))])
    assert model.get_parameter("3.weight").shape == (1,)
    assert outputs(model, batch)[0].shape == (8, 5)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_in_space_is_followed(mode: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1, padding_mode=mode), nn.Conv2d(8, 4, 1)
    )
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert graph.group("0").units == 6
    assert graph.group("1").units == 8


class Grows(nn.Module):
    """Adds a module at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.add_module(f"extra{len(self._modules)}", nn.Identity())
        return self.fc(x)


class Replaces(Grows):
    """Makes its layer anew at every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.fc = nn.Linear(3, 3)
        return self.fc(x)


class Makes(Grows):
    """Makes a parameter at every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = nn.Parameter(torch.ones(3))
        return self.fc(x) * self.scale


class Asserts(Grows):
    """Raises what is no RuntimeError."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("width")


def compiled(whole: bool) -> nn.Module:
    """Compile a model in place, or a part of it by replacing it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if whole:
        model.compile(backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
    return model


def quantised() -> nn.Module:
    """A model with a layer whose class lives in a quantised package."""
    fake = type("Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.modules.linear"})
    return nn.Sequential(nn.Linear(3, 3), fake(3, 3))


BAD: dict[str, tuple[Any, Any, str]] = {
    "no parameters": (nn.ReLU, torch.zeros(2, 3), "has no parameters"),
    "half meta": (
        lambda: nn.Linear(3, 3, device="meta"),
        torch.zeros(2, 3),
        "the model is on meta and the example on cpu",
    ),
    "scripted": (
        lambda: torch.jit.trace(nn.Linear(3, 3), torch.zeros(2, 3)),
        torch.zeros(2, 3),
        "the model is scripted",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(3, 3)), torch.zeros(2, 3), "is compiled"),
    "quantised": (quantised, torch.zeros(2, 3), "'1' is a quantised Linear"),
    "wrong shape": (lambda: nn.Linear(3, 3), torch.zeros(2, 4), "does not run on the example"),
    "wrong kind": (lambda: nn.Linear(3, 3), "pixels", "does not run on the example"),
    "scripted part": (
        lambda: nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3))),
        torch.zeros(2, 3),
        "'1' is scripted.",
    ),
    "compiled in place": (lambda: compiled(True), torch.zeros(2, 3), "the model is compiled."),
    "compiled part": (lambda: compiled(False), torch.zeros(2, 3), "'1' is compiled."),
    "grows": (Grows, torch.zeros(2, 3), "or replaces them: extra1."),
    "replaces": (Replaces, torch.zeros(2, 3), "or replaces them: fc, fc.bias, fc.weight."),
    "makes": (Makes, torch.zeros(2, 3), "or replaces them: scale."),
    "asserts": (Asserts, torch.zeros(2, 3), "does not run on the example: width"),
    "no module": (lambda: None, torch.zeros(2, 3), "the model is of type NoneType."),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_analysed_is_refused(name: str) -> None:
    build, example, message = BAD[name]
    with pytest.raises(StructureError) as error:
        trace(build(), example)
    assert message in error.value.problem
    assert len(str(error.value).splitlines()) == 3


def test_a_layer_called_by_keyword_is_followed() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=torch.relu(self.a(input=x)))

    assert trace(Keywords(), torch.randn(4, 7, 3)).full() == {"a": 5}


def test_analysis_works_inside_inference_mode() -> None:
    model = CASES["residual"].model()
    with torch.inference_mode():
        graph = trace(model, CASES["residual"].batch())
    assert graph.full() == traced("residual")[2].full()


def test_a_default_device_does_not_matter() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    torch.set_default_device("meta")
    try:
        graph = trace(model, batch)
    finally:
        torch.set_default_device(None)
    assert graph.full() == traced("plain")[2].full()


def test_a_wrong_example_is_quoted_with_its_shape() -> None:
    with pytest.raises(StructureError) as error:
        trace(Residual(), torch.zeros(2, 4, 8, 8))
    assert "(2, 4, 8, 8)" in error.value.where
