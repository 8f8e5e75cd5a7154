"""Two models side by side: additions of every spelling, and what the walkers take along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_repair_contract import patient, repair
from torch_otprune.errors import RepairError
from torch_otprune.repair import Patient
from torch_otprune.repair.lockstep import Lockstep, Pause, Site, distance
from torch_otprune.structure import trace


class Block(nn.Module):
    """A stem and one residual block; subclasses say how it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.stem = nn.Linear(3, 10), nn.Linear(10, 6)
        self.up, self.down, self.short = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(torch.relu(self.pre(x))))
        return self.head(torch.relu(self.added(x)))

    def inner(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))

    def added(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class Statement(Block):
    def added(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out.add_(x)
        return out


class Stream(Block):
    def added(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.inner(x)
        return x


class Preactivation(Block):
    def added(self, x: Tensor) -> Tensor:
        x = self.short(x)
        return x + self.inner(torch.relu(x))


class Shortcut(Block):
    def added(self, x: Tensor) -> Tensor:
        y = self.short(x)
        return y + self.inner(x)


class Share(Block):
    def added(self, x: Tensor) -> Tensor:
        return torch.add(self.inner(x), x, alpha=0.1)


class Named(Block):
    def added(self, x: Tensor) -> Tensor:
        return torch.add(self.inner(x), other=x)


WAYS = [Block, Statement, Stream, Preactivation, Shortcut, Share, Named]


def batches(count: int = 3) -> list[Any]:
    """Draw some."""
    return [torch.randn(24, 3, dtype=torch.float64) for _ in range(count)]


def sick_with(way: type[nn.Module], seed: int = 0) -> Patient:
    """Build a model and cut it."""
    torch.manual_seed(seed)
    return patient(way().double().eval(), batches(), seed=seed)


def sites(sick: Patient) -> list[Site]:
    """Stop everywhere."""
    return [Site(p, sick.graph.tails[p]) for p in sick.graph.order if p in sick.graph.tails]


@pytest.mark.parametrize("way", WAYS)
def test_a_walker_computes_what_the_model_with_its_new_weights_does(way: type[nn.Module]) -> None:
    sick = sick_with(way)

    @torch.no_grad()
    def disturb(site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        sick.small.get_submodule(site.path).weight.mul_(1.1)

    with Lockstep(sick.dense, sick.small, sick.batches, sites(sick)) as walk:
        found = walk.play(disturb)
    for (dense, small), batch in zip(found, sick.batches, strict=True):
        torch.testing.assert_close(dense, sick.dense(batch), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(small, sick.small(batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_least_squares_helps_however_the_block_is_added(way: type[nn.Module]) -> None:
    sick = sick_with(way)
    before = distance(sick.dense, sick.small, sick.batches)
    repair("least_squares").apply_(sick)
    assert distance(sick.dense, sick.small, sick.batches) < before


class Projection(nn.Module):
    """A block behind a projection shortcut that runs first and is added last."""

    def __init__(self) -> None:
        super().__init__()
        self.sc, self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sc(x)
        z = self.b(torch.relu(self.a(x)))
        return torch.relu(y + z)


def test_a_shortcut_that_runs_first_and_is_added_last_is_walked_through() -> None:
    model = Projection().double().eval()
    assert all(trace(model, batches(1)[0]).tails[p].added for p in ("sc", "b"))
    sick, order = patient(model, batches(), seed=1), []

    def note(site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        order.append((site.path, [p.stream is None for pair in pauses for p in pair]))

    with Lockstep(sick.dense, sick.small, sick.batches, sites(sick)) as walk:
        found = walk.play(note)
    assert [path for path, _ in order] == ["a", "sc", "b"]
    assert all(order[1][1]) and not any(order[2][1])  # the second to be met makes up for the first
    for (_, small), batch in zip(found, sick.batches, strict=True):
        torch.testing.assert_close(small, sick.small(batch))
    before = distance(sick.dense, sick.small, sick.batches)
    repair("least_squares").apply_(sick)
    assert distance(sick.dense, sick.small, sick.batches) < before


class Fork(Block):
    """Takes another way for some batches."""

    def added(self, x: Tensor) -> Tensor:
        return self.inner(x) + x if len(x) > 8 else x


def test_another_way_than_the_analysed_one_is_named_as_the_cause() -> None:
    model = Fork().double().eval()
    sick = patient(model, [*batches(1), *(b[:4] for b in batches(1))])
    with pytest.raises(RepairError) as error:
        repair("least_squares").apply_(sick)
    assert "the analysis saw one way only" in str(error.value)


def test_hooks_go_when_the_second_model_cannot_be_attached() -> None:
    sick = sick_with(Block)
    sick.small.train()
    broken = copy.deepcopy(sick.small)
    del broken.down
    with (
        pytest.raises(AttributeError),
        Lockstep(sick.small, broken, sick.batches, sites(sick)),
    ):
        pass
    for model in (sick.small, broken):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.training


class Witness(nn.Module):
    """Writes down the surroundings of its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.seen = nn.Linear(3, 6), []

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen.append((y.dtype, torch.empty(1).device.type))
        return y


def test_walkers_take_over_autocast_and_default_device() -> None:
    model, x = Witness(), torch.randn(4, 3)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        Lockstep(model, copy.deepcopy(model), [x], []) as walk,
    ):
        walk.play(lambda site, pauses: None)
    assert model.seen == [(torch.bfloat16, "meta")]
