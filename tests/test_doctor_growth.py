"""How long an analysis takes: in proportion to the number of layers."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.structure import Graph, trace
from torch_otprune.structure.coupling import components

SHALLOW, DEEP = 8, 32  # layers; four times as many cost 4 where growth is linear, 16 if quadratic


class Layer(nn.Module):
    """Grouped queries with rotary angles, and a gated hidden layer, before norms."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = (t * angle.cos() + t.flip(-1) * angle.sin() for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens in, scores of tokens out."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Layer(16, 4, 2) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(16), nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1])[:, None] / torch.arange(1, 5)
        for layer in self.layers:
            x = layer(x, angle)
        return self.head(self.norm(x))


def example() -> Tensor:
    """Two short texts."""
    return torch.arange(12).view(2, 6) % 11


def analyse(depth: int) -> Graph:
    """Build a decoder and analyse it."""
    return trace(Decoder(depth), example())


def calls(depth: int, work: Callable[[nn.Module], object]) -> int:
    """Count the calls of functions: the same on every machine."""
    model, profile = Decoder(depth), cProfile.Profile()
    work(model)  # what is only done once is done
    profile.runcall(work, model)
    total: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return total


def seconds(depth: int) -> float:
    """Take the processor's time for one analysis, the best of three."""
    model = Decoder(depth)
    found = []
    for _ in range(3):
        start = time.process_time()
        trace(model, example())
        found.append(time.process_time() - start)
    return min(found)


WORK: dict[str, Callable[[nn.Module], object]] = {
    "trace": lambda model: trace(model, example()),
    "components": lambda model: components(model, example()),
    "doctor": lambda model: otp.doctor(model, example()),
}


@pytest.mark.parametrize("work", sorted(WORK))
def test_four_times_the_layers_take_four_times_the_calls(work: str) -> None:
    shallow, deep = calls(SHALLOW, WORK[work]), calls(DEEP, WORK[work])
    assert deep / shallow < 1.2 * DEEP / SHALLOW


def test_four_times_the_layers_take_less_than_twice_four_times_the_time() -> None:
    assert seconds(DEEP) / seconds(SHALLOW) < 2 * DEEP / SHALLOW


def test_a_deep_decoder_is_understood_layer_by_layer() -> None:
    graph = analyse(DEEP)
    kinds = [group.kind for group in graph.groups]
    assert (kinds.count("heads"), kinds.count("channels"), kinds.count("hidden")) == (32, 32, 1)
    (hidden,) = (group for group in graph.groups if group.kind == "hidden")
    assert hidden.units == 16 and len(hidden.members) == 2 + 1 + 9 * DEEP
