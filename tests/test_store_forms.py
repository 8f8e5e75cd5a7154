"""Every kind of module survives a save: ties, views, parametrisations, odd types, plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torch_otprune as otp
from tests.test_store import IMAGES, Bag, Net, plan_for, pruned
from tests.zoo.oracle import alive
from tests.zoo.random_nets import Chain, nets
from torch_otprune.errors import LoadError
from torch_otprune.store import load, remember, save
from torch_otprune.surgery import cut_

X = torch.linspace(-1, 1, 32).view(4, 8)


class Two(nn.Module):
    """Two layers around an activation; a subclass adds what it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        self.extend()

    def extend(self) -> None:
        """Add something."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def meta(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build on the meta device."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return factory()

    return build


def state(model: nn.Module) -> dict[str, Tensor]:
    """Read every tensor, buffers outside the state_dict included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(one: nn.Module, other: nn.Module, x: Tensor = X) -> None:
    """Hold two models to equal tensors and outputs, bit for bit."""
    assert torch.equal(one(x), other(x))
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value.dtype, value.stride()) == (theirs[name].dtype, theirs[name].stride()), name
        assert torch.equal(value, theirs[name]), name


class Weighted(Two):
    """Weight-norm on one layer that is cut on both sides of the hidden units."""

    def extend(self) -> None:
        parametrizations.weight_norm(self.up)
        parametrizations.weight_norm(self.down)


class Spectral(Two):
    """A spectral norm, which a cut bakes in."""

    def extend(self) -> None:
        parametrizations.spectral_norm(self.up)


class Orthogonal(Two):
    """An orthogonal layer in front of the cut: a part of it is orthogonal no more."""

    def extend(self) -> None:
        parametrizations.orthogonal(self.down)


class Symmetric(nn.Module):
    """A parametrisation without a way back."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs()


class Squared(Two):
    """A computed weight that cannot be inverted."""

    def extend(self) -> None:
        parametrize.register_parametrization(self.up, "weight", Symmetric())


FORMS = [Two, Weighted, Spectral, Orthogonal, Squared]


@pytest.mark.parametrize(
    ("form", "build"),
    # PyTorch computes the base of an orthogonal weight from values, which meta has not
    [(f, b) for f in FORMS for b in (lambda f: f, meta) if (f, b) != (Orthogonal, meta)],
)
def test_computed_weights_come_back(form: type[Two], build: Any, tmp_path: Path) -> None:
    model = form().eval()
    report = otp.prune_(model, otp.Policy(rules=otp.Channels(keep=0.5)), [X], timing=0)
    assert report.plan.cuts
    same(load(save(model, tmp_path / "m"), factory=build(form)), model)


@pytest.mark.parametrize("form", [Weighted, Spectral])
def test_a_computed_weight_has_its_form_whatever_the_factory_draws(
    form: type[Two], tmp_path: Path
) -> None:
    model = pruned(form(), X).eval()
    chains = {k: type(v) for k, v in model.named_modules() if "parametrizations" in k}

    def factory() -> nn.Module:
        new = form()
        with torch.no_grad():  # a spectral norm of one: the weight would not move if divided
            for p in new.parameters():
                p.zero_()
                p.view(-1)[0] = 1.0
        return new.eval()

    back = load(save(model, tmp_path / "m"), factory=factory)
    assert {k: type(v) for k, v in back.named_modules() if "parametrizations" in k} == chains
    same(back, model)


class Old(Two):
    """The older norms, which compute the weight in a hook and keep it as a plain attribute."""

    def extend(self) -> None:
        self.side = nn.utils.weight_norm(nn.Linear(3, 3))
        self.other = nn.utils.spectral_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.other(self.side(x[:, :3]))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("build", [lambda f: f, meta])
def test_norms_of_the_older_kind_come_back(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Old().eval()
    plan = plan_for(Two(), X)
    plan = plan.model_copy(update={"fingerprint": otp_fingerprint(model)})
    cut_(model, plan.cuts)
    size = sum(p.numel() for p in model.parameters())
    plan = plan.model_copy(update={"params": plan.params.model_copy(update={"after": size})})
    remember(model, plan)
    same(load(save(model, tmp_path / "m"), factory=build(Old)).eval(), model)


def otp_fingerprint(model: nn.Module) -> str:
    from torch_otprune.structure.fingerprint import fingerprint

    return fingerprint(model)


class Shared(nn.Module):
    """One table under three names, tied across the layers that a cut shortens."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.third, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 2)
        if tied:
            self.third.weight = self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = layer(x).relu()
        out: Tensor = self.last(x)
        return out


class Outside(Shared):
    """The same, with a hidden layer beside that can be cut while the tie stays."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__(tied=tied)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.down(self.up(x).relu()))


def test_a_tie_of_three_names_comes_back_as_one_object(tmp_path: Path) -> None:
    model = pruned(Outside(), X)
    back = load(save(model, tmp_path / "m"), factory=Outside)
    names = ("first.weight", "second.weight", "third.weight")
    assert len({id(back.get_parameter(name)) for name in names}) == 1
    same(back, model)


def test_a_tie_that_was_loosened_for_one_of_three_stays_loose(tmp_path: Path) -> None:
    model = Outside()
    model.third.weight = nn.Parameter(model.third.weight.detach().clone() + 1)
    plan = plan_for(Outside(), X)
    cut_(model, plan.cuts)
    size = sum(p.numel() for p in model.parameters())
    plan = plan.model_copy(update={"params": plan.params.model_copy(update={"after": size})})
    back = load(save(model, tmp_path / "m", plan=plan), factory=Outside)
    assert back.get_parameter("first.weight") is back.get_parameter("second.weight")
    assert back.get_parameter("first.weight") is not back.get_parameter("third.weight")
    same(back, model)


class Twin(nn.Module):
    """One module at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x))
        return out


def test_a_module_at_two_paths_is_one_module_again(tmp_path: Path) -> None:
    model = pruned(Twin(), X)
    back = load(save(model, tmp_path / "m"), factory=Twin)
    assert back.get_submodule("one") is back.get_submodule("two")
    same(back, model)


def test_views_of_one_memory_that_are_not_equal_keep_their_values(tmp_path: Path) -> None:
    model = pruned(Two(), X)
    whole = torch.randn(40)
    model.get_submodule("down").bias = nn.Parameter(whole[:3])
    model.get_submodule("up").bias = nn.Parameter(whole[1:4])
    model.get_submodule("down").weight = nn.Parameter(whole[:18].view(3, 6)[:, ::2])
    back = load(save(model, tmp_path / "m"), factory=Two)
    assert torch.equal(back(X), model(X))
    with torch.no_grad():  # they share nothing now
        back.get_parameter("down.bias").zero_()
    assert back.get_parameter("up.bias").all()


class Recurrent(nn.Module):
    """A recurrent layer, whose list of weights repeats its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x[:, None])[0][:, 0])
        return out


@pytest.mark.parametrize("build", [lambda f: f, meta])
def test_a_recurrent_layer_runs_on_the_loaded_weights(build: Any, tmp_path: Path) -> None:
    model = pruned(Recurrent(), X)
    back = load(save(model, tmp_path / "m"), factory=build(Recurrent))
    same(back, model)
    assert back.cell._flat_weights[0] is back.get_parameter("cell.weight_ih_l0")


FLOATS = (torch.bfloat16, torch.float16, torch.float64)
EIGHT = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_model_of_another_type_comes_back_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(Two(), X).to(dtype)
    same(load(save(model, tmp_path / "m"), factory=Two), model, X.to(dtype))


@pytest.mark.parametrize("dtype", EIGHT)
def test_eight_bit_floats_come_back_byte_by_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pruned(Two(), X)
    table = torch.arange(256).to(torch.uint8).view(dtype)
    model.register_buffer("table", table)

    def factory() -> nn.Module:
        new = Two()
        new.register_buffer("table", torch.zeros(256, dtype=dtype))
        return new

    plan = plan_for(factory(), X)
    back = load(save(model, tmp_path / "m", plan=plan), factory=factory)
    assert back.get_buffer("table").dtype == dtype
    assert torch.equal(back.get_buffer("table").view(torch.uint8), table.view(torch.uint8))


class Complex(Two):
    """Complex numbers as a parameter, a conjugate view among the buffers."""

    def extend(self) -> None:
        self.phase = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.register_buffer("twice", torch.randn(2, 3, dtype=torch.complex128))
        self.register_buffer("turned", torch.randn(2, 3, dtype=torch.complex64).conj())

    def forward(self, x: Tensor) -> Tensor:
        extra = self.phase.abs().sum() + self.twice.abs().sum() + self.turned.imag.sum()
        return super().forward(x) + extra


@pytest.mark.parametrize("build", [lambda f: f, meta])
def test_complex_numbers_come_back(build: Any, tmp_path: Path) -> None:
    model = pruned(Complex(), X)
    back = load(save(model, tmp_path / "m"), factory=build(Complex))
    assert torch.equal(back(X), model(X))
    for name, value in state(model).items():
        assert torch.equal(state(back)[name], value)


class Described(Two):
    """Plain attributes of every kind beside the layers, some of which follow a cut."""

    def extend(self) -> None:
        self.hidden_size, self.sizes, self.rate = 6, [6, 3], 0.25
        self.shape = (8, 6)
        self.words, self.table = "gelu", {"a": (1, 2.5), "b": None}
        self.function, self.kind, self.dtype = F.relu, nn.ReLU, torch.float32


def test_plain_attributes_are_those_of_the_pruned_model(tmp_path: Path) -> None:
    model = pruned(Described(), X)
    back = load(save(model, tmp_path / "m"), factory=Described)
    told = ("hidden_size", "sizes", "rate", "shape", "words", "table", "function", "kind", "dtype")
    assert [getattr(back, key) for key in told] == [getattr(model, key) for key in told]
    assert back.hidden_size == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", 0.5), ("rate", float("inf")), ("sizes", [1, 2, 3]), ("words", "it's \"new\"\n"),
        ("table", {"a": (1,), 2: [True, None]}), ("hidden_size", -7), ("shape", ()),
    ],
)  # fmt: skip
def test_an_attribute_changed_after_the_pruning_comes_back(
    key: str, value: object, tmp_path: Path
) -> None:
    model = pruned(Described(), X)
    setattr(model, key, value)
    back = load(save(model, tmp_path / "m"), factory=Described)
    assert getattr(back, key) == value
    assert type(getattr(back, key)) is type(value)


def test_a_norm_and_a_dropout_changed_after_the_pruning_come_back(tmp_path: Path) -> None:
    model = pruned(Net(), IMAGES).eval()
    model.get_submodule("bn1").eps = 0.1
    back = load(save(model, tmp_path / "m"), factory=Net)
    assert torch.equal(back(IMAGES), model(IMAGES))


def test_frozen_parameters_come_back_frozen(tmp_path: Path) -> None:
    model = pruned(Two(), X)
    model.get_parameter("up.weight").requires_grad_(False)
    back = load(save(model, tmp_path / "m"), factory=Two)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in back.named_parameters()} == flags


class Counted(Two):
    """A state of plain values that a module keeps beside its tensors."""

    def extend(self) -> None:
        self._seen: dict[str, Any] = {"steps": 0}

    def get_extra_state(self) -> object:
        return self._seen

    def set_extra_state(self, state: Any) -> None:
        self._seen = state


def test_an_extra_state_of_plain_values_comes_back(tmp_path: Path) -> None:
    model = pruned(Counted(), X)
    model.set_extra_state({"steps": 3, "name": "a 'b'", "rates": (0.1, 1e-30), "raw": b"\x00"})
    back = load(save(model, tmp_path / "m"), factory=Counted)
    assert back.get_extra_state() == model.get_extra_state()


class Tensorial(Two):
    """A state that is a tensor."""

    def extend(self) -> None:
        self._seen = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        return self._seen

    def set_extra_state(self, state: Tensor) -> None:
        self._seen = state


def test_an_extra_state_that_is_a_tensor_comes_back(tmp_path: Path) -> None:
    model = pruned(Tensorial(), X)
    model.set_extra_state(torch.tensor([1.5, -2.0]))
    back = load(save(model, tmp_path / "m"), factory=Tensorial)
    assert torch.equal(back.get_extra_state(), torch.tensor([1.5, -2.0]))


class Renamed(Two):
    """A model whose state_dict calls its tensors something else."""

    def extend(self) -> None:
        self._register_state_dict_hook(_prefixed)
        self.register_load_state_dict_pre_hook(_stripped)


def _prefixed(module: nn.Module, state: dict[str, Any], prefix: str, local: object) -> None:
    for key in list(state):
        state[f"net/{key}"] = state.pop(key)


def _stripped(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for key in list(state):
        state[key.removeprefix("net/")] = state.pop(key)


def test_a_state_dict_with_other_names_comes_back(tmp_path: Path) -> None:
    model = pruned(Renamed(), X)
    same(load(save(model, tmp_path / "m"), factory=Renamed), model)


@dataclasses.dataclass
class Config:
    """What a home-made model is built from."""

    hidden: int = 6
    note: str = "plain"


class Configured(Two):
    """A model that keeps what it was built from."""

    def extend(self) -> None:
        self.config = Config()


def test_a_model_with_a_configuration_of_its_own_comes_back(tmp_path: Path) -> None:
    model = pruned(Configured(), X)
    same(load(save(model, tmp_path / "m"), factory=Configured), model)


class Loose(Two):
    """A tensor in a plain attribute, which nothing stores."""

    def extend(self) -> None:
        self.offset = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


def test_a_plain_tensor_comes_from_the_factory(tmp_path: Path) -> None:
    model = pruned(Loose(), X)
    assert torch.equal(load(save(model, tmp_path / "m"), factory=Loose)(X), model(X))


def test_a_plain_tensor_on_the_meta_device_is_named(tmp_path: Path) -> None:
    save(pruned(Loose(), X), tmp_path / "m")
    with pytest.raises(LoadError, match="'offset' has no values: the factory builds it on the"):
        load(tmp_path / "m", factory=meta(Loose))


@pytest.mark.parametrize("factory", [Net, Bag])
def test_a_factory_on_the_meta_device_is_filled_from_the_file(
    factory: Callable[[], nn.Module], tmp_path: Path
) -> None:
    x = IMAGES if factory is Net else torch.randn(2, 4)
    model = pruned(factory(), x).eval()
    back = load(save(model, tmp_path / "m"), factory=meta(factory))
    assert torch.equal(back(x), model(x))
    assert {t.device.type for t in state(back).values()} == {"cpu"}
    back(x).sum().backward()


def test_a_model_loaded_and_pruned_again_is_saved_and_loaded(tmp_path: Path) -> None:
    first = save(pruned(Net(), IMAGES), tmp_path / "first")
    model = load(first, factory=meta(Net)).eval()
    policy = otp.Policy(rules=otp.Channels(targets=["conv1"], keep=0.5))
    otp.prune_(model, policy, [IMAGES], timing=0)
    save(model, tmp_path / "second")
    back = load(tmp_path / "second", factory=lambda: load(first, factory=meta(Net)))
    same(back, model, IMAGES)


RULES = [
    otp.Layers(drop=1),
    otp.Layers(drop=1, replace="affine"),
    otp.Layers(drop=1, replace="low_rank"),
    otp.Linearize(drop=1, unfolded="allow"),
    otp.Linearize(drop=1),
]


class Deep(nn.Module):
    """Residual blocks with something to fold inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("build", [lambda f: f, meta])
@pytest.mark.parametrize("rule", RULES)
def test_stand_ins_and_folds_come_back(rule: Any, build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Deep().eval()
    otp.prune_(model, otp.Policy(rules=rule), [X.repeat(4, 1)], timing=0)
    back = load(save(model, tmp_path / "m"), factory=build(Deep))
    same(back, model)
    again = save(back, tmp_path / "again")
    name = "model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


# Anything that can be spelled


@settings(max_examples=25)
@given(nets(), st.integers(2, 4), st.booleans(), st.sampled_from(["1GB", 200]))
def test_random_nets_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    ops: list[Any],
    every: int,
    empty: bool,
    shard: str | int,
) -> None:
    def build() -> nn.Module:
        body = Chain([("conv", 5, 3), *ops], 3, (4, 3))
        return nn.Sequential(
            body, nn.Conv2d(body.width, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    root, x = tmp_path_factory.mktemp("net"), torch.linspace(-1, 1, 72).view(2, 3, 4, 3)
    model = alive(build().eval())
    plan = plan_for(model, x, every)
    cut_(model, plan.cuts)
    remember(model, plan)
    first = save(model, root / "first", shard=shard)
    back = load(first, factory=meta(build) if empty else build)
    same(back, model, x)
    second = save(back, root / "second", shard=shard)
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == sorted(path.name for path in second.glob("*.safetensors"))
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
