"""The tangent kernel as a criterion: exact against a Jacobian, and fair between layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torch_otprune as otp
from tests.cases import CASES
from torch_otprune.attach.needs import needs_of
from torch_otprune.criteria import NTK
from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.repair import sparsify
from torch_otprune.statistics import Evidence, tangents
from torch_otprune.statistics.ntk_sap import sap_masks, sap_scores, weights_of
from torch_otprune.statistics.tangents import Tangent, tangent
from torch_otprune.structure import trace


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(share: Tensor, *, missed: tuple[str, ...] = ()) -> Evidence:
    """Lay out a group of which only the kernel is known."""
    rows = draw(len(share), 3)
    return Evidence("g", len(share), rows, None, (), None, 0, (), Tangent(share, share, missed))


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Compute it the expensive way: outputs of all samples x parameter."""
    named = {n: p.detach() for n, p in model.named_parameters()}

    def answer(weights: dict[str, Tensor]) -> Tensor:
        out = functional_call(model, weights, (x,))
        assert isinstance(out, Tensor)
        return out.flatten()

    found = torch.func.jacrev(answer)(named)
    assert isinstance(found, dict)
    return found


def bumpy(outputs: int = 1) -> nn.Module:
    """Make a network with a batch-norm that does something."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(24, outputs),
    ).double()  # fmt: skip
    net(draw(16, 2, 5, 5))
    return net.eval()


ROLES: list[dict[str, Any]] = [{"role": "ranking"}, {"within": "magnitude"}]


# the squares of gradients


@pytest.mark.parametrize("name", ["attention", "residual", "plain"])
def test_squares_are_those_of_the_jacobian_where_there_is_one_output(name: str) -> None:
    if name not in CASES:
        pytest.skip(f"no case is called {name}")
    model, batch = CASES[name].model(), CASES[name].batch(3)
    if not isinstance(batch, Tensor):
        pytest.skip("this case takes more than a tensor")

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).flatten(1)[:, :1]

    one = First().eval()
    found = tangents(one, [batch], draws=1, seed=0)
    for key, exact in jacobian(one, batch).items():
        torch.testing.assert_close(found.squares[key], exact.square().sum(0))


def test_random_signs_agree_with_the_jacobian_of_many_outputs() -> None:
    model, x = bumpy(5), draw(3, 2, 5, 5, seed=1)
    found = tangents(model, [x], draws=600, seed=0)
    exact = {k: j.square().sum(0) for k, j in jacobian(model, x).items()}
    assert found.trace == pytest.approx(sum(float(s.sum()) for s in exact.values()), rel=0.05)
    torch.testing.assert_close(found.squares["0.weight"], exact["0.weight"], rtol=0.35, atol=1e-3)


def test_errors_of_few_draws_cancel_between_samples() -> None:
    model, many = bumpy(8), draw(64, 2, 5, 5, seed=1)
    exact = sum(float(j.square().sum()) for j in jacobian(model, many).values())
    found = [tangents(model, [many], draws=1, seed=s).trace / exact for s in range(3)]
    alone = [tangents(model, [many[:1]], draws=1, seed=s).trace for s in range(3)]
    assert max(found) / min(found) < 1.15 < max(alone) / min(alone)


def test_batches_do_not_matter() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5, seed=1)
    one, two = (tangents(model, b, draws=2, seed=0) for b in ([x], [x[:1], x[1:4], x[4:]]))
    for name in one.squares:
        torch.testing.assert_close(one.squares[name], two.squares[name], rtol=1e-12, atol=1e-14)


def test_the_model_is_left_as_it_was() -> None:
    model = bumpy(2).train()
    model[0].weight.requires_grad_(False)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    tangents(model, [draw(4, 2, 5, 5)], draws=2, seed=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and not model[0].weight.requires_grad and model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_unit_holds_what_goes_with_it() -> None:
    model, x = bumpy(1), draw(3, 2, 5, 5, seed=1)
    graph = trace(model, x)
    group = graph.group("0")
    found = tangents(model, [x], draws=1, seed=0)
    squares = {k: j.square().sum(0) for k, j in jacobian(model, x).items()}
    total = sum(float(s.sum()) for s in squares.values())
    own = squares["0.weight"].flatten(1).sum(1) + squares["0.bias"]
    own = own + squares["1.weight"] + squares["1.bias"]
    own = own + squares["3.weight"].transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(tangent(model, group, found).raw, own / total)


def test_grouped_convolutions_count_what_each_filter_reads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 1),
    ).double()  # fmt: skip
    x = draw(3, 2, 5, 5)
    found = tangents(net, [x], draws=1, seed=0)
    total = found.trace
    squares = {k: j.square().sum(0) for k, j in jacobian(net, x).items()}
    group = next(g for g in trace(net, x).groups if "0" in g.owners)
    held = tangent(net, group, found).raw
    first, second = squares["2.weight"][:4], squares["2.weight"][4:]
    read = torch.cat([first.flatten(2).sum((0, 2)), second.flatten(2).sum((0, 2))])
    own = squares["0.weight"].flatten(1).sum(1) + squares["0.bias"] + read
    member = next(m for m in group.members if m.path == "0")
    expected = own[member.index].sum(1)
    if any(m.path == "2" and m.side == "out" for m in group.members):
        pytest.skip("both layers are one group here")
    torch.testing.assert_close(held, expected / total)


def test_sizes_that_a_norm_divides_out_do_not_matter() -> None:
    model, x = bumpy(1), draw(3, 2, 5, 5, seed=1)
    group = trace(model, x).group("0")
    one = tangent(model, group, tangents(model, [x], draws=1, seed=0))
    with torch.no_grad():  # the same function: batch-norm divides by what it saw
        model[0].weight.mul_(10), model[0].bias.mul_(10)
        model[1].running_mean.mul_(10), model[1].running_var.mul_(100)
        model[1].eps *= 100
    two = tangent(model, group, tangents(model, [x], draws=1, seed=0))
    torch.testing.assert_close(one.free, two.free, rtol=1e-9, atol=0)
    assert not torch.allclose(one.raw, two.raw, rtol=0.1)


# the criterion


def test_a_group_pays_its_share_times_the_log_of_what_goes() -> None:
    share = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    found = NTK(role="ranking").rank(made(share))
    assert found.order.tolist() == [1, 2, 0] and found.unit == "kernel"
    kept = torch.tensor([0.3 / 0.6, 0.5 / 0.6, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.curve[1:], -0.6 * kept.log(), rtol=1e-6, atol=1e-7)
    assert float(found.curve[0]) > 10  # no layer is emptied


def test_by_default_the_kernel_decides_how_many_and_transport_which() -> None:
    assert NTK().needs == {"tangents", "moments"} and NTK(role="ranking").needs == {"tangents"}
    share = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    rows = torch.tensor([[3.0], [1.0], [2.0]], dtype=torch.float64)
    evidence = replace(made(share), producers=rows)
    assert NTK(within="magnitude").rank(evidence).order.tolist() == [0, 2, 1]


@pytest.mark.parametrize("settings", ROLES)
def test_the_same_plan_comes_out_twice_and_it_runs(settings: dict[str, Any]) -> None:
    rule = otp.Channels(criterion={"kind": "ntk", **settings}, repair="none")
    policy = otp.Policy(rules=[rule], budget=otp.Budget(macs="60%"))
    model, x = bumpy(3), draw(8, 2, 5, 5)
    plans = []
    for batches in ([x], [x[:3], x[3:]]):
        with otp.attach(model, policy) as attached:
            plans.append(otp.observe(attached, batches).plan())
    assert plans[0].keep() == plans[1].keep() and plans[0].macs.after <= 0.6 * plans[0].macs.before
    assert "tangent kernel" in str(plans[0])
    report = otp.apply_(model, plans[0], [x])
    assert report.macs.after == plans[0].macs.after


def test_a_transformer_keeps_every_block_alive() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    rule = otp.Channels(criterion={"kind": "ntk", "within": "magnitude"}, repair="none")
    policy = otp.Policy(rules=[rule], budget=otp.Budget(params="80%"))
    with otp.attach(model.eval(), policy) as attached:
        plan = otp.observe(attached, [torch.randn(8, 5, 4)]).plan()
    assert plan.cuts and all(len(cut.keep) >= 1 for cut in plan.cuts)
    assert plan.params.after <= 0.8 * plan.params.before


def test_memory_is_quoted_before_data() -> None:
    rule = otp.Channels(keep="50%", criterion={"kind": "ntk", "role": "ranking"}, repair="none")
    model, x = bumpy(2), draw(4, 2, 5, 5)
    with otp.attach(model, otp.Policy(rules=[rule]), example=x) as attached:
        assert attached.bytes == 8 * sum(p.numel() for p in model.parameters())
    tight = otp.Policy(rules=[rule], calibration=otp.Calibration(memory=1e-6))
    with pytest.raises(CalibrationError) as error:
        otp.attach(model, tight, example=x)
    assert "the gradients of all parameters" in error.value.where


def test_without_data_the_criterion_says_so() -> None:
    with pytest.raises(CalibrationError) as error:
        NTK(role="ranking").rank(replace(made(torch.ones(3)), tangent=None))
    assert "no gradients were gathered" in error.value.problem and "ntk" in error.value.where


def test_scores_that_are_not_finite_are_refused() -> None:
    share = torch.tensor([0.1, float("nan")], dtype=torch.float64)
    with pytest.raises(CalibrationError) as error:
        NTK(role="ranking").rank(made(share))
    assert error.value.problem == "unit 1 scored nan." and "'g'" in error.value.where


def test_fallbacks_are_named() -> None:
    dead = NTK(role="ranking").rank(made(torch.tensor([0.0, 0.2, 0.1], dtype=torch.float64)))
    assert dead.order.tolist() == [1, 2, 0] and "units with no gradient: 0" in dead.note
    none = NTK(role="ranking").rank(made(torch.zeros(2, dtype=torch.float64)))
    assert "does not depend on these units" in none.note and float(none.curve.max()) == 0
    some = NTK(role="ranking").rank(made(torch.ones(2, dtype=torch.float64), missed=("conv",)))
    assert "not counted: conv" in some.note


def test_a_budget_over_two_kinds_of_prices_is_named() -> None:
    rules = [
        otp.Channels(targets="0", criterion={"kind": "ntk", "role": "ranking"}, repair="none"),
        otp.Channels(targets="3", criterion="magnitude", repair="none"),
    ]
    policy = otp.Policy(rules=rules, budget=otp.Budget(macs="60%"))
    with otp.attach(bumpy(3), policy) as attached:
        plan = otp.observe(attached, [draw(8, 2, 5, 5)]).plan()
    assert any("does not compare with that of the other rules" in note for note in plan.notes)


def test_settings_are_checked_and_survive_yaml() -> None:
    with pytest.raises(PolicyError):
        otp.Policy(rules=[otp.Channels(keep=2, criterion={"kind": "ntk", "role": "both"})])
    rule = otp.Channels(keep=2, criterion={"kind": "ntk", "within": "random"}, repair="none")
    policy = otp.Policy(rules=[rule])
    assert needs_of(policy) == {"tangents"}
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy


# single weights: NTK-SAP


def nudge(seed: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).double()


def test_a_score_is_the_derivative_by_the_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh()).double()
    x, eps, step = draw(5, 3), 0.1, 1e-6
    u = nudge(3, model[0].weight.shape)
    own = model[0].weight.detach()

    def answer(mask: Tensor) -> Tensor:
        one, two = ((x @ (w * mask).T).tanh() for w in (own, own + eps * u))
        return (one - two).square().sum()

    score = sap_scores(model, [x], eps=eps, seed=3)["0.weight"]
    for place in ((0, 0), (2, 1), (3, 2)):
        unit = torch.zeros_like(own)
        unit[place] = step
        slope = (answer(1 + unit) - answer(1 - unit)) / (2 * step)
        assert float(score[place]) == pytest.approx(abs(float(slope)), rel=1e-5)


def test_for_a_linear_map_the_score_is_its_inputs_power() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    x = draw(4, 3)
    # E of the derivative is 2 eps^2 sum over samples of x_j^2, for every output alike
    total = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(400):
        u = nudge(seed, model.weight.shape)
        total += 2 * 0.01**2 * u * torch.einsum("nj,nk,ok->oj", x, x, u)
    expected = (2 * 0.01**2 * x.square().sum(0)).expand(2, 3)
    torch.testing.assert_close(total / 400, expected, rtol=0.3, atol=2e-4)
    one = sap_scores(model, [x], eps=0.01, seed=7)["weight"]
    u = nudge(7, model.weight.shape)
    exact = (2 * 0.01**2 * u * torch.einsum("nj,nk,ok->oj", x, x, u)).abs()
    torch.testing.assert_close(one, exact)


def test_how_samples_are_divided_into_batches_does_not_matter_for_single_weights() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5)
    whole = sap_scores(model, [x], passes=3)
    for split in ([2, 4], [1] * 6):
        found = sap_scores(model, list(x.split(split)), passes=3)
        for name, score in whole.items():
            torch.testing.assert_close(found[name], score, rtol=1e-9, atol=0)


def test_weights_that_move_no_kernel_go_first_and_by_size_and_are_counted() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5)
    with torch.no_grad():
        model[4].weight[2:], model[4].bias[2:] = 0.0, -1.0  # four of six channels are dead
    size = model[3].weight.detach().abs().clone()
    rule = otp.Weights(targets="3", keep="50%", criterion="ntk")
    (zeros,) = otp.prune_(model, otp.Policy(rules=[rule]), [x], timing=0).zeros
    kept = model[3].weight != 0
    assert bool(kept[:2].all()) and int(kept[2:].sum()) == kept.numel() // 2 - kept[:2].numel()
    assert float(size[2:][kept[2:]].min()) >= float(size[2:][~kept[2:]].max())
    number = int(kept[2:].sum())
    assert f"{number} of the weights that stay move no kernel: taken by size" in zeros.note


def test_masks_keep_the_density_and_never_bring_a_weight_back() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5)
    names = weights_of(model)
    total = sum(model.get_parameter(n).numel() for n in names)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    last = None
    for density in (0.5, 0.2):
        masks = sap_masks(model, [x], density=density, rounds=3)
        assert sum(int(m.sum()) for m in masks.values()) == round(total * density)
        last = masks
    assert last is not None and set(last) == set(names) == {"0.weight", "3.weight", "7.weight"}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    gone = {n: m & (torch.arange(m.numel()).view_as(m) % 2 == 0) for n, m in masks.items()}
    score = sap_scores(model, [x], masks=gone)
    assert all(float(score[n][~gone[n]].abs().max()) == 0 for n in names)


def test_the_published_recipe_runs_on_noise_and_fresh_weights() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    recipe: dict[str, Any] = {"restart": _again, "noise": True, "passes": 2, "rounds": 2}
    one, two = (sap_masks(model, [x * c], density=0.3, **recipe) for c in (1.0, 5.0))
    assert all(torch.equal(one[n], two[n]) for n in one)  # data values are not looked at
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    other = sap_masks(model, [x], density=0.3, **{**recipe, "seed": 5})
    assert any(not torch.equal(one[n], other[n]) for n in one)


def _again(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


def _no_density() -> None:
    sap_masks(bumpy(2), [draw(2, 2, 5, 5)], density=0.0)


def _nan() -> None:
    sap_scores(bumpy(2), [draw(2, 2, 5, 5) * float("nan")])


@pytest.mark.parametrize(
    ("call", "problem", "where"),
    [
        (_no_density, "keeps no weights", "argument density"),
        (_nan, "NaN or infinite", "parameter '0.weight'"),
    ],
)
def test_what_cannot_be_scored_says_why(call: Callable[[], None], problem: str, where: str) -> None:
    with pytest.raises(CalibrationError) as error:
        call()
    assert problem in error.value.problem and where in error.value.where and error.value.fix


def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Listen to the scores that a rule about weights asks for."""
    heard: list[dict[str, Tensor]] = []

    def listening(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        heard.append(sap_scores(*args, **kwargs))
        return heard[-1]

    monkeypatch.setattr(sparsify, "sap_scores", listening)
    return heard


def test_what_the_rule_keeps_is_hardly_a_matter_of_the_seed() -> None:
    model, x = bumpy(3), draw(6, 2, 5, 5)
    kept = []
    for seed in (0, 1):
        net = copy.deepcopy(model)
        rule = otp.Weights(keep="50%", criterion="ntk")
        otp.prune_(net, otp.Policy(rules=[rule], seed=seed), [x])
        kept.append(net[3].weight != 0)
    same = float((kept[0] & kept[1]).sum() / kept[0].sum())
    once = [sap_scores(model, [x], seed=s)["3.weight"].flatten() for s in (0, 1)]
    top = [set(s.topk(len(s) // 2).indices.tolist()) for s in once]
    assert 0.7 < same < 1 and same > len(top[0] & top[1]) / len(top[0])


def test_the_rule_for_weights_keeps_the_largest_scores_of_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = told(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    batches = [torch.randn(4, 2, 4, 4) for _ in range(2)]
    otp.prune_(model, otp.Policy(rules=[otp.Weights(keep="25%", criterion="ntk")]), batches)
    (scores,) = heard
    for path in ("0", "3"):
        weight, score = model.get_submodule(path).weight, scores[f"{path}.weight"]
        kept = score.flatten().argsort(descending=True)[: weight.numel() // 4]
        assert set(kept.tolist()) == set(weight.flatten().nonzero().flatten().tolist())


def test_layers_whose_weights_lie_across_are_scored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    heard = told(monkeypatch)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 20, (2, 6))}]
    path = "transformer.h.0.mlp.c_fc"
    rule = otp.Weights(targets=path, keep="50%", criterion="ntk")
    otp.prune_(model, otp.Policy(rules=[rule]), batches)
    weight, score = model.get_submodule(path).weight, heard[0][f"{path}.weight"]
    assert int((weight != 0).sum()) == weight.numel() // 2
    assert float(score[weight == 0].max()) <= float(score[weight != 0].min())
