"""Activations become lines, lines are taken up, layers fold: end to end, predicted and undone."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import (
    BudgetError,
    CalibrationError,
    PlanError,
    PolicyError,
    StructureError,
    VerificationError,
)
from torch_otprune.fold import linearize_, lines_of, refold_, surrogate
from torch_otprune.plan import Plan
from torch_otprune.report import count_macs, count_params
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import trace


def unit(into: int, out: int, kernel: int = 1, **options: Any) -> list[nn.Module]:
    """A convolution, its norm and its activation."""
    conv = nn.Conv2d(into, out, kernel, bias=False, **options)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


def alive(model: nn.Module, shape: tuple[int, ...] = (3, 9, 9)) -> nn.Module:
    """Give norms something to do and statistics to do it with."""
    torch.manual_seed(0)
    model.double()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
        model.train()(torch.randn(64, *shape, dtype=torch.float64))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


class Picture(nn.Module):
    """Units in a row, then a head."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return out


def inverted(padding: int = 0) -> nn.Module:
    """1x1, depthwise 3x3, 1x1 with a wide middle: folds into one 3x3, but only as a whole."""
    torch.manual_seed(1)
    middle = unit(24, 24, 3, padding=padding, groups=24)
    return alive(Picture(*unit(3, 8), *unit(8, 24), *middle, *unit(24, 8), width=8))


def pictures(*, size: int = 9, batches: int = 3) -> list[Tensor]:
    """Draw batches."""
    generator = torch.Generator().manual_seed(2)
    shape = (16, 3, size, size)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(batches)]


def policy(*rules: Any, **rule: Any) -> otp.Policy:
    """Declare what goes, without repair unless the rule says so."""
    own = rules or (otp.Linearize(**({"repair": "none"} | rule)),)
    return otp.Policy(rules=own, calibration=otp.Calibration(samples=48, probe=16))


def planned(model: nn.Module, declared: otp.Policy, data: list[Any]) -> Plan:
    """Plan only."""
    with otp.attach(model, declared) as attached:
        for batch in data:
            model(batch)
        return attached.plan()


def pruned(model: nn.Module, declared: otp.Policy, data: list[Any]) -> otp.Report:
    """Prune, and hold the plan to its word."""
    dense = count_params(model), count_macs(model, data[0])
    report = otp.prune_(model, declared, data, timing=0)
    found, plan = (count_params(model), count_macs(model, data[0])), report.plan
    assert (plan.params.before, plan.macs.before) == dense
    assert (plan.params.after, plan.macs.after) == found
    assert (report.params.after, report.macs.after) == found
    return report


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare bit for bit, names included."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def depth(model: nn.Module) -> int:
    """Count the layers with weights."""
    return sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())


# What goes in an activation's place


def test_the_affine_surrogate_is_the_least_squares_line_of_each_channel() -> None:
    model, data = inverted(), pictures()
    site = next(s for s in trace(model, data[0]).sites if s.name == "features.5")
    evidence = watch_sites(model, [site], data)[site.name]
    z = torch.cat([model.features[:5](x) for x in data]).detach().movedim(1, -1).flatten(0, -2)
    slope, shift = surrogate(evidence, "affine")
    for channel in range(z.shape[1]):
        design = torch.stack([z[:, channel], torch.ones(len(z))], 1)
        line = torch.linalg.lstsq(design, z[:, channel].relu()[:, None]).solution[:, 0]
        torch.testing.assert_close(torch.stack([slope[channel], shift[channel]]), line)


def test_the_other_surrogates_are_those_of_easier_and_tlc() -> None:
    model, data = inverted(), pictures()
    sites = trace(model, data[0]).sites
    evidence = watch_sites(model, sites, data)["features.5"]
    ones, zeros = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    assert torch.equal(torch.stack(surrogate(evidence, "identity")), torch.stack([ones, zeros]))
    on = (model.features[4].bias > 0).double()
    assert torch.equal(torch.stack(surrogate(evidence, "on_off")), torch.stack([on, zeros]))
    assert 0 < on.sum() < 24


def test_a_channel_that_never_changes_keeps_its_constant() -> None:
    model, data = inverted(), pictures()
    nn.init.zeros_(model.features[4].weight)
    with torch.no_grad():
        model.features[4].bias[:2] = torch.tensor([2.0, -2.0])
    evidence = watch_sites(model, trace(model, data[0]).sites, data)["features.5"]
    slope, shift = surrogate(evidence, "affine")
    assert torch.equal(slope, torch.zeros_like(slope))
    torch.testing.assert_close(shift, model.features[4].bias.detach().relu())


@pytest.mark.parametrize("kind", ["affine", "identity", "on_off"])
def test_the_folded_model_computes_the_lines(kind: str) -> None:
    model, data = inverted(), pictures()
    dense, chosen = copy.deepcopy(model), ("features.5", "features.8")
    evidence = watch_sites(dense, trace(dense, data[0]).sites, data)
    pruned(model, policy(targets="features", drop=2, surrogate=kind), data)
    for name in chosen:
        dense.get_submodule(name).register_forward_hook(_Line(*surrogate(evidence[name], kind)))
        dense.get_submodule(name).register_forward_pre_hook(_keep)
    torch.testing.assert_close(model(data[0]), dense(data[0]), rtol=1e-10, atol=1e-10)


def _keep(module: nn.Module, args: tuple[Tensor]) -> None:
    module.z = args[0]


class _Line:
    """A hook that writes slope x input + shift in place of an activation's output."""

    def __init__(self, slope: Tensor, shift: Tensor) -> None:
        self.slope, self.shift = slope.view(-1, 1, 1), shift.view(-1, 1, 1)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        z: Tensor = module.z
        return self.slope * z + self.shift


def test_an_activation_that_is_always_on_goes_without_a_trace() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    nn.init.constant_(model[0].bias, 50.0)
    data = [torch.randn(32, 6, dtype=torch.float64) for _ in range(2)]
    before = model(data[0]).detach()
    report = pruned(model, policy(drop=1, repair="least_squares"), data)
    assert [line.site for line in report.plan.lines] == ["1"]
    assert report.plan.lines[0].error == 0
    assert depth(model) == 2
    torch.testing.assert_close(model(data[0]), before, rtol=1e-10, atol=1e-10)


# What folds, and what does not


def test_an_inverted_residual_folds_into_one_convolution() -> None:
    model, data = inverted(), pictures()
    report = pruned(model, policy(targets="features", drop=2), data)
    (folding,) = report.plan.foldings
    assert folding.layers == tuple(f"features.{i}" for i in (3, 4, 6, 7, 9, 10))
    assert folding.lines == ("features.5", "features.8")
    assert (folding.kind, folding.into, folding.writes) == ("exact", "features.3", "features.10")
    assert model.features[3].weight.shape == (8, 8, 3, 3)
    assert depth(model) == 3
    dense = 8 * 24 * 81 + 24 * 9 * 49 + 24 * 8 * 49
    assert (folding.macs.before, folding.macs.after) == (dense, 8 * 8 * 9 * 49)
    assert report.macs.before - report.macs.after == dense - 8 * 8 * 9 * 49


def test_activations_that_only_fold_together_go_together_or_not_at_all() -> None:
    with pytest.raises(BudgetError, match=r"rule 0 drops 1 of 2 activations; 2 can go") as error:
        planned(inverted(), policy(targets=["features.5", "features.8"], drop=1), pictures())
    assert "unfolded='allow'" in error.value.fix
    targets = ["features.5", "features.8"]
    plan = planned(inverted(), policy(targets=targets, drop="50%"), pictures())
    assert [line.site for line in plan.lines] == targets
    assert plan.notes == (
        "rules[0] makes 2 of 2 activations linear, not 1: the others fold in groups only",
    )


def test_the_gate_says_what_must_not_rise() -> None:
    torch.manual_seed(0)
    build = Picture(*unit(16, 16, 3), nn.Conv2d(16, 16, 3), width=16)
    model = alive(build, (16, 24, 24))
    data = [torch.randn(16, 16, 24, 24, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(StructureError, match="rule 0 reaches no activation") as error:
        planned(model, policy(targets="features", drop=1), data)
    before, after = 256 * 9 * (484 + 400), 256 * 25 * 400
    said = f"features.2: 0 MACs saved: it would raise macs from {before:,} to {after:,}"
    assert said in error.value.problem
    assert "gate='none'" in error.value.fix
    report = pruned(model, policy(targets="features", drop=1, gate="none"), data)
    assert (report.plan.foldings[0].macs.before, report.plan.foldings[0].macs.after) == (
        before,
        after,
    )
    assert model.features[0].kernel_size == (5, 5)


def test_zero_padding_behind_a_shift_is_refused_unless_the_interior_is_enough() -> None:
    targets, data = ["features.5", "features.8"], pictures()
    with pytest.raises(StructureError, match="only the interior would be right") as error:
        planned(inverted(padding=1), policy(targets=targets, drop=2), data)
    assert "set interior=True" in error.value.fix
    model = inverted(padding=1)
    report = pruned(model, policy(targets=targets, drop=2, interior=True), data)
    (folding,) = report.plan.foldings
    assert (folding.kind, folding.border) == ("interior", (1, 1))
    assert folding.error is not None
    assert folding.error > 1e-3
    assert model.features[3].padding == (1, 1)


def test_a_norm_that_changes_sides_is_no_fold() -> None:
    """The norm would fold into the depthwise layer behind; both layers would still be there."""
    with pytest.raises(StructureError, match=r"features\.5: 0 MACs saved: it would raise macs"):
        planned(inverted(), policy(targets="features.5", drop=1), pictures())


def test_activations_that_fold_nothing_go_only_if_allowed_and_are_said_to_save_nothing() -> None:
    model, data = inverted(), pictures()
    with pytest.raises(StructureError, match=r"features\.11: 0 MACs saved: no layer that"):
        planned(model, policy(targets="features.11", drop=1), data)
    macs = count_macs(model, data[0])
    report = pruned(model, policy(targets="features.11", drop=1, unfolded="allow"), data)
    (line,) = report.plan.lines
    assert "0 MACs saved" in line.reason
    assert report.plan.notes[0] == (
        "1 of 1 linear activations fold nothing and save no MACs: features.11"
    )
    assert count_macs(model, data[0]) == macs
    assert isinstance(model.features[11], nn.Identity)


def test_an_identity_needs_no_layer_in_front() -> None:
    model, data = residual(), pictures()
    with pytest.raises(
        StructureError, match="no layer that could take up a line writes for it alone"
    ) as error:
        planned(model, policy(targets="blocks.0.last", drop=1, unfolded="allow"), data)
    assert "surrogate='identity', unfolded='allow'" in error.value.fix
    free = policy(targets="blocks.0.last", drop=1, unfolded="allow", surrogate="identity")
    report = pruned(model, free, data)
    assert report.plan.lines[0].into is None
    assert isinstance(model.blocks[0].last, nn.Identity)


def test_the_cheapest_activations_by_the_criterion_go() -> None:
    torch.manual_seed(0)
    layers = [m for w in (8, 8, 8) for m in (nn.Linear(w, w), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, 2)).double()
    nn.init.constant_(model[2].bias, 1.0)
    data = [torch.randn(64, 8, dtype=torch.float64)]
    assert [x.site for x in planned(model, policy(drop=1), data).lines] == ["3"]
    nn.init.constant_(model[4].bias, 30.0)
    assert [x.site for x in planned(model, policy(drop=1), data).lines] == ["5"]
    assert [x.site for x in planned(model, policy(drop=2), data).lines] == ["3", "5"]
    assert len(planned(model, policy(keep=2), data).lines) == 1


@pytest.mark.parametrize("criterion", ["stein", "entropy", "easier", "tlc"])
def test_every_criterion_of_activations_ranks_them(criterion: str) -> None:
    plan = planned(inverted(), policy(targets="features", drop=2, criterion=criterion), pictures())
    assert {line.criterion for line in plan.lines} == {criterion}
    assert all(line.reason.startswith(f"{criterion}: ") for line in plan.lines)


def test_a_data_free_criterion_plans_without_data() -> None:
    model, rule = inverted(), {"kind": "stein", "data_free": True}
    chosen = policy(targets="features", drop=2, criterion=rule)
    with otp.attach(model, chosen, example=pictures()[0]) as attached:
        plan = attached.plan()
    assert plan.samples == 0
    assert len(plan.foldings) == 1
    otp.apply_(model, plan, pictures(), timing=0)
    with (
        otp.attach(
            residual(), policy(drop=1, criterion="easier"), example=pictures()[0]
        ) as attached,
        pytest.raises(CalibrationError, match="was not observed"),
    ):
        attached.plan()


# What cannot become linear


class Odd(nn.Module):
    """One activation of every kind that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.twice, self.bends, self.gate, self.soft = (
            nn.ReLU(),
            nn.PReLU(),
            nn.SiLU(),
            nn.Softmax(-1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.b(self.twice(self.a(x))))
        x = self.bends(self.c(x))
        x = self.d(x)
        x = self.gate(x) * x
        out: Tensor = self.soft(F.gelu(x))
        return out


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("twice", "it runs 2 times per forward pass"),
        ("bends", "PReLU has a state of its own"),
        ("gate", "its output is multiplied with another stream"),
        ("soft", "softmax maps no value by itself"),
        ("auto", "functional F.gelu in Odd.forward"),
    ],
)
def test_what_must_stay_says_why(target: str, reason: str) -> None:
    model = Odd().double()
    with pytest.raises(StructureError) as error:
        planned(model, policy(targets=target, drop=1), [torch.randn(8, 6, dtype=torch.float64)])
    assert reason in error.value.problem or target == "auto"
    assert error.value.where == f"Policy.rules[0].targets = {target}"


class Fed(nn.Module):
    """A layer whose output is used twice, a pool and a tied layer in front of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.d, self.e = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.c.weight
        self.shared, self.pooled, self.tied, self.chained = (nn.ReLU() for _ in range(4))
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.shared(y) + y
        x = self.pooled(self.pool(x))
        x = self.c(self.tied(self.b(x)))
        out: Tensor = self.e(self.chained(self.d(x)).tanh())
        return out


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("shared", "no layer that could take up a line writes for it alone"),
        ("pooled", "an average pooling in front of it has no weights to take up a line"),
        ("tied", "'b' in front of it must stay as it is: it shares a tensor"),
        ("chained", "0 MACs saved: no layer that could fold reads its output alone"),
    ],
)
def test_an_activation_whose_line_has_nowhere_to_go_is_refused(target: str, reason: str) -> None:
    model, data = Fed().double(), pictures(size=8)
    with pytest.raises(StructureError) as error:
        planned(model, policy(targets=target, drop=1), data)
    assert f"{target}: {reason}" in error.value.problem
    plan = planned(
        Fed().double(),
        policy(otp.Linearize(targets=["chained", target], drop=1, unfolded="allow")),
        data,
    )
    assert [x.site for x in plan.lines] == ["chained"]


def test_a_rule_that_reaches_no_activation_says_so() -> None:
    with pytest.raises(StructureError, match="there is no activation among its targets"):
        planned(inverted(), policy(targets="head", drop=1), pictures())


@pytest.mark.parametrize(
    ("rule", "text", "fix"),
    [
        ({"drop": None}, "does not say how many activations go", "such as drop=2"),
        ({"drop": 1, "criterion": "transport"}, "'transport' ranks blocks", "stein, tlc"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_before_any_data(
    rule: dict[str, Any], text: str, fix: str
) -> None:
    both = otp.Policy(rules=[otp.Channels(), otp.Linearize(**rule)], budget=otp.Budget(macs=0.5))
    with pytest.raises(PolicyError, match=text) as error:
        otp.attach(inverted(), both)
    assert fix in error.value.fix
    assert "Policy.rules[1]" in error.value.where


def test_a_budget_chooses_no_activations() -> None:
    alone = otp.Policy(rules=otp.Linearize(), budget=otp.Budget(macs=0.5))
    with pytest.raises(PolicyError, match="a budget chooses channels and layers, but no activ"):
        otp.prune_(inverted(), alone, pictures())


def test_more_than_can_go_is_refused_with_the_numbers_that_can() -> None:
    with pytest.raises(BudgetError, match=r"rule 0 drops 9 of 3 activations; 1, 2, 3 can go"):
        planned(inverted(), policy(targets="features", drop=9), pictures())
    with pytest.raises(
        BudgetError, match=r"drops 0\.1 of 3 activations, which is less than one"
    ) as error:
        planned(inverted(), policy(targets="features", drop="10%"), pictures())
    assert error.value.fix.endswith("at least 34 %.")
    with pytest.raises(BudgetError, match="nothing would be removed"):
        planned(inverted(), policy(targets="features", keep=9), pictures())


class Beside(nn.Module):
    """A layer that runs between another one and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6)
        self.side, self.bend, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        side = self.bend(self.side(x))
        out: Tensor = self.last(self.b(self.act(y)) * 1.0 + side)
        return out


@pytest.mark.parametrize("target", ["act", "bend"])
def test_a_layer_that_runs_in_between_is_no_obstacle_to_the_repair(target: str) -> None:
    torch.manual_seed(0)
    model = Beside().double()
    data = [torch.randn(24, 6, dtype=torch.float64) for _ in range(2)]
    rule = otp.Linearize(targets=target, drop=1, unfolded="allow", surrogate="identity")
    report = pruned(model, otp.Policy(rules=rule), data)
    assert {note.site for note in report.repairs} >= {{"act": "a", "bend": "side"}[target]}
    assert report.output_error.after_repair < 0.8 * report.output_error.before_repair


class Halves(nn.Module):
    """Two halves beside a stream, with one dropout for both."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.act = nn.Linear(6, 6), nn.Linear(6, 20), nn.GELU()
        self.down, self.drop, self.head = nn.Linear(20, 6), nn.Dropout(0.1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.mix(x)) + x
        out: Tensor = self.head(self.drop(self.down(self.act(self.up(x)))) + x)
        return out


def test_a_dropout_that_serves_two_layers_confuses_no_repair() -> None:
    torch.manual_seed(0)
    data = [torch.randn(24, 6, dtype=torch.float64) for _ in range(2)]
    rule = otp.Linearize(drop=1, surrogate="identity")
    report = pruned(Halves().double(), otp.Policy(rules=rule), data)
    assert [note.site for note in report.repairs] == ["up", "head"]
    assert report.output_error.after_repair < 0.8 * report.output_error.before_repair


def test_a_penalty_makes_activations_linear_while_the_model_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 2)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    rule = otp.Linearize(drop=1, penalty={"kind": "linearity", "weight": 1.0})
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    with otp.attach(model, otp.Policy(rules=rule), example=x) as attached:
        model.eval()(x)
        first = attached.plan().lines[0].error
        model.train()
        for _ in range(30):
            model(x)
            optimiser.zero_grad()
            attached.penalty().backward()
            optimiser.step()
            attached.step()
        model.eval()(x)
        assert attached.plan().lines[0].error < first / 2


class Peeking(nn.Module):
    """A forward that looks at the weight of a layer that would fold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6)
        self.c, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.other = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.act(self.a(x))) + 0 * self.b.weight.sum()
        out: Tensor = self.last(self.other(self.c(x)))
        return out


def test_a_fold_that_the_model_does_not_survive_is_refused_and_another_chosen() -> None:
    model = Peeking().double()
    nn.init.constant_(model.a.bias, 50.0)
    data = [torch.randn(32, 6, dtype=torch.float64)]
    plan = planned(model, policy(drop=1), data)
    assert [line.site for line in plan.lines] == ["other"]
    reasons = {refusal.group: refusal.reason for refusal in plan.refused}
    assert "once folded" in reasons["act"]


# Before, after, and back


def test_planning_never_writes_the_model() -> None:
    model, data = inverted(), pictures()
    before, modules = state(model), dict(model.named_modules())
    planned(model, policy(targets="features", drop=2), data)
    assert same(before, state(model))
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_undo_goes_back_bit_for_bit() -> None:
    model, data = inverted(), pictures()
    before, modules, out = state(model), dict(model.named_modules()), model(data[0])
    report = pruned(model, policy(targets="features", drop=2, repair="least_squares"), data)
    assert not torch.equal(model(data[0]), out)
    report.undo_()
    assert same(before, state(model))
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(model(data[0]), out)


def test_a_failure_after_the_fold_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = inverted(), pictures()
    before = state(model)
    plan = planned(model, policy(targets="features", drop=2), data)
    monkeypatch.setattr("torch_otprune.pipeline.changes", lambda *_: {"params": 1, "macs": 0})
    with pytest.raises(VerificationError, match="params are"):
        otp.apply_(model, plan, data, timing=0)
    assert same(before, state(model))


def test_a_fold_that_is_not_as_exact_as_planned_is_refused() -> None:
    model, data = inverted(padding=1), pictures()
    rule = {"targets": ["features.5", "features.8"], "drop": 2, "interior": True}
    plan = planned(model, policy(**rule), data)
    lying = plan.foldings[0].model_copy(update={"kind": "exact"})
    with pytest.raises(VerificationError, match="folding moves the output by"):
        otp.apply_(model, plan.model_copy(update={"foldings": (lying,)}), data, timing=0)


def test_a_plan_says_everything_and_survives_json() -> None:
    plan = planned(inverted(), policy(targets="features", drop=3), pictures())
    assert Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    for line in plan.lines:
        assert line.reason in text
    for folding in plan.foldings:
        assert f"macs {folding.macs.before:,} -> {folding.macs.after:,}" in text
    for refusal in plan.refused:
        assert refusal.reason in text


def test_a_plan_for_another_model_is_refused() -> None:
    plan, data = planned(inverted(), policy(targets="features", drop=2), pictures()), pictures()
    elsewhere = plan.lines[0].model_copy(update={"site": "features.99"})
    with pytest.raises(PlanError, match="a module that the model has not") as error:
        otp.apply_(inverted(), plan.model_copy(update={"lines": (elsewhere,)}), data)
    assert error.value.where == "'features.99'"
    head = plan.lines[0].model_copy(update={"site": "head"})
    with pytest.raises(PlanError, match="'head' cannot become linear"):
        otp.apply_(inverted(), plan.model_copy(update={"lines": (head,)}), data)
    moved = plan.foldings[0].model_copy(update={"into": "features.9"})
    with pytest.raises(PlanError, match=r"the plan folds into 'features\.9'"):
        otp.apply_(inverted(), plan.model_copy(update={"foldings": (moved,)}), data)


_LOAD = """
import sys, torch
import torch_otprune as otp
from tests.test_linearize import {build}
model = otp.load(sys.argv[1], factory={build})
x = torch.load(sys.argv[2])
torch.save(model.eval()(x), sys.argv[3])
"""


def loaded(folder: Path, build: str, x: Tensor) -> Tensor:
    """Load in a fresh process and run."""
    torch.save(x, folder / "x.pt")
    paths = [str(folder / name) for name in ("saved", "x.pt", "y.pt")]
    command = [sys.executable, "-c", _LOAD.format(build=build), *paths]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: Tensor = torch.load(folder / "y.pt")
    return found


@pytest.mark.parametrize("kind", ["affine", "on_off"])
def test_a_folded_model_loads_in_a_fresh_process_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    model, data = inverted(), pictures()
    rule = {"targets": "features", "drop": 2, "surrogate": kind, "repair": "least_squares"}
    pruned(model, policy(**rule), data)
    otp.save(model, tmp_path / "saved")
    assert torch.equal(loaded(tmp_path, "inverted", data[0]), model(data[0]))


# Beside other rules


class Block(nn.Module):
    """Two layers beside a stream, and an activation behind the sum."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.act, self.last, self.drop = nn.ReLU(inplace=True), nn.ReLU(), nn.Dropout(0.1)
        self.down, self.norm2 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.norm1(self.up(x))))
        out: Tensor = self.last(self.norm2(self.down(y)) + x)
        return out


class Residual(nn.Module):
    """Four blocks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, 12) for _ in range(4)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def residual() -> nn.Module:
    """Build it alive."""
    torch.manual_seed(3)
    return alive(Residual())


def test_a_folded_branch_is_refitted_to_what_the_stream_needs() -> None:
    model, data = residual(), pictures()
    report = pruned(model, policy(drop=2, repair="least_squares"), data)
    intos = {folding.into for folding in report.plan.foldings}
    notes = {note.site: note for note in report.repairs}
    assert len(intos) == 2
    assert intos <= notes.keys()
    assert all(notes[into].accepted for into in intos)
    assert report.output_error.after_repair < report.output_error.before_repair
    assert not {note.site for note in report.repairs} & {
        path for f in report.plan.foldings for path in f.layers if path != f.into
    }
    for folding in report.plan.foldings:
        assert folding.idle == (folding.into.replace("up", "drop"),)
        assert isinstance(model.get_submodule(folding.idle[0]), nn.Identity)


def test_the_refit_of_a_folded_layer_is_the_least_squares_solution_of_the_dense_run() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(512, 6, dtype=torch.float64)
    goal = model[:3](x).detach()
    repair = {"kind": "least_squares", "ridge": 1e-12, "one_sided": 0}
    rule = otp.Linearize(targets="1", drop=1, surrogate="identity", repair=repair)
    pruned(model, otp.Policy(rules=rule), [x])
    design = torch.cat([x, torch.ones(512, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, goal).solution
    found = torch.cat([model[0].weight.T, model[0].bias[None]])
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-6)


def three_rules() -> list[Any]:
    """Cut, exchange, linearise."""
    return [
        otp.Channels(targets=["blocks.*.up"], keep=0.5),
        otp.Layers(targets="blocks", drop=1, criterion="block_influence"),
        otp.Linearize(targets="blocks.*.act", drop=2),
    ]


def test_channels_layers_and_activations_go_in_one_policy(tmp_path: Path) -> None:
    model, data = residual(), pictures()
    before, out = state(model), model(data[0])
    report = pruned(model, policy(*three_rules()), data)
    plan = report.plan
    assert (len(plan.cuts), len(plan.drops), len(plan.foldings)) == (4, 1, 2)
    gone = plan.drops[0].block
    assert not any(line.site.startswith(gone) for line in plan.lines)
    assert all(f.macs.before == 81 * 2 * 6 * 6 for f in plan.foldings)  # at the widths left
    assert report.output_error.after_repair < 0.5
    otp.save(model, tmp_path / "saved")
    assert torch.equal(loaded(tmp_path, "residual", data[0]), model(data[0]))
    report.undo_()
    assert same(before, state(model))
    assert torch.equal(model(data[0]), out)


@pytest.mark.parametrize("repair", ["least_squares", "bias", "norm", "reconstruct", "none"])
def test_every_repair_runs_on_a_folded_model(repair: str) -> None:
    model, data = residual(), pictures()
    setting = {"kind": repair, "steps": 3} if repair == "reconstruct" else repair
    rules = [
        otp.Channels(targets=["stem", "blocks.*.down"], keep=0.7, repair=setting),
        otp.Linearize(targets="blocks", drop=2, repair=setting),
    ]
    report = pruned(model, policy(*rules), data)
    assert report.output_error.after_repair <= report.output_error.before_repair


def test_two_rules_choose_one_after_the_other() -> None:
    model, data = inverted(), pictures()
    rules = [
        otp.Linearize(targets=["features.5", "features.8"], drop=2, repair="none"),
        otp.Linearize(targets="features.2", drop=1, repair="none"),
    ]
    report = pruned(model, policy(*rules), data)
    assert [line.rule for line in report.plan.lines] == [1, 0, 0]
    assert depth(model) == 2


# Other networks, other sizes


class Swing(nn.Module):
    """An activation of a make of its own, as Transformers has many."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tokens(nn.Module):
    """Attention halves left out: a norm, a wide layer and back, added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(8), nn.Linear(8, 32), Swing()
        self.down, self.head = nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.down(self.act(self.up(self.norm(x)))))
        return out


def test_an_activation_of_a_make_of_its_own_folds_on_tokens() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    data = [torch.randn(16, 7, 8, dtype=torch.float64) for _ in range(2)]
    report = pruned(model, policy(drop=1, repair="least_squares"), data)
    assert report.plan.foldings[0].layers[-2:] == ("up", "down")
    assert report.macs.before - report.macs.after == 7 * (2 * 8 * 32 - 8 * 8)
    assert depth(model) == 2


def test_a_plan_holds_at_another_input_size() -> None:
    model = inverted()
    plan = planned(model, policy(targets="features", drop=2), pictures())
    report = otp.apply_(model, plan, pictures(size=13), timing=0)
    assert report.macs.after == count_macs(model, pictures(size=13)[0])
    assert report.macs.after != plan.macs.after


@given(
    drop=st.integers(1, 3),
    gate=st.sampled_from(["macs", "params", "none"]),
    kind=st.sampled_from(["affine", "identity", "on_off"]),
    unfolded=st.sampled_from(["refuse", "allow"]),
    padding=st.integers(0, 1),
    interior=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_declared_is_predicted_carried_out_and_undone(
    padding: int, **rule: Any
) -> None:
    model, data = inverted(padding), pictures(batches=1)
    rule["surrogate"], before = rule.pop("kind"), state(model)
    try:
        report = pruned(model, policy(targets="features", **rule), data)
    except (BudgetError, StructureError):
        assert same(before, state(model))
        return
    if rule["unfolded"] == "refuse":
        assert {x.site for x in report.plan.lines} == {
            s for f in report.plan.foldings for s in f.lines
        }
    report.undo_()
    assert same(before, state(model))


def test_structure_alone_gives_the_same_shapes_as_the_numbers() -> None:
    model, data = inverted(), pictures()
    plan = planned(model, policy(targets="features", drop=2), data)
    bare, whole = copy.deepcopy(model), copy.deepcopy(model)
    evidence = watch_sites(model, trace(model, data[0]).sites, data)
    linearize_(bare, plan.lines)
    linearize_(whole, plan.lines, lines_of(plan, evidence))
    for net in (bare, whole):
        refold_(net, plan.foldings)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (bare, whole)]
    assert shapes[0] == shapes[1]
