"""Modules that get no rows on the data: that is no evidence, and no reason to crash."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.statistics.patches import columns, output_rows, pick, positions, rows


class Kinds(nn.Module):
    """A branch per kind of sample, run whether any is of that kind or not."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.f = nn.Linear(6, 16), nn.Linear(16, 3)
        self.a, self.b = (
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        h = self.i(x).relu()
        y = torch.zeros_like(h)
        y[kind == 0] = self.a(h[kind == 0])
        y[kind == 1] = self.b(h[kind == 1])
        return self.f(h + y)


class Mixture(nn.Module):
    """Experts in a loop that does not ask whether anybody chose them."""

    def __init__(self, experts: int = 8) -> None:
        super().__init__()
        self.i, self.r, self.f = nn.Linear(6, 16), nn.Linear(16, experts), nn.Linear(16, 3)
        self.x = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x).relu()
        weight, chosen = self.r(h).softmax(-1).max(-1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.x):
            y[chosen == number] = expert(h[chosen == number]) * weight[chosen == number, None]
        return self.f(h + y)


HALF = {
    "budget": otp.Policy(rules=[otp.Channels()], budget=otp.Budget(macs=0.6)),
    "keep": otp.Policy(rules=[otp.Channels(keep="50%")]),
}
KINDS = {
    "the first are of one kind": [0] * 20 + [1] * 44,
    "all are of one kind": [0] * 64,
}


def points(samples: int = 64) -> Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("policy", sorted(HALF))
@pytest.mark.parametrize("kinds", sorted(KINDS))
def test_a_branch_without_rows_is_no_reason_to_crash(kinds: str, policy: str) -> None:
    torch.manual_seed(0)
    model, batch = Kinds().double().eval(), (points(), torch.tensor(KINDS[kinds]))
    report = otp.prune_(model, HALF[policy], [batch], timing=0)
    assert "a.0" in report.plan.keep()
    assert torch.isfinite(model(*batch)).all()


@pytest.mark.parametrize("policy", sorted(HALF))
def test_experts_without_rows_are_no_reason_to_crash(policy: str) -> None:
    torch.manual_seed(0)
    model, x = Mixture().double().eval(), points(24)
    report = otp.prune_(model, HALF[policy], [x], timing=0)
    assert report.plan.keep()
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 5), (4,)),
        (nn.Linear(4, 5), (3, 4)),
        (nn.Conv1d(4, 5, 3, padding=1), (4, 6)),
        (nn.Conv2d(4, 5, 3), (4, 6, 6)),
    ],
    ids=str,
)
def test_no_samples_are_no_rows_of_the_right_width(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.zeros(0, *shape)
    at = pick(positions(module, x), 5, "path", seed=0)
    assert rows(module, x, at).shape == (0, columns(module))
    assert output_rows(module, module(x), at).shape == (0, 5)
