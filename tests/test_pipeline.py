"""End to end on every case: predicted is measured, all or nothing, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES, outputs
from torch_otprune.errors import (
    BudgetError,
    CalibrationError,
    OTPruneError,
    PlanError,
    PolicyError,
    StructureError,
    TargetError,
)
from torch_otprune.repair import LeastSquares
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import trace


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time nothing for long: latency has tests of its own."""
    from torch_otprune import verify
    from torch_otprune.report import latency

    monkeypatch.setattr(verify, "latency", lambda *a, **k: latency(*a, **(k | {"seconds": 0.0})))


def policy(**budget: Any) -> otp.Policy:
    """Declare channels everywhere under a budget."""
    return otp.Policy(
        rules=otp.Channels(),
        budget=otp.Budget(**(budget or {"macs": 0.6})),
        calibration=otp.Calibration(samples=48, probe=16),
    )


def data(name: str) -> list[Any]:
    """Draw three batches."""
    return [CASES[name].batch(16, seed=s) for s in range(3)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare bit for bit, names included."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("measure", ["macs", "params"])
def test_what_was_predicted_is_what_is_measured(name: str, measure: str) -> None:
    model, batches = CASES[name].model(), data(name)
    floor = _floor(model, batches[0], measure)
    dense = count_params(model), count_macs(model, batches[0])
    limit = max(0.6, floor + 0.05)
    report = otp.prune_(model, policy(**{measure: limit}), batches)
    found = count_params(model), count_macs(model, batches[0])
    assert (report.plan.params.before, report.plan.macs.before) == dense
    assert (report.plan.params.after, report.plan.macs.after) == found
    assert (report.params.after, report.macs.after) == found
    spent = getattr(report, measure)
    allowed = int(limit * spent.before)
    assert spent.after <= allowed
    assert spent.after >= 0.99 * allowed or _said(report.plan, measure)


def _floor(model: nn.Module, batch: Any, measure: str) -> float:
    """Tell what is left when every group keeps one unit."""
    graph = trace(model, batch)
    cost = graph.costs[measure]
    return cost.at(dict.fromkeys(graph.full(), 1)) / cost.at(graph.full())


def _said(plan: otp.Plan, measure: str) -> bool:
    return any(measure in note and "unused" in note for note in plan.notes)


@pytest.mark.parametrize("name", CASES)
def test_repair_brings_the_network_closer(name: str) -> None:
    report = otp.prune_(CASES[name].model(), policy(), data(name))
    assert report.output_error.after_repair < report.output_error.before_repair


@pytest.mark.parametrize("name", CASES)
def test_undo_brings_every_bit_back_after_training(name: str) -> None:
    model, batches = CASES[name].model(), data(name)
    before, answer = state(model), outputs(model, batches[0])
    report = otp.prune_(model, policy(), batches)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        _loss(model.train(), batches[0]).backward()
        optimiser.step()
    report.undo_()
    assert same(before, state(model))
    assert all(
        torch.equal(a, b) for a, b in zip(answer, outputs(model.eval(), batches[0]), strict=True)
    )


def _loss(model: nn.Module, batch: Any) -> Tensor:
    from torch_otprune.structure import flat_tensors, run

    parts = [t.square().mean() for t in flat_tensors(run(model, batch)) if t.requires_grad]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("name", ["plain", "residual", "attention", "tied", "tokens"])
def test_a_pruned_model_is_an_ordinary_module(name: str) -> None:
    model, batches = CASES[name].model(), data(name)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    spare = [sorted(vars(m)) for m in model.modules()]
    otp.prune_(model, policy(), batches)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert [sorted(vars(m)) for m in model.modules()] == spare
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    twin = copy.deepcopy(model)
    for a, b in zip(outputs(model, batches[0]), outputs(twin, batches[0]), strict=True):
        assert torch.equal(a, b)


def test_pruning_twice_goes_on_from_where_it_was() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    first = otp.prune_(model, policy(macs=0.7), batches)
    second = otp.prune_(model, policy(macs=0.7), batches)
    assert second.macs.before == first.macs.after
    second.undo_()
    first.undo_()
    assert count_macs(model, batches[0]) == first.macs.before


def test_training_flags_and_random_state_stay() -> None:
    model, random = CASES["residual"].model().train(), torch.get_rng_state()
    otp.prune_(model, policy(), data("residual"))
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_repair_that_fails_in_the_middle_leaves_the_dense_model(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = CASES["residual"].model(), data("residual")
    before, text = state(model), str(model)
    calls = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= stage:
            raise MemoryError("on purpose")
        return real(*args, **options)

    from torch_otprune.repair import least_squares

    real = least_squares.solve
    monkeypatch.setattr(least_squares, "solve", fail)
    with pytest.raises(MemoryError, match="on purpose"):
        otp.prune_(model, policy(), batches)
    assert same(before, state(model)) and str(model) == text
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_interrupt_leaves_the_dense_model() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    before = state(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        otp.prune_(model, policy(), batches, progress=interrupt)
    assert same(before, state(model))


def test_a_plan_survives_its_json() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    with otp.attach(model, policy()) as attached:
        plan = otp.observe(attached, batches).plan()
    read = otp.Plan.from_json(plan.to_json())
    assert read == plan and read.to_json() == plan.to_json() and read.hash == plan.hash
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    otp.apply_(one, plan, batches)
    otp.apply_(two, read, batches)
    assert same(state(one), state(two))


def test_a_plan_prints_every_cut() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    with otp.attach(model, policy()) as attached:
        plan = otp.observe(attached, batches).plan()
    assert all(cut.group in str(plan) and cut.reason in str(plan) for cut in plan.cuts)
    assert "macs:" in str(plan) and "params:" in str(plan)


def test_a_rule_s_own_keep_is_obeyed() -> None:
    rules = [
        otp.Channels(targets="blocks.*.conv1", keep=3, criterion="magnitude", repair="none"),
        otp.Channels(targets=["blocks.1.conv2", "blocks.1.short"], keep=0.5),
    ]
    model = CASES["residual"].model()
    report = otp.prune_(model, otp.Policy(rules=rules), data("residual"))
    assert report.plan.keep() == {"blocks.0.conv1": 3, "blocks.1.conv1": 3, "blocks.1.conv2": 4}


def test_a_group_that_is_targeted_in_part_stays_and_says_which_others_are_tied_to_it() -> None:
    rules = otp.Channels(targets=["stem", "blocks.*.conv1"], keep=0.5)
    report = otp.prune_(CASES["residual"].model(), otp.Policy(rules=rules), data("residual"))
    [refused] = [r for r in report.plan.refused if r.group == "stem"]
    assert "'blocks.0.conv2'" in refused.reason
    assert "'stem'" not in refused.reason
    assert refused.fix.startswith("target 'blocks.0.conv2'")
    assert refused.fix.endswith("as well, or leave 'stem' out.")


def test_multiple_of_and_min_keep_are_obeyed() -> None:
    rule = otp.Channels(multiple_of=2, min_keep=4)
    model = CASES["residual"].model()
    report = otp.prune_(
        model, otp.Policy(rules=rule, budget=otp.Budget(macs=0.7)), data("residual")
    )
    assert all(n % 2 == 0 and n >= 4 for n in report.plan.keep().values())


@pytest.mark.parametrize("criterion", ["activation", "bn_scale", "fpgm", "magnitude", "obs",
                                       "random", "taylor", "transport"])  # fmt: skip
@pytest.mark.parametrize("weighting", ["output", "uniform", "none"])
def test_every_criterion_meets_the_budget(criterion: str, weighting: Any) -> None:
    model = CASES["concat"].model()
    rule = otp.Channels(criterion=criterion, repair="none")
    asked = otp.Policy(rules=rule, budget=otp.Budget(macs=0.6, weighting=weighting))
    report = otp.prune_(model, asked, data("concat"))
    assert report.macs.after <= 0.6 * report.macs.before


def test_data_may_be_a_function_that_runs_the_model() -> None:
    def feed(model: nn.Module) -> None:
        for batch in data("residual"):
            model(batch)

    one, two = CASES["residual"].model(), CASES["residual"].model()
    reports = otp.prune_(one, policy(), feed), otp.prune_(two, policy(), data("residual"))
    assert reports[0].plan == reports[1].plan
    for a, b in zip(state(one).values(), state(two).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_labels_may_travel_along() -> None:
    labelled = [(x, torch.zeros(len(x))) for x in data("residual")]
    one, two = CASES["residual"].model(), CASES["residual"].model()
    reports = otp.prune_(one, policy(), labelled), otp.prune_(two, policy(), data("residual"))
    assert reports[0].plan == reports[1].plan


# bad input: three lines, and nothing written


class Grows(nn.Module):
    """Adds a module at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.add_module(f"extra{len(self._modules)}", nn.Identity())
        return self.two(self.one(x))


X = torch.zeros(8, 6)
CHANNELS = {"rules": {"kind": "channels", "keep": 0.5}}


def mlp() -> nn.Module:
    """Build a small network in float32."""
    return CASES["mlp"].model(dtype=torch.float32)


def spent() -> Any:
    """Make a loader that was read once already."""
    loader = iter([X])
    list(loader)
    return loader


BAD: dict[str, tuple[Any, Any, Any, type[OTPruneError], str]] = {
    "unmatched target": (
        mlp, {"rules": {"kind": "channels", "targets": "layr1", "keep": 0.5}}, [X],
        TargetError, "'layr1' matches no module",
    ),
    "unknown key": (
        mlp, {"rules": {"kind": "channels", "kep": 0.5}}, [X], PolicyError, "kep",
    ),
    "unknown kind": (
        mlp, {"rules": {"kind": "chanels", "keep": 0.5}}, [X], PolicyError, "chanels",
    ),
    "unknown criterion": (
        mlp, {"rules": {"kind": "channels", "keep": 0.5, "criterion": "magnitud"}}, [X],
        PolicyError, "magnitud",
    ),
    "unknown repair": (
        mlp, {"rules": {"kind": "channels", "keep": 0.5, "repair": "least"}}, [X],
        PolicyError, "least",
    ),
    "budget of nothing": (
        mlp, {"rules": "channels", "budget": {"macs": 0}}, [X], BudgetError, "0",
    ),
    "budget above all": (
        mlp, {"rules": "channels", "budget": {"macs": "120%"}}, [X], BudgetError, "120",
    ),
    "unreachable budget": (
        mlp, {"rules": "channels", "budget": {"macs": "1%"}}, [X], BudgetError, "",
    ),
    "no parameters": (nn.ReLU, CHANNELS, [X], StructureError, "has no parameters"),
    "wrong shape": (mlp, CHANNELS, [torch.zeros(4, 5)], StructureError, "does not run"),
    "empty loader": (mlp, CHANNELS, [], CalibrationError, "no batch"),
    "exhausted loader": (mlp, CHANNELS, spent, CalibrationError, "no batch"),
    "meta": (
        lambda: mlp().to("meta"), CHANNELS, [X], StructureError, "meta device",
    ),
    "compiled": (lambda: torch.compile(mlp()), CHANNELS, [X], StructureError, "compiled"),
    "scripted": (
        lambda: torch.jit.trace(mlp(), X), CHANNELS, [X], StructureError, "scripted",
    ),
    "grows": (Grows, CHANNELS, [X], StructureError, "adds or removes modules"),
    "nothing to cut": (
        lambda: nn.Linear(6, 3), CHANNELS, [X], StructureError, "nothing that can be cut",
    ),
    "only the output": (
        mlp, {"rules": {"kind": "channels", "targets": "5", "keep": 0.5}}, [X],
        StructureError, "they reach the model's output",
    ),
    "nothing removed": (
        mlp, {"rules": {"kind": "channels", "multiple_of": 64}, "budget": {"macs": 0.9}}, [X],
        BudgetError, "",
    ),
    "two rules for one layer": (
        mlp, {"rules": [{"kind": "channels", "targets": t, "keep": 0.5} for t in ("0", "0")]},
        [X], TargetError, "",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_three_lines_before_anything_is_written(name: str) -> None:
    build, asked, loader, kind, message = BAD[name]
    model = build()
    before = None if name == "meta" else state(model)
    with pytest.raises(kind) as error:
        otp.prune_(
            model,
            otp.Policy.model_validate(asked),
            loader() if callable(loader) else loader,
        )
    lines = str(error.value).splitlines()
    assert [line[:8] for line in lines[1:]] == ["  where:", "  fix:  "]
    assert message in error.value.problem and len(error.value.fix) > 5
    assert before is None or same(before, state(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_unreachable_budget_says_what_is_reachable_and_what_blocks_it() -> None:
    with pytest.raises(BudgetError) as error:
        otp.prune_(CASES["option_a"].model(), policy(macs=0.1), data("option_a"))
    text = str(error.value)
    assert "macs" in text and "%" in text and "conv1" in text


def test_a_plan_for_another_model_is_refused() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    with otp.attach(model, policy()) as attached:
        plan = otp.observe(attached, batches).plan()
    other = CASES["plain"].model()
    before = state(other)
    with pytest.raises(PlanError) as error:
        otp.apply_(other, plan, data("plain"))
    assert error.value.fix == "apply the plan to the dense model it was made for."
    assert same(before, state(other))


def test_a_plan_is_not_applied_twice() -> None:
    model, batches = CASES["residual"].model(), data("residual")
    plan = otp.prune_(model, policy(), batches).plan
    with pytest.raises(PlanError) as error:
        otp.apply_(model, plan, batches)
    assert "the plan cuts" in error.value.problem or "other tensors" in error.value.problem


def test_applying_to_an_attached_model_is_refused() -> None:
    model, batches = CASES["plain"].model(), data("plain")
    with otp.attach(model, policy()) as attached:
        plan = otp.observe(attached, batches).plan()
        before = state(model)
        with pytest.raises(StructureError) as error:
            otp.apply_(model, plan, batches)
        assert "attached" in error.value.problem
        assert same(before, state(model))


def test_the_report_names_repairs_that_were_refused() -> None:
    report = otp.prune_(CASES["transposed"].model(), policy(), data("transposed"))
    refused = {r.site: r.note for r in report.repairs if not r.accepted}
    assert refused["up1"] == "a ConvTranspose2d is not refitted"


def test_two_repairs_run_in_order() -> None:
    rule = otp.Channels(keep=0.5, repair=[LeastSquares(), "norm"])
    report = otp.prune_(CASES["residual"].model(), otp.Policy(rules=rule), data("residual"))
    kinds = [r.kind for r in report.repairs]
    assert kinds[-1] == "norm" and set(kinds[:-1]) == {"least_squares"}
