"""Whatever the analysis misses, the check on the real model finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import Case
from torch_otprune.surgery import disagreement


class Between(nn.Module):
    """Applies one op between two convolutions."""

    def __init__(self, op: Any, out: int) -> None:
        super().__init__()
        self.op = op
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(out, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.op(self.a(x)))).mean((2, 3)))


OPS: dict[str, tuple[Any, int]] = {
    "shuffle": (lambda x: x.view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8), 8),
    "flip": (lambda x: x.flip(1), 8),
    "roll": (lambda x: x.roll(1, 1), 8),
    "pick": (lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]], 8),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 1, 2])), 3),
    "slice": (lambda x: x[:, 2:6], 4),
    "stride": (lambda x: x[:, ::2], 4),
    "split": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), 8),
    "chunk add": (lambda x: sum(x.chunk(2, 1)), 4),
    "twice": (lambda x: torch.cat([x, x], 1), 16),
    "sum over channels": (lambda x: x + x.mean(1, keepdim=True), 8),
    "softmax": (lambda x: x.softmax(1), 8),
    "normalise": (lambda x: nn.functional.normalize(x, dim=1), 8),
    "maxout": (lambda x: x.view(len(x), 4, 2, 8, 8).amax(2), 4),
    "pixel shuffle": (lambda x: nn.functional.pixel_shuffle(x, 2), 2),
    "fold space": (lambda x: nn.functional.pixel_unshuffle(x, 2), 32),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 16),
    "interleave": (lambda x: x.repeat_interleave(2, 1), 16),
    "transpose twice": (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), 8),
    "swap axes": (lambda x: x.transpose(1, 2), 8),
    "stack": (lambda x: torch.stack([x, x], 1).flatten(1, 2), 16),
    "stack in": (lambda x: torch.stack([x, x], 2).flatten(1, 2), 16),
    "einsum": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(8).to(x).flip(0)), 8),
    "cumsum": (lambda x: x.cumsum(1), 8),
    "sort": (lambda x: x.sort(1).values, 8),
    "fft": (lambda x: torch.fft.fft(x, dim=1).real, 8),
    "lrn": (lambda x: nn.functional.local_response_norm(x, 3), 8),
    "layer norm": (lambda x: nn.functional.layer_norm(x, x.shape[1:]), 8),
    "constant": (lambda x: x + torch.linspace(0, 1, 8).to(x).view(1, 8, 1, 1), 8),
    "pad": (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 1)), 10),
    "pad space": (lambda x: nn.functional.pad(x, (1, 1, 1, 1)), 8),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), 8),
    "glu": (lambda x: nn.functional.glu(x, 1), 4),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), 8),
    "group mean": (lambda x: x - x.unflatten(1, (2, 4)).mean(2).repeat_interleave(4, 1), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_an_op_between_two_layers_is_followed_or_refused(name: str) -> None:
    op, out = OPS[name]
    model = Case(lambda: Between(op, out), (3, 8, 8)).model()
    batch = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random"))
    with otp.attach(model, policy) as attached:
        plan = otp.observe(attached, [batch]).plan()
    assert disagreement(model, plan.cuts, batch) < 1e-9
    assert plan.keep()["b"] == 3
    assert all(r.reason and r.fix for r in plan.refused)
