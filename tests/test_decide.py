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


class Numbered(nn.Module):
    """Rows of few numbers, of which a ReLU silences about half: the trial may see no difference."""

    def __init__(self, use: Any, read: int = 8) -> None:
        super().__init__()
        self.use = use
        self.a, self.b = nn.Linear(6, 8), nn.Linear(read, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.relu(self.a(x))))


def _write(places: Any, value: Any) -> Any:
    def use(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, places] = value(y) if callable(value) else value
        return y

    return use


USES: dict[str, tuple[Any, str]] = {
    "a channel is muted": (_write(7, 0.0), "picked by its number"),
    "some are muted": (_write(slice(2, 4), 0.0), "written over at places named by numbers"),
    "a channel is copied": (_write(0, lambda y: y[:, 7]), "picked by its number"),
    "some are copied": (_write(slice(2, 4), lambda y: y[:, 4:6]), "written over at places named"),
    "one scales all": (lambda y: y * y[:, 7:8], "picked by its number"),
    "one by one": (lambda y: torch.stack(y.unbind(1)[::-1], 1), "picked by its number"),
}


@pytest.mark.parametrize("name", USES)
def test_channels_that_a_number_names_are_refused_whatever_the_example(name: str) -> None:
    use, why = USES[name]
    model = Case(lambda: Numbered(use), (6,)).model()
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random"))
    silent = torch.zeros(2, 6, dtype=torch.float64)  # then every trial would pass
    with torch.no_grad():
        model.a.bias.zero_()
    with pytest.raises(otp.OTPruneError, match=why):
        otp.attach(model, policy, example=silent).plan()


def test_channels_beside_one_that_a_split_names_can_go() -> None:
    def use(y: Tensor) -> Tensor:
        one, rest = y.split([1, y.shape[1] - 1], 1)
        return torch.relu(rest) * one.sigmoid()

    model = Case(lambda: Numbered(use, read=7), (6,)).model()
    batch = torch.randn(2, 6, dtype=torch.float64)
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random"))
    with otp.attach(model, policy) as attached:
        plan = otp.observe(attached, [batch]).plan()
    assert plan.keep() == {"a": 3}
    assert 0 in plan.cuts[0].slices[0].keep
    assert disagreement(model, plan.cuts, torch.randn(64, 6, dtype=torch.float64)) < 1e-9


def test_one_channel_that_is_looked_at_for_its_shape_only_stops_nothing() -> None:
    def use(y: Tensor) -> Tensor:
        return y * torch.ones(len(y[:, 0]), 1, dtype=y.dtype)

    model = Case(lambda: Numbered(use), (6,)).model()
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random"))
    with otp.attach(model, policy) as attached:
        plan = otp.observe(attached, [torch.randn(2, 6, dtype=torch.float64)]).plan()
    assert plan.keep()["a"] == 4


def test_zeros_that_get_channels_part_by_part_are_no_channels_yet() -> None:
    def use(y: Tensor) -> Tensor:
        out, half = torch.zeros_like(y), y.shape[1] // 2
        out[:, :half] = y.tanh()[:, :half]
        out[:, half:] = y[:, half:].tanh()
        return out

    model = Case(lambda: Numbered(use), (6,)).model()
    said = otp.doctor(model, torch.randn(2, 6, dtype=torch.float64))
    assert not any("written over" in found.reason for found in said.findings)


def test_who_turns_the_check_off_gets_what_it_would_refuse_and_a_note() -> None:
    def use(y: Tensor) -> Tensor:
        return torch.cat([y[:, :4].relu(), 1 - y[:, 4:]], 1)

    model = Case(lambda: Numbered(use), (6,)).model()
    rule, batch = otp.Channels(keep=0.5, criterion="random"), torch.randn(9, 6, dtype=torch.float64)
    checked = otp.Policy(rules=rule)
    with otp.attach(model, checked) as attached, pytest.raises(otp.OTPruneError, match="differ by"):
        otp.observe(attached, [batch]).plan()
    with otp.attach(model, otp.Policy(rules=rule, verify="off")) as attached:
        plan = otp.observe(attached, [batch]).plan()
    assert disagreement(model, plan.cuts, batch) > 1e-3
    assert any("Policy.verify = 'off'" in note for note in plan.notes)


class PerHead(nn.Module):
    """One small layer per head, in a loop over pieces of what is written."""

    def __init__(self, pieces: Any) -> None:
        super().__init__()
        self.pieces = pieces
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.pieces(torch.relu(self.a(x)))
        done = [head(piece) for head, piece in zip(self.heads, pieces, strict=True)]
        return self.b(torch.cat(done, 1))


PIECES: dict[str, Any] = {
    "slices": lambda y: [y[:, 2 * i : 2 * i + 2] for i in range(4)],
    "views": lambda y: [y.view(len(y), 4, -1)[:, i] for i in range(4)],
    "chunks": lambda y: y.chunk(4, 1),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_loop_over_heads_is_cut_exactly(name: str) -> None:
    model = Case(lambda: PerHead(PIECES[name]), (6,)).model()
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random"))
    with otp.attach(model, policy) as attached:
        plan = otp.observe(attached, [torch.randn(2, 6, dtype=torch.float64)]).plan()
    assert {f"heads.{i}" for i in range(4)} <= set(plan.keep())
    assert disagreement(model, plan.cuts, torch.randn(64, 6, dtype=torch.float64)) < 1e-9
