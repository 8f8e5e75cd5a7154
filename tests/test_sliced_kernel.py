"""Diverse subsets: pivoted Cholesky against brute force, and the kernel of channel laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.attach.needs import needs_of
from torch_otprune.criteria import SlicedKernel
from torch_otprune.errors import CalibrationError, PolicyError, TransportError
from torch_otprune.statistics import Consumer, Evidence
from torch_otprune.statistics.filters import Filters
from torch_otprune.transport import pivoted_cholesky, wasserstein_1d


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heard(signals: Tensor, *, absorbs: bool = False, weight: Tensor | None = None) -> Evidence:
    """Lay out one dense consumer: rows x units."""
    units = signals.shape[1]
    read = torch.ones(1, units, 1, dtype=torch.float64) if weight is None else weight[None, :, None]
    feel = torch.ones(1, dtype=torch.float64)
    reader = Consumer("next", read, None, absorbs, feel, None, signals)
    return Evidence("group", units, draw(units, 3), None, (reader,), None, 0)


def gram(evidence: Evidence, **settings: Any) -> Tensor:
    """Compute the kernel of the laws from pairs of W_2 distances."""
    signals = evidence.consumers[0].signals
    assert signals is not None
    signals = signals / signals.square().mean().sqrt()
    units = signals.shape[1]
    far = torch.zeros(units, units, dtype=torch.float64)
    for i in range(units):
        for j in range(units):
            far[i, j] = wasserstein_1d(signals[:, [i]], signals[:, [j]])[0] ** 2
    return (-settings["gamma"] * far).exp()


# pivoted Cholesky


@given(seed=st.integers(0, 40), n=st.integers(2, 7))
def test_every_pick_is_the_one_that_enlarges_the_determinant_most(seed: int, n: int) -> None:
    root = draw(n, n, seed=seed)
    kernel = root @ root.T
    found = pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal())
    for size in range(1, n + 1):
        before = found.order[: size - 1].tolist()
        rest = [j for j in range(n) if j not in before]
        volumes = [float(torch.det(kernel[[*before, j]][:, [*before, j]])) for j in rest]
        mine = found.order[:size].tolist()
        assert float(torch.det(kernel[mine][:, mine])) >= max(volumes) * (1 - 1e-9)


@given(seed=st.integers(0, 40))
def test_the_curve_is_what_the_best_prediction_misses(seed: int) -> None:
    root = draw(6, 6, seed=seed)
    kernel = root @ root.T
    found = pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal())
    assert found.rank == 6 and sorted(found.order.tolist()) == list(range(6))
    for size in range(7):
        kept = found.order[:size]
        part = kernel[kept][:, kept]
        left = kernel - kernel[:, kept] @ torch.linalg.solve(part, kernel[kept])
        assert float(found.trace[size]) == pytest.approx(float(left.trace()), abs=1e-8)


def test_the_determinant_is_within_reach_of_the_best_subset() -> None:
    root = draw(8, 8, seed=3)
    kernel = root @ root.T
    mine = pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal()).order[:3].tolist()
    best = max(float(torch.det(kernel[list(s)][:, list(s)])) for s in combinations(range(8), 3))
    assert float(torch.det(kernel[mine][:, mine])) >= best / 36  # (k!)^2, the known guarantee


def test_stopping_early_leaves_an_upper_bound_and_the_same_start() -> None:
    root = draw(9, 9, seed=1)
    kernel = root @ root.T
    full, short = (
        pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal(), steps=s) for s in (None, 4)
    )
    assert short.rank == 4 and torch.equal(full.order[:4], short.order[:4])
    assert sorted(short.order.tolist()) == list(range(9)) and float(short.trace[-1]) == 0
    for size in range(10):
        kept = short.order[:size]
        left = kernel - kernel[:, kept] @ torch.linalg.lstsq(
            kernel[kept][:, kept], kernel[kept]
        ).solution if size else kernel  # fmt: skip
        assert float(left.trace()) <= float(short.trace[size]) + 1e-8


def test_copies_add_nothing_and_equals_go_as_asked() -> None:
    kernel = torch.ones(4, 4, dtype=torch.float64)
    kernel[3] = kernel[:, 3] = 0
    kernel[3, 3] = 1
    wish = torch.tensor([1.0, 3.0, 2.0, 0.0])
    found = pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal(), among_equals=wish)
    assert found.order.tolist() == [1, 3, 2, 0] and found.rank == 2
    assert found.trace.tolist() == [4, 1, 0, 0, 0]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_no_kernel_is_refused(bad: float) -> None:
    with pytest.raises(TransportError) as error:
        pivoted_cholesky(lambda j: torch.ones(2), torch.tensor([1.0, bad]))
    assert "diagonal" in error.value.problem or "diagonal" in error.value.where


# the kernel of laws


@given(seed=st.integers(0, 30), gamma=st.sampled_from([0.01, 0.3, 3.0, 30.0]))
def test_the_kernel_of_laws_is_positive_definite(seed: int, gamma: float) -> None:
    signals = draw(7, 12, seed=seed).exp() * draw(1, 12, seed=seed + 1)
    values = torch.linalg.eigvalsh(gram(heard(signals), gamma=gamma))
    assert float(values.min()) > -1e-10


def test_the_order_is_that_of_the_exact_kernel() -> None:
    made = heard(draw(20, 9) * torch.linspace(0.3, 3, 9, dtype=torch.float64))
    kernel = gram(made, gamma=0.7)
    size = torch.linspace(0.3, 3, 9)
    exact = pivoted_cholesky(lambda j: kernel[:, j], kernel.diagonal(), among_equals=size)
    found = SlicedKernel(gamma=0.7, weigh=False).rank(made)
    assert torch.equal(found.order, exact.order)
    torch.testing.assert_close(found.curve, exact.trace / 9, rtol=1e-6, atol=1e-7)


def test_of_copies_one_stays() -> None:
    base = draw(30, 3).exp()
    made = heard(torch.cat([base, base, base], 1))
    found = SlicedKernel().rank(made)
    assert {unit % 3 for unit in found.order[:3].tolist()} == {0, 1, 2}
    assert float(found.curve[3]) < 1e-9


def test_faint_channels_stay_only_without_weighing() -> None:
    signals = torch.cat([draw(40, 5) * 1 + 1, 1e-3 * draw(40, 1, seed=1).exp()], 1)
    assert SlicedKernel(weigh=True).rank(heard(signals)).order.tolist()[-1] == 5
    assert SlicedKernel(weigh=False, gamma=1.0).rank(heard(signals)).order.tolist()[1] == 5


def test_what_consumers_make_of_a_channel_counts() -> None:
    signals = draw(40, 4)
    weight = torch.tensor([1.0, 1.0, 1.0, 1e-4], dtype=torch.float64)
    found = SlicedKernel(measure="paired").rank(heard(signals, weight=weight))
    assert found.order.tolist()[-1] == 3


def test_laws_do_not_see_who_fires_when_and_paired_does() -> None:
    one = draw(50, 1)
    other = one[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    made = heard(torch.cat([one, other, one], 1))
    blind, sees = (SlicedKernel(measure=m).rank(made) for m in ("activations", "paired"))
    assert float(blind.curve[1]) < 1e-9  # one histogram: the first stands for all
    assert float(sees.curve[1]) > 0.1 and float(sees.curve[2]) < 1e-9


def test_filters_are_laws_as_well() -> None:
    rows = draw(6, 8)
    rows[4] = rows[1].flip(0)  # the same values elsewhere
    found = Filters("conv", rows[:, None, :, None], rows.new_zeros(6, 1), ())
    made = Evidence("g", 6, rows, None, (), None, 0, (found,))
    assert SlicedKernel(measure="weights").needs == frozenset()
    ranking = SlicedKernel(measure="weights", weigh=False).rank(made)
    assert float(ranking.curve[5]) < 1e-9 and int(ranking.order[-1]) in (1, 4)


# fallbacks and errors


def test_dead_and_constant_channels_go_first_and_are_named() -> None:
    signals = draw(20, 5)
    signals[:, 1], signals[:, 3] = 0, 2.5
    found = SlicedKernel().rank(heard(signals, absorbs=True))
    assert set(found.order.tolist()[-2:]) == {1, 3} and "dead channels go first: 1, 3" in found.note
    assert found.curve[3:].tolist() == [0, 0, 0]


def test_all_channels_dead_is_no_crash() -> None:
    found = SlicedKernel().rank(heard(torch.zeros(5, 4, dtype=torch.float64)))
    assert sorted(found.order.tolist()) == [0, 1, 2, 3] and float(found.curve.max()) == 0
    assert "dead channels go first" in found.note


@pytest.mark.parametrize("units", [1, 2, 3])
def test_small_groups_start_with_the_largest(units: int) -> None:
    signals = draw(30, units) * torch.arange(1, units + 1, dtype=torch.float64)
    assert int(SlicedKernel().rank(heard(signals)).order[0]) == units - 1


def test_numbers_that_are_none_are_refused() -> None:
    signals = draw(10, 3)
    signals[4, 1] = float("nan")
    with pytest.raises(CalibrationError) as error:
        SlicedKernel().rank(heard(signals))
    assert "scored nan" in error.value.problem and "'group'" in error.value.where


def test_without_data_the_criterion_says_so() -> None:
    made = heard(draw(9, 3))
    made = replace(made, consumers=(replace(made.consumers[0], signals=None),))
    with pytest.raises(CalibrationError) as error:
        SlicedKernel().rank(made)
    assert error.value.problem == "no activations were gathered of what reads this group."
    assert "sliced_kernel" in error.value.where and "measure='weights'" in error.value.fix


def test_settings_are_checked() -> None:
    with pytest.raises(PolicyError):
        otp.Policy(rules=[otp.Channels(keep=2, criterion={"kind": "sliced_kernel", "gamma": 0})])
    rule = otp.Channels(keep=2, criterion="sliced_kernel", repair="none")
    assert needs_of(otp.Policy(rules=[rule])) == {"signals"}


def test_a_very_wide_group_names_how_many_were_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_otprune.criteria.sliced_kernel._WORK", 30 * 5**2)
    found = SlicedKernel().rank(heard(draw(12, 30)))
    assert "5 channels were picked by Cholesky" in found.note
    assert sorted(found.order.tolist()) == list(range(30))
    assert bool((found.curve.diff() <= 1e-12).all())


@pytest.mark.parametrize("measure", ["activations", "weights", "paired"])
def test_a_network_is_planned_cut_and_runs(measure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4, 3),
    ).eval()  # fmt: skip
    setting = {"kind": "sliced_kernel", "measure": measure}
    x = torch.randn(16, 2, 6, 6)
    plans = []
    for batches in ([x], [x[:5], x[5:]]):
        rule = otp.Channels(keep="50%", criterion=setting)
        with otp.attach(model, otp.Policy(rules=[rule])) as attached:
            plans.append(otp.observe(attached, batches).plan())
    assert plans[0].keep() == plans[1].keep()
    report = otp.apply_(model, plans[0], [x])
    assert model(x).shape == (16, 3) and report.macs.after == plans[0].macs.after
