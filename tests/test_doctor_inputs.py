"""Odd models and examples: the doctor answers, or says in three lines what to pass instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import StructureError
from torch_otprune.structure.doctor import FATES


def fates(found: otp.Diagnosis) -> dict[str, str]:
    """Name the fate of every parameter."""
    return {f.parameter: f.fate for f in found.findings}


def refusal(model: nn.Module, example: Any) -> StructureError:
    """Ask for a diagnosis that cannot be given."""
    with pytest.raises(StructureError) as error:
        otp.doctor(model, example)
    return error.value


def trunk() -> nn.Module:
    """A frozen trunk under a head that trains."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    for parameter in model[:3].parameters():
        parameter.requires_grad_(False)
    return model


def test_a_frozen_trunk_is_prunable_and_said_to_be_frozen() -> None:
    found = otp.doctor(trunk(), torch.randn(3, 4))
    assert fates(found)["0.weight"] == fates(found)["2.weight"] == "prunable"
    assert found.notes[0].startswith("4 of 6 parameters are frozen (requires_grad=False)")
    assert "they can be cut all the same" in found.notes[0] and found.notes[0] in str(found)


def test_what_is_left_of_a_frozen_trunk_stays_frozen() -> None:
    model = trunk()
    otp.prune_(model, otp.Policy(rules=otp.Channels(keep=0.5)), [torch.randn(16, 4)], timing=0)
    assert model[0].weight.shape[0] == 4
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


class Branches(nn.Module):
    """Takes one of two ways, as the numbers of the batch say."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.high, self.low = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x).relu()
        return self.head(self.high(y) if bool(x.mean() > 0) else self.low(y))


@pytest.mark.parametrize(("sign", "ran", "idle"), [(1, "high", "low"), (-1, "low", "high")])
def test_a_branch_is_analysed_as_the_example_takes_it(sign: int, ran: str, idle: str) -> None:
    found = otp.doctor(Branches(), sign * torch.ones(2, 3))
    assert fates(found)[f"{ran}.weight"] == "prunable"
    assert fates(found)[f"{idle}.weight"] == "fixed"
    assert found.notes == (
        f"'{idle}' did not run: all of this holds for the way that the example takes through the "
        "model, and what it does not reach stays",
    )
    (finding,) = (f for f in found.findings if f.parameter == f"{idle}.bias")
    assert finding.fix == "pass an example that reaches it, or remove it from the model."


def test_a_model_without_surprises_has_no_notes() -> None:
    assert (
        otp.doctor(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)).notes == ()
    )


@dataclass
class Answer:
    """What a model returns."""

    scores: Tensor
    hidden: tuple[Tensor, ...]


class Many(nn.Module):
    """Two inputs, and several outputs in some container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.left, self.right = nn.Linear(3, 7), nn.Linear(4, 7)
        self.inner, self.head = nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, left: Tensor, right: Tensor) -> Any:
        mixed = (self.left(left) + self.right(right)).relu()
        hidden = self.inner(mixed)
        scores = self.head(hidden.relu())
        if self.kind == "dataclass":
            return Answer(scores, (hidden,))
        return (scores, hidden) if self.kind == "tuple" else {"scores": scores, "hidden": [hidden]}


@pytest.mark.parametrize("kind", ["dataclass", "tuple", "dict"])
@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_and_outputs_of_any_make_are_followed(kind: str, named: bool) -> None:
    left, right = torch.randn(2, 3), torch.randn(2, 4)
    example = {"left": left, "right": right} if named else (left, right)
    found = otp.doctor(Many(kind), example)
    (group,) = found.groups
    assert (group.producers, group.consumers) == (("left", "right"), ("inner",))
    assert fates(found)["inner.bias"] == "fixed"  # the hidden values are an answer, too
    assert sum(found.elements(fate) for fate in FATES) == found.params


class Labelled(nn.Module):
    """Computes its own loss, and does not run without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.up(x).relu())
        return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}


def test_a_model_that_needs_labels_gets_them_with_the_example() -> None:
    example = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    found = otp.doctor(Labelled(), example)
    assert [group.group for group in found.groups] == ["up"]
    assert fates(found)["head.bias"] == "fixed"


def test_labels_that_are_missing_are_named() -> None:
    said = refusal(Labelled(), torch.randn(5, 4))
    assert "does not run on the example" in said.problem and "labels" in said.problem
    assert said.fix == "pass a batch as the model's forward takes it."


def test_an_example_of_another_shape_is_refused_with_both_shapes() -> None:
    said = refusal(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 5))
    assert "mat1 and mat2 shapes cannot be multiplied (2x5 and 4x6)" in said.problem
    assert "example of shape" in said.where


class Int8Linear(nn.Linear):
    """Stands for a layer of another package."""


Int8Linear.__module__ = "bitsandbytes.nn.modules"


def quantised() -> nn.Module:
    """A net whose layers hold integers."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", [quantised, lambda: nn.Sequential(Int8Linear(4, 6))])
def test_quantised_layers_are_refused_by_name(make: Any) -> None:
    model = nn.Sequential(make(), nn.Linear(2, 2))
    said = refusal(model, torch.randn(2, 4))
    assert "'0.0' is a quantised" in said.problem
    assert said.fix == "prune the float model, then quantise it."


def test_scripted_and_compiled_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    assert (
        "is scripted"
        in refusal(torch.jit.trace(model, torch.randn(2, 4)), torch.randn(2, 4)).problem
    )
    compiled = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    compiled.compile()
    said = refusal(compiled, torch.randn(2, 4))
    assert (said.problem, said.fix) == (
        "the model is compiled.",
        "prune the eager model, then compile it.",
    )


class FSDPLinear(nn.Linear):
    """Stands for what `fully_shard` makes of a layer, which needs a process group."""


FSDPLinear.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_init"


def test_a_sharded_model_is_refused_with_the_fix() -> None:
    said = refusal(nn.Sequential(nn.Linear(4, 4), FSDPLinear(4, 2)), torch.randn(2, 4))
    assert said.problem == "'1' is sharded: this process holds a part of its weights only."
    assert said.fix == "prune the whole model before FSDP or fully_shard wraps it, then shard that."


def test_what_torch_itself_shards_is_refused() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
        assert refusal(model, torch.randn(2, 4)).problem.startswith("'1' is sharded")
    finally:
        distributed.destroy_process_group()


def test_a_model_without_weights_is_answered_from_its_shapes() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    with torch.device("meta"):
        empty, nothing = build(), torch.empty(3, 4)
    found, real = otp.doctor(empty, nothing), otp.doctor(build(), torch.randn(3, 4))
    assert found.groups == real.groups and found.findings == real.findings
    assert (found.params, found.macs) == (real.params, real.macs)
    assert found.segments == () and real.segments
    assert found.notes[0].startswith("the weights do not exist (meta device)")


def test_a_scripted_part_is_refused_in_three_lines() -> None:
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 2)))
    with pytest.raises(StructureError, match="'1' is scripted"):
        otp.doctor(model, torch.randn(2, 3))
