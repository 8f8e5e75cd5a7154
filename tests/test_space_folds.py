"""Space folds: published values, exact folds of hand-made functions, laws, and refusals."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.criteria.layers import SpaceFolds
from torch_otprune.criteria.layers.sites import affine_residual
from torch_otprune.errors import CalibrationError, OTPruneError, PolicyError, StructureError
from torch_otprune.statistics.codes import changed, pack, popcount, unpack
from torch_otprune.statistics.depth import SiteEvidence, SiteFold
from torch_otprune.statistics.folds import bend_weights, follow, rectifiers, undone
from torch_otprune.statistics.paths import paths_between, paths_from
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import trace


def layer(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    """Write a linear layer out."""
    made = nn.Linear(len(weight[0]), len(weight), bias=bias is not None).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


def cantor(depth: int) -> nn.Sequential:
    """Build CantorNet's recursive form: a tent with a flat middle, again and again."""
    tent = [[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], [-2.0, 1.0, 0.0]
    fold = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    made = [[layer(*tent), nn.ReLU(), layer(fold), nn.ReLU()] for _ in range(depth)]
    return nn.Sequential(*itertools.chain(*made), layer([[-0.5, 1.0]], [-0.5]), nn.ReLU())


def mlp(depth: int = 4, width: int = 12, seed: int = 0) -> nn.Sequential:
    """Draw a network of rectifiers in float64."""
    torch.manual_seed(seed)
    sizes = [6, *[width] * depth]
    made = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*made), nn.Linear(width, 3)).double().eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(*values: float) -> Tensor:
    """Write out one sample."""
    return torch.tensor([values], dtype=torch.float64)


# codes


@given(st.integers(0, 40), st.integers(1, 5), st.integers(0, 99))
def test_packed_codes_come_back_as_they_were(units: int, rows: int, seed: int) -> None:
    bits = draw(rows, units, seed=seed) > 0
    words = pack(bits)
    assert words.shape == (rows, math.ceil(units / 8))
    assert torch.equal(unpack(words, units), bits)


@given(st.integers(1, 40), st.integers(0, 99))
def test_packed_distances_equal_unpacked_ones(units: int, seed: int) -> None:
    a, b = draw(3, units, seed=seed) > 0, draw(3, units, seed=seed + 1) > 0
    plain = (a != b).sum(1)
    assert torch.equal(popcount(pack(a) ^ pack(b)), plain)
    ones = torch.ones(units, dtype=torch.float64)
    assert torch.equal(changed(a, b, ones), plain.double())


def test_every_byte_has_its_number_of_bits() -> None:
    words = torch.arange(256, dtype=torch.uint8)[:, None]
    assert popcount(words).tolist() == [bin(n).count("1") for n in range(256)]


# published values


@pytest.mark.parametrize(
    ("depth", "coarse", "converged"),
    [
        (1, 1 / 2, 0.500),
        (2, 11 / 16, 0.688),
        (3, 3 / 4, 0.806),
        (4, 13 / 16, 0.882),
        (5, 33 / 40, 0.929),
    ],
)
def test_cantornet_folds_as_published(depth: int, coarse: float, converged: float) -> None:
    net, start, end = cantor(depth), point(0, 0.75), point(1, 0.75)
    few = otp.folds(net, [start], ends=end, steps=10)
    assert few.phi_bits == pytest.approx(coarse, abs=1e-12)
    many = otp.folds(net, [start], ends=end, steps=4096)
    assert many.phi_bits == pytest.approx(converged, abs=6e-4)


def test_too_few_steps_are_told() -> None:
    found = otp.folds(cantor(5), [point(0, 0.75)], ends=point(1, 0.75), steps=32)
    assert found.missed > 0.05
    assert "take more than 32 steps" in str(found)


# hand-made functions


def test_a_tent_folds_the_kink_behind_it_exactly_in_half() -> None:
    """|x| goes down and up again, so a unit that is on above 1 switches off and on."""
    net = nn.Sequential(
        layer([[1.0], [-1.0]], [0.0, 0.0]), nn.ReLU(), layer([[1.0, 1.0]], [-1.0]), nn.ReLU()
    )
    first, second = otp.folds(net, [point(-2)], ends=point(2.02), steps=64).layers
    assert (first.switch, first.score) == (1.0, 0.0)
    assert (second.switch, second.score) == (2.0, 0.5)
    # shares: each rectifier counts 1 in all: lengths 1 + 2, reach max(1 + 1, 1 + 0)
    assert second.upto == pytest.approx(1 / 3)
    assert second.increment == pytest.approx(1 / 3)


def test_weights_count_a_unit_by_what_it_bends() -> None:
    """Two units that switch back, one of which nobody reads."""
    abs_ = layer([[1.0], [-1.0]], [0.0, 0.0])
    kinks = layer([[1.0, 1.0], [1.0, 0.0]], [-1.0, 0.5])
    net = nn.Sequential(abs_, nn.ReLU(), kinks, nn.ReLU(), layer([[1.0, 0.0]], [0.0]))
    found = otp.folds(net, [torch.linspace(-2, 2, 9)[:, None].double()], paths=30, steps=64)
    only = nn.Sequential(
        abs_, nn.ReLU(), layer([[1.0, 1.0]], [-1.0]), nn.ReLU(), layer([[1.0]], [0.0])
    )
    alone = otp.folds(only, [torch.linspace(-2, 2, 9)[:, None].double()], paths=30, steps=64)
    assert found.layers[1].weighted_switch == pytest.approx(alone.layers[1].switch)
    assert found.layers[1].weighted_score == pytest.approx(alone.layers[1].score)


def test_both_kinks_of_a_relu6_are_counted() -> None:
    net = nn.Sequential(layer([[1.0]], [0.0]), nn.ReLU6())
    (found,) = otp.folds(net, [point(-1)], ends=point(7.3), steps=32).layers
    assert (found.bits, found.switch * found.bits, found.score) == (2, 2.0, 0.0)


def test_a_network_that_does_not_switch_has_no_fold() -> None:
    net = nn.Sequential(layer([[1.0]], [100.0]), nn.ReLU(), layer([[1.0]], [100.0]), nn.ReLU())
    found = otp.folds(net, [draw(20, 1)])
    assert [(x.switch, x.score, x.always_on) for x in found.layers] == [(0, 0, 1)] * 2
    assert found.phi == found.missed == 0
    assert [x.residual for x in found.layers] == pytest.approx([0, 0], abs=1e-6)


def test_dead_channels_are_counted() -> None:
    net = nn.Sequential(layer([[1.0], [0.0], [0.0]], [0.0, -1.0, 1.0]), nn.ReLU())
    (found,) = otp.folds(net, [draw(20, 1)]).layers
    assert (found.dead, found.always_on, found.channels) == (1, 1, 3)


# laws


@pytest.mark.parametrize("seed", range(5))
def test_a_first_layer_never_folds(seed: int) -> None:
    first, *later = otp.folds(mlp(seed=seed), [draw(30, 6)], steps=64).layers
    assert first.score == first.upto == first.increment == first.weighted_score == 0
    assert first.switch > 0
    assert max(x.score for x in later) > 0


def test_increments_add_up_to_the_whole() -> None:
    found = otp.folds(mlp(), [draw(30, 6)])
    assert sum(x.increment for x in found.layers) == pytest.approx(found.phi)
    assert sum(x.weighted_increment for x in found.layers) == pytest.approx(found.phi_weighted)


def test_the_symmetric_form_does_not_know_the_direction() -> None:
    a, b, net = draw(30, 6), draw(30, 6, seed=1), mlp()
    there, back = (otp.folds(net, [x], ends=y) for x, y in ((a, b), (b, a)))
    assert there.phi_symmetric == pytest.approx(back.phi_symmetric, abs=1e-9)
    assert there.phi != back.phi
    assert there.phi_symmetric is not None
    assert there.phi_symmetric <= there.phi


def test_units_may_change_places() -> None:
    net, order = mlp(), torch.randperm(12)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].weight.copy_(net[2].weight[order])
        other[2].bias.copy_(net[2].bias[order])
        other[4].weight.copy_(net[4].weight[:, order])
    one, two = (otp.folds(n, [draw(30, 6)]) for n in (net, other))
    for x, y in zip(one.layers, two.layers, strict=True):
        assert (x.switch, x.score) == (y.switch, y.score)
        assert x.weighted_score == pytest.approx(y.weighted_score)


def test_scaling_a_unit_up_and_down_again_changes_nothing() -> None:
    net = mlp()
    other = copy.deepcopy(net)
    with torch.no_grad():
        scale = torch.linspace(0.5, 4, 12).double()
        other[2].weight.mul_(scale[:, None])
        other[2].bias.mul_(scale)
        other[4].weight.div_(scale)
    one, two = (otp.folds(n, [draw(30, 6)]) for n in (net, other))
    assert [x.switch for x in one.layers] == [y.switch for y in two.layers]
    x, y = one.layers[1], two.layers[1]  # the layer in front is read by scaled weights
    assert x.weighted_switch == pytest.approx(y.weighted_switch)
    assert x.weighted_score == pytest.approx(y.weighted_score)


def test_finer_paths_find_no_fewer_switches() -> None:
    net, x = mlp(), draw(30, 6)
    found = [otp.folds(net, [x], steps=steps).layers for steps in (8, 16, 32, 64)]
    for coarse, fine in itertools.pairwise(found):
        assert all(a.switch <= b.switch for a, b in zip(coarse, fine, strict=True))


def test_batches_do_not_matter() -> None:
    net, x = mlp(), draw(30, 6)
    one, two = (otp.folds(net, parts) for parts in ([x], list(x.split(7))))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert (a.switch, a.score) == (b.switch, b.score)
        assert a.residual == pytest.approx(b.residual)


def test_groups_of_paths_add_up_to_one_by_one() -> None:
    net, a, b = mlp(), draw(20, 6), draw(20, 6, seed=1)
    every = otp.folds(net, [a], ends=b)
    alone = [otp.folds(net, [a[i : i + 1]], ends=b[i : i + 1]) for i in range(20)]
    for i, x in enumerate(every.layers):
        assert x.score == pytest.approx(sum(one.layers[i].score for one in alone) / 20)
        assert x.switch == pytest.approx(sum(one.layers[i].switch for one in alone) / 20)


def test_packed_counts_equal_those_of_plain_codes() -> None:
    net, a, b = mlp(), draw(7, 6), draw(7, 6, seed=1)
    found = otp.folds(net, [a], ends=b, steps=16)
    t = torch.linspace(0, 1, 17).double()[:, None, None]
    x = torch.lerp(a, b, t)
    for i, told in enumerate(found.layers):
        code = net[: 2 * i + 1](x) > 0
        length = (code[1:] != code[:-1]).sum((0, 2)).double()
        reach = (code != code[:1]).sum(2).amax(0).double()
        assert told.switch == pytest.approx(float(length.mean()) / 12)
        assert told.score == pytest.approx(float(undone(reach, length).mean()))


def test_memory_is_an_eighth_of_plain_codes() -> None:
    found = otp.folds(mlp(width=16), [draw(30, 6)])
    assert found.packed * 8 == found.plain
    assert found.plain == 4 * 16 * 33 * 7  # layers, units, points, paths at a time


def test_convolutions_watch_part_of_their_units() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    ).eval()
    x = torch.randn(12, 1, 8, 8)
    part, whole = otp.folds(net, [x], bits=40), otp.folds(net, [x])
    assert [(y.bits, y.units) for y in part.layers] == [(40, 144), (40, 64)]
    assert [(y.bits, y.units) for y in whole.layers] == [(144, 144), (64, 64)]
    assert "only a part of the units is watched" in part.notes[0]
    assert part.layers[0].switch == pytest.approx(whole.layers[0].switch, rel=0.3)


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.ReLU())
    net.double().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    otp.folds(net, [draw(30, 6)])
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# paths


@pytest.mark.parametrize("pairs", ["inter", "intra"])
def test_pairs_keep_to_their_classes(pairs: Literal["inter", "intra"]) -> None:
    x, y = draw(30, 6), torch.arange(30) % 3
    marked = torch.cat([x[:, :5], y[:, None].double()], dim=1)
    paths = paths_between(mlp(), [(marked, y)], count=20, pairs=pairs)
    starts, ends = paths.starts.args[0][:, 5], paths.ends.args[0][:, 5]
    assert len(paths) == 20
    assert bool(((starts == ends) == (pairs == "intra")).all())


def test_local_paths_go_a_tenth_of_the_way() -> None:
    paths = paths_between(mlp(), [draw(9, 6)], count=5, pairs="local")
    points = paths.points(0, 5, 4).args[0].view(5, 5, 6)
    a, b = paths.starts.args[0], paths.ends.args[0]
    torch.testing.assert_close(points[-1], a + 0.1 * (b - a))


def test_paths_end_exactly_where_they_should() -> None:
    a, b = draw(3, 6), draw(3, 6, seed=1)
    points = paths_from(mlp(), a, b).points(0, 3, 6).args[0].view(7, 3, 6)
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)


def test_no_pair_is_followed_twice() -> None:
    paths = paths_between(mlp(), [draw(4, 6)], count=99)
    rows = torch.cat([paths.starts.args[0], paths.ends.args[0]], dim=1)
    assert len(paths) == len(rows.unique(dim=0)) <= 12


# the criterion


def evidence(fold: SiteFold | None, z: Tensor) -> SiteEvidence:
    """Pool what a rectifier sees."""
    net = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(z.shape[1], 1)).double()
    sites = trace(net, z[:2], channels=False).sites
    (seen,) = watch_sites(net, sites, [z]).values()
    return SiteEvidence(**{**vars(seen), "fold": fold})


FOLD = SiteFold(0.5, 0.2, 0.125, 0.75, 0.3, 0.25, paths=8)


@pytest.mark.parametrize(
    ("settings", "added", "residual"),
    [
        ({}, 0.25, True),
        ({"weighted": False}, 0.125, True),
        ({"share": 2.0}, 0.5, True),
        ({"by": "switch"}, 0.75 + 0.25, False),
        ({"by": "switch", "weighted": False, "share": 0}, 0.5, False),
        ({"by": "increment"}, 0.25, False),
        ({"by": "fold"}, 0.3, False),
        ({"by": "fold", "weighted": False}, 0.2, False),
    ],
)
def test_the_score_is_what_it_says(settings: dict[str, Any], added: float, residual: bool) -> None:
    seen = evidence(FOLD, draw(50, 3))
    expected = added + residual * affine_residual(seen)
    assert SpaceFolds(**settings).site(seen) == pytest.approx(expected)


def test_an_increment_that_falls_is_no_bonus() -> None:
    falling = SiteFold(0.5, 0.2, -0.1, 0.7, 0.3, -0.2, paths=8)
    seen = evidence(falling, draw(50, 3))
    assert SpaceFolds().site(seen) == pytest.approx(affine_residual(seen))


def test_the_residual_is_that_of_the_best_line() -> None:
    z = draw(400, 2)
    phi, left = z.relu(), 0.0
    for c in range(2):
        basis = torch.stack([z[:, c], torch.ones(400, dtype=torch.float64)], dim=1)
        fit = basis @ torch.linalg.lstsq(basis, phi[:, c]).solution
        left += float((phi[:, c] - fit).square().sum())
    expected = (left / float(phi.square().sum())) ** 0.5
    assert affine_residual(evidence(None, z)) == pytest.approx(expected)


def test_a_first_layer_has_the_lowest_raw_score_and_the_highest_default() -> None:
    """Along a plain network the default falls with depth; the raw score rises."""
    found = otp.folds(mlp(depth=5, width=16), [draw(60, 6)])
    assert found.ranking()[-1] == found.layers[0].name
    raw = sorted(found.layers, key=lambda x: x.score)
    assert raw[0].name == found.layers[0].name
    assert SpaceFolds().by == "residual"


def test_a_plan_is_ranked_by_it_end_to_end() -> None:
    net, x = mlp(), [draw(64, 6)]
    policy = otp.Policy(rules=otp.Linearize(drop=2, criterion="space_folds"))
    with otp.attach(net, policy) as attached:
        plan = otp.observe(attached, x).plan()
    assert len(plan.lines) == 2
    assert all("space_folds: " in line.reason for line in plan.lines)
    report = otp.apply_(net, plan, x)
    assert report.params.after < report.params.before


def test_plans_do_not_know_the_batches() -> None:
    policy = otp.Policy(rules=otp.Linearize(drop=1, criterion="space_folds"))
    plans = []
    for parts in (draw(48, 6).split(48), draw(48, 6).split(5)):
        with otp.attach(mlp(), policy) as attached:
            plans.append(otp.observe(attached, list(parts)).plan())
    assert plans[0].lines == plans[1].lines


def test_blocks_are_ranked_by_it_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.up(x)))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), *(Block() for _ in range(3)), nn.Linear(6, 2)).double()
    rule = otp.Layers(drop=1, criterion="space_folds")
    report = otp.prune_(net, otp.Policy(rules=rule), [draw(64, 6)], timing=0)
    assert len(report.plan.drops) == 1


# what it prints and draws


def test_it_prints_every_layer_and_what_it_rests_on(tmp_path: Path) -> None:
    found = otp.folds(mlp(), [draw(30, 6)], paths=9)
    said = str(found)
    assert all(f"\n{x.name} " in said for x in found.layers)
    assert "9 paths between any samples, 32 steps" in said
    assert otp.Folds.model_validate_json(found.model_dump_json()) == found
    found.plot(tmp_path / "folds.png")
    assert (tmp_path / "folds.png").read_bytes()[1:4] == b"PNG"
    assert json.loads(found.model_dump_json())["layers"][0]["running"][0] == 0


def test_one_pattern_to_ignore_is_a_pattern_and_no_list_of_letters() -> None:
    assert [x.name for x in otp.folds(mlp(), [draw(9, 6)], ignore="3").layers] == ["1", "5", "7"]


def test_smooth_activations_are_named_beside_the_others() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU()).double()
    found = otp.folds(net, [draw(30, 6)])
    assert found.left_out == {"3": "gelu"}
    assert "left out, as they have no kinks: 3 (gelu)" in str(found)


# refusals


def broken() -> nn.Sequential:
    """Draw a network that computes NaN in its second layer."""
    net = mlp()
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan
    return net


GELU = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


class Words(nn.Module):
    """A network that reads numbers of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.act, self.head = nn.Embedding(9, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.act(self.embed(tokens).mean(1)))


@pytest.mark.parametrize(
    ("call", "problem", "fix"),
    [
        (lambda: otp.folds(GELU, [torch.randn(9, 6)]), "it has 1 (gelu), 3 (gelu)", "stein"),
        (lambda: otp.folds(mlp(), []), "there are no batches", "list of batches"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], steps=5), "5 steps do not halve", "even number"),
        (lambda: otp.folds(mlp(), [draw(1, 6)]), "1 samples of one shape", "two samples"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], paths=0), "0 paths between 'any'", "at least one"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], pairs="inter"), "no class numbers", "pairs='any'"),
        (
            lambda: otp.folds(mlp(), [(draw(9, 6), torch.zeros(9).long())], pairs="inter"),
            "no two of 9 samples make a pair of kind 'inter'",
            "pairs='any'",
        ),
        (
            lambda: otp.folds(mlp(), [draw(9, 6)], ends=draw(8, 6)),
            "9 starts and 8 ends",
            "one end per sample",
        ),
        (lambda: otp.folds(mlp(), draw(9, 6)), "batches is a tensor", "a list of batches"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], steps=8.0), "8.0 steps", "even number"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], bits=0), "0 bits watch nothing", "whole number"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], paths=2.5), "2.5 paths", "at least one path"),
        (lambda: otp.folds(mlp(), [draw(9, 6)], ignore="9.x"), "'9.x' matches no", "module path"),
        (lambda: otp.folds(mlp(), [draw(9, 6) / 0]), "are NaN or infinite", "clean the data"),
        (
            lambda: otp.folds(mlp(), [draw(9, 6)], ends=draw(9, 6) * math.nan),
            "are NaN or infinite",
            "clean the data",
        ),
        (lambda: otp.folds(broken(), [draw(9, 6)]), "'3' reads NaN", "in the weights"),
        (
            lambda: otp.folds(mlp(), [torch.ones(9, 6).double()]),
            "paths end where they start",
            "samples that differ",
        ),
        (
            lambda: otp.folds(Words(), [torch.randint(9, (8, 5))]),
            "no straight path between samples of torch.int64",
            "stein",
        ),
    ],
)
def test_what_cannot_fold_is_refused(call: Any, problem: str, fix: str) -> None:
    with pytest.raises((CalibrationError, StructureError)) as caught:
        call()
    assert problem in caught.value.problem
    assert fix in caught.value.fix


@pytest.mark.parametrize("net", [GELU, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *GELU)])
def test_a_rule_over_smooth_activations_is_refused_with_the_fix(net: nn.Module) -> None:
    net, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    policy = otp.Policy(rules=otp.Linearize(drop=1, criterion="space_folds"))
    with pytest.raises(OTPruneError) as caught:
        otp.prune_(net, policy, [torch.randn(20, 6)])
    assert "is a gelu and has no kink" in caught.value.problem
    assert "rank it by 'stein'" in caught.value.fix
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_odd_number_of_steps_is_refused_in_the_policy() -> None:
    with pytest.raises(PolicyError, match="multiple of 2"):
        otp.Policy(rules=otp.Linearize(drop=1, criterion={"kind": "space_folds", "steps": 3}))


def test_weights_are_spread_times_what_reads() -> None:
    z = draw(50, 3)
    seen = evidence(None, z)
    assert seen.reads is not None
    torch.testing.assert_close(bend_weights(seen), z.std(0, correction=0) * seen.reads.sqrt())


def test_units_without_weight_all_weigh_the_same() -> None:
    net, x = mlp(depth=2), draw(10, 6)
    sites, _ = rectifiers(trace(net, x[:2], channels=False).sites)
    paths = paths_between(net, [x], count=5)
    nothing = {site.name: torch.zeros(12) for site in sites}
    run = follow(net, sites, paths, steps=16, weights=nothing)
    torch.testing.assert_close(run.bent_score, run.score)
