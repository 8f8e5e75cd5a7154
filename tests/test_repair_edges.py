"""Where a repair must hold back: norms of odd kinds, lone samples, other rules, half precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import cut
from tests.test_repair_contract import patient, repair
from torch_otprune.attach.needs import needs_of
from torch_otprune.criteria.base import Need
from torch_otprune.policy.registry import REPAIRS
from torch_otprune.repair import Note, Patient, Repair, register
from torch_otprune.repair.goals import relative
from torch_otprune.repair.lockstep import Pause, Site, distance
from torch_otprune.structure import trace
from torch_otprune.surgery import cut_


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=torch.float64)


class Normed(nn.Module):
    """One residual layer behind some norms."""

    def __init__(self, *norms: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.c = nn.Linear(6, 6)
        self.norms, self.calls = nn.Sequential(*norms), calls

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x + self.norms(self.b(torch.relu(x)))
        if self.calls > 1:
            x = x + self.norms(self.c(torch.relu(x)))
        return self.head(x)


def norm(**settings: bool) -> nn.BatchNorm1d:
    """Make a norm that scales by five."""
    made = nn.BatchNorm1d(6, **settings)
    if made.running_var is not None:
        made.running_var.fill_(0.01)
    nn.init.constant_(made.weight, 0.5)
    return made


def wanted(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Ask what layer `b` should write where the stream has lost one everywhere."""
    x = draw(5, 3)
    model = model.double().eval()
    sick = Patient(model, copy.deepcopy(model), trace(model, x), [], [], [x])
    site = Site("b", sick.graph.tails["b"])
    assert site.tail.added
    y = draw(5, 6)
    dense, small = Pause("b", draw(5, 6), y, draw(5, 6)), Pause("b", draw(5, 6), y)
    assert dense.stream is not None
    small.stream = dense.stream - 1
    at = torch.zeros(1, dtype=torch.int64)
    return sick.target(site, dense, small, at, drift=True), y, sick.small.get_parameter("b.weight")


def test_without_a_norm_the_whole_drift_is_made_up_for() -> None:
    target, y, _ = wanted(Normed())
    torch.testing.assert_close(target, y + 1)


def test_a_norm_of_its_own_has_its_scale_undone() -> None:
    target, y, _ = wanted(Normed(norm()))
    torch.testing.assert_close(target, y + (0.01 + 1e-5) ** 0.5 / 0.5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Normed(norm(), calls=2),
        lambda: Normed(norm(track_running_stats=False)),
        lambda: Normed(norm(), norm()),
    ],
    ids=["repeated", "batch statistics", "two"],
)
def test_no_drift_is_made_up_for_behind_a_norm_whose_scale_is_unclear(model: object) -> None:
    target, y, _ = wanted(model())  # type: ignore[operator]
    torch.testing.assert_close(target, y)


class Chain(nn.Module):
    """Three layers in a row that can be cut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.head(x)


def test_a_refit_leaves_what_only_another_rules_cut_touches() -> None:
    model, x = Chain().double(), draw(64, 4)
    graph, small = trace(model, x), copy.deepcopy(model)
    cuts = [cut(graph, name, torch.arange(4)) for name in ("a", "b")]
    cut_(small, cuts)
    before = small.c.weight.clone()
    notes = repair("least_squares").apply_(Patient(model, small, graph, cuts[:1], cuts, [x]))
    assert [n.site for n in notes] == ["b", "head"]
    assert torch.equal(small.c.weight, before)


class Dense(nn.Module):
    """A batch-norm over samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.spare = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(input=self.a(x))))


@pytest.mark.parametrize("sizes", [[16, 1], [1, 16], [1, 1, 1]])
def test_a_batch_of_one_sample_joins_the_norms_pool(sizes: list[int]) -> None:
    model, x = Dense().double().eval(), draw(sum(sizes), 4)
    sick = patient(model, list(x.split(sizes)))
    with torch.no_grad():
        sick.small.a.bias += 1  # something to repair
    (note,) = repair("norm").apply_(sick)
    assert note.accepted
    torch.testing.assert_close(sick.small.norm.running_mean, sick.small.a(x).mean(0))


def test_a_norm_that_never_runs_keeps_its_statistics() -> None:
    model, x = Dense().double().eval(), draw(16, 4)
    sick = patient(model, [x])
    repair("norm").apply_(sick)
    assert torch.equal(sick.small.spare.running_mean, torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_in_half_precision_are_not_taken_and_noted(dtype: torch.dtype) -> None:
    model, x = Chain().to(dtype), torch.randn(32, 4).to(dtype)
    sick = patient(model, [x])
    before = [p.clone() for p in sick.small.parameters()]
    (note,) = repair("reconstruct", least_squares=None).apply_(sick)
    assert (note.accepted, note.text) == (False, "half precision: steps would be lost in rounding")
    assert all(torch.equal(a, b) for a, b in zip(before, sick.small.parameters(), strict=True))


def test_a_silent_output_in_half_precision_has_a_finite_distance() -> None:
    silent = torch.zeros(3, dtype=torch.float16)
    assert torch.isfinite(relative(silent, silent))


def test_steps_inside_the_callers_autocast_see_the_new_weights() -> None:
    model, x = Chain(), torch.randn(64, 4)
    sick = patient(model, [x[:48], x[48:]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        notes = repair("reconstruct", least_squares=None, steps=20, rate=1e-2).apply_(sick)
        measured = distance(sick.dense, sick.small, [x[48:]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = distance(sick.dense, sick.small, [x[48:]])
    assert measured == pytest.approx(fresh) and notes[-1].after == pytest.approx(fresh)


@pytest.fixture
def hungry() -> Iterator[type[Repair]]:
    """Register a repair in one new place, and take it out again."""

    @register
    class Hungry(Repair):
        """Ask for everything, do nothing."""

        needs: ClassVar[frozenset[Need]] = frozenset({"moments", "sensitivity"})
        refits: ClassVar[bool] = True

        kind: Literal["hungry"] = "hungry"

        def apply_(self, patient: Patient) -> tuple[Note, ...]:
            """Do nothing."""
            return ()

    yield Hungry
    REPAIRS.remove("hungry")


def test_a_repair_asks_for_the_statistics_that_itneeds_of(hungry: type[Repair]) -> None:
    def policy(name: str) -> otp.Policy:
        return otp.Policy(rules=[otp.Channels(keep="50%", criterion="magnitude", repair=name)])

    assert needs_of(policy("hungry")) == hungry.needs
    assert needs_of(policy("least_squares")) == needs_of(policy("reconstruct")) == {"moments"}
    assert needs_of(policy("norm")) == needs_of(policy("none")) == frozenset()


def test_a_repair_that_refits_is_priced_as_one(hungry: type[Repair]) -> None:
    model, x = Chain().double(), draw(64, 4)

    def predicted(name: str) -> list[float]:
        rule = otp.Channels(targets="a", keep="50%", repair=name)
        with otp.attach(model, otp.Policy(rules=[rule])) as attached:
            otp.observe(attached, [x])
            return [c.error for c in attached.plan().cuts]

    assert predicted("hungry") == predicted("least_squares") != predicted("none")


@pytest.mark.parametrize("kind", ["bias", "least_squares"])
def test_a_shift_never_goes_past_the_first_norm(kind: str) -> None:
    model, x = Normed(norm(track_running_stats=False), norm()).double().eval(), draw(24, 3)
    sick = patient(model, [x])
    assert sick.norm_behind("b") is None
    before = sick.small.norms[1].running_mean.clone()
    repair(kind).apply_(sick)
    assert torch.equal(sick.small.norms[1].running_mean, before)
