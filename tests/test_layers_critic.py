"""Blocks ranked by a W_1 critic: what it scores, what the plan says beside it, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.criteria.layers import MaxSliced
from torch_otprune.errors import PolicyError
from torch_otprune.statistics.depth import ChainEvidence


def chain(points: Tensor) -> ChainEvidence:
    """Lay out a chain whose rows are one sample each."""
    blocks, rows = len(points) - 1, points.shape[1]
    names = tuple(f"blocks.{b}" for b in range(blocks))
    return ChainEvidence(
        name=names[0], blocks=names, points=points, sample=torch.arange(rows),
        last=torch.ones(rows, dtype=torch.bool), writers=(None,) * blocks,
        feel=torch.ones(len(points), points.shape[2]), power=1.0, sites=((),) * blocks,
        weights=torch.ones(blocks), trial=lambda gone: 0.0, seed=0,
    )  # fmt: skip


def moving(*shifts: float) -> ChainEvidence:
    """Let every block shift the stream along the first axis."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.tensor([0.0, *shifts], dtype=torch.float64).cumsum(0)
    return chain(torch.stack([x + s * torch.eye(3, dtype=torch.float64)[0] for s in steps]))


RULE = MaxSliced(distance="critic", training=20, relative=False)


def test_a_shift_costs_its_length() -> None:
    prices, _ = RULE.told([moving(2.0, 0.5)])
    assert prices["blocks.0"] == pytest.approx(2.0, rel=1e-3)
    assert prices["blocks.1"] == pytest.approx(0.5, rel=1e-3)


def test_told_prices_are_those_of_price() -> None:
    evidence = moving(2.0, 0.5, 1.0)
    assert RULE.told([evidence])[0] == pytest.approx(RULE.price([evidence]))


def test_relative_prices_do_not_know_the_unit() -> None:
    rule, near, far = MaxSliced(distance="critic", training=5), moving(2.0), moving(2.0)
    far = chain(far.points * 1024)
    assert float(rule.score(far)[0]) == pytest.approx(float(rule.score(near)[0]), rel=1e-4)


def test_every_block_stands_in_the_plan_with_three_numbers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(6, 2)).eval()
        x = torch.randn(64, 6)
    rule = otp.Layers(drop=1, criterion={"kind": "max_sliced", "distance": "critic", "training": 5})
    policy = otp.Policy(rules=rule)
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    plan = otp.prune_(net, policy, [x], timing=0).plan
    told = [note for note in plan.notes if "W1 critic" in note]
    assert len(told) == 3
    for number, note in enumerate(told):
        assert note.startswith(f"group '{number}': ")
        assert "max-sliced" in note and "Sinkhorn" in note and "between halves" in note


def test_without_a_critic_there_is_nothing_to_tell() -> None:
    assert MaxSliced(steps=2, restarts=1).told([moving(1.0)])[1] == {}


def test_a_critic_of_another_order_is_refused() -> None:
    with pytest.raises(PolicyError) as caught:
        otp.Policy(
            rules=otp.Layers(drop=1, criterion={"kind": "max_sliced", "distance": "critic", "p": 2})
        )
    assert "a critic measures W_1, and p is 2" in caught.value.problem
    assert "leave p out" in caught.value.fix
