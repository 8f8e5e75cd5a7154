"""Every criterion and every repair, on every kind of units of real models."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.zoo.oracle import Case, case_of
from tests.zoo.registry import ENTRIES
from torch_otprune.errors import CalibrationError, PolicyError, StructureError
from torch_otprune.policy import CRITERIA, REPAIRS
from torch_otprune.structure.forward import map_tensors
from torch_otprune.surgery import disagreement

pytest.importorskip("transformers")

RULES = {
    "heads": otp.Heads,
    "hidden": otp.Hidden,
    "experts": otp.Experts,
    "channels": otp.Channels,
}
PAIRS = [*(("mixtral", kind) for kind in RULES), ("gpt2", "hidden")]
READERS = "an expert has no reader of its own"
NO_REPAIR = {
    "least_squares": READERS,
    "bias": READERS,
    "sparse_map": READERS,
    "domain_map": READERS,
    "flow": READERS,
    "coupling": "experts are whole networks, which have none",
}


@cache
def batches(name: str) -> tuple[Any, ...]:
    """Draw texts: the example's tokens in other orders."""
    generator = torch.Generator().manual_seed(0)
    example = case(name).example

    def shuffled(tensor: Tensor) -> Tensor:
        if tensor.dim() != 2 or tensor.is_floating_point() or int(tensor.max()) < 2:
            return tensor
        return tensor[:, torch.randperm(tensor.shape[1], generator=generator)]

    return tuple(map_tensors(example, shuffled) for _ in range(4))


def case(name: str) -> Case:
    return case_of(ENTRIES[name])


def ruled(kind: str, criterion: str = "magnitude", repair: Any = "none") -> Any:
    """Make a rule; where the setting is not for these units, the error is the answer."""
    try:
        return RULES[kind](keep=0.5, criterion=criterion, repair=repair)
    except PolicyError as error:
        return error


def planned(model: nn.Module, rule: Any, name: str) -> otp.Plan | CalibrationError:
    """Plan on texts; where a criterion finds nothing to go by, the error is the answer."""
    with otp.attach(model, otp.Policy(rules=rule)) as attached:
        try:
            return otp.observe(attached, batches(name)).plan()
        except CalibrationError as error:
            return error


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_a_criterion_plans_is_the_masked_model_or_is_refused(
    name: str, kind: str, criterion: str
) -> None:
    rule = ruled(kind, criterion)
    if isinstance(rule, PolicyError):
        assert f"criterion '{criterion}' " in rule.problem
        assert rule.where == f"{RULES[kind].__name__}.criterion"
        assert rule.fix
        assert (kind, criterion) not in PLANS
        return
    model = case(name).model
    plan = planned(model, rule, name)
    if isinstance(plan, CalibrationError):
        assert (kind, criterion) not in PLANS
        assert plan.where.endswith(f"criterion {criterion}") and plan.fix
        return
    groups = {g.name: g for g in case(name).graph.groups if g.kind == kind}
    assert groups.keys() >= plan.keep().keys()
    assert plan.cuts and all(cut.criterion == criterion for cut in plan.cuts)
    assert all(len(cut.keep) < groups[cut.group].units for cut in plan.cuts)
    for batch in batches(name)[:2]:  # the second is not what the plan was tried on
        assert disagreement(model, plan.cuts, batch) < 1e-9


ANY = ("activation", "fpgm", "magnitude", "obs", "random", "transport")
SOME = ("taylor", "cpot")
PLANS = {(kind, name) for kind in RULES for name in ANY}
PLANS |= {(kind, name) for kind in ("channels", "heads", "hidden") for name in SOME}


@pytest.mark.parametrize("criterion", ["taylor", "bn_scale", "cpot"])
def test_a_criterion_of_single_channels_cannot_rank_experts(criterion: str) -> None:
    error = ruled("experts", criterion)
    assert isinstance(error, PolicyError)
    assert error.problem == f"criterion '{criterion}' ranks channels, not experts."
    assert error.fix == "choose transport, obs, activation, fpgm, magnitude or random."


@pytest.mark.parametrize("repair", NO_REPAIR)
def test_a_repair_of_what_reads_the_units_is_not_for_experts(repair: str) -> None:
    error = ruled("experts", repair=repair)
    assert isinstance(error, PolicyError)
    assert error.problem.startswith(f"repair '{repair}' ") and NO_REPAIR[repair] in error.problem
    assert error.where == "Experts.repair"
    assert error.fix == "leave repair out, or choose reconstruct."


@pytest.mark.parametrize("repair", sorted(REPAIRS))
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_repair_mends_or_says_why_not(name: str, kind: str, repair: str) -> None:
    rule = ruled(kind, repair={"kind": repair} | ({"steps": 40} if repair in STEPS else {}))
    if isinstance(rule, PolicyError):
        assert kind == "experts" and repair in NO_REPAIR
        return
    model = copy.deepcopy(case(name).model)
    report = otp.prune_(model, otp.Policy(rules=rule), batches(name), timing=0)
    done = [note for note in report.repairs if note.accepted]
    assert all(note.accepted or note.note for note in report.repairs)
    before, after = report.output_error.before_repair, report.output_error.after_repair
    assert before > 1e-6  # or there was nothing to mend
    if not done:  # nothing to shift, no batch-norm, one tensor for two layers, a mean that harms
        assert repair not in MENDS
        assert after == before
        assert report.repairs or repair in SILENT
    elif repair != "bias":  # means alone promise nothing
        assert after < before


STEPS = {"reconstruct"}
MENDS = {"least_squares", "reconstruct"}
SILENT = {"none"}


def test_a_scale_that_is_not_there_is_told() -> None:
    model = case("gpt2").model
    rule = otp.Heads(keep=0.5, criterion="bn_scale", repair="none")
    with otp.attach(model, otp.Policy(rules=rule)) as attached:
        plan = otp.observe(attached, batches("gpt2")).plan()
    told = "no batch-norm carries these units; ranked by weight norm"
    assert plan.cuts
    assert {f"group '{cut.group}': {told}" for cut in plan.cuts} <= set(plan.notes)


def test_a_scale_that_is_there_is_not_told() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    rule = otp.Channels(keep=0.5, criterion="bn_scale", repair="none")
    with otp.attach(net, otp.Policy(rules=rule)) as attached:
        plan = otp.observe(attached, [torch.randn(40, 3)]).plan()
    assert not any("batch-norm" in note for note in plan.notes)


def test_a_bias_that_is_not_there_is_told() -> None:
    model = copy.deepcopy(case("mixtral").model)
    rule = otp.Channels(keep=0.5, criterion="magnitude", repair="bias")
    report = otp.prune_(model, otp.Policy(rules=rule), batches("mixtral"), timing=0)
    assert {note.note for note in report.repairs} == {"is no layer, and has no bias"}
    assert {note.site for note in report.repairs} == {
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    }


class Logits(nn.Module):
    """A model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Tensor:
        logits: Tensor = self.model(**batch).logits
        return logits


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart"])
def test_the_stream_of_an_encoder_decoder_narrows_unless_it_is_returned(name: str) -> None:
    given, policy = case(name), otp.Policy(rules=RULES["hidden"](keep=0.5, criterion="magnitude"))
    assert "encoder_last_hidden_state" in given.model(**given.example)
    with (
        otp.attach(given.model, policy, example=given.example) as attached,
        pytest.raises(StructureError, match="they reach the model's output"),
    ):
        otp.observe(attached, batches(name)).plan()
    model = Logits(given.model)
    with otp.attach(model, policy, example=given.example) as attached:
        plan = otp.observe(attached, batches(name)).plan()
    assert plan.keep() and not plan.refused
    for batch in batches(name)[:2]:
        assert disagreement(model, plan.cuts, batch) < 1e-9
