"""Gradient steps towards the dense network: what they see, how fast they go, which weights stay."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_repair_contract import case, patient, repair, state
from torch_otprune.plan import Drop
from torch_otprune.repair import Patient
from torch_otprune.repair.descend import Descent, learning, pace, steps_left
from torch_otprune.repair.goals import Goals, Taps, halves, loss, pieces
from torch_otprune.repair.least_squares import LeastSquares
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.reconstruct import _counterparts, _split, _spread
from torch_otprune.structure import trace


class Tokens(nn.Module):
    """A table of words, two residual layers, a head; positions do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def texts(count: int, *, seed: int, pads: int = 0) -> list[dict[str, Tensor]]:
    """Draw batches of 16 texts of 3 to 6 words."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = (torch.arange(6) < torch.randint(3, 7, (16, 1), generator=generator)).long()
        words = torch.randint(1, 40, (16, 6), generator=generator)
        found.append({"input_ids": torch.where(mask > 0, words, pads), "attention_mask": mask})
    return found


def shaken(model: nn.Module, batches: list[Any], *, by: float = 0.3) -> Patient:
    """Lay a model beside a copy whose matrices are a little off: no cut, much to learn."""
    small = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() > 1:
                parameter += by * parameter.std() * torch.randn_like(parameter)
    return Patient(model, small, trace(model, batches[0]), [], [], batches)


def encoder(batches: list[Any], *, by: float = 0.3) -> Patient:
    torch.manual_seed(0)
    sick = shaken(Tokens(), batches, by=by)
    with torch.no_grad():
        sick.small.table.weight.copy_(sick.dense.table.weight)
    return sick


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    samples=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_every_sample_is_in_one_piece_of_its_own_batch(
    sizes: list[int], samples: int, seed: int
) -> None:
    batches = [torch.arange(n) + 100 * i for i, n in enumerate(sizes)]
    found = pieces(batches, samples, torch.Generator().manual_seed(seed))
    taken = [piece.take() for piece in found]
    assert sorted(torch.cat(taken).tolist()) == sorted(torch.cat(batches).tolist())
    assert all(1 <= len(t) <= samples and len(set((t // 100).tolist())) == 1 for t in taken)
    for i in range(len(sizes)):
        widths = [len(t) for t in taken if int(t[0]) // 100 == i]
        assert max(widths) - min(widths) <= 1


def test_no_piece_comes_up_again_before_all_have() -> None:
    batches = [torch.full((4, 3), float(i)) for i in range(9)]
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(3, 3))
    sick = shaken(model, batches)
    trained = sick.small
    trained.register_forward_pre_hook(
        lambda _, args: seen.append(int(args[0][0, 0])) if torch.is_grad_enabled() else None
    )
    repair("reconstruct", least_squares=None, steps=24).apply_(sick)
    train = set(range(9)) - {7}
    assert [set(seen[i : i + 8]) for i in (0, 8, 16)] == [train] * 3
    assert seen[:8] != seen[8:16]


@pytest.mark.parametrize("count", [1, 2, 8, 17])
def test_no_held_out_sample_is_trained_on(count: int) -> None:
    batches = list(torch.arange(4 * count).split(4))
    train, held = _split(batches)
    assert len(held) >= 1 and len(train) >= 1
    both = torch.cat(train + held).tolist()
    assert sorted(both) == list(range(4 * count))


@pytest.mark.parametrize(("count", "expected"), [(16, 2), (64, 8), (200, 8), (1000, 8)])
def test_of_many_samples_only_some_are_asked(count: int, expected: int) -> None:
    train, held = _split([torch.zeros(64, 1) for _ in range(count)])
    assert (len(held), len(train)) == (expected, count - expected)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), samples=st.integers(1, 300))
def test_the_refit_sees_evenly_spaced_batches_all_of_them_if_they_fit(
    sizes: list[int], samples: int
) -> None:
    batches = [torch.full((size, 1), i) for i, size in enumerate(sizes)]
    found = [int(b[0]) for b in _spread(batches, samples)]
    assert found == sorted(set(found))
    if samples >= sum(sizes):
        assert found == list(range(len(sizes)))
    gaps = [b - a for a, b in pairwise([-1, *found, len(sizes)])][1:-1]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_refit_sees_no_more_samples_than_told_and_the_steps_see_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def refit(self: LeastSquares, patient: Patient) -> tuple[()]:
        seen.extend(len(batch["input_ids"]) for batch in patient.batches)
        return ()

    monkeypatch.setattr(LeastSquares, "apply_", refit)
    sick = encoder(texts(16, seed=0))
    count = counted(sick.dense)
    repair("reconstruct", steps=20, refit_samples=64).apply_(sick)
    assert seen == [16] * 4
    assert len(count) == 16


def test_one_sample_alone_is_both_trained_on_and_asked() -> None:
    one = torch.ones(1, 3)
    assert [len(part) for part in _split([one])] == [1, 1]
    assert [len(part) for part in halves(torch.arange(16), last=2)] == [14, 2]


def counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_dense_model_runs_once_per_piece_while_there_is_room_and_to_the_same_end() -> None:
    batches, found, calls = texts(9, seed=0), [], []
    for memory in (64, 0):
        sick = encoder(batches)
        count = counted(sick.dense)
        repair("reconstruct", least_squares=None, steps=30, memory=memory).apply_(sick)
        found.append(state(sick.small))
        calls.append(len(count))
    assert calls[0] == 9  # eight to train on, one held out
    assert calls[1] > 30
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_goals_never_take_more_room_than_given() -> None:
    model, x = nn.Linear(4, 4).double(), torch.randn(8, 4, dtype=torch.float64)
    one = 8 * 4 * 8
    goals = Goals(Taps(model, ()), {}, 2 * one + 1)
    for number in range(5):
        torch.testing.assert_close(goals.of(("train", number), x).ends[0], model(x))
    assert len(goals.known) == 2 and goals.room == 1


def test_steps_do_the_same_every_time_and_another_seed_another_thing() -> None:
    model, batches = case("residual")
    found = []
    for seed in (0, 0, 1):
        sick = patient(model, batches)
        object.__setattr__(sick, "seed", seed)
        repair("reconstruct", steps=12, samples=4).apply_(sick)
        found.append(state(sick.small))
    same, other = (all(torch.equal(v, found[0][k]) for k, v in now.items()) for now in found[1:])
    assert same and not other


@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_a_shaken_network_comes_back_on_texts_that_no_step_saw(precision: str) -> None:
    sick, fresh = encoder(texts(16, seed=0)), texts(4, seed=9)
    before = distance(sick.dense, sick.small, fresh)
    note = repair(
        "reconstruct", least_squares=None, steps=400, rate=1e-2, precision=precision
    ).apply_(sick)[-1]
    after = distance(sick.dense, sick.small, fresh)
    assert note.accepted and note.text == ""
    assert after < before / 20
    assert all(p.dtype == torch.float32 for p in sick.small.parameters())


def test_the_note_says_what_held_out_texts_say_in_full_precision() -> None:
    batches = texts(9, seed=0)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    sick = encoder(batches)
    before = distance(sick.dense, sick.small, batches[7:8])
    note = repair("reconstruct", least_squares=None, steps=40, precision="bfloat16").apply_(sick)[
        -1
    ]
    assert note.before == pytest.approx(before, rel=1e-9)
    assert note.after == pytest.approx(distance(sick.dense, sick.small, batches[7:8]), rel=1e-9)


def test_what_stands_in_padding_changes_nothing() -> None:
    found = []
    for pads in (0, 17):
        sick = encoder(texts(9, seed=0, pads=pads))
        notes = repair("reconstruct", least_squares=None, steps=20).apply_(sick)
        found.append((state(sick.small), notes[-1].before, notes[-1].after))
    for key, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][key], rtol=1e-4, atol=1e-6)
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-4)


def test_what_stands_in_padding_is_no_distance() -> None:
    found = []
    for pads in (0, 17):
        sick = encoder(texts(3, seed=0))
        found.append(distance(sick.dense, sick.small, texts(4, seed=9, pads=pads)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    bare = [batch | {"attention_mask": torch.ones(16, 6)} for batch in texts(4, seed=9)]
    assert found[0] != pytest.approx(distance(sick.dense, sick.small, bare), rel=1e-3)


class Wide(nn.Module):
    """A table of words and a layer within: positions do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(40, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.table(input_ids))))


@pytest.mark.parametrize("kind", ["bias", "least_squares"])
def test_no_repair_learns_from_padding(kind: str) -> None:
    found = []
    for pads in (0, 17):
        torch.manual_seed(0)
        sick = patient(Wide(), texts(3, seed=0, pads=pads))
        before = state(sick.small)
        notes = repair(kind).apply_(sick)
        assert any(note.accepted for note in notes)
        found.append(state(sick.small))
        assert not torch.equal(before["down.bias"], found[-1]["down.bias"])
    torch.testing.assert_close(found[0], found[1])


class Residual(nn.Module):
    """Add a layer to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def test_a_block_is_held_to_the_removed_ones_behind_it_in_its_own_row() -> None:
    rows = [[Residual() for _ in range(3)] for _ in range(2)]
    model = nn.Sequential(*rows[0], nn.Linear(4, 4), *rows[1], nn.Linear(4, 2))
    graph, x = trace(model, torch.randn(5, 4)), torch.randn(5, 4)
    drops = [
        Drop(
            block=name,
            rule=0,
            criterion="",
            replace="identity",
            reason="",
            error=0.0,
            swaps=graph.block(name).swaps,
        )
        for name in ("1", "4", "5")
    ]
    sick = Patient(model, copy.deepcopy(model), graph, [], [], [x], drops=drops, gone=drops)
    assert _counterparts(sick) == {"0": "1", "2": "2", "6": "6"}


def test_steps_that_do_harm_leave_the_weights_bit_for_bit() -> None:
    sick = encoder(texts(9, seed=0), by=1e-4)
    before = state(sick.small)
    note = repair("reconstruct", least_squares=None, steps=6, rate=10.0, checks=3).apply_(sick)[-1]
    assert note.after == note.before
    assert all(torch.equal(v, before[k]) for k, v in state(sick.small).items())


def test_the_weights_that_held_out_samples_like_best_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 2)
    descent = Descent(Taps(model, ()), Goals(Taps(model, ()), {}, 0), [], list(model.parameters()))
    told = iter([5.0, 3.0, 4.0, float("nan")])
    monkeypatch.setattr(descent, "distance", lambda *, together: next(told))
    for value in range(4):
        nn.init.constant_(model.weight, value)
        descent.check()
    descent.restore_()
    assert torch.equal(model.weight, torch.ones(2, 2)) and descent.best == 3.0


@pytest.mark.parametrize("checks", [1, 4, 20])
def test_held_out_samples_are_asked_as_often_as_told(
    checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sick, asked, plain = encoder(texts(9, seed=0)), list[int](), Descent.check

    def check(descent: Descent) -> None:
        asked.append(1)
        plain(descent)

    monkeypatch.setattr(Descent, "check", check)
    repair("reconstruct", least_squares=None, steps=20, checks=checks).apply_(sick)
    assert len(asked) == checks + 1  # and before the first step


def test_tables_of_embeddings_keep_their_rows_and_the_rest_learns() -> None:
    sick = encoder(texts(9, seed=0))
    before = state(sick.small)
    repair("reconstruct", least_squares=None, steps=20).apply_(sick)
    moved = {k for k, v in state(sick.small).items() if not torch.equal(v, before[k])}
    assert moved == before.keys() - {"table.weight"}


def test_a_table_that_is_a_head_as_well_does_not_learn() -> None:
    model = Tokens()
    model.head = nn.Linear(8, 40, bias=False)
    model.head.weight = model.table.weight
    with learning(model) as live:
        assert {id(p) for p in live} == {id(p) for p in model.layers.parameters()}
    assert all(p.requires_grad for p in model.parameters())


def test_a_network_of_tables_alone_is_left_and_noted() -> None:
    model, batches = nn.Embedding(5, 3), [torch.arange(4)]
    sick = Patient(
        model, copy.deepcopy(model), trace(Tokens(), texts(1, seed=0)[0]), [], [], batches
    )
    (note,) = repair("reconstruct", least_squares=None).apply_(sick)
    assert (note.accepted, note.text) == (False, "no parameter that could learn")


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_the_step_size_rises_to_its_peak_then_falls_and_is_never_nothing(
    steps: int, warmup: float
) -> None:
    found = [pace(done, steps, warmup) for done in range(steps)]
    assert all(0 < value <= 1 for value in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert top <= warmup * steps + 1


def test_without_a_rise_the_step_size_is_half_a_cosine() -> None:
    assert [pace(done, 4, 0.0) for done in (0, 2)] == pytest.approx([1.0, 0.5])
    assert [pace(done, 20, 0.2) for done in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("done", "spent", "expected"),
    [(0, 0.0, 100), (5, 9.0, 95), (20, 1.0, 80), (20, 5.0, 20), (20, 8.0, 5), (20, 10.0, 0)],
)
def test_there_are_as_many_steps_left_as_there_is_time_for(
    done: int, spent: float, expected: int
) -> None:
    assert steps_left(100, done, spent, 10.0) == expected


def test_a_descent_without_time_for_all_its_steps_ends_in_time_and_says_so() -> None:
    sick = encoder(texts(9, seed=0))
    note = repair("reconstruct", least_squares=None, steps=10**6, seconds=0.4).apply_(sick)[-1]
    assert note.accepted and note.after < note.before
    assert note.text.endswith("steps in 0.4 s")
    assert 0 < int(note.text.split()[0]) < 10**5


def test_the_loss_is_relative_and_weighs_modules_alike() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with Taps(model, ("0",)) as taps:
        goal = taps.show(x)
        assert loss(goal, goal, x, outputs=1.0).item() == 0
        scaled = goal._replace(
            inner={"0": [1.5 * t for t in goal.inner["0"]]}, ends=[0.9 * t for t in goal.ends]
        )
    assert loss(goal, scaled, x, outputs=2.0).item() == pytest.approx(0.25 + 2 * 0.01)
