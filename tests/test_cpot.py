"""CPOT: barycenters by hand, laws, and every trap of the published idea."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES
from torch_otprune.attach.needs import needs_of
from torch_otprune.criteria import CPOT
from torch_otprune.criteria.laws import Gaussians, Grids, Lines
from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.statistics import Consumer, Evidence
from torch_otprune.statistics.evidence import gather
from torch_otprune.statistics.filters import Filters
from torch_otprune.structure import trace

MEASURES = ["weights", "taps", "activations", "gaussian"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def evidence(*blocks: Tensor, kernel: tuple[int, ...] = ()) -> Evidence:
    """Lay out producers: units x features each, the kernel's taps last."""
    taps = int(torch.tensor(kernel).prod()) if kernel else 1
    found = tuple(
        Filters(f"conv{i}", b.reshape(len(b), 1, -1, taps), b.new_zeros(len(b), 1), kernel)
        for i, b in enumerate(blocks)
    )
    return Evidence("g", len(blocks[0]), torch.cat(blocks, 1), None, (), None, 0, found)


def heard(signals: Tensor, *, absorbs: bool = False) -> Evidence:
    """Lay out one dense consumer: rows x units."""
    mean, centre = signals.mean(0), signals.mean(0) if absorbs else 0
    second = (signals - centre).T @ (signals - centre) / len(signals)
    ones = torch.ones(2, signals.shape[1], 1, dtype=torch.float64)
    feel = torch.ones(2, dtype=torch.float64)
    read = Consumer("c", ones, second[:, None, :, None], absorbs, feel, mean[:, None], signals)
    return replace(evidence(draw(signals.shape[1], 5)), consumers=(read,))


def order(made: Evidence, **settings: Any) -> list[int]:
    return CPOT(**settings).rank(made).order.tolist()


# exact answers


def test_the_curve_is_the_share_of_squared_distance_to_the_mean_quantiles() -> None:
    rows = numbers([20, 21, 22, 23], [25, 24, 27, 26], [21, 20, 23, 22], [30, 32, 31, 33])
    ranking = CPOT(normalise="none").rank(evidence(rows))
    quantiles = rows.sort(1).values
    far = ((quantiles - quantiles.mean(0)) ** 2).mean(1)
    assert ranking.order.tolist() == [3, 2, 0, 1]  # 0 and 2 hold the same values
    share = far[ranking.order] / far.sum()
    expected = torch.cat([share.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(ranking.curve, expected)


def test_of_order_one_the_barycenter_is_the_median() -> None:
    rows = numbers([1, 1], [2, 2], [3, 3], [4, 4], [100, 100]) + 200
    one = Lines(rows, 1)
    centre = one.centre(torch.arange(5))
    assert centre.tolist() == [203, 203] and one.far(centre).tolist() == [2, 1, 0, 1, 97]
    assert order(evidence(rows), normalise="none", p=1)[-1] == 2
    assert order(evidence(rows), normalise="none", p=2)[-1] == 3  # the mean is 222


def test_gaussians_on_a_line_are_apart_by_mean_and_deviation() -> None:
    means, deviations = draw(6, 1), draw(6, 1, seed=1).abs() + 0.1
    laws = Gaussians(means, deviations[:, :, None] ** 2)
    mean, cov = laws.centre(torch.arange(6))
    torch.testing.assert_close(mean, means.mean(0))
    torch.testing.assert_close(cov.sqrt()[0], deviations.mean(0))
    expected = ((means - means.mean()) ** 2 + (deviations - deviations.mean()) ** 2).sqrt()[:, 0]
    torch.testing.assert_close(laws.far((mean, cov)), expected)


def test_the_barycenter_of_two_taps_is_the_tap_between_them() -> None:
    at = torch.arange(5, dtype=torch.float64)
    cost = (at[:, None] - at) ** 2
    masses = torch.eye(5, dtype=torch.float64)[[0, 2]]
    laws = Grids(masses, cost, 2, eps=0.01)
    centre = laws.centre(torch.arange(2))
    torch.testing.assert_close(centre, torch.eye(5, dtype=torch.float64)[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        laws.far(centre), torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_the_barycenter_of_taps_costs_what_the_linear_program_finds() -> None:
    at = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 2)
    cost = torch.cdist(at, at).square()
    masses = draw(4, 9).abs() ** 3
    laws = Grids(masses / masses.sum(1, keepdim=True), cost, 2, eps=0.02)
    rows, points = laws.masses.shape
    plans = rows * points * points
    limits = torch.zeros(2 * rows * points, plans + points, dtype=torch.float64)
    wanted = torch.cat([laws.masses.flatten(), torch.zeros(rows * points, dtype=torch.float64)])
    for row in range(rows):
        every = torch.arange(points**2).view(points, points) + row * points**2
        for k in range(points):
            limits[row * points + k, every[k]] = 1
            limits[(rows + row) * points + k, every[:, k]] = 1
            limits[(rows + row) * points + k, plans + k] = -1
    prices = torch.cat([cost.flatten().repeat(rows), cost.new_zeros(points)])
    exact = linprog(prices.numpy(), A_eq=limits.numpy(), b_eq=wanted.numpy(), bounds=(0, None))
    ours = laws.far(laws.centre(torch.arange(rows))).square().sum()
    assert float(ours) == pytest.approx(exact.fun, rel=1e-3)


def test_the_barycenter_of_gaussians_is_the_fixed_point_of_bures() -> None:
    wide = draw(5, 4, 4)
    laws = Gaussians(draw(5, 4, seed=1), wide @ wide.mT)
    mean, cov = laws.centre(torch.arange(5))
    root = sqrtm(cov)
    between = torch.stack([sqrtm(root @ own @ root) for own in laws.covs]).mean(0)
    torch.testing.assert_close(mean, laws.means.mean(0))
    torch.testing.assert_close(between, cov)


def sqrtm(matrix: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return (basis * values.clamp_min(0).sqrt()) @ basis.mT


def test_of_copies_that_are_outliers_one_goes_only_where_there_are_several_centres() -> None:
    rows = draw(8, 30)
    rows[0] = rows[1] = 4 * rows[0]
    made = evidence(rows)
    assert set(order(made, normalise="none")[:2]) == {0, 1}  # a limit that the docstring names
    rule = CPOT(k_barycenters="kept", normalise="none")
    kept = rule.refine(made, rule.rank(made).order[:4])
    assert len({0, 1} & set(kept.tolist())) == 1


def test_one_dimensional_gaussian_signals_and_their_quantiles_agree() -> None:
    base = torch.distributions.Normal(0.0, 1.0).icdf(
        (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    )
    signals = base[:, None] * numbers([1, 2, 3, 5, 9]) + numbers([0, 1, -2, 0, 4])
    found = [
        CPOT(measure=m, normalise="none").rank(heard(signals)) for m in ("activations", "gaussian")
    ]
    assert torch.equal(found[0].order, found[1].order)
    torch.testing.assert_close(found[0].curve, found[1].curve, atol=1e-3, rtol=0)


def test_a_mean_that_a_bias_absorbs_still_belongs_to_the_law() -> None:
    signals = draw(200, 6) * numbers([1, 2, 3, 1, 2, 3]) + numbers([0, 5, 1, 2, 9, 4])
    found = [
        CPOT(measure="gaussian", normalise="none").rank(heard(signals, absorbs=a)).curve
        for a in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1])


# traps


def test_filters_with_the_same_values_are_told_apart_by_where_they_stand() -> None:
    rows = numbers([1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])
    ranking = CPOT().rank(evidence(rows))
    assert ranking.order.tolist() == [0, 4, 1, 2, 3]


def test_taps_see_where_a_filter_looks_and_weights_do_not() -> None:
    left, right = numbers([1, 1, 0, 0, 0]), numbers([0, 0, 0, 1, 1])
    made = evidence(torch.cat([left] * 4 + [right]), kernel=(5,))
    weights, taps = (CPOT(measure=m).rank(made) for m in ("weights", "taps"))
    assert float(weights.curve[0]) == 0  # all laws are the same
    assert float(taps.curve[0]) == pytest.approx(1) and int(taps.order[0]) == 4


def test_taps_see_signs() -> None:
    rows = numbers([1, 2, 1]).repeat(5, 1)
    rows[3] *= -1
    assert order(evidence(rows, kernel=(3,)), measure="taps")[0] == 3


@pytest.mark.parametrize("normalise", ["none", "std", "l2"])
@pytest.mark.parametrize("mode", ["one_shot", "greedy"])
@pytest.mark.parametrize("measure", ["weights", "taps"])
def test_a_zero_filter_goes_first_and_does_not_move_the_barycenter(
    measure: Any, mode: Any, normalise: Any
) -> None:
    rows = draw(7, 9)
    settings = {"measure": measure, "mode": mode, "normalise": normalise}
    alone = CPOT(**settings).rank(evidence(rows, kernel=(3, 3)))
    ranking = CPOT(**settings).rank(evidence(torch.cat([rows, rows[:1] * 0]), kernel=(3, 3)))
    assert ranking.order.tolist() == [*alone.order.tolist(), 7]
    torch.testing.assert_close(ranking.curve[:8], alone.curve)
    assert ranking.note == "dead channels go first: 7"


@pytest.mark.parametrize("measure", ["activations", "gaussian"])
def test_a_constant_signal_goes_first_and_is_named(measure: Any) -> None:
    signals = draw(60, 6)
    signals[:, 2] = 40.0
    ranking = CPOT(measure=measure).rank(heard(signals))
    assert int(ranking.order[-1]) == 2 and ranking.note == "dead channels go first: 2"


def test_many_dead_channels_are_counted_off_in_short() -> None:
    rows = draw(12, 4)
    rows[3:10] = 0
    assert CPOT().rank(evidence(rows)).note == "dead channels go first: 3, 4, 5, 6, 7, ..."


def test_a_filter_whose_weights_are_all_equal_is_no_division_by_zero() -> None:
    rows = draw(6, 9)
    rows[4] = 3.0
    ranking = CPOT(normalise="std").rank(evidence(rows))
    assert bool(torch.isfinite(ranking.curve).all()) and ranking.note == ""


def normed(scales: list[float], variances: list[float]) -> Evidence:
    """Gather a convolution with a batch-norm behind it."""
    width = len(scales)
    model = nn.Sequential(
        nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2, 1)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(draw(1, 2, 3, 3).expand(width, -1, -1, -1))
        model[1].weight.copy_(torch.tensor(scales))
        model[1].running_var.copy_(torch.tensor(variances))
    model.eval()
    graph = trace(model, draw(2, 2, 6, 6))
    return gather(model, graph, graph.groups[0], moments={}, sensitivity=None, seed=0)


def test_the_batch_norm_behind_a_filter_counts() -> None:
    made = normed([1.0, 1.1, 5.0, 0.9, 1.0], [1.0] * 5)
    assert order(made, normalise="none")[0] == 2
    made = normed([1.0] * 5, [1.0, 1.0, 1.0, 0.01, 1.0])
    assert order(made, normalise="none")[0] == 3
    negative = normed([1.0, 1.0, -1.0, 1.0, 1.0], [1.0] * 5)
    assert order(negative, normalise="l2")[0] == 2


def test_a_batch_norm_without_variance_stays_finite() -> None:
    made = normed([1.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0])
    assert bool(torch.isfinite(made.filters[0].weight).all())
    assert order(made, normalise="none")[0] == 1


def test_a_sharp_barycenter_is_not_blurred_by_its_temperature() -> None:
    rows = torch.zeros(9, 9, dtype=torch.float64)
    rows[:8, 4] = 1.0  # eight filters look at the middle
    rows[8] = 1.0  # one looks everywhere
    ranking = CPOT(measure="taps", eps=0.5).rank(evidence(rows, kernel=(3, 3)))
    assert int(ranking.order[0]) == 8
    one = evidence(rows[:8], kernel=(3, 3))
    assert float(CPOT(measure="taps", eps=0.5).rank(one).curve[0]) == 0


@pytest.mark.parametrize("measure", ["weights", "taps"])
def test_producers_of_one_stream_count_alike_whatever_their_scale(measure: Any) -> None:
    blocks = [draw(6, 18), draw(6, 9, seed=1)]
    found = [
        CPOT(measure=measure, normalise="none").rank(
            evidence(blocks[0], blocks[1] * s, kernel=(3, 3))
        )
        for s in (1.0, 1000.0)
    ]
    assert torch.equal(found[0].order, found[1].order)
    torch.testing.assert_close(found[0].curve, found[1].curve)


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("mode", ["one_shot", "greedy"])
def test_of_three_channels_the_largest_stay(units: int, mode: Any) -> None:
    rows = draw(units, 6) * numbers([2.0], [3.0], [1.0])[:units]
    ranking = CPOT(mode=mode).rank(evidence(rows))
    assert ranking.order.tolist() == rows.norm(dim=1).argsort(descending=True).tolist()
    assert ranking.note == (
        f"{units} live channels have no centre to speak of; ranked by weight norm"
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_all_channels_dead_is_no_crash(measure: Any) -> None:
    made = heard(torch.zeros(9, 5, dtype=torch.float64))
    blank = made.filters[0].weight * 0
    made = replace(
        made, producers=made.producers * 0, filters=(replace(made.filters[0], weight=blank),)
    )
    ranking = CPOT(measure=measure).rank(made)
    assert sorted(ranking.order.tolist()) == [0, 1, 2, 3, 4]
    assert bool((ranking.curve == 0).all())


def test_a_layer_without_a_kernel_has_its_values_compared_and_says_so() -> None:
    made = evidence(draw(6, 8))
    taps, weights = CPOT(measure="taps").rank(made), CPOT(measure="weights").rank(made)
    assert torch.equal(taps.order, weights.order)
    assert taps.note == "'conv0' has one tap: its values are compared instead"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", ["weights", "taps"])
def test_weights_that_are_not_finite_are_refused(measure: Any, bad: float) -> None:
    rows = draw(6, 9)
    rows[3, 1] = bad
    with pytest.raises(CalibrationError) as error:
        CPOT(measure=measure).rank(evidence(rows, kernel=(3, 3)))
    assert error.value.problem == f"unit 3 scored {bad}." and error.value.where == "group 'g'"


@pytest.mark.parametrize("measure", ["activations", "gaussian"])
def test_signals_that_were_not_gathered_are_asked_for(measure: Any) -> None:
    with pytest.raises(CalibrationError) as error:
        CPOT(measure=measure).rank(evidence(draw(6, 9)))
    assert error.value.problem == "no activations were gathered of what reads this group."
    assert error.value.fix.startswith("run calibration data through the model; of experts")


def test_a_filter_near_nothing_is_no_outlier() -> None:
    rows = draw(7, 40) * numbers([5], [4], [6], [5], [0.01], [4.5], [5.5])
    assert order(evidence(rows), normalise="none")[-1] == 4
    signals = draw(400, 7) * numbers([5, 4, 6, 5, 0.01, 4.5, 5.5])
    for measure in ("activations", "gaussian"):
        assert order(heard(signals), measure=measure, normalise="none")[-1] == 4


# laws


@given(scale=st.floats(0.01, 100))
@pytest.mark.parametrize("normalise", ["std", "l2"])
def test_the_size_of_a_channel_counts_only_where_it_is_asked_for(
    scale: float, normalise: Any
) -> None:
    rows = draw(6, 9)
    louder = rows.clone()
    louder[2] *= scale
    one, two = (CPOT(normalise=normalise).rank(evidence(r)) for r in (rows, louder))
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.curve, two.curve)


def test_a_loud_channel_stays_where_sizes_count() -> None:
    rows = draw(6, 9)
    rows[2] *= 30
    assert order(evidence(rows), normalise="none")[0] == 2


@pytest.mark.parametrize("measure", MEASURES)
def test_the_order_follows_its_channels(measure: Any) -> None:
    signals, rows, turn = draw(80, 7), draw(7, 9, seed=1), torch.randperm(7)
    made = [
        replace(heard(s), filters=evidence(r, kernel=(3, 3)).filters, producers=r)
        for s, r in ((signals, rows), (signals[:, turn], rows[turn]))
    ]
    one, two = (CPOT(measure=measure).rank(m) for m in made)
    assert torch.equal(turn[two.order], one.order)


def test_greedy_takes_the_nearest_to_what_is_left_every_time() -> None:
    rows = draw(9, 12)
    quantiles = rows.sort(1).values / (rows.square().mean()).sqrt()
    left, gone = list(range(9)), []
    while len(left) > 3:
        far = (quantiles[left] - quantiles[left].mean(0)).norm(dim=1)
        gone.append(left.pop(int(far.argmin())))
    found = order(evidence(rows), mode="greedy", normalise="none")
    assert found[3:] == gone[::-1]
    assert found[:3] == sorted(left, key=lambda u: -float(rows[u].norm()))


def test_greedy_and_one_shot_part_ways_where_the_centre_moves() -> None:
    rows = 100 + numbers([0], [0.1], [0.2], [9], [10], [11], [12], [14]).expand(-1, 4)
    one = order(evidence(rows), normalise="none")
    two = order(evidence(rows), normalise="none", mode="greedy")
    assert one != two and one[-1] == two[-1]


def two_clusters() -> Tensor:
    centres = numbers([20.0] * 6, [25.0] * 6)
    return torch.cat([centres[[0]] + 0.1 * draw(4, 6), centres[[1]] + 0.1 * draw(3, 6, seed=1)])


def test_with_two_barycenters_the_medoid_of_either_cluster_stays_first() -> None:
    rows = two_clusters()
    found = order(evidence(rows), k_barycenters=2, normalise="none")
    quantiles = rows.sort(1).values
    medoids = set()
    for members in (range(4), range(4, 7)):
        own = quantiles[list(members)]
        medoids.add(members[int((own - own.mean(0)).norm(dim=1).argmin())])
    assert set(found[:2]) == medoids


def test_as_many_barycenters_as_channels_stay_keep_the_medoids() -> None:
    rows = two_clusters()
    made, rule = evidence(rows), CPOT(k_barycenters="kept", normalise="none")
    keep = rule.refine(made, rule.rank(made).order[:4])
    assert len(set(keep.tolist())) == 4
    quantiles = rows.sort(1).values
    left = torch.cdist(quantiles, quantiles[keep]).amin(1).square().sum()
    centre = CPOT(normalise="none").rank(made).order[:4]
    assert left < torch.cdist(quantiles, quantiles[centre]).amin(1).square().sum()


def test_more_barycenters_than_live_channels_is_said() -> None:
    rows = draw(6, 5)
    rows[5] = 0
    ranking = CPOT(k_barycenters=40).rank(evidence(rows))
    assert ranking.note == (
        "dead channels go first: 5; 5 centres and not 40: no more channels are alive"
    )
    assert sorted(ranking.order.tolist()) == list(range(6)) and int(ranking.order[-1]) == 5


# as a policy


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"k_barycenters": 0}, "k_barycenters is 0."),
        ({"measure": "gaussian", "p": 1}, "Gaussians have a barycenter in closed form for p=2"),
        ({"mode": "greedy", "k_barycenters": 2}, "greedy moves one barycenter"),
        ({"mode": "greedy", "k_barycenters": "kept"}, "greedy moves one barycenter"),
        ({"p": 3}, "3 is no valid p"),
        ({"measure": "filters"}, "'filters' is no valid measure"),
        ({"eps": 0}, "0 is no valid eps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        CPOT(**settings)
    assert problem in error.value.problem


@pytest.mark.parametrize(
    ("measure", "needs"),
    [("weights", set()), ("taps", set()), ("activations", {"signals"}), ("gaussian", {"moments"})],
)
def test_a_measure_gathers_what_it_looks_at_and_no_more(measure: str, needs: set[str]) -> None:
    rule = otp.Channels(keep="50%", criterion={"kind": "cpot", "measure": measure}, repair="none")
    assert needs_of(otp.Policy(rules=[rule])) == needs


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["plain", "residual", "transposed", "attention", "flatten"])
def test_every_measure_prunes_every_kind_of_network(name: str, measure: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch(16)
    rule = otp.Channels(keep="50%", criterion={"kind": "cpot", "measure": measure}, repair="none")
    policy = otp.Policy(rules=[rule])
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    report = otp.prune_(model, policy, [batch], timing=0)
    assert report.params.after < report.params.before
    assert all(cut.criterion == "cpot" for cut in report.plan.cuts)


def test_a_plan_names_the_groups_where_a_fallback_decided() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch(16)
    with torch.no_grad():
        model[3].weight[2] = 0
    rule = otp.Channels(keep="50%", criterion="cpot", repair="none")
    report = otp.prune_(model, otp.Policy(rules=[rule]), [batch], timing=0)
    assert "group '3': dead channels go first: 2" in report.plan.notes
    assert 2 not in next(cut.keep for cut in report.plan.cuts if cut.group == "3")


def test_what_is_heard_does_not_depend_on_the_split_into_batches() -> None:
    rule = otp.Channels(
        keep="50%", criterion={"kind": "cpot", "measure": "activations"}, repair="none"
    )
    batch, plans = CASES["plain"].batch(24), []
    for batches in ([batch], list(batch.split([5, 19])), list(batch.split(1))):
        model = CASES["plain"].model()
        with otp.attach(model, otp.Policy(rules=[rule])) as attached:
            plans.append(otp.observe(attached, batches).plan())
    assert plans[0].cuts == plans[1].cuts == plans[2].cuts
    assert plans[0].calibration == plans[1].calibration != "none"


# the small generator


class Generator(nn.Module):
    """Image to image: strided down, transposed up, instance norms between."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, width, 3, 2, 1)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.down2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm2 = nn.InstanceNorm2d(2 * width, affine=True)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.norm3 = nn.InstanceNorm2d(width, affine=True)
        self.up2 = nn.ConvTranspose2d(width, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.down1(x)))
        x = torch.relu(self.norm2(self.down2(x)))
        return torch.tanh(self.up2(torch.relu(self.norm3(self.up1(x)))))


@pytest.mark.parametrize("repair", ["none", "coupling"])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_generator_with_transposed_convolutions_and_instance_norms_is_pruned(
    measure: str, repair: str
) -> None:
    torch.manual_seed(0)
    model, batch = Generator().double().eval(), draw(12, 1, 16, 16)
    rule = otp.Channels(keep="50%", criterion={"kind": "cpot", "measure": measure}, repair=repair)
    report = otp.prune_(model, otp.Policy(rules=[rule]), [batch], timing=0)
    assert {c.group: len(c.keep) for c in report.plan.cuts} == {"down1": 4, "down2": 8, "up1": 4}
    assert model(batch).shape == batch.shape


def test_the_benchmark_of_the_generator_runs_and_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from benchmarks import generator

    generator.main(["--smoke", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_pictures_of_the_generator_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    from benchmarks import generator

    clean = draw(12, 1, 16, 16).sigmoid()
    found = generator.gallery(clean, clean + 0.1, {"dense": nn.Identity()})
    assert found[1]["noisy"] == f"noisy\n{generator.decibels(clean + 0.1, clean):.1f} dB"
    generator.draw(tmp_path / "pictures.png", *found)
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")


def test_the_memory_of_the_signals_is_quoted_before_and_kept() -> None:
    case = CASES["plain"]
    rule = otp.Channels(keep=0.5, criterion=CPOT(measure="activations"), repair="none")
    free = otp.Channels(keep=0.5, criterion="magnitude", repair="none")
    quotes = []
    for one in (rule, free):
        with otp.attach(case.model(), otp.Policy(rules=one), example=case.batch(2)) as attached:
            quotes.append(attached.bytes)
            otp.observe(attached, [case.batch(16)])
            heard = attached.observation().signals.values()
            assert sum(t.untyped_storage().nbytes() for t in heard) <= quotes[-1]
    assert quotes[0] > quotes[1] == 0


def test_signals_that_would_not_fit_are_refused_before_data() -> None:
    case = CASES["plain"]
    rule = otp.Channels(keep=0.5, criterion=CPOT(measure="activations"), repair="none")
    small = otp.Policy(rules=rule, calibration=otp.Calibration(memory=1e-6))
    with pytest.raises(CalibrationError, match="the signals at '"):
        otp.attach(case.model(), small, example=case.batch(2))
