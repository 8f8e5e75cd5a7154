"""Cutting: exact, checked before the first write, and back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES, cut, outputs, random_cuts
from torch_otprune.errors import PlanError
from torch_otprune.plan import Cut
from torch_otprune.structure import trace
from torch_otprune.structure.layers import Conv, is_depthwise
from torch_otprune.surgery import Snapshot, check_cuts, cut_, disagreement, gap, masked


def silenced(model: nn.Module, cuts: list[Cut]) -> nn.Module:
    """Zero the consumers' weights on what the cuts remove: an oracle that shares no code."""
    twin = copy.deepcopy(model)
    for piece in (p for c in cuts for p in c.slices if p.side == "in"):
        module = twin.get_submodule(piece.path)
        gone = torch.tensor([i not in piece.keep for i in range(piece.size)])
        with torch.no_grad():
            _zero(module, gone)
    return twin


def _zero(module: Any, gone: Tensor) -> None:
    if isinstance(module, Conv) and module.groups > 1:
        for g, (weight, part) in enumerate(
            zip(module.weight.chunk(module.groups), gone.chunk(module.groups), strict=True)
        ):
            del g
            weight[:, part] = 0
    elif isinstance(module, Conv) and module.transposed:
        module.weight[gone] = 0
    else:
        module.weight[:, gone] = 0


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_pruned_equals_masked(name: str, seed: int) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    cuts = random_cuts(trace(model, batch), seed=seed, hidden=False)
    expected = outputs(silenced(model, cuts), batch)
    cut_(model, cuts)
    assert gap(expected, outputs(model, batch)) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_our_own_oracle_agrees_with_silenced_weights(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    cuts = random_cuts(trace(model, batch), seed=3, hidden=False)
    with masked(model, cuts):
        got = outputs(model, batch)
    assert gap(outputs(silenced(model, cuts), batch), got) < 1e-12
    assert disagreement(model, cuts, batch) < 1e-10


def test_the_oracle_sees_a_cut_that_misses_a_layer() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    [first, *rest] = random_cuts(trace(model, batch))
    lame = first.model_copy(update={"slices": first.slices[:-1]})
    assert disagreement(model, [lame, *rest], batch) == float("inf")


def test_the_oracle_sees_a_cut_of_the_wrong_channels() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    graph = trace(model, batch)
    one, two = (cut(graph, "0", torch.tensor(k)) for k in ([0, 1, 2], [3, 4, 5]))
    crossed = one.model_copy(update={"slices": (*two.slices[:1], *one.slices[1:])})
    assert disagreement(model, [crossed], batch) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_keeping_all_changes_nothing(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    graph, before = trace(model, batch), outputs(model, batch)
    cut_(model, [cut(graph, g.name, torch.arange(g.units)) for g in graph.groups])
    assert gap(before, outputs(model, batch)) == 0


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_keeps_its_names_types_and_flags(name: str) -> None:
    model = CASES[name].model()
    before = copy.deepcopy(model)
    cut_(model, random_cuts(trace(model, CASES[name].batch())))
    assert list(model.state_dict()) == list(before.state_dict())
    for (_, a), (_, b) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
        assert b.is_contiguous() and b.is_leaf


@pytest.mark.parametrize("name", CASES)
def test_static_widths_follow_the_tensors(name: str) -> None:
    model = CASES[name].model()
    cut_(model, random_cuts(trace(model, CASES[name].batch())))
    for module in model.modules():
        if isinstance(module, Conv):
            width = module.in_channels // module.groups
            out, into = (1, 0) if module.transposed else (0, 1)
            assert module.weight.shape[out] == module.out_channels
            assert module.weight.shape[into] == width or is_depthwise(module)
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_trains(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    cut_(model, random_cuts(trace(model, batch)))
    model.train()
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    _loss(model, batch).backward()
    optimiser.step()
    assert all(torch.isfinite(t).all() for t in outputs(model, batch))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    from torch_otprune.structure import flat_tensors, run

    parts = [t.square().mean() for t in flat_tensors(run(model, batch)) if t.requires_grad]
    return torch.stack(parts).sum()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare bit for bit, names included."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_brings_everything_back_after_training(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    before, text, answer = state(model), str(model), outputs(model, batch)
    snapshot = Snapshot(model)
    cut_(model, random_cuts(trace(model, batch)))
    model.train()
    optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        _loss(model, batch).backward()
        optimiser.step()
    snapshot.restore_()
    assert same(before, state(model))
    assert str(model) == text
    assert gap(answer, outputs(model.eval(), batch)) == 0


def test_a_snapshot_returns_the_very_parameters_that_an_optimiser_holds() -> None:
    model, batch = CASES["residual"].model(), CASES["residual"].batch()
    held = list(model.parameters())
    snapshot = Snapshot(model)
    cut_(model, random_cuts(trace(model, batch)))
    snapshot.restore_()
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_a_snapshot_undoes_what_training_wrote_into_the_old_tensors() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    before, snapshot = state(model), Snapshot(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    _loss(model, batch).backward()
    optimiser.step()
    snapshot.restore_()
    assert same(before, state(model))


def test_a_snapshot_keeps_ties() -> None:
    model = CASES["tied"].model()
    snapshot = Snapshot(model)
    cut_(model, random_cuts(trace(model, CASES["tied"].batch())))
    snapshot.restore_()
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")


@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_under_two_names_is_cut_under_both(first: bool, tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self, scale: nn.Parameter) -> None:
            super().__init__()
            self.w = scale

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            scale = nn.Parameter(torch.rand(16))
            if first:
                self.w = scale
            self.a, self.n, self.f = nn.Linear(6, 16), Scale(scale), nn.Linear(16, 3)
            self.w = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.n(self.a(x).relu()))

    model, x = Net().double().eval(), torch.randn(32, 6, dtype=torch.float64)
    report = otp.prune_(model, otp.Policy(rules=[otp.Channels(keep="50%")]), [x], timing=0)
    assert model.n.w is model.w and model.w.shape == (8,)
    assert report.params.after == 6 * 8 + 8 + 8 + 8 * 3 + 3
    otp.save(model, tmp_path / "small")
    loaded = otp.load(tmp_path / "small", factory=lambda: Net().double().eval())
    assert loaded.n.w is loaded.w and torch.equal(loaded(x), model(x))
    report.undo_()
    assert model.n.w is model.w and model.w.shape == (16,)


def test_a_snapshot_can_be_used_twice() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    before, snapshot, graph = state(model), Snapshot(model), trace(model, batch)
    for seed in range(2):
        cut_(model, random_cuts(graph, seed=seed))
        snapshot.restore_()
        assert same(before, state(model))


def test_training_flags_come_back() -> None:
    model = CASES["plain"].model().train()
    snapshot = Snapshot(model)
    model.eval()
    snapshot.restore_()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message", "where"),
    [
        ({"path": "9"}, "the plan cuts 6 channels, the model has no such module.", "'9', side out"),
        ({"size": 7}, "the plan cuts 7 channels, the model has 6.", "'0', side out"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused_before_the_first_write(
    change: dict[str, Any], message: str, where: str
) -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    before, [first, *rest] = state(model), random_cuts(trace(model, batch))
    wrong = first.slices[0].model_copy(update=change)
    bad = first.model_copy(update={"slices": (*first.slices[1:], wrong)})
    with pytest.raises(PlanError) as error:
        cut_(model, [*rest, bad])
    assert (error.value.problem, error.value.where) == (message, where)
    assert same(before, state(model))


def test_an_index_beyond_the_channels_is_refused_before_the_first_write() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    before, [first, *rest] = state(model), random_cuts(trace(model, batch))
    wrong = first.slices[0].model_copy(update={"keep": (0, 99)})
    bad = first.model_copy(update={"slices": (*first.slices[1:], wrong)})
    with pytest.raises(PlanError) as error:
        check_cuts(model, [*rest, bad])
    assert "keeps channel 99 of 6" in error.value.problem
    assert same(before, state(model))


def test_two_groups_that_empty_a_consumer_are_refused() -> None:
    model, batch = CASES["mlp"].model(), CASES["mlp"].batch()
    graph = trace(model, batch)
    pair = [cut(graph, "0", torch.tensor(k)) for k in ([0], [1])]
    with pytest.raises(PlanError) as error:
        cut_(model, pair)
    assert error.value.problem == "the cuts leave no channel."
    assert "fix:" in str(error.value)


@pytest.mark.filterwarnings("error:input's size at dim=1")
@pytest.mark.parametrize(
    ("norm", "width"),
    [
        (nn.InstanceNorm2d(8), "num_features"),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features"),
        (nn.GroupNorm(8, 8, affine=False), "num_channels"),
    ],
)
def test_a_norm_without_tensors_says_its_new_width(norm: nn.Module, width: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 7, 7)
    snapshot = Snapshot(net)
    cut_(net, [cut(trace(net, x), "0", torch.tensor([1, 4, 6]))])
    assert getattr(net[1], width) == 3
    assert net(x).shape == (2, 4, 3, 3)
    snapshot.restore_()
    assert getattr(net[1], width) == 8
