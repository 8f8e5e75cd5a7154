"""An optimiser goes on after a pruning: state is sliced, groups stay, undo brings it back."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_otprune as otp
from tests.cases import CASES
from torch_otprune.errors import OTPruneError
from torch_otprune.structure import flat_tensors, run

HALF = otp.Policy(rules=otp.Channels(keep="50%", criterion="magnitude", repair="none"))
MENDED = otp.Policy(rules=otp.Channels(keep="50%"), calibration=otp.Calibration(samples=64))


def net(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    widths = [(6, 16), (16, 12), (12, 4)]
    layers = [layer for a, b in widths for layer in (nn.Linear(a, b, dtype=dtype), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def data(samples: int = 64, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, (x[:, :4] + x[:, 2:].abs()).argmax(1)


def take(model: nn.Module, optimizer: Any, steps: int = 1) -> list[float]:
    """Train, and list the losses."""
    x, y = data(dtype=next(model.parameters()).dtype)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def kept(plan: otp.Plan) -> dict[tuple[str, str], Tensor]:
    pieces = [piece for cut in plan.cuts for piece in cut.slices]
    return {(piece.path, piece.side): torch.tensor(piece.keep) for piece in pieces}


def sliced(plan: otp.Plan, name: str, tensor: Tensor) -> Tensor:
    """Cut a tensor of the dense net as the plan cuts the parameter of that name."""
    path, _, leaf = name.rpartition(".")
    keeps = kept(plan)
    if (path, "out") in keeps:
        tensor = tensor[keeps[path, "out"]]
    if leaf == "weight" and (path, "in") in keeps:
        tensor = tensor[:, keeps[path, "in"]]
    return tensor


Make = Callable[[Any], Optimizer]
OPTIMISERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_next_step_is_the_one_the_masked_network_would_take(kind: str) -> None:
    model = net()
    optimizer = OPTIMISERS[kind](model.parameters())
    take(model, optimizer, 3)
    masked = copy.deepcopy(model)
    twin = OPTIMISERS[kind](masked.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    done = report.rebind_(optimizer)
    with torch.no_grad():  # who reads a unit that goes reads nothing
        for (path, side), keep in kept(report.plan).items():
            if side == "in":
                weight = masked.get_submodule(path).weight
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[keep] = False
                weight[:, gone] = 0
    assert take(model, optimizer) == pytest.approx(take(masked, twin), rel=1e-12)
    now = dict(model.named_parameters())
    for name, parameter in masked.named_parameters():
        torch.testing.assert_close(now[name], nn.Parameter(sliced(report.plan, name, parameter)))
    assert not done.reset and not done.left and not done.joined
    assert set(done.sliced) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}


def test_parameters_that_live_on_are_the_same_objects() -> None:
    model = net()
    before = dict(model.named_parameters())
    before["0.weight"].tag = "mine"  # type: ignore[attr-defined]
    otp.prune_(model, MENDED, [data()[0]], timing=0)
    now = dict(model.named_parameters())
    assert all(now[name] is before[name] for name in before)
    assert now["0.weight"].shape == (8, 6) and now["0.weight"].tag == "mine"  # type: ignore


def test_a_forgotten_rebind_is_no_silence() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    take(model, optimizer)
    otp.prune_(model, MENDED, [data()[0]], timing=0)
    with pytest.raises(RuntimeError, match="size"):
        take(model, optimizer)


def test_plain_descent_needs_no_rebind() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take(model, optimizer)
    otp.prune_(model, MENDED, [data()[0]], timing=0)
    before = [p.detach().clone() for p in model.parameters()]
    take(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_graph_of_the_last_step_may_be_alive() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    report = otp.prune_(model, MENDED, [x], timing=0)
    report.rebind_(optimizer)
    new = F.cross_entropy(model(x), y)  # with the old `loss` alive, as in everybody's loop
    new.backward()
    optimizer.step()
    report.undo_()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert float(loss.detach()) != float(new.detach())


def test_pruning_nothing_leaves_the_loss_curve_as_it_is() -> None:
    curves = []
    for watched in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if watched:
            policy = otp.Policy(rules=otp.Channels(keep="50%"), schedule=otp.Schedule(at=1000))
            with otp.attach(model, policy) as attached:
                curve = []
                for _ in range(10):
                    curve += take(model, optimizer)
                    assert attached.step(optimizer) is None
        else:
            curve = take(model, optimizer, 10)
        curves.append(curve)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", CASES)
def test_after_a_prune_every_live_parameter_is_updated(name: str) -> None:
    model, batch = CASES[name].model().train(), CASES[name].batch(32)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    _descend(model, batch, optimizer)
    policy = otp.Policy(
        rules=otp.Channels(),
        budget=otp.Budget(params=0.7),
        calibration=otp.Calibration(samples=32, probe=8),
    )
    report = otp.prune_(model, policy, [batch], timing=0)
    assert not report.rebind_(optimizer).reset
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _descend(model, batch, optimizer)
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    unheard = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= unheard | {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(still) < len(before)


def _descend(model: nn.Module, batch: Any, optimizer: Optimizer) -> None:
    parts = [t.square().mean() for t in flat_tensors(run(model, batch)) if t.requires_grad]
    optimizer.zero_grad()
    torch.stack(parts).sum().backward()
    optimizer.step()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep().double()


SHORTER = otp.Policy(rules=otp.Layers(drop=2, replace="low_rank", repair="none"))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    decays = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def test_what_is_gone_leaves_its_group_and_stand_ins_join_that_of_their_like() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    take(model, optimizer, 2)
    held = list(optimizer.param_groups)
    report = otp.prune_(model, SHORTER, [data()[0]], timing=0)
    done = report.rebind_(optimizer)
    assert len(done.left) == 8 and done.joined
    assert all(a is b for a, b in zip(held, optimizer.param_groups, strict=True))
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert len(members) == len(list(model.parameters())) and set(optimizer.state) <= set(members)
    assert all(p.dim() > 1 for p in optimizer.param_groups[0]["params"])
    assert all(p.dim() <= 1 for p in optimizer.param_groups[1]["params"])
    before = [p.detach().clone() for p in model.parameters()]
    take(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_rebound_optimiser_has_the_order_of_one_made_anew() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    take(model, optimizer, 2)
    otp.prune_(model, SHORTER, [data()[0]], timing=0).rebind_(optimizer)
    new = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert all(
        a is b
        for a, b in zip(
            optimizer.param_groups[0]["params"], new.param_groups[0]["params"], strict=True
        )
    )
    new.load_state_dict(optimizer.state_dict())
    take(model, new)


def test_new_parameters_do_not_join_where_nothing_trained_before() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    take(model, optimizer)
    report = otp.prune_(model, SHORTER, [data()[0]], timing=0)
    assert not report.rebind_(optimizer).joined


def test_names_in_the_groups_follow_compacted_lists() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.01)
    take(model, optimizer)
    policy = otp.Policy(rules=otp.Layers(drop=2, replace="identity"))
    report = otp.prune_(model, policy, [data()[0]], timing=0)
    report.rebind_(optimizer)
    assert len(model.blocks) == 2
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_a_group_that_loses_everything_stays_for_the_scheduler() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(
        [{"params": list(block.parameters())} for block in model.blocks]
        + [{"params": [*model.stem.parameters(), *model.head.parameters()]}],
        lr=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.5**n] * 5)
    policy = otp.Policy(rules=otp.Layers(drop=2, replace="identity", repair="none"))
    take(model, optimizer)
    schedule.step()
    otp.prune_(model, policy, [data()[0]], timing=0).rebind_(optimizer)
    assert sorted(len(g["params"]) for g in optimizer.param_groups) == [0, 0, 4, 4, 4]
    take(model, optimizer)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0025] * 5


def test_weights_that_were_computed_anew_start_anew_and_it_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Linear(6, 16)), nn.ReLU(), weight_norm(nn.Linear(16, 4))
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    take(model, optimizer, 2)
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    done = report.rebind_(optimizer)
    assert "computed anew" in str(done) and not done.joined and not done.left
    before = [p.detach().clone() for p in model.parameters()]
    take(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_factors_are_cut_along_the_axis_they_have() -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    take(model, optimizer, 2)
    state = optimizer.state[model[2].weight]
    row, col = state["row_var"].clone(), state["col_var"].clone()
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    assert not report.rebind_(optimizer).reset
    keeps, now = kept(report.plan), optimizer.state[model[2].weight]
    assert torch.equal(now["row_var"], row[keeps["2", "out"]])
    assert torch.equal(now["col_var"], col[:, keeps["2", "in"]])
    take(model, optimizer)


class Factored(Optimizer):
    """Keeps what an optimiser may keep: factors without the lost axis, and a matrix per side."""

    def __init__(self, params: Any, *, gram: bool) -> None:
        super().__init__(params, {"lr": 0.1})
        self.gram = gram

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            state = self.state[p]
            if p.dim() == 2 and not state:
                state["exp_avg_sq_row"] = torch.arange(p.shape[0]).double()
                state["exp_avg_sq_col"] = torch.arange(p.shape[1]).double()
                if self.gram:
                    state["precondition"] = torch.eye(p.shape[0])


def test_factors_of_a_square_matrix_go_by_their_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)
    ).double()
    optimizer = Factored(model.parameters(), gram=False)
    take(model, optimizer)
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    assert not report.rebind_(optimizer).reset
    keeps, now = kept(report.plan), optimizer.state[model[2].weight]
    assert torch.equal(now["exp_avg_sq_row"], keeps["2", "out"].double())
    assert torch.equal(now["exp_avg_sq_col"], keeps["2", "in"].double())


def test_state_that_cannot_be_cut_starts_anew_and_it_says_why() -> None:
    model = net()
    optimizer = Factored(model.parameters(), gram=True)
    take(model, optimizer)
    done = otp.prune_(model, HALF, [data()[0]], timing=0).rebind_(optimizer)
    assert "2.weight: 'precondition' has a shape of its own" in done.reset
    assert model[2].weight not in optimizer.state


def test_lbfgs_starts_anew() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    done = otp.prune_(model, HALF, [x], timing=0).rebind_(optimizer)
    assert done.reset == ("0.weight: it spans all parameters",)
    assert math.isfinite(optimizer.step(closure).item())


def test_undo_brings_groups_and_state_back() -> None:
    model = deep()
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    take(model, optimizer, 2)
    members = [list(group["params"]) for group in optimizer.param_groups]
    values = copy.deepcopy(optimizer.state_dict()["state"])
    report = otp.prune_(model, SHORTER, [data()[0]], timing=0)
    report.rebind_(optimizer)
    report.undo_()
    assert [[id(p) for p in g] for g in members] == [
        [id(p) for p in g["params"]] for g in optimizer.param_groups
    ]
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], values[index][key]) for key in state)
    take(model, optimizer)


def test_undo_after_training_brings_the_cut_state_back() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    take(model, optimizer, 2)
    before = optimizer.state[model[2].weight]["momentum_buffer"].clone()
    weights = model[2].weight.detach().clone()
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    report.rebind_(optimizer)
    take(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.05
    report.undo_()
    assert torch.equal(optimizer.state[model[2].weight]["momentum_buffer"], before)
    assert torch.equal(model[2].weight, weights)
    assert optimizer.param_groups[0]["lr"] == 0.05
    take(model, optimizer)


def test_a_second_rebind_changes_nothing() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    take(model, optimizer)
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    report.rebind_(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    again = report.rebind_(optimizer)
    assert again == type(again)()
    after = optimizer.state_dict()
    for index, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][index][key]) for key in state)


def test_an_optimiser_of_another_model_changes_nothing() -> None:
    model, other = net(), net()
    mine = torch.optim.Adam(model.parameters())
    theirs = torch.optim.Adam(other.parameters())
    take(model, mine)
    take(other, theirs)
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    shapes = [s["exp_avg"].shape for s in mine.state.values()]
    with pytest.raises(OTPruneError) as error:
        report.rebind_(mine, theirs)
    assert error.value.problem == "this optimiser trains no parameter of the pruned model."
    assert error.value.where == "Report.rebind_, Adam with 6 parameters"
    assert [s["exp_avg"].shape for s in mine.state.values()] == shapes
    take(other, theirs)


def test_no_optimiser_is_refused() -> None:
    model = net()
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    with pytest.raises(OTPruneError) as error:
        report.rebind_(model)  # type: ignore[arg-type]
    assert error.value.problem == "a Sequential is no optimiser."


def test_a_report_from_a_file_and_one_that_was_undone_refuse() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    report = otp.prune_(model, HALF, [data()[0]], timing=0)
    read = otp.Report.from_json(report.to_json())
    report.undo_()
    for each in (read, report):
        with pytest.raises(OTPruneError) as error:
            each.rebind_(optimizer)
        assert "undone, or read from a file" in error.value.problem


def test_an_earlier_report_refuses_after_a_later_pruning() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    take(model, optimizer)
    first = otp.prune_(model, HALF, [data()[0]], timing=0)
    second = otp.prune_(model, HALF, [data()[0]], timing=0)
    with pytest.raises(OTPruneError) as error:
        first.rebind_(optimizer)
    assert error.value.problem == "the model was pruned again since."
    assert "has a shape of its own" in str(second.rebind_(optimizer))
    take(model, optimizer)


def test_two_optimisers_share_a_model() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam([*model[2].parameters(), *model[4].parameters()])
    x, y = data()
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    report = otp.prune_(model, HALF, [x], timing=0)
    assert len(report.rebind_(first, second).sliced) == 5
    F.cross_entropy(model(x), y).backward()
    first.step()
    second.step()


@pytest.mark.parametrize("averaged", [True, False])
def test_an_average_is_pruned_as_well_and_starts_from_the_model(averaged: bool) -> None:
    model = net()
    ema: nn.Module = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if averaged
        else copy.deepcopy(model)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x = data()[0]
    take(model, optimizer, 3)
    before = ema(x).detach()
    report = otp.prune_(model, MENDED, [x], timing=0)
    assert report.rebind_(optimizer, ema=ema).copies == 1
    inner = ema.module if isinstance(ema, AveragedModel) else ema
    assert all(map(torch.equal, inner.state_dict().values(), model.state_dict().values()))
    take(model, optimizer)
    if isinstance(ema, AveragedModel):
        ema.update_parameters(model)
    report.undo_()
    torch.testing.assert_close(ema(x).detach(), before)
    assert sum(p.numel() for p in ema.parameters()) == sum(p.numel() for p in model.parameters())


def test_an_average_of_another_model_changes_nothing() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    take(model, optimizer)
    report = otp.prune_(model, MENDED, [data()[0]], timing=0)
    good = net()
    with pytest.raises(OTPruneError) as error:
        report.rebind_(optimizer, ema=[good, deep()])
    assert error.value.problem == "this average is no copy of the dense model."
    assert good[0].weight.shape == (16, 6)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (16, 6)


def test_a_scaler_goes_on() -> None:
    model = net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    x, y = data(dtype=torch.float32)
    report = None
    for step in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            report = otp.prune_(model, HALF, [x], timing=0)
            report.rebind_(optimizer)
    assert scaler.get_scale() > 64.0
    assert model[0].weight.shape == (8, 6) and model[0].weight.grad is not None


def test_state_lies_in_memory_as_its_parameter_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    optimizer.step()
    otp.prune_(model, HALF, [x], timing=0).rebind_(optimizer)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    model(x).square().mean().backward()
    optimizer.step()


def test_a_rebound_checkpoint_loads_into_the_pruned_model(tmp_path: Any) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    take(model, optimizer, 2)
    otp.prune_(model, MENDED, [data()[0]], timing=0).rebind_(optimizer)
    otp.save(model, tmp_path / "model")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = otp.load(tmp_path / "model", factory=net)
    new = torch.optim.AdamW(again.parameters(), lr=0.01)
    new.load_state_dict(torch.load(buffer, weights_only=True))
    assert take(model, optimizer, 3) == take(again, new, 3)
