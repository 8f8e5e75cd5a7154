"""What modules say about themselves follows a cut, and comes back with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import cut, outputs
from tests.zoo import transformers_text
from torch_otprune.plan import Cut
from torch_otprune.structure import Graph, trace
from torch_otprune.surgery import Snapshot, compared, cut_, gap

T5ForConditionalGeneration = pytest.importorskip(
    "transformers", reason="Transformers is not installed"
).T5ForConditionalGeneration


def built(name: str) -> tuple[Any, Any, Graph]:
    """Build an entry of the zoo in float64 and analyse it."""
    entry = transformers_text.ENTRIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.build().double().eval()
    example = entry.example()
    return model, example, trace(model, example)


def halves(graph: Graph, kinds: Iterable[str] = ("channels", "heads", "hidden")) -> list[Cut]:
    """Keep the first half of every group of some kinds."""
    return [
        cut(graph, g.name, torch.arange((g.units + 1) // 2))
        for g in graph.groups
        if g.kind in tuple(kinds)
    ]


def said(model: nn.Module) -> dict[str, Any]:
    """Write down every plain attribute, and whom each module refers to for its configuration."""
    told: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, tuple, list)) and not key.startswith("_"):
                told[f"{path}.{key}"] = value
        config = vars(module).get("config")
        if config is not None:
            told[f"{path}.config"] = (id(config), str(config))
    return told


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "mamba2", "phi3", "t5"])
def test_undo_brings_every_attribute_and_configuration_back(name: str) -> None:
    model, example, graph = built(name)
    before, expected, snapshot = said(model), outputs(model, example), Snapshot(model)
    cut_(model, halves(graph))
    assert said(model) != before
    snapshot.restore_()
    assert said(model) == before
    assert gap(expected, outputs(model, example)) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "llama-one-key", "phi3", "t5", "opt"])
def test_a_model_cut_on_every_side_writes_the_same_text_with_and_without_a_cache(name: str) -> None:
    model, example, graph = built(name)
    cut_(model, halves(graph))
    ids = example["input_ids"]
    asked: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    with torch.no_grad():
        fast = model.generate(ids, use_cache=True, **asked)
        slow = model.generate(ids, use_cache=False, **asked)
    assert torch.equal(fast, slow)


def test_the_width_of_a_stream_stands_in_a_copy_of_the_configuration() -> None:
    model, _, graph = built("llama-grouped")
    old = model.config
    cut_(model, halves(graph, ["hidden"]))
    assert (old.hidden_size, model.config.hidden_size) == (24, 12)
    assert model.model.config is model.config
    assert model.config.intermediate_size == old.intermediate_size


def test_heads_of_one_layer_are_that_layers_business() -> None:
    model, example, graph = built("phi3")
    [first, *_] = [g for g in graph.groups if g.kind == "heads"]
    cuts = [cut(graph, first.name, torch.tensor([1]))]
    assert compared(model, cuts, example)[0] < 1e-10
    cut_(model, cuts)
    one, two = (layer.self_attn for layer in model.model.layers)
    assert (one.num_key_value_heads, two.num_key_value_heads) == (1, 2)
    assert model.config.num_attention_heads == two.config.num_attention_heads == 4


def test_fewer_queries_share_the_only_key() -> None:
    model, _, graph = built("llama-one-key")
    cut_(model, halves(graph, ["heads"]))
    assert {layer.self_attn.num_key_value_groups for layer in model.model.layers} == {2}


def test_queries_that_go_with_their_key_are_as_many_for_each_that_stays() -> None:
    model, _, graph = built("llama-grouped")
    cut_(model, halves(graph, ["heads"]))
    assert {layer.self_attn.num_key_value_groups for layer in model.model.layers} == {2}


def test_a_number_that_only_scales_stays() -> None:
    model, example, graph = built("ctrl")
    cuts = halves(graph, ["hidden"])
    assert compared(model, cuts, example)[0] < 1e-10
    cut_(model, cuts)
    assert model.transformer.d_model_size == 24  # forward takes its root


def test_tied_embeddings_stay_tied() -> None:
    model, _, graph = built("gpt2")
    cut_(model, halves(graph, ["hidden"]))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape == (50, 12)


class Table(nn.Module):
    """A square matrix of its own, and both its widths."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.nx, self.nf = size, size
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, self.nx) @ self.weight).view(*x.shape[:-1], self.nf)


class Tables(nn.Module):
    """Two of them, one feeding the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Table(6), Table(6), nn.Linear(6, 3)
        self.window = 6  # only by chance

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_names_decide_which_of_two_equal_widths_was_cut() -> None:
    model, x = Tables().double(), torch.randn(5, 6, dtype=torch.float64)
    graph = trace(model, x)
    between = next(g for g in graph.groups if any(m.path.startswith("b.") for m in g.consumers))
    cuts = [cut(graph, between.name, torch.tensor([0, 2, 5]))]
    assert compared(model, cuts, x)[0] < 1e-12
    cut_(model, cuts)
    assert (model.a.nx, model.a.nf, model.b.nx, model.b.nf) == (6, 3, 3, 6)
    assert model.window == 6


class Counted(nn.Module):
    """Heads put side by side by the width of the stream: no attribute can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = (
            f(x).view(b, t, self.num_heads, 6).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2)
        return self.head(self.o(mixed.reshape(b, t, width))).mean(1)


def test_a_failure_names_the_line_of_the_users_code() -> None:
    model, x = Counted().double(), torch.randn(2, 5, 24, dtype=torch.float64)
    graph = trace(model, x)
    [heads] = [g for g in graph.groups if g.kind == "heads"]
    far, reason = compared(model, [cut(graph, heads.name, torch.tensor([0, 3]))], x)
    assert far == float("inf")
    assert "shape '[2, 5, 24]' is invalid" in reason
    assert "(at test_surgery_attributes.py:" in reason


def test_as_many_heads_as_channels_in_each_are_told_apart_by_their_names() -> None:
    entry = transformers_text.ENTRIES["t5"]
    config = entry.build().config
    config.num_heads = config.d_kv = 4
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).double().eval()
    graph = trace(model, entry.example())
    cuts = halves(graph, ["heads"])
    assert cuts
    assert compared(model, cuts, entry.example())[0] < 1e-9
    cut_(model, cuts)
    attention = model.encoder.block[0].layer[0].SelfAttention
    assert (attention.n_heads, attention.key_value_proj_dim, attention.inner_dim) == (2, 4, 8)
