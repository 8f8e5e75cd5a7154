"""What is saved comes back bit for bit, in any process, or a clear error comes instead."""

from __future__ import annotations

import copy
import gc
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import torch_otprune.criteria  # noqa: F401  (fills the table that policies name)
from torch_otprune.errors import LoadError, PlanError
from torch_otprune.plan.model import Cost, Cut, Plan
from torch_otprune.plan.slices import slices
from torch_otprune.policy import Channels, Policy
from torch_otprune.report import count_macs, count_params
from torch_otprune.store import PLANS, Saved, forget, load, plan_of, remember, save
from torch_otprune.structure.fingerprint import fingerprint, layout
from torch_otprune.structure.trace import trace
from torch_otprune.surgery import cut_


class Net(nn.Module):
    """A stem, a residual block, a grouped and a depthwise convolution, a head."""

    def __init__(self, width: int = 8, *, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.conv2 = nn.Conv2d(12, width, 3, padding=1)
        self.inner = nn.Linear(width, 10)
        self.head = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.depthwise(self.bn1(self.conv1(x)).relu())
        x = (x + self.conv2(y)).mean(dim=(2, 3))
        out: Tensor = self.head(self.inner(x).relu())
        return out


class Tied(nn.Module):
    """A decoder that shares the encoder's table, around a hidden layer that can be cut."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Embedding(7, 6)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.decoder = nn.Linear(6, 7, bias=False)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        out: Tensor = self.decoder(hidden + self.down(self.up(hidden).relu()))
        return out


class Bag(nn.Module):
    """Tensors of every kind around one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)
        for name in (
            "float64",
            "float16",
            "bfloat16",
            "int64",
            "uint8",
            "bool",
            "complex64",
            "complex128",
        ):
            self.register_buffer(f"a_{name}", torch.randn(3).to(getattr(torch, name)))
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("empty_too", torch.empty(0))
        self.register_buffer("transient", torch.randn(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x * self.transient).relu())
        return out


IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)
WORDS = torch.arange(14).view(2, 7) % 7


def plan_for(model: nn.Module, example: Tensor, every: int = 2) -> Plan:
    """Keep every second unit of every group."""
    graph = trace(model, example)
    keep = {group.name: torch.arange(0, group.units, every) for group in graph.groups}
    cuts = tuple(
        Cut(
            group=group.name,
            rule=0,
            units=group.units,
            keep=tuple(keep[group.name].tolist()),
            criterion="magnitude",
            reason="every second",
            error=0.1,
            slices=slices(group, keep[group.name]),
        )
        for group in graph.groups
    )
    after = {name: len(kept) for name, kept in keep.items()}
    params, macs = (
        Cost(before=graph.costs[m].at(graph.full()), after=graph.costs[m].at(after))
        for m in ("params", "macs")
    )
    return Plan(
        policy=Policy(rules=Channels(criterion="magnitude", repair=(), keep=0.5), seed=3),
        fingerprint=fingerprint(model),
        calibration="none",
        samples=0,
        cuts=cuts,
        params=params,
        macs=macs,
    )


def pruned(model: nn.Module, example: Tensor) -> nn.Module:
    """Cut a model and note how, as the pipeline does."""
    plan = plan_for(model, example)
    cut_(model, plan.cuts)
    remember(model, plan)
    return model


@pytest.fixture
def net() -> nn.Module:
    """A pruned net in evaluation mode, its batch-norm statistics away from their start."""
    model = Net()
    model(torch.randn(8, 3, 6, 6))
    return pruned(model, IMAGES).eval()


@pytest.fixture
def saved(net: nn.Module, tmp_path: Path) -> Path:
    """A directory that holds the net."""
    return save(net, tmp_path / "net")


def message(error: pytest.ExceptionInfo[Any]) -> str:
    """The text a user sees, which has three lines."""
    text = str(error.value)
    assert [line[:9] for line in text.splitlines()[1:]] == ["  where: ", "  fix:   "]
    return text


# What comes back


def test_what_is_measured_is_what_the_plan_promised(net: nn.Module) -> None:
    plan = plan_of(net)
    assert (count_params(net), count_macs(net, IMAGES)) == (plan.params.after, plan.macs.after)


def test_a_loaded_model_computes_the_same_bits(net: nn.Module, saved: Path) -> None:
    assert torch.equal(load(saved, factory=Net)(IMAGES), net(IMAGES))


def test_a_fresh_process_computes_the_same_bits(net: nn.Module, saved: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); from test_store import *;"
        "print(load(sys.argv[1], factory=Net)(IMAGES).tolist())"
    )
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path.cwd()}"}
    command = [sys.executable, "-c", code, str(saved)]
    printed = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    assert json.loads(printed.stdout) == net(IMAGES).tolist()


def test_loading_twice_gives_two_models_that_share_nothing(saved: Path) -> None:
    first, second = load(saved, factory=Net), load(saved, factory=Net)
    with torch.no_grad():
        first.get_parameter("stem.weight").zero_()
    assert second.get_parameter("stem.weight").any()


def test_a_loaded_model_can_be_saved_again_byte_for_byte(saved: Path, tmp_path: Path) -> None:
    again = save(load(saved, factory=Net), tmp_path / "again")
    for name in ("model.safetensors", "plan.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_a_loaded_model_trains(saved: Path) -> None:
    load(saved, factory=Net)(IMAGES).sum().backward()


def test_nothing_is_pickled(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "plan.json"]
    json.loads((saved / "plan.json").read_text())


def test_the_plan_file_says_what_made_the_model(net: nn.Module, saved: Path) -> None:
    found = Saved.model_validate_json((saved / "plan.json").read_text())
    assert (found.plan, found.seed, found.calibration) == (plan_of(net), 3, "none")
    assert found.plan_hash == found.plan.hash
    assert {"python", "torch", "torch_otprune", "safetensors"} <= found.versions.keys()


def test_the_dense_layout_is_worked_back_from_the_plan(saved: Path) -> None:
    found = Saved.model_validate_json((saved / "plan.json").read_text())
    assert found.dense == layout(Net())


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    model = pruned(Tied(), WORDS)
    back = load(save(model, tmp_path / "m"), factory=Tied)
    assert back.get_parameter("decoder.weight") is back.get_parameter("encoder.weight")
    assert torch.equal(back(WORDS), model(WORDS))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    save(pruned(Tied(), WORDS), tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert ("encoder.weight" in names) != ("decoder.weight" in names)


def test_weights_are_tied_again_if_the_factory_does_not_tie_them(tmp_path: Path) -> None:
    save(pruned(Tied(), WORDS), tmp_path / "m")
    back = load(tmp_path / "m", factory=lambda: Tied(tied=False))
    assert back.get_parameter("decoder.weight") is back.get_parameter("encoder.weight")


def test_weights_untied_since_come_back_untied(tmp_path: Path) -> None:
    model = Tied(tied=False)
    pruned(model, WORDS)
    back = load(save(model, tmp_path / "m"), factory=Tied)
    assert torch.equal(back(WORDS), model(WORDS))


def test_every_type_and_value_survives(tmp_path: Path) -> None:
    model = pruned(Bag(), torch.randn(2, 4))
    state = load(save(model, tmp_path / "m"), factory=Bag).state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)


def test_empty_tensors_are_not_taken_for_tied(tmp_path: Path) -> None:
    save(pruned(Bag(), torch.randn(2, 4)), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "plan.json").read_text())["aliases"] == {}


def test_buffers_outside_the_state_dict_come_back(tmp_path: Path) -> None:
    x, model = torch.randn(2, 4), pruned(Bag(), torch.randn(2, 4))
    back = load(save(model, tmp_path / "m"), factory=Bag)
    assert torch.equal(back(x), model(x))
    assert "transient" not in back.state_dict()


def test_a_model_cast_after_pruning_comes_back_in_its_new_type(
    net: nn.Module, tmp_path: Path
) -> None:
    net.bfloat16()
    back = load(save(net, tmp_path / "m"), factory=Net)
    assert torch.equal(back(IMAGES.bfloat16()), net(IMAGES.bfloat16()))


def test_tensors_that_are_not_contiguous_or_share_memory_survive(
    net: nn.Module, tmp_path: Path
) -> None:
    both = torch.randn(2, 5, 5)
    net.get_submodule("inner").weight = nn.Parameter(both[0].T[:, :4])
    net.get_submodule("head").weight = nn.Parameter(both[1])
    net.get_submodule("inner").bias = nn.Parameter(both[1][0])
    back = load(save(net, tmp_path / "m"), factory=Net)
    assert torch.equal(back(IMAGES), net(IMAGES))


def test_memory_formats_survive(net: nn.Module, tmp_path: Path) -> None:
    net.to(memory_format=torch.channels_last)
    back = load(save(net, tmp_path / "m"), factory=Net)
    for name, value in net.state_dict().items():
        assert back.state_dict()[name].stride() == value.stride()


def test_an_expanded_tensor_is_saved_by_its_values(net: nn.Module, tmp_path: Path) -> None:
    net.get_submodule("head").bias = nn.Parameter(torch.ones(1).expand(5))
    back = load(save(net, tmp_path / "m"), factory=Net)
    assert torch.equal(back(IMAGES), net(IMAGES))


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_come_back_module_by_module(
    net: nn.Module, tmp_path: Path, training: bool
) -> None:
    net.train(training)
    net.get_submodule("bn1").train(not training)
    back = load(save(net, tmp_path / "m"), factory=Net)
    flags = {name: module.training for name, module in net.named_modules()}
    assert {name: module.training for name, module in back.named_modules()} == flags


def test_saving_leaves_the_model_alone(net: nn.Module, tmp_path: Path) -> None:
    before = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    save(net, tmp_path / "m")
    after = net.state_dict(keep_vars=True)
    assert all(id(after[name]) == key for name, (key, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


def test_a_model_pruned_twice_loads_through_its_first_save(
    net: nn.Module, saved: Path, tmp_path: Path
) -> None:
    pruned(net, IMAGES)
    save(net, tmp_path / "second")
    back = load(tmp_path / "second", factory=lambda: load(saved, factory=Net))
    assert torch.equal(back(IMAGES), net(IMAGES))


# Where it is written


def test_an_earlier_save_is_replaced(net: nn.Module, saved: Path) -> None:
    with torch.no_grad():
        net.get_parameter("head.bias").add_(1)
    save(net, saved)
    assert torch.equal(load(saved, factory=Net)(IMAGES), net(IMAGES))
    assert [p.name for p in saved.parent.iterdir()] == ["net"]


def test_an_empty_directory_is_used(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert load(save(net, tmp_path / "empty"), factory=Net) is not net


def test_missing_parents_are_made(net: nn.Module, tmp_path: Path) -> None:
    assert (save(net, tmp_path / "a" / "b") / "plan.json").is_file()


def test_others_may_read_what_the_umask_lets_them_read(saved: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


def test_a_failed_save_leaves_the_earlier_one_and_no_debris(
    net: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoadError) as error:
        save(net, saved)
    assert "cannot be saved: No space left on device." in message(error)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["net"]


def test_a_directory_that_cannot_be_written_is_named(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LoadError) as error:
        save(net, tmp_path / "m")
    assert "cannot be saved: Permission denied." in message(error)
    assert "/m\n" in message(error)


def test_a_parent_that_is_a_file_is_an_error(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoadError) as error:
        save(net, tmp_path / "file" / "m")
    assert "Not a directory" in message(error)


def test_a_directory_with_other_files_is_refused(net: nn.Module, saved: Path) -> None:
    (saved / "notes.txt").touch()
    with pytest.raises(LoadError) as error:
        save(net, saved)
    assert "it holds notes.txt" in message(error)
    assert (saved / "notes.txt").exists()


def test_a_foreign_plan_file_is_not_replaced(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(LoadError) as error:
        save(net, tmp_path)
    assert "its plan.json is not ours" in message(error)


def test_a_file_is_not_replaced(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(LoadError) as error:
        save(net, tmp_path / "m")
    assert "it is a file" in message(error)


# Which plan


def test_a_copy_of_a_model_has_no_plan(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        save(copy.deepcopy(net), tmp_path / "m")
    assert "no plan is known for this Net" in message(error)
    assert "plan=report.plan" in message(error)


class Around(nn.Module):
    """A hand-written wrapper."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("wrap", "fix"),
    [
        (nn.DataParallel, "otp.save(model.module, directory)"),
        (lambda net: torch.compile(net, backend="eager"), "otp.save(model._orig_mod, directory)"),
        (Around, "otp.save(model.net, directory)"),
    ],
)
def test_a_wrapper_is_refused_with_what_to_save(
    net: nn.Module, wrap: Callable[[nn.Module], nn.Module], fix: str, given: bool, tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as error:
        save(wrap(net), tmp_path / "m", plan=plan_of(net) if given else None)
    assert "is a wrapper around the model that was pruned" in message(error)
    assert fix in message(error)
    assert not (tmp_path / "m").exists()


def test_a_copy_is_saved_with_the_plan_given(net: nn.Module, tmp_path: Path) -> None:
    save(copy.deepcopy(net), tmp_path / "m", plan=plan_of(net))
    assert torch.equal(load(tmp_path / "m", factory=Net)(IMAGES), net(IMAGES))


def test_a_forgotten_model_has_no_plan(net: nn.Module) -> None:
    forget(net)
    with pytest.raises(PlanError):
        plan_of(net)


def test_a_model_carries_no_mark_of_its_plan(net: nn.Module) -> None:
    assert vars(net).keys() == vars(Net()).keys()


def test_a_dead_model_leaves_no_plan() -> None:
    model = pruned(Net(), IMAGES)
    key = id(model)
    assert key in PLANS
    del model
    gc.collect()
    assert key not in PLANS


def test_a_plan_that_does_not_lead_to_the_model_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        save(Net(), tmp_path / "m", plan=plan_of(net))
    assert "parameters, this model has" in message(error)
    assert not (tmp_path / "m").exists()


class Extra(Net):
    """A net with a state that is no plain value."""

    def get_extra_state(self) -> object:
        return {"any": object()}

    def set_extra_state(self, state: object) -> None:
        pass


class Sparse(Bag):
    """A net with a tensor that safetensors does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.zeros(2, 2).to_sparse())


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (Extra, IMAGES, "'_extra_state' is an extra state of type dict"),
        (Sparse, torch.ones(1, 4), "'wide' is a torch.float32 tensor of layout torch.sparse_coo"),
    ],
)
def test_what_only_pickle_could_hold_is_refused(
    model: Callable[[], nn.Module], example: Tensor, words: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadError) as error:
        save(pruned(model(), example), tmp_path / "m")
    assert words in message(error)
    assert not (tmp_path / "m").exists()


# What is not loaded


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        load(tmp_path / "nowhere", factory=Net)
    assert "the directory does not exist" in message(error)
    assert "nowhere" in message(error)


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(LoadError, match="this is no saved model: it is a file"):
        load(tmp_path / "m", factory=Net)


def test_an_empty_directory_holds_no_plan(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"there is no plan\.json"):
        load(tmp_path, factory=Net)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert f"there is no {name}" in message(error)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_an_error(saved: Path, name: str, share: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert name in message(error)


def test_weights_of_another_save_are_an_error(net: nn.Module, saved: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        net.get_parameter("head.bias").add_(1)
    other = save(net, tmp_path / "other")
    (other / "model.safetensors").replace(saved / "model.safetensors")
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert "model.safetensors is truncated or from another save" in message(error)


def edit(saved: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the plan file behind the library's back."""
    content = json.loads((saved / "plan.json").read_text())
    change(content)
    (saved / "plan.json").write_text(json.dumps(content))


def test_an_edited_plan_is_an_error(saved: Path) -> None:
    edit(saved, lambda content: content["plan"].update(samples=7))
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert "its plan was edited" in message(error)


def test_an_unknown_version_is_an_error(saved: Path) -> None:
    edit(saved, lambda content: content.update(version=3))
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert "its plan.json cannot be read: its version is 3, not 1 or 2." in message(error)


def test_an_unknown_criterion_in_the_plan_is_an_error(saved: Path) -> None:
    edit(saved, lambda c: c["plan"]["policy"]["rules"][0].update(criterion={"kind": "later"}))
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert "its plan.json cannot be read" in message(error)


def test_someone_elses_json_is_an_error(saved: Path) -> None:
    (saved / "plan.json").write_text('{"model": "bert"}')
    with pytest.raises(LoadError) as error:
        load(saved, factory=Net)
    assert "its plan.json is cut short or not ours" in message(error)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: Net(9), "'conv1.weight' is 12x9x3x3:float32 in the factory's model, 12x8x3x3"),
        (lambda: Net(classes=6), "'head.bias' is 6:float32 in the factory's model, 5:float32"),
        (lambda: Net().double(), "'bn1.bias' is 12:float64 in the factory's model, 12:float32"),
        (Bag, "the factory's model has 'a_bfloat16', the saved one has not."),
        (lambda: nn.Sequential(), "the factory's model has no 'bn1.bias', the saved one has."),
    ],
)
def test_a_changed_factory_is_told_by_its_first_tensor(
    saved: Path, factory: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(LoadError) as error:
        load(saved, factory=factory)
    assert words in message(error)


def test_an_already_pruned_factory_is_an_error(saved: Path) -> None:
    with pytest.raises(LoadError):
        load(saved, factory=lambda: load(saved, factory=Net))


@pytest.mark.parametrize("factory", [dict, Net()])
def test_a_factory_that_builds_no_module_is_an_error(saved: Path, factory: Any) -> None:
    with pytest.raises(LoadError) as error:
        load(saved, factory=factory)
    assert "that builds no module when called." in message(error)


# Fingerprints


def test_a_fingerprint_does_not_see_values() -> None:
    assert fingerprint(Net()) == fingerprint(Net().eval())


@pytest.mark.parametrize("other", [lambda: Net(9), lambda: Net().half(), Tied, nn.Identity])
def test_a_fingerprint_sees_names_shapes_and_types(other: Callable[[], nn.Module]) -> None:
    assert fingerprint(Net()) != fingerprint(other())


def test_a_layout_reads_well() -> None:
    described = layout(Net())
    assert described["conv1.weight"] == "12x8x3x3:float32"
    assert described["bn1.num_batches_tracked"] == "scalar:int64"
