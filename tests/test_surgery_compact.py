"""Placeholders leave their lists, and the model says so; or everything stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, PlanError
from torch_otprune.nn import ChannelScale, Skip, Zero
from torch_otprune.surgery.compact import compact_, renamed, take_out_
from torch_otprune.surgery.compact_config import place_of, shorten_
from torch_otprune.surgery.compact_index import Entry, places, renumber_
from torch_otprune.surgery.layout import Layout
from torch_otprune.surgery.reload import unlike_config
from torch_otprune.surgery.standin import stand_in_

WIDTH = 4


class Layer(nn.Module):
    """A residual layer that knows its number."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.attn.layer_idx = number
        self.kind = "dense"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attn(x).tanh()
        return out


class Looped(nn.Module):
    """Runs its layers by number, as many as it believes to have."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.n_layer = layers
        self.h = nn.ModuleList(Layer(i) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.n_layer):
            x = self.h[i](x)
        return x


class Indexed(nn.Module):
    """Looks for one of its layers in a fixed place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[-1](self.layers[1](self.layers[0](x)))
        return out


class Scaled(nn.Module):
    """Weighs every layer by its number when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            number = getattr(getattr(layer, "attn", None), "layer_idx", 0)
            x = layer(x / (number + 1))
        return x


@dataclass
class Config:
    """A configuration that is no Transformers one."""

    n_layer: int = 5
    width: int = WIDTH


class Described(nn.Module):
    """Is built from a configuration."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(*(Layer(i) for i in range(config.n_layer)))

    def forward(self, x: Tensor) -> Tensor:
        assert len(self.blocks) == self.config.n_layer
        out: Tensor = self.blocks(x)
        return out


def alive(model: nn.Module) -> nn.Module:
    return model.double().eval()


def batch() -> Tensor:
    return torch.randn(3, WIDTH, dtype=torch.float64)


def skip(model: nn.Module, *paths: str) -> nn.Module:
    for path in paths:
        stand_in_(model, path, Skip())
    return model


def numbers(model: nn.Module) -> list[int]:
    return [vars(m)["layer_idx"] for m in model.modules() if "layer_idx" in vars(m)]


# -- taking entries out -----------------------------------------------------------------


@pytest.mark.parametrize("build", [Looped, lambda: Described(Config())])
def test_the_output_is_the_same_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    model, x = alive(build()), batch()
    name = next(
        n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))
    )
    skip(model, f"{name}.1", f"{name}.3")
    before = model(x)
    assert compact_(model, x) == (f"{name}.1", f"{name}.3")
    assert len(model.get_submodule(name)) == 3
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_what_is_left_is_numbered_anew() -> None:
    model = skip(alive(Looped()), "h.0", "h.3")
    compact_(model, batch())
    assert [n for n, _ in model.h.named_children()] == ["0", "1", "2"]
    assert numbers(model) == [0, 1, 2]
    assert model.n_layer == 3


def test_entries_with_names_keep_them() -> None:
    model = nn.Sequential()
    for name in ("stem", "body", "head"):
        model.add_module(name, Layer())
    alive(skip(model, "body"))
    assert compact_(model, batch()) == ("body",)
    assert [n for n, _ in model.named_children()] == ["stem", "head"]


def test_lists_in_lists_are_all_compacted() -> None:
    stages = [nn.Sequential(Layer(), Layer()), Skip(), nn.Sequential(Layer(), Layer(), Layer())]
    model = alive(nn.Sequential(*stages))
    skip(model, "2.0", "2.1")
    assert compact_(model, batch()) == ("1", "2.0", "2.1")
    assert [len(stage) for stage in model] == [2, 1]


def test_a_list_of_placeholders_keeps_one() -> None:
    model = skip(alive(Looped()), *(f"h.{i}" for i in range(5)))
    assert compact_(model, batch()) == ("h.1", "h.2", "h.3", "h.4")
    assert isinstance(model.h[0], Skip)


def test_a_stand_in_that_computes_stays() -> None:
    model = alive(Looped())
    stand_in_(model, "h.1", ChannelScale(WIDTH).double())
    assert compact_(skip(model, "h.2"), batch()) == ("h.2",)
    assert isinstance(model.h[1], ChannelScale)


@pytest.mark.parametrize(
    ("build", "gone", "left"), [(Indexed, ("layers.*",), [0, 1]), (Scaled, (), [0, 2])]
)
def test_a_list_whose_loss_changes_the_output_keeps_its_placeholders(
    build: Callable[[], nn.Module], gone: tuple[str, ...], left: list[int]
) -> None:
    model, x = skip(alive(build()), "layers.1"), batch()
    before, names = model(x), [n for n, _ in model.named_modules()]
    assert compact_(model, x) == gone
    assert [n for n, _ in model.named_modules()] == names
    assert numbers(model) == left  # where the output allows it, the cache is filled without gaps
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_one_list_that_must_stay_does_not_hold_back_another() -> None:
    model = alive(nn.ModuleDict({"loop": Looped(), "fixed": Indexed()}))
    model.forward = lambda x: model["fixed"](model["loop"](x))
    skip(model, "loop.h.2", "fixed.layers.1")
    assert compact_(model, batch()) == ("loop.h.2", "fixed.layers.*")


def test_compacting_twice_changes_nothing_more() -> None:
    model, x = skip(alive(Looped()), "h.2"), batch()
    compact_(model, x)
    state = {n: vars(m).get("layer_idx") for n, m in model.named_modules()}
    assert compact_(model, x) == ()
    assert {n: vars(m).get("layer_idx") for n, m in model.named_modules()} == state


def test_an_output_of_nan_is_still_the_same_output() -> None:
    model, x = skip(alive(Looped()), "h.2"), batch()
    x[0] = torch.nan
    assert compact_(model, x) == ("h.2",)


def test_training_flags_and_random_state_are_left_as_they_were() -> None:
    model = skip(alive(Looped()).train(), "h.2")
    state = torch.get_rng_state()
    compact_(model, batch_before := torch.ones(3, WIDTH, dtype=torch.float64))
    assert batch_before.sum() == 3 * WIDTH
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="the model does not run on batch 0") as caught:
        compact_(skip(alive(Looped()), "h.1"), torch.ones(2, 3, dtype=torch.float64))
    assert caught.value.fix == "make every batch one that the model's forward takes."


# -- configurations ---------------------------------------------------------------------


def test_the_configuration_is_a_copy() -> None:
    config = Config()
    model, twin = alive(Described(config)), Described(config)
    compact_(skip(model, "blocks.1"), batch())
    assert model.config.n_layer == 4
    assert config.n_layer == twin.config.n_layer == 5


def test_a_configuration_inside_another_is_one_object_still() -> None:
    @dataclass
    class Outer:
        inner: Config

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Outer(Config())
            self.body = Described(self.config.inner)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    model = alive(Wrapper())
    compact_(skip(model, "body.blocks.1"), batch())
    assert model.config.inner is model.body.config
    assert model.config.inner.n_layer == 4


class Stack(nn.Module):
    """One stack of an encoder-decoder, with a configuration of its own or a shared one."""

    def __init__(self, config: Any, layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(i) for i in range(layers))


class Pair(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, config: Any, *, shared: bool) -> None:
        super().__init__()
        self.config = config
        self.encoder = Stack(config if shared else copy.deepcopy(config), 4)
        self.decoder = Stack(config if shared else copy.deepcopy(config), 4)


@dataclass
class PairConfig:
    """Counts in all the usual words."""

    is_encoder_decoder: bool = True
    num_hidden_layers: int = 4
    encoder_layers: int = 4
    num_decoder_layers: int = 4
    num_attention_heads: int = 4
    d_model: int = 4


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("side", "expected"), [("encoder", (3, 3, 4)), ("decoder", (4, 4, 3))])
def test_each_side_has_its_own_counts(
    side: str, expected: tuple[int, int, int], shared: bool
) -> None:
    model = Pair(PairConfig(), shared=shared)
    shorten_(model, place_of(model, f"{side}.layers"), 4, {1})
    c = model.config
    assert (c.num_hidden_layers, c.encoder_layers, c.num_decoder_layers) == expected
    assert (c.num_attention_heads, c.d_model) == (4, 4)


def test_a_stack_with_its_own_configuration_counts_itself() -> None:
    model = Pair(PairConfig(), shared=False)
    shorten_(model, place_of(model, "decoder.layers"), 4, {1})
    assert model.decoder.config.num_hidden_layers == 3  # what its cache is built from
    assert model.encoder.config.num_hidden_layers == 4


@dataclass
class ListsConfig:
    """Says something of every layer, in all the usual ways."""

    num_hidden_layers: int = 5
    layer_types: tuple[str, ...] = ("a", "b", "c", "d", "e")
    no_rope_layers: tuple[int, ...] = (1, 1, 0, 1, 0)
    mlp_only_layers: tuple[int, ...] = (1, 3, 4)
    global_layer_ids: tuple[int, ...] = (0, 1, 2, 3, 4)
    first_k_dense_replace: int = 2
    intermediate_size: tuple[int, ...] = (1, 2, 3, 4, 5)
    conv_layer_widths: tuple[int, ...] = (1, 2, 3, 4, 5)
    out_indices: tuple[int, ...] = (1, 3)
    image_mean: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)


def test_values_by_layer_and_layer_numbers_follow() -> None:
    model = Stack(ListsConfig(), 5)
    shorten_(model, place_of(model, "layers"), 5, {1, 3})
    assert model.config == ListsConfig(
        num_hidden_layers=3,
        layer_types=("a", "c", "e"),
        no_rope_layers=(1, 0, 0),
        mlp_only_layers=(2,),
        global_layer_ids=(0, 1, 2),
        first_k_dense_replace=1,
        intermediate_size=(1, 3, 5),
    )


def test_a_stage_is_counted_where_stages_are() -> None:
    @dataclass
    class Staged:
        depths: tuple[int, ...] = (2, 3)
        num_layers: int = 3

    model = nn.Module()
    model.config = Staged()
    model.stages = nn.ModuleList(
        nn.ModuleDict({"blocks": nn.Sequential(*(Layer() for _ in range(n)))}) for n in (2, 3)
    )
    shorten_(model, place_of(model, "stages.1.blocks"), 3, {0})
    assert model.config == Staged(depths=(2, 2), num_layers=3)


def test_a_model_like_its_configuration_has_no_difference() -> None:
    model, x = alive(Described(Config())), batch()
    assert unlike_config(model) == ()
    skip(model, "blocks.1")
    assert unlike_config(model) == ("'blocks.1' is Skip, its configuration builds Layer.",)
    compact_(model, x)
    assert unlike_config(model) == ()


def test_what_the_configuration_cannot_say_is_told() -> None:
    model = alive(Described(Config()))
    model.blocks[0].kind = "sparse"
    model.blocks[1].attn = nn.Linear(WIDTH, WIDTH + 1)
    assert unlike_config(model) == (
        "'blocks.0' has kind sparse, its configuration builds dense.",
        "'blocks.1.attn' has out_features 5, its configuration builds 4.",
        "'blocks.1.attn' has weight (5, 4), its configuration builds (4, 4).",
        "'blocks.1.attn' has bias (5,), its configuration builds (4,).",
        "'blocks.1.attn' has layer_idx None, its configuration builds 1.",
    )


def test_a_model_that_needs_more_than_its_configuration_is_told() -> None:
    class Greedy(Described):
        def __init__(self, config: Config, more: int) -> None:
            super().__init__(config)
            assert more

    (line,) = unlike_config(Greedy(Config(), 1))
    assert line.startswith("the model cannot be built from its configuration: ")


# -- numbers ----------------------------------------------------------------------------


def entries(values: list[int | None]) -> list[Entry]:
    """Layers with these numbers; None has lost its attention."""
    found = []
    for old, value in enumerate(values):
        layer = Layer(value or 0)
        if value is None:
            stand_in_(layer, "attn", Zero(WIDTH))
        found.append(Entry(old, layer))
    return found


def read(found: list[Entry]) -> list[int | None]:
    return [vars(e.module.attn).get("layer_idx") for e in found]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([1, 2, 3], [1, 2, 3]),  # counted from one
        ([None, 1, 2], [None, 0, 1]),
        ([0, None, 2], [0, None, 1]),
        ([None, None, 1], [None, None, 0]),  # an earlier pass had moved it up
        ([0, 0, 1], [0, 0, 1]),  # means something else
        ([4, 2, 0], [4, 2, 0]),
    ],
)
def test_layers_move_up_where_others_lost_their_attention(
    before: list[int | None], after: list[int | None]
) -> None:
    found = entries(before)
    renumber_(found, None)
    assert read(found) == after


def test_layers_move_up_among_those_of_their_type() -> None:
    found = entries([None, 1, 2, 3])
    types = ["near", "far", "near", "far"]
    assert renumber_(found, types) == types
    assert read(found) == [None, 1, 0, 3]


def test_a_type_without_attentions_makes_room_for_one_with() -> None:
    found = entries([None, 1, None, 3])
    assert renumber_(found, ["near", "far", "near", "far"]) == ["far", "far", "far", "far"]
    assert read(found) == [None, 0, None, 1]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=9))
def test_places_are_a_rearrangement_that_keeps_types_and_order(
    layers: list[tuple[bool, str]],
) -> None:
    live = [i for i, (alive, _) in enumerate(layers) if alive]
    mute = [i for i, (alive, _) in enumerate(layers) if not alive]
    types = [kind for _, kind in layers]
    found = places(live, mute, types)
    assert sorted(found) == live
    assert len(set(found.values())) == len(live)
    for kind in set(types):
        taken = [found[i] for i in live if types[i] == kind]
        free = [i for i in sorted([*live, *mute]) if types[i] == kind]
        assert taken == free[: len(taken)]


def test_a_layer_that_two_entries_share_keeps_its_number() -> None:
    model = alive(Looped(4))
    model.h[2] = model.h[1]
    compact_(skip(model, "h.0"), batch())
    assert [layer.attn.layer_idx for layer in model.h] == [1, 1, 3]


def test_numbers_move_up_where_no_entry_goes() -> None:
    model, x = alive(Looped(3)), batch()
    stand_in_(model, "h.0.attn", Zero(WIDTH))
    assert compact_(model, x) == ("h.*",)
    assert numbers(model) == [0, 1]


# -- the same again, and the way back ---------------------------------------------------


def test_taking_out_does_what_compacting_did() -> None:
    model, x = alive(Looped()), batch()
    stand_in_(skip(model, "h.1"), "h.2.attn", Zero(WIDTH))
    twin = copy.deepcopy(model)
    take_out_(twin, compact_(model, x))
    assert str(twin) == str(model)
    assert numbers(twin) == numbers(model) == [0, 1, 2]
    assert vars(twin)["n_layer"] == vars(model)["n_layer"] == 4


def test_numbers_that_had_to_stay_stay() -> None:
    model, x = alive(Scaled()), batch()
    stand_in_(model, "layers.0.attn", Zero(WIDTH))
    gone = compact_(model, x)
    take_out_(model, gone)
    assert gone == ()
    assert numbers(model) == [1, 2]


@pytest.mark.parametrize("path", ["h.1", "h.9", "x.1", "x.*"])
def test_taking_out_what_is_no_placeholder_is_an_error(path: str) -> None:
    model = skip(alive(Looped()), "h.2")
    with pytest.raises(PlanError, match="does not hold its placeholder") as caught:
        take_out_(model, ["h.2", path])
    assert caught.value.where == f"'{path}'"
    assert len(model.h) == 5


def test_a_layout_brings_everything_back() -> None:
    model, x = alive(Described(Config())), batch()
    before, keys, config = model(x), list(model.state_dict()), model.config
    names = [n for n, _ in model.named_modules()]
    layout = Layout(model)
    stand_in_(skip(model, "blocks.1"), "blocks.2.attn", Zero(WIDTH))
    compact_(model, x)
    layout.restore_()
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert model.config is config
    assert config == Config()
    assert numbers(model) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


# -- stand-ins and names ----------------------------------------------------------------


def test_a_stand_in_says_what_its_block_said_but_not_its_number() -> None:
    model = Looped()
    stand_in_(model, "h.1", Skip())
    old = stand_in_(model, "h.2.attn", Zero(WIDTH))
    assert isinstance(old, nn.Linear)
    assert model.h[1].kind == "dense"
    assert "layer_idx" not in vars(model.h[2].attn)
    assert model.h[2].attn.in_features == WIDTH


def test_a_stand_in_keeps_its_own_parameters() -> None:
    model = Looped()
    model.h[1].scale = 0.5  # as attentions call their temperature
    stand_in_(model, "h.1", ChannelScale(WIDTH))
    assert isinstance(model.h[1].scale, nn.Parameter)


@pytest.mark.parametrize("path", ["h.7", "nowhere.at.all", ""])
def test_a_stand_in_for_nothing_is_an_error(path: str) -> None:
    with pytest.raises(PlanError) as caught:
        stand_in_(Looped(), path, Skip())
    assert caught.value.problem == f"the model has no module '{path}'."


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SIZES, st.data())
def test_renamed_says_what_compacting_does(sizes: list[int], data: st.DataObject) -> None:
    model = nn.Sequential(*(nn.Sequential(*(Layer() for _ in range(n))) for n in sizes)).double()
    paths = [f"{i}.{j}" for i, n in enumerate(sizes) for j in range(n)]
    skip(model, *data.draw(st.sets(st.sampled_from(paths))))
    before = dict(model.named_modules())
    gone = compact_(model, batch())
    after = {module: name for name, module in model.named_modules()}
    expected = {name: after[m] for name, m in before.items() if m in after}
    assert renamed(before, gone) == expected


def test_renamed_also_takes_the_names_of_tensors() -> None:
    keys = ["h.0.w", "h.1.w", "h.2.w", "head.w"]
    assert renamed(keys, ["h.1", "h.*", "*"]) == {
        "h.0.w": "h.0.w",
        "h.2.w": "h.1.w",
        "head.w": "head.w",
    }
