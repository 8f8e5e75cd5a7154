"""The doctor: every parameter accounted for, with its reason."""

from __future__ import annotations

import json

import pytest
import torch
from cases import CASES
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import StructureError
from torch_otprune.structure import trace
from torch_otprune.structure.doctor import FATES


class Mixed(nn.Module):
    """A convolution that may go, a stream that a layer-norm blocks, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(x).relu())))


@pytest.fixture
def found() -> otp.Diagnosis:
    """The diagnosis of the mixed model."""
    return otp.doctor(Mixed(), torch.randn(3, 4))


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_three_fates_are_all_parameters(name: str) -> None:
    model = CASES[name].model()
    found = otp.doctor(model, CASES[name].batch())
    total = sum(p.numel() for p in model.parameters())
    assert sum(found.elements(fate) for fate in FATES) == found.params == total
    assert [f.parameter for f in found.findings] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_prunable_parameter_shrinks_with_its_group_and_no_other_does(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    graph, found = trace(model, batch), otp.doctor(model, batch)
    terms = {term.owner: term for term in graph.costs["params"].terms}
    for finding in found.findings:
        for group in graph.groups:
            less = graph.full() | {group.name: group.units - 1}
            shrinks = terms[finding.parameter].at(less) < finding.elements
            assert shrinks == (group.name in finding.groups)


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_stays_has_a_reason(name: str) -> None:
    found = otp.doctor(CASES[name].model(), CASES[name].batch())
    assert all(bool(f.reason) == (f.fate != "prunable") for f in found.findings)


def test_each_fate_is_told_with_its_reason(found: otp.Diagnosis) -> None:
    fates = {f.parameter: (f.fate, f.reason) for f in found.findings}
    assert fates["up.weight"] == ("prunable", "")
    assert fates["norm.weight"][0] == "blocked" and "LayerNorm" in fates["norm.weight"][1]
    assert fates["head.bias"][0] == "fixed" and "model's output" in fates["head.bias"][1]
    assert fates["spare.weight"] == ("fixed", "'spare' (Linear) did not run on the example")


def test_a_group_says_what_goes_together_and_what_one_unit_frees(found: otp.Diagnosis) -> None:
    (group,) = found.groups
    assert (group.producers, group.carriers, group.consumers) == (("up",), (), ("down",))
    assert group.params_per_unit == 4 + 1 + 5  # a row, its bias, a column
    assert group.macs_per_unit == 4 + 5


def test_the_shares_sum_to_one(found: otp.Diagnosis) -> None:
    assert sum(found.share(fate) for fate in FATES) == pytest.approx(1)


def test_the_text_names_every_group_and_everything_that_stays(found: otp.Diagnosis) -> None:
    text = str(found)
    assert "group up: 6 units" in text
    assert all(f.parameter in text for f in found.findings if f.fate != "prunable")


def test_json_loses_nothing(found: otp.Diagnosis) -> None:
    content = json.loads(found.to_json())
    totals = content.pop("totals")
    assert otp.Diagnosis.model_validate(content) == found
    assert totals == {fate: found.elements(fate) for fate in FATES}


def test_a_diagnosis_is_frozen(found: otp.Diagnosis) -> None:
    with pytest.raises(ValueError, match="frozen"):
        found.params = 0  # type: ignore[misc]


def test_the_model_is_left_as_it_was() -> None:
    model = Mixed().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    otp.doctor(model, torch.randn(3, 4))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_example_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(StructureError, match="does not run on the example"):
        otp.doctor(Mixed(), torch.randn(3, 7))
