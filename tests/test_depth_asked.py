"""What a rule about layers asks for: nothing costs nothing, and what the model reads stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.attach.ahead import Ahead
from torch_otprune.criteria.layers.look import Look
from torch_otprune.criteria.layers.transport import Transport
from torch_otprune.errors import BudgetError, OTPruneError, StructureError, VerificationError
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.structure import trace
from torch_otprune.surgery import disagreement


class Layer(nn.Module):
    """Attention with fewer keys than queries and a gated MLP, all in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.o, self.down = nn.Linear(12, 12), nn.Linear(20, 12)
        self.gate, self.up = nn.Linear(12, 20), nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """A stem, three layers, a head."""

    def __init__(self, reads: Callable[[nn.Module, Tensor], bool] = lambda layer, x: False) -> None:
        super().__init__()
        self.stem, self.head, self.reads = nn.Linear(4, 12), nn.Linear(12, 2), reads
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x.to(layer.up.weight.dtype) if self.reads(layer, x) else x)
        return self.head(x.mean(1))


def net(**settings: Any) -> Net:
    """Build one."""
    torch.manual_seed(0)
    return Net(**settings).eval()


def data() -> Tensor:
    """Draw a batch."""
    return torch.randn(32, 5, 4, generator=torch.Generator().manual_seed(1))


def test_a_half_skips_what_fits_and_leaves_out_what_would_not() -> None:
    graph = trace(net(), data()[:2])
    swaps = {b.name: [(s.path, s.by) for s in b.swaps] for b in graph.blocks if b.kind == "branch"}
    # the keys are narrower than the queries: handed on, they would have too many heads
    assert swaps["layers.0.o"] == [
        ("layers.0.o", "zero"),
        ("layers.0.norm", "skip"),
        ("layers.0.q", "skip"),
    ]
    # nothing between these minds the width, so both layers of the MLP are saved
    assert swaps["layers.0.down"] == [
        ("layers.0.down", "zero"),
        ("layers.0.gate", "skip"),
        ("layers.0.up", "skip"),
    ]


@pytest.mark.parametrize("half", ["o", "down"])
def test_each_half_goes_and_leaves_what_muting_it_leaves(half: str) -> None:
    policy = otp.Policy(
        rules=otp.Layers(targets=f"**.{half}", drop=2, replace="identity", repair="none")
    )
    with otp.attach(net(), policy) as attached:
        plan = otp.observe(attached, [data()]).plan()
    assert len(plan.drops) == 2
    assert disagreement(net(), (), data(), drops=plan.drops) < 1e-6


@pytest.mark.parametrize("drop", [np.int64(1), np.int32(1), np.uint8(1), np.float32(0.34)])
def test_numbers_of_numpy_are_numbers(drop: Any) -> None:
    plain = float(str(drop)) if isinstance(drop, np.floating) else int(drop)
    assert otp.Layers(drop=drop) == otp.Layers(drop=plain)
    assert otp.Linearize(drop=drop) == otp.Linearize(drop=plain)
    assert otp.Layers(keep=drop) == otp.Layers(keep=plain)


@pytest.mark.parametrize("keep", ["100%", 3])
def test_a_rule_that_keeps_every_layer_tries_none(
    keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(Ahead, "among", lambda self, gone: tried.append(gone) or 0.0)
    policy = otp.Policy(rules=[otp.Layers(keep=keep), otp.Channels(keep=0.5)])
    with otp.attach(net(), policy) as attached:
        plan = otp.observe(attached, [data()]).plan()
    assert not tried and not plan.drops and plan.cuts
    assert attached.observation().chains == {}


def test_keeping_as_many_layers_as_there_are_says_both_numbers() -> None:
    with (
        pytest.raises(BudgetError, match="keeps 3 of the layers it reaches, which are 3"),
        otp.attach(net(), otp.Policy(rules=otp.Layers(keep=3))) as attached,
    ):
        otp.observe(attached, [data()]).plan()


def test_a_layer_whose_weight_the_model_reads_is_refused_by_name() -> None:
    with pytest.raises(StructureError) as error:
        otp.prune_(net(reads=lambda *_: True), otp.Policy(rules=otp.Layers(drop=1)), [data()])
    said = "layers.0: without it the model does not run: it reads '.up' of 'layers.0', which is"
    assert said in error.value.problem and "at test_depth_asked.py:" in error.value.problem
    assert "object has no attribute" not in str(error.value)


def test_a_layer_that_is_read_on_the_data_alone_is_named_and_nothing_is_written() -> None:
    model = net(reads=lambda layer, x: len(x) > 4)  # the trial runs on fewer samples
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(VerificationError) as error:
        otp.prune_(model, otp.Policy(rules=otp.Layers(drop=1)), [data()], timing=0)
    assert error.value.problem.startswith(
        "the smaller model does not run on the calibration data: it reads '.up' of 'layers."
    )
    assert error.value.where.startswith("the plan for layers.")
    assert error.value.fix.endswith("do without what the plan takes, or `ignore` it.")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_error_that_is_not_the_model_s_own_passes_as_it_is() -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "repair":
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match=r"^enough$") as error:
        otp.prune_(net(), otp.Policy(rules=otp.Layers(drop=1)), [data()], timing=0, progress=stop)
    assert not isinstance(error.value, OTPruneError)


class Told(Look):
    """Knows what every set of blocks costs."""

    def __call__(self, gone: Any) -> float:
        return float(len(gone))

    def among(self, gone: Any) -> float:
        return float(sum(1 + ord(name) % 7 for name in gone))


@pytest.mark.parametrize(
    "settings", [{"replace": "identity"}, {"folds": 2}, {"left": 0.9}, {"longest_span": 1}]
)
def test_where_a_repair_is_tried_the_prices_are_the_trials_alone(settings: dict[str, Any]) -> None:
    points = torch.zeros(4, 6, 2, dtype=torch.float64)
    blocks = ("a", "b", "c")
    chain = ChainEvidence.__new__(ChainEvidence)
    object.__setattr__(chain, "blocks", blocks)
    object.__setattr__(chain, "points", points)
    prices = Transport().price([chain], look=Told())
    assert Transport(**settings).price([chain], look=Told()) == prices
    assert sorted(prices) == list(blocks)
