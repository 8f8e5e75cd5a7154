"""Every activation is found, with the layers around it, and with why it could not become linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import CASES
from torch_otprune.structure import trace
from torch_otprune.structure.flow import flow
from torch_otprune.structure.graph import Site
from torch_otprune.structure.sites import find_sites, sites_in

MODULES: dict[str, Callable[[], nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leakyrelu": nn.LeakyReLU,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, 0.0),
}
CALLS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", F.relu),
    "F.relu in place": ("relu", lambda x: F.relu(x, inplace=True)),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "x.relu()": ("relu", lambda x: x.relu()),
    "x.relu_()": ("relu", lambda x: x.relu_()),
    "F.relu6": ("relu6", F.relu6),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu by keyword": ("gelu", lambda x: F.gelu(input=x, approximate="tanh")),
    "F.silu": ("silu", F.silu),
    "F.leaky_relu": ("leakyrelu", F.leaky_relu),
    "F.leaky_relu_": ("leakyrelu", F.leaky_relu_),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.elu": ("elu", F.elu),
    "F.softplus": ("softplus", F.softplus),
    "F.mish": ("mish", F.mish),
    "F.logsigmoid": ("logsigmoid", F.logsigmoid),
    "F.threshold": ("threshold", lambda x: F.threshold(x, 0.1, 0.0)),
    "torch.tanh": ("tanh", torch.tanh),
    "x.sigmoid()": ("sigmoid", lambda x: x.sigmoid()),
}


class Calls(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


class Part(nn.Module):
    """A module whose forward is a function of its first argument."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def sites(model: nn.Module, *shape: int) -> dict[str, Site]:
    """List the activations of a model by name."""
    found = find_sites(model, flow(model.eval(), torch.randn(shape)))
    assert len({site.name for site in found}) == len(found)
    return {site.name: site for site in found}


def only(model: nn.Module, *shape: int) -> Site:
    """Take the one activation of a model."""
    (site,) = sites(model, *shape).values()
    return site


# what is found


@pytest.mark.parametrize("function", MODULES)
def test_every_activation_module_is_a_site(function: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), MODULES[function](), nn.Linear(6, 2))
    site = only(model, 4, 3)
    assert (site.name, site.module, site.within, site.functional) == ("1", "1", "", False)
    assert (site.function, site.ordinal, site.calls) == (function, 1, 1)
    assert (site.channels, site.axis, site.norm) == (6, -1, None)
    assert (site.producer, site.readers, site.others) == ("0", ("2",), False)
    assert bool(site.reason) == bool(site.fix) == (function == "prelu")


@pytest.mark.parametrize("call", CALLS)
def test_every_activation_function_is_a_site_of_the_same_make(call: str) -> None:
    name, function = CALLS[call]
    site = only(Calls(function), 4, 3)
    assert (site.name, site.module, site.within, site.functional) == (f":{name}", "", "", True)
    assert (site.function, site.ordinal, site.calls, site.channels) == (name, 1, 1, 6)
    assert (site.producer, site.readers, site.others) == ("up", ("down",), False)


def test_functions_are_counted_per_module_and_in_order_of_execution() -> None:
    def inner(self: nn.Module, x: Tensor) -> Tensor:
        return F.relu(F.gelu(F.relu(self.lin(x))))  # type: ignore[operator]

    def outer(self: nn.Module, x: Tensor) -> Tensor:
        return F.relu(self.inner(F.relu(x)))  # type: ignore[operator]

    model = Part(outer, inner=Part(inner, lin=nn.Linear(3, 3)))
    names = [":relu", "inner:relu", "inner:gelu", "inner:relu#2", ":relu#2"]
    assert list(sites(model, 2, 3)) == names
    assert [s.ordinal for s in sites(model, 2, 3).values()] == [1, 1, 1, 2, 2]


def test_a_module_of_its_own_that_bends_every_value_is_an_activation() -> None:
    swish = Part(lambda self, x: x * torch.sigmoid(x))
    assert only(nn.Sequential(nn.Linear(3, 4), swish, nn.Linear(4, 2)), 2, 3).function == "part"


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: 2 * x + 1,
        lambda self, x: x / x.pow(2).mean(-1, keepdim=True).sqrt(),
        lambda self, x: x.clamp(-1, 1)[..., :2],
    ],
    ids=["a line", "a norm", "a slice"],
)
def test_a_module_that_is_linear_or_mixes_or_cuts_is_none(
    function: Callable[..., Tensor],
) -> None:
    assert not sites(nn.Sequential(nn.Linear(3, 4), Part(function)), 2, 3)


def test_a_function_of_a_parameter_alone_is_none() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.lin = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(F.relu(self.lin(x)) * F.softplus(self.scale))

    found = sites(Scaled(), 2, 3)
    assert list(found) == [":relu", ":softplus#2"]
    assert found[":relu"].reason == "functional F.relu in Scaled.forward"


def test_the_graph_of_a_model_lists_its_activations() -> None:
    case = CASES["residual"]
    model, batch = case.model(), case.batch(2)
    assert trace(model, batch).sites == find_sites(model, flow(model, batch))
    assert len(trace(model, batch).sites) == 5


# what is around it


def test_a_batch_norm_writes_an_input_only_where_nothing_comes_between() -> None:
    found = sites(CASES["residual"].model().float(), 2, 3, 8, 8)
    first, last = found["blocks.1.relu"], found["blocks.1.relu#2"]
    assert (first.norm, first.producer) == ("blocks.1.norm1", "blocks.1.conv1")
    assert (first.readers, first.others) == (("blocks.1.conv2",), False)
    assert (last.norm, last.producer) == (None, None)  # behind the addition


def test_a_shortcut_is_another_reader() -> None:
    found = sites(CASES["residual"].model().float(), 2, 3, 8, 8)
    assert found[":relu"].readers == ("blocks.0.conv1",)
    assert found[":relu"].others
    # the second block's shortcut is a layer
    last = found["blocks.0.relu#2"]
    assert (last.readers, last.others) == (("blocks.1.conv1", "blocks.1.short.0"), False)


@pytest.mark.parametrize(
    ("between", "norm"),
    [
        ([nn.BatchNorm1d(4)], "1"),
        ([nn.BatchNorm1d(4), nn.Dropout()], "1"),
        ([nn.BatchNorm1d(4), nn.LayerNorm(4)], None),
        ([nn.LayerNorm(4), nn.BatchNorm1d(4)], "2"),
        ([nn.LayerNorm(4)], None),
        ([nn.Dropout(), nn.Identity()], None),
    ],
)
def test_norms_and_dropouts_lead_back_to_the_layer(
    between: list[nn.Module], norm: str | None
) -> None:
    site = only(nn.Sequential(nn.Linear(3, 4), *between, nn.ReLU()), 2, 3)
    assert (site.norm, site.producer) == (norm, "0")
    assert site.others  # the model returns it


def test_an_op_between_leads_nowhere() -> None:
    model = Part(lambda self, x: F.relu(self.lin(x) * 2), lin=nn.Linear(3, 4))
    assert only(model, 2, 3).producer is None


@pytest.mark.parametrize(
    ("between", "features"),
    [
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], 5),
        ([nn.MaxPool2d(2), nn.Flatten()], 20),
        ([nn.Dropout(), nn.Flatten()], 80),
        ([Part(lambda self, x: x.mean((2, 3)))], 5),
        ([Part(lambda self, x: x.reshape(len(x), -1))], 80),
    ],
)
def test_pooling_and_flattening_lead_on_to_the_reader(
    between: list[nn.Module], features: int
) -> None:
    rest = [nn.Linear(features, 2)]
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), *between, *rest)
    site = only(model, 2, 3, 4, 4)
    assert (site.readers, site.others) == ((str(len(model) - 1),), False)


def test_a_layer_that_reads_another_axis_is_no_reader_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Linear(4, 2))
    site = only(model, 2, 3, 4, 4)
    assert (site.readers, site.others) == ((), True)


@pytest.mark.parametrize(
    ("model", "shape", "axis", "channels"),
    [
        (nn.Sequential(nn.Conv1d(3, 5, 1), nn.ReLU()), (2, 3, 7), 1, 5),
        (nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (2, 7, 3), -1, 5),
        (nn.Sequential(nn.Linear(3, 5), nn.GELU()), (2, 7, 6, 3), -1, 5),
        (nn.Sequential(nn.ReLU(), nn.Conv1d(3, 5, 1)), (2, 3, 7), 1, 3),
        (nn.Sequential(nn.Conv3d(3, 5, 1), nn.ReLU()), (2, 3, 2, 2, 2), 1, 5),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.MaxPool2d(2), nn.ReLU()), (2, 3, 4, 4), 1, 5),
    ],
    ids=["signal", "tokens", "channels last", "in front", "volume", "pooled"],
)
def test_the_layers_around_tell_the_axis_of_the_channels(
    model: nn.Module, shape: tuple[int, ...], axis: int, channels: int
) -> None:
    site = only(model, *shape)
    assert (site.axis, site.channels) == (axis, channels)


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_a_transformer_layer_has_its_activation_between_its_two_linear_layers(
    module: bool,
) -> None:
    activation: Any = nn.GELU() if module else "gelu"
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    site = only(nn.Sequential(layer), 2, 5, 8)
    assert (site.within, site.function, site.channels, site.axis) == ("0", "gelu", 16, -1)
    assert (site.producer, site.readers) == ("0.linear1", ("0.linear2",))
    assert site.others is False


# what belongs to a block


class Bottleneck(nn.Module):
    """A residual block with an activation that the caller brings."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), act, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def test_an_activation_that_blocks_share_belongs_to_each_of_them_in_turn() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 6), *(Bottleneck(act) for _ in range(3)), nn.Linear(6, 2))
    graph = trace(model, torch.randn(2, 3))
    inside = {b.name: [s.name for s in sites_in(graph.sites, b)] for b in graph.blocks}
    assert inside == {"1": ["1.act"], "2": ["1.act#2"], "3": ["1.act#3"]}


def test_a_half_of_a_layer_has_the_activation_between_its_layers() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.attention(y, y, y)[0]
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    model = nn.Sequential(nn.Linear(3, 8), Halves(), Halves(), nn.Linear(8, 2))
    graph = trace(model, torch.randn(2, 4, 3))
    inside = {b.name: [s.name for s in sites_in(graph.sites, b)] for b in graph.blocks}
    assert inside["1"] == inside["1.down"] == ["1:gelu"]
    assert inside["2"] == inside["2.down"] == ["2:gelu"]
    assert inside["1.attention"] == []


# why not


def swiglu(self: nn.Module, x: Tensor) -> Tensor:
    """Gate one projection with another."""
    return self.act(self.gate(x)) * self.up(x)  # type: ignore[operator]


def excite(self: nn.Module, x: Tensor) -> Tensor:
    """Weigh every channel."""
    x = self.stem(x)  # type: ignore[operator]
    return x * self.act(self.squeeze(x.mean((2, 3), keepdim=True)))  # type: ignore[operator]


def capped(self: nn.Module, x: Tensor) -> Tensor:
    """Attend with scores that a tanh bounds."""
    scores = self.act(self.up(x) @ x.mT / 4) * 4  # type: ignore[operator]
    return self.soft(scores + torch.zeros(4, 4)) @ x  # type: ignore[operator]


def linear_attention(self: nn.Module, x: Tensor) -> Tensor:
    """Attend without a softmax."""
    return self.act(self.up(x)) @ x.mT @ x  # type: ignore[operator]


LEAVE = "leave it in: without it, a product of two streams is left."
REASONS: dict[str, tuple[nn.Module, tuple[int, ...], str, str, str]] = {
    "function": (
        Calls(F.leaky_relu),
        (2, 3),
        ":leakyrelu",
        "functional F.leaky_relu in Calls.forward",
        "write it as nn.LeakyReLU.",
    ),
    "repeated": (
        CASES["residual"].model().float(),
        (2, 3, 8, 8),
        "blocks.0.relu",
        "it runs 2 times per forward pass",
        "give every call a module of its own.",
    ),
    "state": (
        nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)),
        (2, 3),
        "1",
        "PReLU has a state of its own",
        "replace it by an activation without parameters, and train on.",
    ),
    "gate": (
        Part(swiglu, gate=nn.Linear(3, 4), up=nn.Linear(3, 4), act=nn.SiLU()),
        (2, 3),
        "act",
        "its output is multiplied with another stream",
        LEAVE,
    ),
    "excitation": (
        Part(excite, stem=nn.Conv2d(3, 4, 1), squeeze=nn.Conv2d(4, 4, 1), act=nn.Sigmoid()),
        (2, 3, 5, 5),
        "act",
        "its output is multiplied with another stream",
        LEAVE,
    ),
    "matrix": (
        Part(linear_attention, up=nn.Linear(3, 3), act=nn.ReLU()),
        (2, 4, 3),
        "act",
        "its output is multiplied with another stream, as a matrix",
        LEAVE,
    ),
    "scores": (
        Part(capped, up=nn.Linear(3, 3), act=nn.Tanh(), soft=nn.Softmax(-1)),
        (2, 4, 3),
        "act",
        "its output goes into a softmax",
        "leave it in: what a softmax reads is not folded into a linear layer.",
    ),
    "mixture": (
        Part(capped, up=nn.Linear(3, 3), act=nn.Tanh(), soft=nn.Softmax(-1)),
        (2, 4, 3),
        "soft",
        "softmax maps no value by itself",
        "leave it in: only an activation that bends single values can become linear.",
    ),
    "halves": (
        nn.Sequential(nn.Linear(3, 4), nn.GLU()),
        (2, 3),
        "1",
        "glu maps no value by itself",
        "leave it in: only an activation that bends single values can become linear.",
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_what_cannot_become_linear_says_why_and_what_would_help(why: str) -> None:
    model, shape, name, reason, fix = REASONS[why]
    site = sites(model, *shape)[name]
    assert (site.reason, site.fix) == (reason, fix)
    assert (site.channels == 0) == (why in {"matrix", "scores", "mixture", "halves"})


def test_what_a_gate_weighs_is_no_gate_itself() -> None:
    gate = nn.Conv2d(4, 4, 1)
    stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    site = sites(Part(excite, stem=stem, squeeze=gate, act=nn.Sigmoid()), 2, 3, 5, 5)["stem.1"]
    assert (site.reason, site.others) == ("", True)


def test_a_layer_scale_or_a_head_with_a_softmax_is_no_gate() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.down(self.act(self.up(x)) * self.scale), -1)

    assert sites(Head(), 2, 3)["act"].reason == ""
