"""MACs are those of every product of matrices, and predicted ones are those measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_otprune as otp
from tests.zoo.oracle import random_cut
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import Graph, batch_size, trace
from torch_otprune.structure.forward import evaluating, run
from torch_otprune.structure.products import plain
from torch_otprune.surgery import copied, cut_

TOKENS, WIDTH, CLASSES = 5, 12, 3


class Net(nn.Module):
    """Reads vectors, puts something in the middle, writes classes."""

    def __init__(self, middle: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.middle = nn.Linear(4, WIDTH), middle
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.embed(x))
        return self.head(y[0] if isinstance(y, tuple) else y)


class SelfAttention(nn.Module):
    """Torch's own attention, every token with every other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Bare(nn.Module):
    """A product with a weight of one's own, by a function."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Mixing(nn.Module):
    """Channels are positions of the layers that mix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(TOKENS, 7), nn.Linear(7, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.mT).relu()).mT


class EinsumHeads(nn.Module):
    """Heads and their dimensions are axes of the weights, which become one axis in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, 4, 3)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bthk,bshk->bhts", q, k).softmax(-1)
        return torch.einsum("bthk,hkd->btd", torch.einsum("bhts,bshk->bthk", scores, v), self.o)


class Convolutions(nn.Module):
    """Dense, depthwise, grouped and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.g, self.t = nn.Conv2d(8, 12, 1, groups=2), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.t(self.g(self.d(self.a(x).relu())).relu())
        return self.head(x.relu().mean((2, 3)))


def linear_twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(x, up).relu(), down)


def einsum_twice(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("btf,fd->btd", torch.einsum("btd,df->btf", x, up).relu(), down)


def encoder(**given: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 10, batch_first=True, **given)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Net(nn.LSTM(WIDTH, 6, batch_first=True), 6),
    "lstm of two layers": lambda: Net(nn.LSTM(WIDTH, 6, 2, batch_first=True), 6),
    "lstm with projections": lambda: Net(nn.LSTM(WIDTH, 6, proj_size=3, batch_first=True), 3),
    "gru both ways": lambda: Net(nn.GRU(WIDTH, 6, batch_first=True, bidirectional=True), 12),
    "rnn": lambda: Net(nn.RNN(WIDTH, 6, batch_first=True), 6),
    "attention": lambda: Net(SelfAttention()),
    "encoder": lambda: Net(encoder()),
    "encoder, norm first": lambda: Net(encoder(norm_first=True)),
    "bare weights": lambda: Net(Bare(linear_twice, (9, WIDTH), (WIDTH, 9))),
    "einsum": lambda: Net(Bare(einsum_twice, (WIDTH, 9), (9, WIDTH))),
    "einsum heads": lambda: Net(EinsumHeads()),
    "mixing tokens": lambda: Net(Mixing()),
    "convolutions": Convolutions,
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = NETS[name]().eval()
    return model, torch.randn(2, 3, 7, 7) if name == "convolutions" else torch.randn(2, TOKENS, 4)


def oracle(model: nn.Module, batch: Any) -> float:
    """Halve the operations that torch counts, of the plain ops."""
    with (
        evaluating(model),
        torch.no_grad(),
        plain(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        run(model, batch)
    return counter.get_total_flops() / 2 / batch_size(batch)


def smaller(
    model: nn.Module, graph: Graph, ratio: float, kinds: tuple[str, ...]
) -> tuple[nn.Module, dict[str, int]]:
    """Cut random units of all groups of some kinds on a copy."""
    generator = torch.Generator().manual_seed(1)
    cuts = [random_cut(g, ratio, generator) for g in graph.groups if g.kind in kinds]
    assert cuts, "the net must have something to cut"
    small = copied(model)
    cut_(small, cuts)
    return small, graph.full() | {cut.group: len(cut.keep) for cut in cuts}


@pytest.mark.parametrize("name", NETS)
def test_dense_macs_are_half_the_operations_that_torch_counts(name: str) -> None:
    model, batch = built(name)
    graph = trace(model, batch)
    assert graph.costs["macs"].at(graph.full()) == count_macs(model, batch) == oracle(model, batch)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", NETS)
def test_predicted_costs_are_those_of_the_smaller_model(name: str, ratio: float) -> None:
    model, batch = built(name)
    graph = trace(model, batch)
    found = [g.kind for g in graph.groups]
    for kinds in [*((kind,) for kind in dict.fromkeys(found)), tuple(found)]:
        small, keep = smaller(model, graph, ratio, kinds)
        assert graph.costs["params"].at(keep) == count_params(small)
        assert graph.costs["macs"].at(keep) == count_macs(small, batch) == oracle(small, batch)
        assert graph.costs["macs"].at(keep) < graph.costs["macs"].at(graph.full())


def test_macs_of_an_lstm_are_quadratic_in_its_units_at_every_step() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    graph = trace(Tagger(), torch.randn(3, 5, 4))
    (group,) = graph.groups
    for kept in (6, 4, 1):
        by_hand = 5 * (4 * kept * (4 + kept) + 2 * kept)
        assert graph.costs["macs"].at({group.name: kept}) == by_hand


def test_scores_and_means_cost_tokens_squared_for_every_head() -> None:
    model = Net(SelfAttention())
    for tokens in (5, 10):
        macs = trace(model, torch.randn(2, tokens, 4)).costs["macs"]
        own = [t for t in macs.terms if t.data]
        heads = {name for t in own for d in t.dims for name, _ in d.by_group}
        assert len(heads) == 1
        assert sum(t.at(dict.fromkeys(heads, 4)) for t in own) == 2 * tokens**2 * WIDTH
        assert sum(t.at(dict.fromkeys(heads, 1)) for t in own) == 2 * tokens**2 * WIDTH // 4


def test_dimensions_of_a_head_shorten_its_scores_alone() -> None:
    model, batch = built("einsum heads")
    graph = trace(model, batch)
    data = [t for t in graph.costs["macs"].terms if t.data]
    assert sum(t.at(graph.full()) for t in data) == 2 * TOKENS**2 * 4 * 3


def test_a_report_holds_what_its_plan_predicted_of_an_lstm_and_attention() -> None:
    for name in ("lstm of two layers", "encoder"):
        model, _ = built(name)
        batch = torch.randn(16, TOKENS, 4)
        rules = [otp.Channels(keep=0.5)] if "lstm" in name else [otp.Heads(keep=2)]
        report = otp.prune_(model, otp.Policy(rules=rules), [batch], timing=0)
        assert report.macs == report.plan.macs
        assert report.macs.after == count_macs(model, batch) == oracle(model, batch)
        assert report.macs.after < report.macs.before


def test_what_runs_twice_counts_twice_and_what_does_not_run_counts_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(self.a(x).relu()).relu())

    model, batch = Twice(), torch.randn(2, 4)
    graph = trace(model, batch)
    assert graph.costs["macs"].at(graph.full()) == count_macs(model, batch) == 2 * 16 + 8


def test_macs_are_counted_where_only_layers_may_go() -> None:
    model, batch = built("encoder")
    full, depth = trace(model, batch), trace(model, batch, channels=False)
    assert depth.costs["macs"].at({}) == full.costs["macs"].at(full.full())


def test_an_op_inside_inference_mode_is_counted_by_its_parts() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(nn.LSTM(WIDTH, 6, batch_first=True), 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.inner(x)

    model, batch = Inside().eval(), torch.randn(2, TOKENS, 4)
    assert count_macs(model, batch) == count_macs(model.inner, batch) > 0


def test_a_parametrised_weight_costs_what_it_computes_once_and_nothing_per_sample() -> None:
    plain_net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    before = count_macs(plain_net, torch.randn(2, 4))
    nn.utils.parametrizations.spectral_norm(plain_net[0])
    assert count_macs(plain_net, torch.randn(2, 4)) == before == 36


def test_counting_leaves_no_hook_behind() -> None:
    model, batch = built("encoder")
    trace(model, batch)
    count_macs(model, batch)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
