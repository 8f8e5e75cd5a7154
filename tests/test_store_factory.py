"""A factory that builds another model, a directory that is not what was saved: one error each."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_store import IMAGES, Net, edit, message, plan_for, pruned
from torch_otprune.errors import LoadError
from torch_otprune.store import Saved, load, plan_of, save
from torch_otprune.store.parts import describe, difference, put_back_, read, write

X = torch.linspace(-1, 1, 32).view(4, 8)


class Model(nn.Module):
    """A model whose factory can change without a tensor that changes."""

    def __init__(
        self,
        *,
        act: type[nn.Module] = nn.ReLU,
        heads: int = 2,
        eps: float = 1e-5,
        rate: float = 0.1,
        stride: int = 1,
        function: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, stride=stride, padding=1)
        self.norm, self.act = nn.BatchNorm1d(4, eps=eps), act()
        self.mix, self.drop = nn.Conv1d(4, 8, 1), nn.Dropout(rate)
        self.num_heads, self.function = heads, function
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.act(self.norm(self.conv(x[:, None]))))
        x = x.view(len(x), self.num_heads, -1, x.shape[-1]).flatten(1, 2)
        out: Tensor = self.head(self.function(self.drop(x)).mean(-1))
        return out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A pruned model, by the pipeline, so that the dense one is known."""
    torch.manual_seed(0)
    net = Model().eval()
    policy = otp.Policy(rules=otp.Channels(targets=["conv"], keep=0.5))
    otp.prune_(net, policy, [X], timing=0)
    return net


@pytest.fixture(scope="module")
def stored(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is saved."""
    return save(model, tmp_path_factory.mktemp("model") / "m")


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"act": nn.GELU}, "'act' is a GELU in the factory's model, a ReLU in the saved one."),
    ({"heads": 4}, "the model itself has num_heads 4 in the factory's model, 2 in the saved one."),
    ({"eps": 1e-3}, "'norm' has eps 0.001 in the factory's model, 1e-05 in the saved one."),
    ({"rate": 0.5}, "'drop' has p 0.5 in the factory's model, 0.1 in the saved one."),
    ({"stride": 2}, "'conv' has stride (2,) in the factory's model, (1,) in the saved one."),
    ({"function": F.gelu}, "the model itself has function <gelu> in the factory's model, <relu>"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_changed_factory_is_told_by_module_and_attribute(
    stored: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(LoadError) as error:
        load(stored, factory=lambda: Model(**change))
    assert words in message(error)
    put_back = not {"act", "function"} & change.keys()
    hint = "or strict=False to let" if put_back else "strict=False would keep what this one builds"
    assert hint in message(error)


class Longer(Model):
    """A model with one more module, which has no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Flatten()


Longer.__name__ = "Model"


def test_a_module_without_tensors_that_came_is_named(stored: Path) -> None:
    with pytest.raises(LoadError) as error:
        load(stored, factory=Longer)
    assert "the factory's model has a module 'late', a Flatten; the saved one has not" in message(
        error
    )


def test_a_module_without_tensors_that_went_is_named(stored: Path) -> None:
    def factory() -> nn.Module:
        built = Model()
        del built.drop
        return built

    with pytest.raises(LoadError) as error:
        load(stored, factory=factory)
    assert "the factory's model has no module 'drop', the saved one has: a Dropout" in message(
        error
    )


def test_without_strictness_what_the_saved_model_says_prevails(
    model: nn.Module, stored: Path
) -> None:
    back = load(stored, factory=lambda: Model(eps=1e-3, rate=0.5, heads=4), strict=False).eval()
    assert torch.equal(back(X), model(X))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act": nn.GELU}, "'act' is a GELU in the loaded model, a ReLU in the saved one."),
        ({"function": F.gelu}, "has function <gelu> in the loaded model, <relu> in the saved one."),
    ],
)
def test_without_strictness_what_cannot_be_put_back_is_warned_of(
    stored: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.warns(UserWarning, match="what the factory builds stays") as told:
        load(stored, factory=lambda: Model(**change), strict=False)
    assert words in str(told[0].message)


def test_without_strictness_what_can_be_put_back_is_no_matter_of_a_warning(stored: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(stored, factory=lambda: Model(eps=1e-3, rate=0.5, heads=4), strict=False)


def test_what_a_factory_refuses_in_three_lines_is_told_as_it_is(stored: Path) -> None:
    def factory() -> nn.Module:
        raise otp.OTPruneError("there is none.", where="here", fix="make one.")

    with pytest.raises(otp.OTPruneError) as error:
        load(stored, factory=factory)
    assert str(error.value).startswith("there is none.\n")


def test_a_changed_training_switch_is_passed_over(stored: Path) -> None:
    def factory() -> nn.Module:
        built = Model().train()
        built.gradient_checkpointing = True
        return built

    load(stored, factory=factory)


_BUILT = itertools.count()


class Unstable(Model):
    """A model that says something else each time it is built, and each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.seed = next(_BUILT), random.random()
        self.where = hex(id(self))
        self.name, self.file = f"<object at {hex(id(self))}>", "/home/somebody/config.yaml"
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_attributes_that_change_by_themselves_do_not_break_a_load(tmp_path: Path) -> None:
    net = Unstable().eval()
    net(X)
    otp.prune_(net, otp.Policy(rules=otp.Channels(targets=["conv"], keep=0.5)), [X], timing=0)
    back = load(save(net, tmp_path / "m"), factory=Unstable)
    assert torch.equal(back(X), net(X))


def test_a_changed_attribute_is_named_although_others_are_random(tmp_path: Path) -> None:
    net = Unstable().eval()
    otp.prune_(net, otp.Policy(rules=otp.Channels(targets=["conv"], keep=0.5)), [X], timing=0)
    save(net, tmp_path / "m")

    def factory() -> nn.Module:
        built = Unstable()
        built.num_heads = 4
        return built

    with pytest.raises(LoadError, match="the model itself has num_heads 4 in the factory's model"):
        load(tmp_path / "m", factory=factory)


def test_a_function_changed_after_the_pruning_is_named(
    model: nn.Module, stored: Path, tmp_path: Path
) -> None:
    other = load(stored, factory=Model)
    other.function = F.gelu
    save(other, tmp_path / "m")
    with pytest.raises(LoadError) as error:
        load(tmp_path / "m", factory=Model)
    assert "has function <relu> in the loaded model, <gelu> in the saved one." in message(error)
    with pytest.warns(UserWarning, match="has function <relu> in the loaded model, <gelu>"):
        load(tmp_path / "m", factory=Model, strict=False)


def test_a_save_of_the_first_version_loads(model: nn.Module, stored: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    shutil.copytree(stored, target)

    def older(content: dict[str, Any]) -> None:
        content["weights"] = content.pop("files")["model.safetensors"]["sha256"]
        content["version"] = 1
        for key in ("parts", "dense_parts", "seal", "pairs", "extra", "frozen"):
            del content[key]

    edit(target, older)
    assert torch.equal(load(target, factory=Model).eval()(X), model(X))
    with pytest.raises(LoadError, match=r"'conv\.bias' is 4:float64"):
        load(target, factory=lambda: Model().double())
    (target / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(LoadError, match=r"model\.safetensors is truncated or from another save"):
        load(target, factory=Model)


def test_the_plan_file_says_its_version_and_files(stored: Path) -> None:
    found = Saved.model_validate_json((stored / "plan.json").read_text())
    assert found.version == 2
    assert found.files["model.safetensors"].bytes == (stored / "model.safetensors").stat().st_size


# Devices


def test_tensors_go_to_the_device_that_is_named(model: nn.Module, stored: Path) -> None:
    def empty() -> nn.Module:
        with torch.device("meta"):
            return Model()

    back = load(stored, factory=empty, device="cpu").eval()
    assert torch.equal(back(X), model(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_is_loaded_to_the_gpu(model: nn.Module, stored: Path) -> None:
    back = load(stored, factory=Model, device="cuda")
    assert {t.device.type for t in back.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("meta", "the device 'meta' holds no values."),
        ("nonsense", "the device 'nonsense' cannot be used: "),
    ],
)
def test_a_device_that_holds_nothing_is_an_error(stored: Path, device: str, words: str) -> None:
    with pytest.raises(LoadError) as error:
        load(stored, factory=Model, device=device)
    assert words in message(error)


# Shards


@pytest.fixture
def shards(model: nn.Module, tmp_path: Path) -> Path:
    """The same model in several files."""
    root = save(model, tmp_path / "shards", shard=100)
    assert len(list(root.glob("model-0*.safetensors"))) > 2
    return root


def test_a_model_in_several_files_comes_back(model: nn.Module, shards: Path) -> None:
    assert torch.equal(load(shards, factory=Model).eval()(X), model(X))


def test_the_index_has_the_layout_that_other_tools_read(model: nn.Module, shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    state = model.state_dict()
    sizes = sum(t.numel() * t.element_size() for t in state.values())
    assert index["metadata"] == {"total_size": sizes}
    assert index["weight_map"].keys() == state.keys()
    for name, file in index["weight_map"].items():
        with safe_open(shards / file, framework="pt") as found:
            assert torch.equal(found.get_tensor(name), state[name])
            assert found.metadata() == {"format": "pt"}


def test_every_file_keeps_to_its_size_but_for_single_tensors(shards: Path) -> None:
    for path in shards.glob("model-0*.safetensors"):
        with safe_open(path, framework="pt") as found:
            tensors = [found.get_tensor(name) for name in found.keys()]  # noqa: SIM118
        size = sum(t.numel() * t.element_size() for t in tensors)
        assert size <= 100 or len(tensors) == 1


@pytest.mark.parametrize("size", ["1GB", " 2 gib ", "1.5MB", 10**9, "500000"])
def test_a_size_is_bytes_or_words(model: nn.Module, tmp_path: Path, size: str | int) -> None:
    root = save(model, tmp_path / "m", shard=size)
    assert sorted(p.name for p in root.iterdir()) == ["model.safetensors", "plan.json"]


@pytest.mark.parametrize("size", ["", "big", 0, -1, "0GB", True, None, "1PB"])
def test_what_is_no_size_is_an_error(model: nn.Module, tmp_path: Path, size: Any) -> None:
    with pytest.raises(LoadError) as error:
        save(model, tmp_path / "m", shard=size)
    assert f"the size of a file is {size!r}." in message(error)
    assert not (tmp_path / "m").exists()


class Large(nn.Module):
    """1.1 GB of weights, most of them in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(11_700, 11_700), nn.Linear(11_700, 11_700)
        self.narrow = nn.Linear(11_700, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.narrow(self.out(self.wide(x).relu()).relu())
        return hidden


@pytest.mark.slow
def test_what_is_larger_than_a_gigabyte_is_split_without_being_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Large().eval(), torch.randn(1, 11_700)
    rule = otp.Channels(targets="out", keep=11_600, criterion="magnitude", repair="none")
    with otp.attach(model, otp.Policy(rules=[rule])) as attached:
        plan = otp.observe(attached, [x]).plan()
    otp.apply_(model, plan, [x])
    root = save(model, tmp_path / "large")
    sizes = [path.stat().st_size for path in root.glob("model-0*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) <= 1.001e9 < sum(sizes)
    assert torch.equal(load(root, factory=Large).eval()(x), model(x))


def test_fewer_files_replace_more(model: nn.Module, shards: Path) -> None:
    save(model, shards)
    assert sorted(p.name for p in shards.iterdir()) == ["model.safetensors", "plan.json"]


def test_the_command_line_takes_several_files_for_an_earlier_save(shards: Path) -> None:
    from torch_otprune.cli.files import check_directory

    shards.rename(shards.with_name("model"))
    check_directory(shards.parent)


def first_two(root: Path) -> tuple[Path, Path]:
    one, two, *_ = sorted(root.glob("model-0*.safetensors"))
    return one, two


def test_a_missing_shard_is_named(shards: Path) -> None:
    one, _ = first_two(shards)
    one.unlink()
    with pytest.raises(LoadError) as error:
        load(shards, factory=Model)
    assert f"there is no {one.name}" in message(error)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_shard_is_named(shards: Path, keep: int) -> None:
    _, two = first_two(shards)
    content = two.read_bytes()
    two.write_bytes(content[:keep])
    with pytest.raises(LoadError) as error:
        load(shards, factory=Model)
    assert f"its {two.name} is truncated or from another save: it has" in message(error)
    assert f"bytes of {len(content):,}" in message(error)


@pytest.mark.parametrize("reader", ["read_header", "read"])
def test_a_shard_that_the_disk_does_not_give_is_named(
    shards: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_otprune.store import shards as module

    one, hashed = first_two(shards)[0], module.digest

    def broken(path: Path, *_: Any) -> Any:
        if path.name == one.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hashed(path)

    monkeypatch.setattr(module, reader, broken)
    monkeypatch.setattr(module, "digest", broken)
    with pytest.raises(LoadError) as error:
        load(shards, factory=Model)
    assert f"its {one.name} cannot be read: Input/output error" in message(error)
    assert "pass a directory that you may read" in message(error)


def test_exchanged_shards_are_named(shards: Path) -> None:
    one, two = first_two(shards)
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    with pytest.raises(LoadError) as error:
        load(shards, factory=Model)
    assert f"its {one.name} holds what {two.name} should hold" in message(error)


def test_a_shard_of_another_save_is_named(model: nn.Module, shards: Path, tmp_path: Path) -> None:
    other = load(shards, factory=Model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    foreign = save(other, tmp_path / "other", shard=100)
    _, two = first_two(shards)
    shutil.copy(foreign / two.name, two)
    with pytest.raises(LoadError) as error:
        load(shards, factory=Model)
    assert f"its {two.name} is truncated or from another save: the hash differs" in message(error)


def test_a_flipped_bit_is_named(shards: Path) -> None:
    _, two = first_two(shards)
    content = bytearray(two.read_bytes())
    content[-1] ^= 1
    two.write_bytes(content)
    with pytest.raises(LoadError, match=f"its {two.name} is truncated or from another save"):
        load(shards, factory=Model)


def test_an_edited_index_is_named(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("00001", "00002", 1))
    with pytest.raises(LoadError, match=r"its model\.safetensors\.index.json is truncated or from"):
        load(shards, factory=Model)


# Directories that are something else


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "last.ckpt"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "opened").touch, ()

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoadError) as error:
        load(tmp_path, factory=Model)
    assert f"there is no plan.json, and {name} is a pickle, which is never opened" in message(error)
    assert not (tmp_path / "opened").exists()


def test_nothing_in_the_store_can_open_a_pickle() -> None:
    root = Path(otp.__file__).parent / "store"
    text = "".join(path.read_text() for path in root.glob("*.py"))
    assert not [word for word in ("torch.load", "import pickle", "torch.save") if word in text]


@pytest.mark.parametrize("key", ["tensors", "aliases", "training", "files", "parts", "frozen"])
def test_an_edit_anywhere_on_the_page_is_an_error(
    model: nn.Module, tmp_path: Path, key: str
) -> None:
    root = save(model, tmp_path / "m")

    def change(content: dict[str, Any]) -> None:
        value = content[key]
        if key == "files":
            value["model.safetensors"]["bytes"] += 1
        elif key == "training":
            content[key] = not value
        elif key == "frozen":
            content[key] = ["conv.weight"]
        elif key == "parts":
            value["modules"]["conv"] = 0
        else:
            value["conv.bias"] = "9:float32"

    edit(root, change)
    with pytest.raises(LoadError) as error:
        load(root, factory=Model)
    assert "its plan.json was edited: the hash differs" in message(error)


def test_a_plan_of_another_model_is_an_error(tmp_path: Path) -> None:
    plan = plan_for(Model().eval(), X)
    net = pruned(Net(), IMAGES)
    with pytest.raises(otp.OTPruneError) as error:
        save(net, tmp_path / "m", plan=plan)
    assert "parameters, this model has" in message(error)
    with pytest.raises(otp.OTPruneError) as error:
        otp.apply_(Net().eval(), plan, [IMAGES], timing=0)
    assert "the model has no such module" in message(error)


def test_a_dense_model_with_the_plans_number_of_parameters_is_no_pruned_one(
    model: nn.Module, tmp_path: Path
) -> None:
    size = sum(p.numel() for p in Model().parameters())
    plan = plan_of(model)
    wrong = plan.model_copy(update={"params": plan.params.model_copy(update={"after": size})})
    save(Model(), tmp_path / "m", plan=wrong)
    with pytest.raises(LoadError) as error:
        load(tmp_path / "m", factory=Model)
    assert "save again with the plan that pruned the model last." in message(error)


def test_a_failed_load_leaves_the_directory_alone(stored: Path) -> None:
    before = {path.name: path.read_bytes() for path in stored.iterdir()}
    with pytest.raises(LoadError):
        load(stored, factory=lambda: Model(eps=1.0))
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == before


# What modules say


@pytest.mark.parametrize(
    "value",
    [1, -2.5, float("inf"), True, None, "a\n'b'", (1,), (), [1, [2.0]], {"a": (1,)}, {1, 2}, set()],
)
def test_a_plain_value_is_read_as_it_was_written(value: object) -> None:
    text = write(value)
    assert text is not None
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize("value", [torch.ones(1), object(), "<x at 0x7f0000000000>", "/etc/passwd"])
def test_what_differs_from_machine_to_machine_is_not_written(value: object) -> None:
    assert write(value) is None


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "<relu>", "sha256 ab", "1 +"])
def test_what_is_no_literal_is_not_run(text: str) -> None:
    with pytest.raises(ValueError):
        read(text)


def test_equal_modules_are_written_once() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(50)))
    parts = describe(net)
    assert len(parts.modules) == 51
    assert len(parts.kinds) == 2


def test_an_attribute_that_only_one_of_two_has_is_no_difference() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    one.new = 1
    assert difference(describe(one), describe(two)) is None


def test_what_is_put_back_is_what_was_described() -> None:
    net = Model()
    parts = describe(net)
    net.num_heads, net.norm.eps, net.conv.stride = 8, 1.0, (3,)
    put_back_(net, parts)
    assert difference(describe(net), parts) is None
    assert net.conv.stride == (1,)
