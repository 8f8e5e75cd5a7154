"""Fusing units by transport: copies are exact, the published traps are gone."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES, cut, outputs
from tests.test_experts import batches as tokens
from tests.test_experts import net
from tests.test_repair_contract import DOUBLES, case, doubled, patient, state
from torch_otprune.errors import PolicyError, RepairError
from torch_otprune.plan import Cut
from torch_otprune.repair import Coupling, Note
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.matching import Matching, fused, importance, maps
from torch_otprune.repair.profile import profile
from torch_otprune.structure import trace
from torch_otprune.surgery import cut_, gap

DATA_FREE: dict[str, Any] = {"scale": "none", "guard": False}
PUBLISHED: dict[str, Any] = {
    "features": "group", "marginals": "uniform", "normalise": "published", "scale": "none",
}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def couple(sick: Any, **settings: Any) -> tuple[Note, ...]:
    return Coupling(**settings).apply_(sick)


# copies


@pytest.mark.parametrize("name", [*DOUBLES, "conv3d", "option_a", "squeeze_excite", "transposed"])
@pytest.mark.parametrize("scale", ["none", "variance", "least_squares"])
def test_a_duplicated_unit_is_fused_exactly(name: str, scale: Any) -> None:
    model, cuts = doubled(*case(name))
    _, batches = case(name)
    sick = patient(model, batches, cuts)
    assert distance(sick.dense, sick.small, batches) > 1e-7
    notes = couple(sick, scale=scale)
    assert [n.accepted for n in notes] == [True]
    assert distance(sick.dense, sick.small, batches) < 1e-28


@pytest.mark.parametrize("name", [*DOUBLES, "conv3d", "transposed"])
def test_a_duplicated_unit_is_fused_exactly_without_any_data(name: str) -> None:
    model, cuts = doubled(*case(name))
    _, batches = case(name)
    sick = patient(model, batches, cuts)
    blind = patient(model, batches, cuts)
    object.__setattr__(blind, "batches", [])
    [note] = couple(blind, scale="none")
    assert (note.before, note.after, note.accepted, note.text) == (None, None, True, "")
    assert distance(sick.dense, blind.small, batches) < 1e-28


def twofold(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, list[Cut]]:
    """Make every unit of the first group one of two copies, and cut the second of each."""
    graph = trace(model, batches[0])
    group = next(g for g in graph.groups if g.kind == "channels")
    half = group.units // 2
    with torch.no_grad():
        for member in (m for m in group.members if m.side != "in"):
            module = model.get_submodule(member.path)
            for values in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if values.dim() and len(values) == member.size:
                    values[member.index[half:]] = values[member.index[:half]]
    return model, [cut(graph, group.name, torch.arange(half))]


@pytest.mark.parametrize("name", ["plain", "mlp", "residual", "flatten", "grouped", "branches"])
@pytest.mark.parametrize("target", ["topk", "kmeans", "barycenter"])
@pytest.mark.parametrize("marginals", ["uniform", "importance", "semi_relaxed"])
def test_pairs_of_copies_are_exact_for_every_target_and_marginal(
    name: str, target: Any, marginals: Any
) -> None:
    model, cuts = twofold(*case(name))
    _, batches = case(name)
    sick = patient(model, batches, cuts)
    couple(sick, target=target, marginals=marginals, **DATA_FREE)
    assert distance(sick.dense, sick.small, batches) < 1e-24


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("features", ["producers", "activations"])
def test_pairs_of_copies_are_exact_for_every_cost_and_feature(cost: Any, features: Any) -> None:
    model, cuts = twofold(*case("plain"))
    _, batches = case("plain")
    sick = patient(model, batches, cuts)
    couple(sick, cost=cost, features=features, **DATA_FREE)
    assert distance(sick.dense, sick.small, batches) < 1e-24


def test_pairs_of_copies_are_nearly_exact_for_an_unbalanced_coupling() -> None:
    model, cuts = twofold(*case("plain"))
    _, batches = case("plain")
    sick = patient(model, batches, cuts)
    before = distance(sick.dense, sick.small, batches)
    couple(sick, marginals="unbalanced", eps=0.005, **DATA_FREE)
    assert distance(sick.dense, sick.small, batches) < 1e-6 * before


class Normed(nn.Module):
    """A stream that a layer-norm takes as one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def test_a_layer_norm_over_pairs_of_copies_is_exact() -> None:
    torch.manual_seed(0)
    model, batch = Normed().double(), draw(32, 5)
    graph = trace(model, batch)
    group = next(g for g in graph.groups if g.kind == "hidden")
    with torch.no_grad():
        for layer in (model.embed, model.down, model.norm):
            for values in layer.parameters():
                values[4:] = values[:4]
    sick = patient(model, [batch], [cut(graph, group.name, torch.arange(4))])
    before = distance(sick.dense, sick.small, [batch])
    [note] = couple(sick, scale="none")
    assert note.accepted and before > 1e-3
    assert distance(sick.dense, sick.small, [batch]) < 1e-24


# the published map


def linear_pair(units: int = 8) -> tuple[nn.Module, Tensor]:
    """Build a network of one hidden layer whose units are copies two by two, without biases."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, units, bias=False), nn.ReLU(), nn.Linear(units, 3, bias=False)
    ).double()
    with torch.no_grad():
        model[0].weight[units // 2 :] = model[0].weight[: units // 2]
        model[2].weight[:, units // 2 :] = model[2].weight[:, : units // 2]
    return model, draw(32, 5)


@pytest.mark.parametrize(("normalise", "ratio"), [("preserving", 1.0), ("published", 2.0)])
def test_the_published_map_writes_as_many_times_too_much_as_units_are_fused(
    normalise: Any, ratio: float
) -> None:
    model, batch = linear_pair()
    graph = trace(model, batch)
    sick = patient(model, [batch], [cut(graph, "0", torch.arange(4))])
    couple(sick, **(PUBLISHED | {"normalise": normalise, "guard": False}))
    [small], [dense] = outputs(sick.small, batch), outputs(model, batch)
    torch.testing.assert_close(small, ratio * dense)


def test_the_published_setting_is_that_of_the_paper() -> None:
    x, keep = draw(9, 7), torch.arange(4)
    plan = fused(x, keep, Matching("l1", "uniform"))
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((9,), 1 / 9, dtype=torch.float64))
    cost = torch.cdist(unit, unit[keep], p=1)
    other = Matching("l1", "uniform").couple(x, x[keep])
    assert float((cost * plan).sum()) == pytest.approx(other.cost)
    out, into = maps(plan, keep, published=True)
    assert torch.equal(out, into)
    torch.testing.assert_close(out.sum(1), torch.ones(9, dtype=torch.float64))


# the paper's two warning signs


@pytest.mark.parametrize("marginals", ["uniform", "importance", "unbalanced", "semi_relaxed"])
@pytest.mark.parametrize("cost", ["l1", "cosine"])
def test_units_without_weights_do_not_turn_the_network_into_a_constant(
    marginals: Any, cost: Any
) -> None:
    model, batches = case("plain")
    graph = trace(model, batches[0])
    with torch.no_grad():
        model[3].weight[[1, 6]] = 0  # one that goes, one that stays
        model[3].bias[[1, 6]] = 0
        for name in ("weight", "bias", "running_mean"):
            getattr(model[4], name)[[1, 6]] = 0
    sick = patient(model, batches, [cut(graph, "3", torch.tensor([0, 2, 4, 6]))])
    [note] = couple(sick, marginals=marginals, cost=cost, **DATA_FREE)
    [out] = outputs(sick.small, batches[0])
    assert bool(torch.isfinite(out).all()) and float(out.std(0).min()) > 1e-3
    assert note.text == "2 dead units joined nothing"


def test_scores_near_zero_leave_no_mass_to_divide_by() -> None:
    x = draw(6, 4)
    x[2] *= 1e-200
    assert float(importance(x).min()) > 1e-5
    out, into = maps(fused(x, torch.tensor([0, 2, 3]), Matching("l2", "importance")),
                     torch.tensor([0, 2, 3]))  # fmt: skip
    assert bool(torch.isfinite(out).all() and torch.isfinite(into).all())


@pytest.mark.parametrize("seed", range(4))
def test_the_layer_at_the_input_never_ends_worse_than_dropped(seed: int) -> None:
    model, batches = case("plain")
    graph = trace(model, batches[0])
    keep = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:3].sort().values
    fused_, dropped = (patient(model, batches, [cut(graph, "0", keep)]) for _ in range(2))
    for settings in ({}, {"scale": "none"}, PUBLISHED):
        [note] = couple(fused_, **settings)
        assert note.accepted or "would rise to" in note.text
        before = distance(model, dropped.small, batches)
        assert distance(model, fused_.small, batches) <= before
        for key, value in state(dropped.small).items():
            if not note.accepted:  # and what was tried leaves no trace
                assert torch.equal(fused_.small.state_dict()[key], value)
        fused_ = patient(model, batches, [cut(graph, "0", keep)])


# laws


@pytest.mark.parametrize("target", ["topk", "kmeans", "barycenter"])
@pytest.mark.parametrize("marginals", ["uniform", "importance", "unbalanced", "semi_relaxed"])
@given(seed=st.integers(0, 50), kept=st.integers(1, 7))
def test_means_have_columns_and_shares_have_rows_of_sum_one(
    target: Any, marginals: Any, seed: int, kept: int
) -> None:
    x = draw(8, 5, seed=seed)
    keep = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
    plan = fused(x, keep, Matching("l2", marginals), target)
    out, into = maps(plan, keep)
    assert bool((plan >= 0).all())
    torch.testing.assert_close(out.sum(0), torch.ones(kept, dtype=torch.float64))
    torch.testing.assert_close(into.sum(1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("marginals", ["uniform", "importance", "semi_relaxed"])
def test_all_units_kept_is_the_identity(marginals: Any) -> None:
    out, into = maps(fused(draw(6, 9), torch.arange(6), Matching("l1", marginals)), torch.arange(6))
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(out, eye)
    torch.testing.assert_close(into, eye)


def test_a_free_marginal_sends_every_unit_to_its_nearest() -> None:
    x, keep = draw(9, 4), torch.tensor([1, 4, 6])
    plan = fused(x, keep, Matching("l2", "semi_relaxed"))
    assert torch.equal(plan.argmax(1), torch.cdist(x, x[keep]).argmin(1))
    assert int((plan > 0).sum()) == 9


def test_a_dear_marginal_is_a_hard_one_and_a_cheap_one_is_free() -> None:
    x, keep = draw(9, 4), torch.tensor([1, 4, 6])
    hard, free = (fused(x, keep, Matching("l2", m)) for m in ("uniform", "semi_relaxed"))
    dear, cheap = (
        fused(x, keep, Matching("l2", "unbalanced", reach=reach, eps=0.002))
        for reach in (1e4, 1e-4)
    )
    torch.testing.assert_close(dear.sum(0), hard.sum(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(cheap, free, atol=5e-3, rtol=0)


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
def test_two_solvers_agree(cost: Any) -> None:
    x, keep = draw(10, 6), torch.tensor([0, 3, 5, 8])
    exact = Matching(cost, "uniform", eps=0).couple(x, x[keep])
    near = Matching(cost, "uniform", eps=0.002, solver="scaling").couple(x, x[keep])
    blocks = Matching(cost, "uniform", eps=0.002, solver="blocks").couple(x, x[keep])
    assert exact.solver == "exact" and near.solver == "scaling" and blocks.solver == "blocks"
    assert near.cost == pytest.approx(exact.cost, rel=2e-3)
    torch.testing.assert_close(near.plan(), blocks.plan(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("cost", ["l1", "l2", "cosine"])
def test_a_network_fused_by_either_solver_computes_the_same(cost: Any) -> None:
    model, cuts = twofold(*case("plain"))
    _, batches = case("plain")
    with torch.no_grad():
        model[0].weight.add_(0.02 * draw(*model[0].weight.shape))
    found = []
    for settings in ({"eps": 0}, {"eps": 0.005}):
        sick = patient(model, batches, cuts)
        couple(sick, marginals="uniform", cost=cost, **settings, **DATA_FREE)
        found.append(outputs(sick.small, batches[0]))
    assert 0 < gap(*found) < 1e-3


def test_centroids_price_no_more_than_the_kept_units() -> None:
    x, keep = draw(20, 3), torch.arange(5)
    matching = Matching("cosine", "semi_relaxed")

    def spread(plan: Tensor) -> float:
        unit = x / x.norm(dim=1, keepdim=True)
        means = plan.T @ unit / plan.sum(0)[:, None]
        return float((plan[:, :, None] * (unit[:, None] - means[None]) ** 2).sum())

    assert spread(fused(x, keep, matching, "kmeans")) < spread(fused(x, keep, matching))


@pytest.mark.parametrize("scale", ["variance", "least_squares"])
def test_data_bring_the_consumer_closer_than_the_coupling_alone(scale: Any) -> None:
    model, batches = case("residual")
    keep = torch.tensor([0, 2, 5])
    cuts = [cut(trace(model, batches[0]), "blocks.0.conv1", keep)]
    far = []
    for chosen in ("none", scale):
        sick = patient(model, batches, cuts)
        couple(sick, scale=chosen, guard=False)
        far.append(distance(model, sick.small, batches))
    assert far[1] < far[0]


def test_the_variance_is_what_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(8))  # its output is what the consumer reads
    x = draw(400, 5)
    sick = patient(model, [x], [cut(trace(model, x), "0", torch.tensor([0, 1, 3, 6]))])
    couple(sick, scale="variance", guard=False)
    [dense], [small] = outputs(model, x), outputs(sick.small, x)
    torch.testing.assert_close(small.mean(0), dense.mean(0))
    torch.testing.assert_close(small.std(0), dense.std(0))


def test_of_the_decodings_least_squares_leaves_the_least() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    x = draw(400, 5)
    cuts = [cut(trace(model, x), "0", torch.tensor([0, 1, 3, 6]))]
    far = {}
    for scale in ("none", "variance", "least_squares"):
        sick = patient(model, [x], cuts)
        couple(sick, scale=scale, ridge=1e-9 if scale == "least_squares" else None, guard=False)
        far[scale] = distance(model, sick.small, [x])
    assert far["least_squares"] < min(far["none"], far["variance"])


@pytest.mark.parametrize("split", [[5, 19], [24], [8, 8, 8]])
def test_the_split_into_batches_does_not_matter(split: list[int]) -> None:
    model, [batch] = case("residual", batches=1, samples=24)
    found = []
    for batches in ([batch], list(batch.split(split))):
        graph = trace(model, batch)
        sick = patient(model, batches, [cut(graph, "blocks.0.conv1", torch.tensor([0, 2, 5]))])
        couple(sick, guard=False)
        found.append(outputs(sick.small, batch))
    assert gap(*found) < 1e-9


# batch-norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_batch_norm_writes_is_the_mean_of_what_it_wrote(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine).double()
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=bias).double(), norm, nn.Identity(), nn.Conv2d(6, 3, 1).double()
    )
    with torch.no_grad():
        norm.running_mean.copy_(draw(6))
        norm.running_var.copy_(draw(6, seed=1).abs())
        if affine:
            norm.weight.copy_(draw(6, seed=2))
            norm.bias.copy_(draw(6, seed=3))
    x = draw(8, 2, 6, 6)
    sick = patient(model.eval(), [x], [cut(trace(model, x), "0", torch.tensor([0, 2, 5]))])
    couple(sick, **DATA_FREE)
    found = profile(model, trace(model, x), trace(model, x).groups[0], "producers")
    keep = torch.tensor([0, 2, 5])
    out, _ = maps(fused(found, keep, Matching("l1", "semi_relaxed")), keep)
    with torch.no_grad():
        expected = torch.einsum("nchw,cd->ndhw", model[:2](x), out)
        torch.testing.assert_close(sick.small[:2](x), expected)


def test_a_batch_norm_with_channels_without_variance_or_gain_stays_finite() -> None:
    model, batches = case("plain")
    with torch.no_grad():
        model[4].running_var[[1, 2]] = 0
        model[4].weight[[2, 3, 4]] = 0
    graph = trace(model, batches[0])
    sick = patient(model, batches, [cut(graph, "3", torch.tensor([0, 2, 4, 6]))])
    couple(sick, **DATA_FREE)
    assert all(bool(torch.isfinite(v).all()) for v in sick.small.state_dict().values())


# what is left alone


def test_a_group_that_was_written_since_the_cut_is_left_alone() -> None:
    model, batches = case("plain")
    sick = patient(model, batches)
    with torch.no_grad():
        sick.small[3].weight.mul_(1.01)
    notes = {n.site: n for n in couple(sick)}
    why = "was written since the cut: name coupling before other repairs"
    assert not notes["0"].accepted and notes["0"].text == why
    assert not notes["3"].accepted and notes["3"].text == why
    assert notes["6"].text != why


def test_experts_have_no_mean() -> None:
    with pytest.raises(PolicyError, match="experts are whole networks, which have none") as error:
        otp.Experts(keep=3, criterion="random", repair="coupling")
    assert error.value.fix == "leave repair out, or choose reconstruct."


def test_channels_beside_experts_that_went_are_fused_or_left_with_a_reason() -> None:
    model = net()
    rules = [
        otp.Experts(keep=3, criterion="random", repair="none"),
        otp.Hidden(keep="75%", criterion="random", repair="coupling"),
    ]
    report = otp.prune_(model, otp.Policy(rules=rules), tokens(), timing=0)
    assert report.repairs and all(n.accepted or n.note for n in report.repairs)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"marginals": "unbalanced", "eps": 0}, "an unbalanced coupling has no exact solver"),
        ({"normalise": "published"}, "least squares replaces the map"),
        ({"reach": 0}, "0 is no valid reach"),
        ({"target": "median"}, "'median' is no valid target"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        Coupling(**settings)
    assert problem in error.value.problem


def test_activations_without_batches_are_asked_for() -> None:
    model, batches = case("plain")
    sick = patient(model, batches)
    object.__setattr__(sick, "batches", [])
    before = state(sick.small)
    with pytest.raises(RepairError) as error:
        couple(sick, features="activations")
    assert error.value.problem == "there are no activations to compare units by."
    assert all(torch.equal(v, sick.small.state_dict()[k]) for k, v in before.items())


def test_a_scale_without_batches_is_said_to_have_learnt_nothing() -> None:
    model, batches = case("plain")
    sick = patient(model, batches)
    object.__setattr__(sick, "batches", [])
    for note in couple(sick, scale="variance"):
        assert note.accepted
        assert note.text == "without batches there is nothing for scale='variance' to learn from"


def test_features_that_are_not_finite_are_refused() -> None:
    x = draw(6, 4)
    x[3, 1] = math.nan
    with pytest.raises(RepairError) as error:
        fused(x, torch.arange(3), Matching())
    assert error.value.problem == "unit 3 has features that are NaN or infinite."


@pytest.mark.parametrize("name", ["plain", "residual", "attention", "concat", "grouped"])
def test_a_pruned_network_is_undone_to_the_bit(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch(24)
    before = state(model)
    rule = otp.Channels(keep="60%", criterion="magnitude", repair="coupling")
    policy = otp.Policy(rules=[rule])
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    report = otp.prune_(model, policy, [batch], timing=0)
    assert any(note.kind == "coupling" for note in report.repairs)
    report.undo_()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_one_group_after_the_other_is_the_same_as_all_at_once_where_nothing_is_learnt() -> None:
    model, batches = case("plain")
    graph = trace(model, batches[0])
    cuts = [cut(graph, n, torch.arange(4)) for n in ("0", "3", "6")]
    found = []
    for order in itertools.permutations(cuts):
        small = copy.deepcopy(model)
        cut_(small, cuts)
        sick = patient(model, batches, list(order))
        couple(sick, **DATA_FREE)
        found.append(outputs(sick.small, batches[0]))
    assert all(gap(found[0], other) < 1e-12 for other in found[1:])


def planned(repair: Any) -> otp.Plan:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)]
    rule = otp.Channels(criterion="transport", repair=repair)
    policy = otp.Policy(rules=[rule], budget=otp.Budget(params="40%"))
    x = draw(96, 8).float() @ draw(8, 16, seed=1).float()  # inputs that repeat one another
    with otp.attach(nn.Sequential(*layers).eval(), policy) as attached:
        return otp.observe(attached, [x]).plan()


def test_widths_are_priced_by_what_the_fusion_does() -> None:
    plain, refitted = (planned(repair) for repair in ("none", "least_squares"))
    assert plain.keep() != refitted.keep()
    assert planned("coupling").keep() == refitted.keep()
    for scale in ("none", "variance"):
        assert planned({"kind": "coupling", "scale": scale}).keep() == plain.keep()
