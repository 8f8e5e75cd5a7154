"""Claims about masks that training finds: from the first step to the smaller model."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_otprune as otp
from benchmarks.cifar import ResNet
from torch_otprune.errors import (
    BudgetError,
    CalibrationError,
    LoadError,
    PolicyError,
    StructureError,
)
from torch_otprune.integrations.loop import Loop
from torch_otprune.integrations.trainer import _Pruning
from torch_otprune.structure.graph import CostModel, Dim, Term
from torch_otprune.training.gates import _Share
from torch_otprune.training.linearised import Linearised
from torch_otprune.training.pool import Pool, Price, Seat
from torch_otprune.transport import soft_topk
from torch_otprune.transport.threshold import threshold

D = torch.float64
CPU = torch.device("cpu")


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(count, 8, generator=g)
    return x, (x[:, :4] + x[:, 4:].abs()).argmax(1)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def images() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(6)
    return torch.randn(16, 3, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)


def resnet() -> nn.Module:
    torch.manual_seed(2)
    return ResNet(blocks=2, width=8)


def dtp(steps: int = 10, **more: Any) -> dict[str, Any]:
    return {"kind": "dtp", "steps": steps, **more}


def policy(rule: Any = None, **limits: Any) -> otp.Policy:
    rule = otp.Channels(criterion=dtp()) if rule is None else rule
    return otp.Policy(rules=[rule], budget=otp.Budget(**limits) if limits else None)


def train(
    attached: otp.Attached,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    steps: int,
    *,
    sgd: torch.optim.Optimizer | None = None,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
) -> torch.optim.Optimizer:
    sgd = sgd or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        value = loss(model(batch[0]), batch[1])
        sgd.zero_grad()
        value.backward()
        sgd.step()
        attached.step()
    return sgd


def search(attached: otp.Attached) -> Any:
    masked = attached._course.masked
    assert masked is not None
    return masked.search


# ---- the algorithm -------------------------------------------------------------------------


def pool(count: int | None = 3, start: Tensor | None = None, floor: int = 1) -> Pool:
    start = torch.linspace(-1, 1, 8, dtype=D) if start is None else start
    return Pool([Seat("a", start, tuple(range(floor, len(start) + 1)))], count, CPU)


def test_after_t_steps_of_still_scores_the_softness_is_eps_over_t() -> None:
    found, eps = pool(), 1.0
    for t in range(1, 21):
        found.push_(eps, keeps=True)
        found.solve_([Price((1.0,), 3.0)])
        want = soft_topk(found.scores.double(), 3.0, eps=eps / (2 * t))
        torch.testing.assert_close(found.flat.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("steps", "share"), [(20, 0.5), (200, 0.3)])
def test_the_automatic_softness_ends_with_the_median_unit_ten_logits_away(
    steps: int, share: float
) -> None:
    start = torch.randn(400, dtype=D, generator=torch.Generator().manual_seed(0))
    found = pool(round(400 * share), start)
    eps = found.softness(share, steps)
    for _ in range(steps):
        found.push_(eps, keeps=True)
        found.solve_([Price((1.0,), 400 * share)])
    assert float(found.logits.abs().median()) == pytest.approx(10, rel=0.05)


def test_one_step_is_the_sinkhorn_plan_of_squared_distances_to_zero_and_one() -> None:
    import ot

    found, eps, n, k = pool(), 0.3, 8, 3
    found.push_(eps, keeps=True)
    found.solve_([Price((1.0,), float(k))])
    s = found.scores.double()
    cost = torch.stack([s.square(), (s - 1).square()], dim=1)
    plan = ot.sinkhorn(
        [1 / n] * n, [1 - k / n, k / n], cost.numpy(), eps,
        method="sinkhorn_log", numItermax=100_000, stopThr=1e-14,
    )  # fmt: skip
    want = torch.from_numpy(plan[:, 1] * n)
    torch.testing.assert_close(found.flat.double(), want, atol=1e-5, rtol=0)


def test_the_scores_move_along_the_gradient_of_sinkhorn() -> None:
    """Differentiate a long Sinkhorn loop by autograd, and compare with the closed form."""
    found, eps, k = pool(), 0.4, 3.0
    found.push_(eps, keeps=True)
    found.solve_([Price((1.0,), k)])
    v = torch.randn(8, dtype=D)
    s = found.scores.double().requires_grad_()
    kernel = torch.exp(-torch.stack([s.square(), (s - 1).square()], dim=1) / eps)
    right = torch.ones(2, dtype=D)
    for _ in range(2000):
        left = (1 / 8) / (kernel @ right)
        right = torch.tensor([1 - k / 8, k / 8], dtype=D) / (kernel.T @ left)
    mask = 8 * left * kernel[:, 1] * right[1]
    (want,) = torch.autograd.grad((mask * v).sum(), s)
    m = found.flat.double()
    g = m * (1 - m)
    got = 2 / eps * (g * v - g * (g @ v) / g.sum())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    moved: list[Tensor] = []
    found._descend_ = lambda slope, lr, step: moved.append(slope)  # type: ignore[method-assign]
    leaf = found.masks()
    leaf["a"].grad = v.float()
    found.learn_(leaf, eps, lr=0.1, step=1)
    torch.testing.assert_close(moved[0].double(), want, atol=1e-5, rtol=1e-4)


def test_with_costs_the_scores_move_along_the_difference_quotient_of_the_loss() -> None:
    eps, budget = 0.4, 7.0
    costs = torch.tensor([1.0] * 4 + [3.0] * 4, dtype=D)
    start = torch.linspace(-1, 1, 8, dtype=D)[torch.randperm(8)]
    found = Pool([Seat("a", start[:4], (0, 4)), Seat("b", start[4:], (0, 4))], None, CPU)
    found.push_(eps, keeps=True)
    found.solve_([Price((1.0, 3.0), budget)])
    v, s = torch.randn(8, dtype=D), found.scores.double()

    def loss(scores: Tensor) -> float:
        logits = 2 * scores / eps
        at = threshold([logits], budget, costs=[costs]).at
        return float(torch.dot(v, torch.sigmoid(logits - at)))

    far = 1e-4 * torch.eye(8, dtype=D)
    want = torch.tensor([(loss(s + f) - loss(s - f)) / 2e-4 for f in far], dtype=D)
    moved: list[Tensor] = []
    found._descend_ = lambda slope, lr, step: moved.append(slope)  # type: ignore[method-assign]
    leaf = found.masks()
    leaf["a"].grad, leaf["b"].grad = v[:4].float(), v[4:].float()
    assert found.learn_(leaf, eps, lr=0.1, step=1)
    torch.testing.assert_close(moved[0].double(), want, atol=1e-5, rtol=1e-4)


def test_gradients_that_overflowed_move_nothing() -> None:
    found = pool()
    before, leaf = found.scores.clone(), found.masks()
    leaf["a"].grad = torch.full((8,), float("inf"))
    assert not found.learn_(leaf, 1.0, lr=0.1, step=1)
    assert torch.equal(found.scores, before)


def test_two_budgets_both_hold_and_one_is_met() -> None:
    start = torch.randn(12, dtype=D)
    found = Pool([Seat("a", start[:6], (1, 6)), Seat("b", start[6:], (1, 6))], None, CPU)
    found.push_(1.0, keeps=True)
    found.solve_([Price((1.0, 3.0), 8.0), Price((2.0, 1.0), 9.0)])
    widths = found.widths()
    spent = (widths["a"] + 3 * widths["b"] - 8, 2 * widths["a"] + widths["b"] - 9)
    assert max(spent) == pytest.approx(0, abs=1e-4)


def test_a_budget_empties_no_group() -> None:
    seats = [Seat("a", torch.linspace(0, 1, 6), tuple(range(2, 7))), Seat("b", torch.ones(6), (6,))]
    found = Pool(seats, None, CPU)
    found.scores[:6] -= 50
    found.push_(1.0, keeps=True)
    found.solve_([Price((1.0, 1.0), 8.5)])
    assert found.widths()["b"] == pytest.approx(6, abs=1e-3)
    assert found.widths()["a"] >= 2 - 1e-3


def test_where_nothing_may_go_all_masks_are_one() -> None:
    found = pool(None, floor=8)
    found.push_(1.0, keeps=True)
    found.solve_([Price((1.0,), 3.0)])
    assert bool((found.flat == 1).all())


def test_slopes_are_finite_differences_of_the_exact_cost() -> None:
    terms = (
        Term("x", 9, (Dim(1, (("a", 2),)), Dim(0, (("b", 3),)))),
        Term("y", 2, (Dim(0, (("b", 1), ("a", 1))), Dim(5))),
    )
    cost = CostModel("macs", terms)
    at = {"a": 4, "b": 7}
    total, slopes = Linearised(cost).at({name: float(width) for name, width in at.items()})
    assert total == cost.at(at)
    for name, width in at.items():  # linear in each width alone
        assert slopes[name] == cost.at(at | {name: width + 1}) - total


# ---- the whole way -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits", [{"params": "40%"}, {"macs": "40%"}, {"params": 700, "macs": 700}]
)
def test_the_masks_meet_the_budget_and_the_smaller_model_is_the_masked_one(
    limits: dict[str, Any],
) -> None:
    model, batch = net(), data()
    with otp.attach(model, policy(**limits), example=batch[0][:2]) as attached:
        train(attached, model, batch, 14)
        masked = model(batch[0]).detach()
        plan = attached.plan()
    torch.testing.assert_close(model(batch[0]), masked)  # hard masks are in the weights
    report = otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked, atol=1e-5, rtol=1e-5)
    for measure in limits:
        cost = getattr(report, measure)
        allowed = plan.policy.budget.limits[measure].of(cost.before)  # type: ignore[union-attr]
        assert 0.9 * allowed < cost.after or measure == "macs"
        assert cost.after <= allowed


def test_the_linearised_budget_is_met_while_widths_move() -> None:
    model, batch = net(), data()
    rule = otp.Channels(criterion=dtp(40, ramp=0.2))
    with otp.attach(model, policy(rule, params="40%"), example=batch[0][:2]) as attached:
        train(attached, model, batch, 39)
        found = search(attached)
        assert 1e-4 < found.softness < 0.25
        total, _ = Linearised(found.costs["params"]).at(found.widths)
        assert total == pytest.approx(found.limits["params"], rel=0.01)
        attached.harden()


def test_without_a_ramp_the_first_mask_keeps_the_share_of_every_group() -> None:
    model, batch = net(), data()
    rule = otp.Channels(criterion=dtp(1000, ramp=0), keep="25%")
    with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
        assert search(attached).widths == pytest.approx({"0": 8.0, "2": 8.0}, rel=1e-4)


def test_with_a_ramp_training_starts_from_the_whole_network() -> None:
    model, batch = net(), data()
    dense = model(batch[0])
    with otp.attach(model, policy(params="40%"), example=batch[0][:2]):
        assert torch.equal(model(batch[0]), dense)


def test_masks_harden_by_themselves_when_proximal_and_not_when_entropic() -> None:
    left = {}
    for mode in ("proximal", "entropic"):
        model, batch = net(), data()
        rule = otp.Channels(criterion=dtp(200, mode=mode, ramp=0, lr=1e-9, eps=0.5), keep="50%")
        with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
            soft = search(attached).softness
            train(attached, model, batch, 40)
            left[mode] = search(attached).softness / soft
            attached.harden()
    assert left["proximal"] < 0.4
    assert left["entropic"] == pytest.approx(1, rel=1e-3)


def test_training_prefers_the_units_that_matter() -> None:
    """Half of all units are cut off from the answer, and their weights are the largest."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), data(256)
    with torch.no_grad():
        model[0].weight[8:] *= 3  # what the scores start from
        model[2].weight[:, 8:] = 0
    adam = torch.optim.Adam(model[2].parameters(), lr=0.02)
    for _ in range(100):
        adam.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert model[2].weight.grad is not None
        model[2].weight.grad[:, 8:] = 0
        adam.step()
    frozen = torch.optim.SGD([model[2].bias], lr=0.0)
    rule = otp.Channels(criterion=dtp(60, lr=0.05), keep="50%")
    with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
        train(attached, model, batch, 60, sgd=frozen)
        (cut,) = attached.plan().cuts
    assert sum(unit < 8 for unit in cut.keep) >= 7


def test_channels_of_a_residual_network_are_masked_behind_its_norms() -> None:
    model, batch = resnet(), images()
    with otp.attach(model, policy(macs="60%"), example=batch[0][:2]) as attached:
        train(attached, model, batch, 12)
        model.eval()
        masked = model(batch[0]).detach()
        plan = attached.plan()
    assert plan.macs.ratio <= 0.6
    assert any("stays whole: without it the model does not run" in note for note in plan.notes)
    report = otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked, atol=1e-4, rtol=1e-4)
    assert report.undo_() is None


@pytest.mark.parametrize("replace", ["identity", "affine"])
def test_layers_that_training_did_without_are_missed_by_nobody(replace: str) -> None:
    model, batch = resnet(), images()
    rule = otp.Layers(criterion=dtp(), drop=2, replace=replace)
    with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
        train(attached, model, batch, 12)
        model.eval()
        masked = model(batch[0]).detach()
        plan = attached.plan()
    assert len(plan.drops) == 2
    assert all(drop.silent for drop in plan.drops)
    otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked, atol=1e-3, rtol=1e-3)


def test_layers_and_channels_share_one_budget() -> None:
    model, batch = resnet(), images()
    rules = [otp.Layers(criterion=dtp(), replace="identity"), otp.Channels(criterion=dtp())]
    shared = otp.Policy(rules=rules, budget=otp.Budget(macs="40%", params="45%"))
    with otp.attach(model, shared, example=batch[0][:2]) as attached:
        train(attached, model, batch, 12)
        model.eval()
        masked = model(batch[0]).detach()
        plan = attached.plan()
    assert plan.macs.ratio <= 0.4
    assert plan.params.ratio <= 0.45
    otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked, atol=1e-4, rtol=1e-4)


def test_heads_are_masked_where_their_projection_reads_them() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(6, 5, 16)
    rule = otp.Heads(criterion=dtp(), keep="50%")

    def loss(out: Tensor, x: Tensor) -> Tensor:
        return (out - x.flip(-1)).square().mean()

    with otp.attach(model, policy(rule), example=x[:2]) as attached:
        train(attached, model, (x, x), 12, loss=loss)
        model.eval()
        masked = model(x).detach()
        plan = attached.plan()
    assert [len(cut.keep) for cut in plan.cuts] == [2]
    otp.apply_(model, plan, [x], timing=0)
    torch.testing.assert_close(model(x), masked, atol=1e-4, rtol=1e-4)


def test_a_multiple_and_a_least_width_are_respected() -> None:
    model, batch = net(), data()
    rule = otp.Channels(criterion=dtp(), multiple_of=8, min_keep=16)
    with otp.attach(model, policy(rule, params="65%"), example=batch[0][:2]) as attached:
        train(attached, model, batch, 12)
        plan = attached.plan()
    assert all(len(cut.keep) % 8 == 0 and len(cut.keep) >= 16 for cut in plan.cuts)


def test_single_weights_end_as_zeros_in_ordinary_tensors() -> None:
    model, batch = net(), data()
    rule = otp.Weights(keep="25%", criterion=dtp())
    with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
        train(attached, model, batch, 14)
        masked = model(batch[0]).detach()
        plan = attached.plan()
        eps = search(attached).eps
    said = f"hard since step 10 of 10, at a softness of {eps / 10:.1e} (eps {eps:.2g})"
    assert any(said in note for note in plan.notes)
    otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked)
    left = {name: int((p != 0).sum()) for name, p in model.named_parameters() if p.dim() == 2}
    assert left == {"0.weight": 64, "2.weight": 256, "4.weight": 32}


def test_weights_of_convolutions_are_masked_in_their_own_order() -> None:
    model, batch = resnet().to(memory_format=torch.channels_last), images()
    rule = otp.Weights(keep="50%", criterion=dtp(6), targets="layer*")
    with otp.attach(model, policy(rule), example=batch[0][:2]) as attached:
        train(attached, model, batch, 8)
        model.eval()
        masked = model(batch[0]).detach()
        plan = attached.plan()
    otp.apply_(model, plan, [batch[0]], timing=0)
    torch.testing.assert_close(model(batch[0]), masked, atol=1e-5, rtol=1e-5)
    weight = model.get_parameter("layer1.0.conv1.weight")
    assert int((weight != 0).sum()) == weight.numel() // 2


def test_channels_are_left_alone_where_only_layers_are_counted() -> None:
    model, batch = resnet(), images()
    rules = [otp.Layers(criterion=dtp(4), replace="identity"), otp.Channels(criterion=dtp(4))]
    asked = otp.Policy(rules=rules, budget=otp.Budget(layers=2))
    with otp.attach(model, asked, example=batch[0][:2]) as attached:
        train(attached, model, batch, 5)
        plan = attached.plan()
    assert len(plan.drops) == 2
    assert not plan.cuts
    assert any("no budget asks it to go" in note for note in plan.notes)


# ---- in somebody's loop --------------------------------------------------------------------


def test_the_model_has_no_new_keys_and_its_own_weights_between_two_passes() -> None:
    model, batch = net(), data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = [name for name, _ in model.named_parameters()]
    rule = otp.Channels(criterion=dtp(ramp=0), keep="50%")
    with otp.attach(model, policy(rule), example=batch[0][:2]):
        masked = model(batch[0])
        assert [name for name, _ in model.named_parameters()] == order
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
        assert not torch.equal(copy.deepcopy(model)(batch[0]), masked)  # a copy is not masked


def test_a_pass_that_fails_leaves_the_weights_alone() -> None:
    model, batch = net(), data()
    before = model[2].weight
    rule = otp.Channels(criterion=dtp(ramp=0), keep="50%")
    with otp.attach(model, policy(rule), example=batch[0][:2]):
        with pytest.raises(RuntimeError):
            model(batch[0][:, :3])
        assert model[2].weight is before


def test_a_pass_that_fails_inside_a_block_keeps_no_stream() -> None:
    model, batch = resnet(), images()
    rule = otp.Layers(criterion=dtp(), drop=2, replace="identity")
    with otp.attach(model, policy(rule), example=batch[0][:2]):
        masked = model(batch[0]).detach()
        shares = {
            id(hook.__self__): hook.__self__
            for module in model.modules()
            for hook in module._forward_hooks.values()
            if isinstance(getattr(hook, "__self__", None), _Share)
        }
        assert shares and not any(share.streams for share in shares.values())
        for module in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
            stumble = module.register_forward_hook(_fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                model(batch[0])
            stumble.remove()
            assert not any(share.streams for share in shares.values())
        assert torch.equal(model(batch[0]), masked)


def _fail(*args: Any) -> None:
    raise RuntimeError("on purpose")


def test_accumulated_gradients_move_scores_as_one_batch_does() -> None:
    scores = []
    for parts in (1, 4):
        model, (x, y) = net(), data()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        rule = otp.Channels(criterion=dtp(20, ramp=0), keep="50%")
        with otp.attach(model, policy(rule), example=x[:2]) as attached:
            for _ in range(5):
                sgd.zero_grad()
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (F.cross_entropy(model(a), b) / parts).backward()
                sgd.step()
                attached.step()
            scores.append(torch.cat([p.scores for p in search(attached).pools]))
            attached.harden()
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=0)


class Checkpointed(nn.Module):
    """Runs its middle again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner[1](self.inner[0](x))
        middle = self.inner[2:]
        if self.reentrant is None or not torch.is_grad_enabled():
            return middle(y)  # type: ignore[no-any-return]
        return checkpoint(middle, y, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_run_again_in_the_backward_pass_is_masked_again(reentrant: bool) -> None:
    grads = []
    for how in (None, reentrant):
        model, (x, y) = Checkpointed(how), data()
        rule = otp.Channels(criterion=dtp(20, ramp=0), keep="50%")
        with otp.attach(model, policy(rule), example=x[:2]) as attached:
            F.cross_entropy(model(x), y).backward()
            masks = [mask.grad for mask in search(attached).masks.values()]
            grads.append([*masks, *(p.grad for p in model.parameters())])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_half_precision_trains_masks_as_well() -> None:
    model, batch = net(), data()
    with otp.attach(model, policy(params="40%"), example=batch[0][:2]) as attached:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(attached, model, batch, 12)
        assert attached.plan().cuts
        assert all(p.scores.dtype == torch.float32 for p in search(attached).pools)


def test_a_training_that_was_interrupted_goes_on_bit_for_bit() -> None:
    results = []
    for stop in (None, 6, 13):  # never, while soft, when hard
        model, batch = net(), data()
        asked = policy(params="40%")
        attached = otp.attach(model, asked, example=batch[0][:2])
        sgd = train(attached, model, batch, stop or 16)
        if stop is not None:
            written = io.BytesIO()
            told = {"attached": attached.state_dict(), "model": model.state_dict()}
            torch.save(told | {"sgd": sgd.state_dict()}, written)
            written.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the search stops early, as it should
                attached.remove()
            model = net()
            attached = otp.attach(model, asked, example=batch[0][:2])
            saved = torch.load(written, weights_only=True)
            attached.load_state_dict(saved["attached"])
            sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            model.load_state_dict(saved["model"])
            sgd.load_state_dict(saved["sgd"])
            train(attached, model, batch, 16 - stop, sgd=sgd)
        results.append((attached.plan().keep(), model.state_dict()))
        attached.remove()
    for keep, weights in results[1:]:
        assert keep == results[0][0]
        assert all(torch.equal(weights[k], v) for k, v in results[0][1].items())


def test_weights_that_hard_masks_silence_stay_zero_while_momentum_moves_on() -> None:
    model, batch = net(), data()
    with otp.attach(model, policy(params="40%"), example=batch[0][:2]) as attached:
        train(attached, model, batch, 20)
        keep = {cut.group: cut.keep for cut in attached.plan().cuts}
    gone = [unit for unit in range(32) if unit not in keep["0"]]
    assert gone
    assert not model[2].weight[:, gone].any()


# ---- what is refused, and what is said -----------------------------------------------------


@pytest.fixture
def soft() -> Iterator[tuple[otp.Attached, nn.Module]]:
    model, batch = net(), data()
    attached = otp.attach(model, policy(params="40%"), example=batch[0][:2])
    train(attached, model, batch, 3)
    yield attached, model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached.remove()


def test_a_plan_of_soft_masks_is_refused(soft: tuple[otp.Attached, nn.Module]) -> None:
    with pytest.raises(PolicyError, match="the masks are soft: the search is at step 3 of 10"):
        soft[0].plan()


def test_a_search_may_be_ended_early_and_the_plan_says_so(
    soft: tuple[otp.Attached, nn.Module],
) -> None:
    soft[0].harden()
    assert any("hard since step 3 of 10" in note for note in soft[0].plan().notes)


def test_leaving_too_early_warns(soft: tuple[otp.Attached, nn.Module]) -> None:
    with pytest.warns(UserWarning, match="the search of dtp stops at step 3 of 10"):
        soft[0].remove()


def test_a_step_without_a_backward_pass_is_refused(soft: tuple[otp.Attached, nn.Module]) -> None:
    with pytest.raises(CalibrationError, match="no gradient reached the masks"):
        soft[0].step()


def test_a_state_of_other_groups_is_refused(soft: tuple[otp.Attached, nn.Module]) -> None:
    state = soft[0].state_dict()
    state["masks"]["pools"][0]["names"][0] = "other"
    with pytest.raises(LoadError, match="this state masks other groups"):
        soft[0].load_state_dict(state)


def test_without_a_training_step_the_plan_says_what_decided() -> None:
    model, (x, _) = net(), data()
    report = otp.prune_(model, policy(params="40%"), [x], timing=0)
    assert any("dtp saw no training step" in note for note in report.plan.notes)


def test_without_a_training_step_a_plan_of_layers_says_so_as_well() -> None:
    model, (x, _) = resnet().eval(), images()
    with otp.attach(model, policy(otp.Layers(criterion="dtp", drop=1))) as attached:
        otp.observe(attached, [x])
        plan = attached.plan()
    assert len(plan.drops) == 1
    assert not plan.drops[0].silent
    assert any("dtp saw no training step" in note for note in plan.notes)


class Twice(nn.Module):
    """Two layers that read different units with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        self.one, self.two, self.head = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(6, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.relu(self.first(x))) + self.two(F.relu(self.second(x)))
        return self.head(F.relu(y))  # type: ignore[no-any-return]


def test_units_that_a_shared_weight_reads_stay_whole() -> None:
    model, batch = Twice(), data()
    with otp.attach(model, policy(params="95%"), example=batch[0][:2]) as attached:
        masked = search(attached).masks
        assert not {"first", "second"} & set(masked)
        attached.harden()


@pytest.mark.parametrize("name", ["eps", "lr"])
@pytest.mark.parametrize(
    ("value", "wanted"), [(-1.0, "greater than 0"), (0, "greater than 0"), ("x", "a valid number")]
)
def test_a_setting_that_is_not_above_zero_is_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(PolicyError, match=f"no valid {name}: .* 'auto' or {wanted}") as error:
        otp.Channels(criterion=dtp(**{name: value}))
    assert error.value.where == f"Channels.criterion.{name}"


@pytest.mark.parametrize("name", ["eps", "lr"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(PolicyError, match=f"no valid {name}: it should be 'auto' or a finite"):
        otp.Channels(criterion=dtp(**{name: value}))


@pytest.mark.parametrize("example", [True, False])
def test_a_plan_of_zeros_without_a_training_step_says_what_decided(example: bool) -> None:
    model, (x, _) = net(), data()
    rule = otp.Weights(keep="25%", criterion="dtp")
    with otp.attach(model, policy(rule), example=x[:2] if example else None) as attached:
        otp.observe(attached, [x])
        plan = attached.plan()
    assert any("dtp saw no training step" in note for note in plan.notes)


def test_masks_that_were_hardened_before_any_step_say_what_decided() -> None:
    model, (x, _) = net(), data()
    with otp.attach(model, policy(params="40%"), example=x[:2]) as attached:
        attached.harden()
        notes = attached.plan().notes
    assert any("dtp saw no training step" in note for note in notes)
    assert not any("hard since" in note for note in notes)


def test_gradients_that_were_no_numbers_are_told() -> None:
    model, batch = net(), data()
    asked = policy(params="40%")
    with otp.attach(model, asked, example=batch[0][:2]) as attached:
        train(attached, model, batch, 4)
        for _ in range(2):  # the optimiser skips the steps
            (F.cross_entropy(model(batch[0]), batch[1]) * torch.nan).backward()
            attached.step()
        model.zero_grad()
        assert attached.state_dict()["masks"]["lost"] == 2
        train(attached, model, batch, 6)
        notes = attached.plan().notes
    assert any("in 2 of them a gradient was NaN or infinite" in note for note in notes)


def test_a_state_with_masks_is_refused_without_an_example(
    soft: tuple[otp.Attached, nn.Module],
) -> None:
    with (
        otp.attach(net(), policy(params="40%")) as attached,
        pytest.raises(PolicyError, match="no example was given") as error,
    ):
        attached.load_state_dict(soft[0].state_dict())
    assert error.value.where.startswith("Attached.load_state_dict")


def test_a_step_without_an_example_is_refused() -> None:
    with (
        otp.attach(net(), policy(params="40%")) as attached,
        pytest.raises(PolicyError, match="and no example was given"),
    ):
        attached.step()


def test_a_schedule_beside_it_is_refused() -> None:
    rounds = policy(params="40%").model_copy(update={"schedule": otp.Schedule(at=[5])})
    with pytest.raises(PolicyError, match="the schedule prunes in rounds, and dtp finds"):
        otp.attach(net(), rounds, example=data()[0][:2])


def test_two_ways_of_training_masks_are_refused() -> None:
    rules = [
        otp.Channels(targets="0", criterion=dtp(5)),
        otp.Channels(targets="2", criterion=dtp()),
    ]
    both = otp.Policy(rules=rules, budget=otp.Budget(params="40%"))
    with pytest.raises(PolicyError, match="the rules train masks differently"):
        otp.attach(net(), both, example=data()[0][:2])


def test_a_budget_shared_with_a_rule_that_trains_nothing_is_refused() -> None:
    rules = [otp.Channels(targets="0", criterion=dtp()), otp.Channels(targets="2")]
    both = otp.Policy(rules=rules, budget=otp.Budget(params="40%"))
    with pytest.raises(PolicyError, match=r"rules\[1\] trains no masks, and shares a budget"):
        otp.attach(net(), both, example=data()[0][:2])


def test_a_budget_out_of_reach_is_refused_before_training() -> None:
    rule = otp.Channels(criterion=dtp(), min_keep=16)
    said = r"a budget of \d+ params cannot be reached: the least is"
    with pytest.raises(BudgetError, match=said):
        otp.attach(net(), policy(rule, params="5%"), example=data()[0][:2])


def test_hardening_without_masks_is_refused() -> None:
    with (
        otp.attach(net(), policy(otp.Channels(keep="50%"))) as attached,
        pytest.raises(PolicyError, match="no rule trains masks"),
    ):
        attached.harden()


@pytest.mark.parametrize(
    ("rule", "said"),
    [(otp.Hidden, "a norm takes this stream whole"), (otp.Experts, "ranks channels, not experts")],
)
def test_streams_and_experts_are_not_masked(rule: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        rule(criterion="dtp", keep="50%")


def test_weights_in_a_pattern_are_not_masked() -> None:
    with pytest.raises(PolicyError, match="masks weights wherever they are, not n of every m"):
        otp.attach(net(), policy(otp.Weights(pattern="2:4", criterion=dtp())))


def test_weights_and_other_rules_are_not_masked_together() -> None:
    rules = [otp.Channels(criterion=dtp(), keep="50%"), otp.Weights(keep="50%", criterion=dtp())]
    with pytest.raises(PolicyError, match="masks of single weights and other rules"):
        otp.attach(net(), otp.Policy(rules=rules))


def test_a_computed_weight_is_refused() -> None:
    model = net()
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(StructureError, match="a parametrisation computes the weight of '2'"):
        otp.attach(model, policy(params="40%"), example=data()[0][:2])


# ---- callbacks -----------------------------------------------------------------------------


def test_a_callback_trains_masks_and_its_handle_plans_behind_the_training() -> None:
    model, (x, y) = net(), data()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    callback = Loop(policy(params="40%"), example=x[:2])
    callback.begin(model)
    for _ in range(12):
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
        assert callback.tick([sgd]) is None
    callback.end()
    assert callback.ended is not None
    plan = callback.ended.plan()
    assert plan.params.ratio <= 0.4
    otp.apply_(model, plan, [x], timing=0)


def test_a_checkpoint_without_masks_is_refused() -> None:
    callback = _Pruning(policy(params="40%"), example=data()[0][:2])
    callback.begin(net())
    with pytest.raises(LoadError, match="a checkpoint of the Trainer holds no masks"):
        callback._resume(5)
