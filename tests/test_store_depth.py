"""A wrong factory for a network that lost layers: the error names what differs first."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import LoadError
from torch_otprune.store import load


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


class Deep(nn.Module):
    """A stem, some blocks, a head."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def short(path: Path, rule: otp.Layers | otp.Linearize) -> Any:
    """Save a network that lost layers, and hand its report out."""
    model = deep()
    batch = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    report = otp.prune_(model, otp.Policy(rules=rule), [batch], timing=0)
    otp.save(model, path)
    assert load(path, factory=deep)(batch).shape == (16, 4)
    return model, report


def deep(depth: int = 4, width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return Deep(depth, width).eval()


DEPTH_RULES: list[otp.Layers | otp.Linearize] = [
    otp.Layers(drop=2),
    otp.Linearize(drop=1, unfolded="allow"),
]


@pytest.mark.parametrize("rule", DEPTH_RULES)
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: deep(3), "the factory's model has no 'layers.3.down.bias', the saved one has."),
        (lambda: deep(5), "the factory's model has 'layers.4.down.bias', the saved one has not."),
        (lambda: deep(width=5), "'head.weight' is 4x5:float32 in the factory's model, 4x6"),
    ],
)
def test_a_changed_factory_is_told_by_its_first_tensor_where_layers_went(
    tmp_path: Path, rule: Any, factory: Callable[[], nn.Module], words: str
) -> None:
    kept = short(tmp_path / "saved", rule)
    with pytest.raises(LoadError) as error:
        load(tmp_path / "saved", factory=factory)
    assert words in str(error.value)
    del kept


def test_what_the_dense_model_was_survives_saving_what_was_loaded(tmp_path: Path) -> None:
    kept = short(tmp_path / "first", DEPTH_RULES[0])
    loaded = load(tmp_path / "first", factory=deep)
    del kept
    otp.save(loaded, tmp_path / "second")
    with pytest.raises(LoadError, match=r"has no 'layers\.3\.down\.bias'"):
        load(tmp_path / "second", factory=lambda: deep(3))


def test_a_copy_is_told_by_the_first_module_that_its_plan_misses(tmp_path: Path) -> None:
    model, report = short(tmp_path / "first", otp.Layers(targets="layers.3", drop=1))
    twin, plan = copy.deepcopy(model), report.plan
    del model, report
    gc.collect()
    otp.save(twin, tmp_path / "second", plan=plan)
    with pytest.raises(LoadError, match=r"the factory's model has no module 'layers\.3'"):
        load(tmp_path / "second", factory=lambda: deep(3))
