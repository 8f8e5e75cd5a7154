"""Experts laid flat, one behind the other, in tables of two axes: as DBRX keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_otprune as otp
from tests.zoo.oracle import random_cut
from torch_otprune.structure import trace
from torch_otprune.surgery import compared

WIDTH, INNER, COUNT = 8, 6, 5


class Flat(nn.Module):
    """Each token goes to two experts, whose rows are a stretch of two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = COUNT
        self.router = nn.Linear(WIDTH, COUNT, bias=False)
        self.up = nn.Parameter(torch.randn(COUNT * INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(COUNT * INNER, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            up, down = (t.view(-1, INNER, WIDTH)[number] for t in (self.up, self.down))
            rows, place = torch.where(chosen == number)
            out[rows] += weights[rows, place, None] * (F.gelu(flat[rows] @ up.T) @ down)
        return out.view_as(x)


class Net(nn.Module):
    """A mixture between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, WIDTH), nn.LayerNorm(WIDTH)
        self.moe, self.head = Flat(), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head((x + self.moe(self.norm(x))).mean(1))


def built() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().double().eval(), torch.randint(0, 20, (16, 7))


def test_experts_laid_flat_are_a_mixture() -> None:
    model, ids = built()
    (group,) = [g for g in trace(model, ids).groups if g.kind == "experts"]
    assert (group.units, group.least) == (COUNT, 2)
    widths = {m.path: tuple(m.index.shape) for m in group.members}
    assert widths == {
        "moe.router": (COUNT, 1), "moe.up:0": (COUNT, INNER), "moe.down:0": (COUNT, INNER)
    }  # fmt: skip


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_fewer_of_them_are_the_dense_mixture_that_never_chooses_the_others(ratio: float) -> None:
    model, ids = built()
    (group,) = [g for g in trace(model, ids).groups if g.kind == "experts"]
    cut = random_cut(group, ratio, torch.Generator().manual_seed(3))
    far, said = compared(model, [cut], ids)
    assert far < 1e-12, said


@pytest.mark.parametrize("criterion", ["transport", "magnitude"])
def test_a_policy_prunes_them(criterion: Any) -> None:
    model, ids = built()
    policy = otp.Policy(rules=otp.Experts(keep=3, criterion=criterion))
    otp.prune_(model, policy, [ids], timing=0)
    assert model.moe.up.shape == model.moe.down.shape == (3 * INNER, WIDTH)
    assert (model.moe.num_experts, model.moe.router.out_features) == (3, 3)
    assert model(ids).isfinite().all()
