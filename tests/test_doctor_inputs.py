"""Odd models and examples: the doctor answers, or says in three lines what to pass instead."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import PolicyError, StructureError
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
    assert said.fix == "pass a batch as the model's forward takes it: forward(x, labels)."


def test_an_example_of_another_shape_is_refused_with_both_shapes() -> None:
    said = refusal(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 5))
    assert "mat1 and mat2 shapes cannot be multiplied (3x5 and 4x6)" in said.problem
    assert said.where == "Sequential, example of shape (3, 5)"


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


def test_model_and_example_on_two_devices_are_named_both_ways() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    with torch.device("meta"):
        empty, nothing = build(), torch.empty(3, 4)
    said = refusal(empty, torch.randn(3, 4))
    assert said.problem == "the model is on meta and the example on cpu."
    assert said.where == "Sequential, example of shape (3, 4)"
    assert said.fix == "move the example to the model's device: batch.to('meta')."
    said = refusal(build(), nothing)
    assert said.problem == "the model is on cpu and the example on meta."
    assert said.fix == "pass a batch that holds numbers."


def test_a_plan_by_shapes_is_the_plan_of_the_model_with_weights() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random", repair="none"))
    with torch.device("meta"):
        empty, nothing = build(), torch.empty(3, 4)
    with otp.attach(empty, policy, example=nothing) as attached:
        shapes = attached.plan()
    with otp.attach(build(), policy, example=torch.randn(3, 4)) as attached:
        assert attached.plan() == shapes
    otp.apply_(model := build(), shapes, [torch.randn(16, 4)], timing=0)
    assert model[0].weight.shape == (4, 4)


def test_a_plan_that_needs_weights_says_what_shapes_are_enough_for() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(StructureError) as error:
        otp.attach(empty, otp.Policy(rules=otp.Channels(keep=0.5)))
    assert error.value.problem == "the model is on the meta device: its weights do not exist."
    assert "a plan with criterion='random' and repair='none'" in error.value.fix


class Fixed(nn.Module):
    """Insists on the size of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x.view(5, 4)).relu())


def test_a_model_that_insists_on_the_size_of_its_batch_is_analysed_on_all_of_it() -> None:
    assert [group.group for group in otp.doctor(Fixed(), torch.randn(5, 4)).groups] == ["up"]
    with otp.attach(Fixed(), otp.Policy(rules=otp.Channels(keep=0.5))) as attached:
        assert otp.observe(attached, [torch.randn(5, 4)]).plan().cuts


@pytest.mark.parametrize("ask", ["doctor", "attach"])
def test_an_error_shows_the_shape_that_was_passed(ask: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), torch.randn(8, 1, 9, 9)
    policy = otp.Policy(rules=otp.Channels(keep=0.5))
    with pytest.raises(StructureError) as error:
        otp.doctor(model, x) if ask == "doctor" else otp.attach(model, policy, example=x)
    assert "input[8, 1, 9, 9]" in error.value.problem
    assert error.value.where == "Sequential, example of shape (8, 1, 9, 9)"


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_named_with_what_to_use(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    (note,) = otp.doctor(model, torch.randn(3, 4)).notes
    assert note == (
        "a hook of torch.nn.utils computes the weight of '0', which is not followed: use the same "
        "from torch.nn.utils.parametrizations, or remove it first"
    )


@dataclass(frozen=True)
class Record:
    """What a model is given."""

    x: Tensor
    scale: float = 2.0


class Reads(nn.Module):
    """Takes its input from an object with names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, given: Any) -> Any:
        return SimpleNamespace(scores=self.head(self.up(given.x).relu()))


@pytest.mark.parametrize("kind", [Record, lambda x: SimpleNamespace(x=x)])
def test_objects_with_names_go_in_and_out_and_costs_are_per_sample(kind: Any) -> None:
    found = otp.doctor(Reads(), kind(torch.randn(5, 4)))
    assert [group.group for group in found.groups] == ["up"]
    assert found.macs == 4 * 6 + 6 * 2 and fates(found)["head.bias"] == "fixed"
    policy = otp.Policy(rules=otp.Channels(keep=0.5))
    report = otp.prune_(Reads(), policy, [kind(torch.randn(32, 4))], timing=0)
    assert report.plan.macs.after == 18


def test_an_answer_without_numbers_is_noted_since_no_cut_can_be_checked() -> None:
    class Silent(nn.Sequential):
        def forward(self, x: Tensor) -> None:
            super().forward(x)

    (note,) = otp.doctor(Silent(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)).notes
    assert note == (
        "forward returns no floating numbers (NoneType): no cut could be checked against the "
        "model in which the same units are muted"
    )


@pytest.mark.parametrize(
    ("example", "problem", "fix"),
    [
        (torch.zeros(0, 4), "the example holds no sample.", "pass a batch of at least one sample."),
        (
            torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)]),
            "the example is a nested tensor.",
            "pass a padded one, and a mask.",
        ),
        (
            range(3),
            "the model does not run on the example: linear(): argument 'input' (position 1) must "
            "be Tensor, not range",
            "pass a batch of tensors, such as next(iter(loader)), as the model's forward takes it.",
        ),
    ],
)
def test_what_is_no_batch_is_refused_with_what_to_pass(
    example: Any, problem: str, fix: str
) -> None:
    said = refusal(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), example)
    assert (said.problem, said.fix) == (problem, fix)


def test_a_class_a_lazy_and_an_exported_model_are_refused_by_name() -> None:
    x = torch.randn(3, 4)
    assert refusal(nn.Linear, x).problem == "the model is of type type."
    said = refusal(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 2)), x)
    assert said.problem == "'0' is lazy: its weights have no shape yet."
    assert said.fix == "run one batch through the model first."
    said = refusal(torch.export.export(nn.Linear(4, 2), (x,)).module(), x)
    assert said.problem == "the model is exported: its modes are fixed."
    assert said.fix == "prune the eager model, then export it."


@pytest.mark.parametrize(
    ("policy", "kind", "fix"),
    [
        (otp.Channels(keep=0.5), "Channels", "wrap it: otp.Policy(rules=...)."),
        ("policy.yaml", "str", "read it: otp.Policy.from_yaml(path)."),
        ({}, "dict", "pass an otp.Policy."),
    ],
)
def test_what_is_no_policy_is_refused_with_what_to_do(policy: Any, kind: str, fix: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(PolicyError) as error:
        otp.doctor(model, torch.randn(3, 4), policy=policy)
    assert error.value.problem == f"the policy is of type {kind}." and error.value.fix == fix


class Padded(nn.Module):
    """Texts with padding, through torch's own encoder, which packs them in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.encoder(self.embed(x), src_key_padding_mask=mask)
        return self.head(y.masked_fill(mask[..., None], 0).mean(1))


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_padded_texts_in_torchs_own_encoder_are_analysed_and_pruned() -> None:
    torch.manual_seed(0)
    model = Padded().eval()
    batch = torch.randn(16, 5, 4), torch.arange(5).expand(16, 5) > 3
    found = otp.doctor(model, batch)
    assert {"encoder.layers.0.linear1", "embed"} <= {group.group for group in found.groups}
    policy = otp.Policy(rules=[otp.Channels(keep=0.5), otp.Heads(keep=1)])
    report = otp.prune_(model, policy, [batch], timing=0)
    assert len(report.plan.cuts) == 4
    with torch.inference_mode():
        assert model(*batch).shape == (16, 2)


def test_buffers_that_forward_writes_are_as_they_were() -> None:
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            self.count += 1
            return self.head(y - self.mean)

    model = Averages()
    before = dict(model.named_buffers())
    otp.doctor(model, torch.randn(3, 4))
    after = dict(model.named_buffers())
    assert all(after[name] is before[name] for name in before)
    assert float(model.count) == 0 and not model.mean.any()


def test_a_channel_that_forward_picks_by_number_is_blocked_with_what_to_change() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mid, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.head(self.mid(torch.cat([y[:, :4].relu(), y[:, 4:].tanh()], 1)).relu())

    (ailment,) = (a for a in otp.doctor(Picks(), torch.randn(3, 4)).ailments if a.name == "up")
    assert ailment.fix.startswith("where forward picks or writes channels by a number, as x[:, :4]")
    assert "outputs differ by" in ailment.reason
