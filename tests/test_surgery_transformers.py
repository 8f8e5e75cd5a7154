"""Layers and halves of layers leave Transformers models, which stay ordinary ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers_cases import CASES, DEPTH, VOCAB, WIDTH, Case, Half, transformers
from torch_otprune.nn import ChannelScale, Skip, Zero
from torch_otprune.structure.flow import Visit
from torch_otprune.structure.forward import flat_tensors, run
from torch_otprune.structure.wiring import wiring_of
from torch_otprune.surgery.compact import compact_
from torch_otprune.surgery.layout import Layout
from torch_otprune.surgery.reload import unlike_config
from torch_otprune.surgery.standin import stand_in_

pytestmark = pytest.mark.filterwarnings("ignore")

HALVES = [
    (name, stack, half)
    for name, case in CASES.items()
    for stack, halves in case.halves.items()
    for half in halves
]
WRITERS = sorted(name for name, case in CASES.items() if case.generates)
STEPS = ((0, 6), (6, 8), (8, 9), (9, 10))  # tokens that are fed at a time


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each architecture in turn."""
    return CASES[request.param]


@torch.no_grad()
def outputs(model: nn.Module, example: dict[str, Any]) -> list[Tensor]:
    return flat_tensors(run(model, example))


def same(one: list[Tensor], other: list[Tensor], *, within: float = 0) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=within)


def without(case: Case, *gone: int, model: Any = None) -> Any:
    """Put placeholders where layers of every stack were."""
    model = case.model() if model is None else model
    for stack, wiring in case.stacks.items():
        for i in gone:
            stand_in_(model, f"{stack}.{i}", Skip(wiring))
    return model


def mute_(model: nn.Module, layer: str, half: Half) -> None:
    """Put stand-ins where one half of a layer was."""
    for path, wiring in half.inner:
        stand_in_(model, f"{layer}.{path}", Skip(wiring))
    path, wiring = half.end
    stand_in_(model, f"{layer}.{path}", Zero(WIDTH, wiring))


def silence(module: nn.Module, args: Any, out: Any) -> Any:
    """Zero a branch's output, as a hook on the dense model."""
    return torch.zeros_like(out) if isinstance(out, Tensor) else (out[0] * 0, *out[1:])


@contextmanager
def hooked(model: nn.Module, layers: list[str], half: Half) -> Iterator[None]:
    ends = [model.get_submodule(f"{layer}.{half.end[0]}") for layer in layers]
    handles = [end.register_forward_hook(silence) for end in ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def cached(model: Any, *, padded: bool = False) -> Tensor:
    """Feed a text in pieces, each piece's past in the cache; the logits of all of it."""
    ids, mask = text(padded=padded)
    parts, past = [], None
    for first, last in STEPS:
        feed = {"past_key_values": past, "use_cache": True}
        if model.config.is_encoder_decoder:
            out = model(input_ids=ids, decoder_input_ids=ids[:, first:last], **feed)
        else:
            piece, seen = ids[:, first:last], mask[:, :last]
            out = model(input_ids=piece, attention_mask=seen, **feed)
        parts.append(out.logits)
        past = out.past_key_values
    return torch.cat(parts, dim=1)


@torch.no_grad()
def uncached(model: Any, *, padded: bool = False) -> Tensor:
    ids, mask = text(padded=padded)
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def text(*, padded: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, : 3 * padded] = 0
    return ids, mask


@torch.no_grad()
def written(model: Any, example: dict[str, Any], *, use_cache: bool) -> Tensor:
    ids = example["input_ids"]
    mask = torch.ones_like(ids)
    many = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return model.generate(ids, attention_mask=mask, use_cache=use_cache, **many)


def numbers(model: nn.Module, stack: str) -> list[tuple[str, int]]:
    """Read every number in a stack, with the path within its layer."""
    return [
        (path.partition(".")[2], vars(module)["layer_idx"])
        for path, module in model.get_submodule(stack).named_modules()
        if "layer_idx" in vars(module)
    ]


# -- whole layers -----------------------------------------------------------------------


def test_whole_layers_leave_and_the_output_is_the_same_bit_for_bit(case: Case) -> None:
    model, example = without(case, 1, 3), case.example()
    before = outputs(model, example)
    assert compact_(model, example) == tuple(f"{s}.{i}" for s in case.stacks for i in (1, 3))
    same(outputs(model, example), before)


def test_the_configuration_counts_what_is_left(case: Case) -> None:
    model, example = without(case, 1, 3), case.example()
    compact_(model, example)
    assert {getattr(model.config, key) for key in case.counts.values()} == {DEPTH - 2}
    for stack in case.stacks:
        owner = model.get_submodule(stack.rpartition(".")[0])
        assert len(model.get_submodule(stack)) == DEPTH - 2
        if hasattr(owner, "config") and not model.config.is_encoder_decoder:
            assert owner.config is model.config


def test_one_side_alone_leaves_the_other_side_s_count(case: Case) -> None:
    first, *others = case.stacks
    model, example = case.model(), case.example()
    stand_in_(model, f"{first}.2", Skip(case.stacks[first]))
    compact_(model, example)
    assert getattr(model.config, case.counts[first]) == DEPTH - 1
    assert all(getattr(model.config, case.counts[other]) == DEPTH for other in others)


def test_numbers_are_contiguous(case: Case) -> None:
    model, example = without(case, 1, 3), case.example()
    compact_(model, example)
    for stack in case.stacks:
        found = numbers(model, stack)
        for path in {path for path, _ in found}:
            assert [n for p, n in found if p == path] == [0, 1, 2]


def test_types_of_layers_follow() -> None:
    case = CASES["qwen2"]
    model = without(case, 0, 2)
    compact_(model, case.example())
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_another_model_of_the_same_configuration_is_not_touched(case: Case) -> None:
    dense = case.model()
    config, told = dense.config, dense.config.to_dict()
    compact_(without(case, 1, 3, model=dense), case.example())
    assert dense.config is not config
    assert config.to_dict() == told


def test_saving_and_loading_brings_the_smaller_model_back(case: Case, tmp_path: Path) -> None:
    model, example = without(case, 1, 3, model=case.model(dtype=torch.float32)), case.example()
    example = {k: v.float() if v.is_floating_point() else v for k, v in example.items()}
    compact_(model, example)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Loaded weights lie in a mapped file; aligned as ours are, they give the same bits.
    same(outputs(copy.deepcopy(loaded), example), outputs(model, example))


def test_the_configuration_builds_the_smaller_model(case: Case) -> None:
    model, example = case.model(), case.example()
    assert unlike_config(model) == ()
    without(case, 1, 4, model=model)
    assert len(unlike_config(model)) == 2 * len(case.stacks)
    compact_(model, example)
    assert unlike_config(model) == ()


def test_a_copy_computes_the_same(case: Case) -> None:
    model, example = without(case, 1, 3), case.example()
    compact_(model, example)
    same(outputs(copy.deepcopy(model), example), outputs(model, example))


def test_undo_brings_names_configuration_and_outputs_back(case: Case) -> None:
    model, example = case.model(), case.example()
    before, keys, config = outputs(model, example), list(model.state_dict()), model.config
    told, places = config.to_dict(), [numbers(model, stack) for stack in case.stacks]
    layout = Layout(model)
    compact_(without(case, 1, 3, model=model), example)
    layout.restore_()
    assert list(model.state_dict()) == keys
    assert model.config is config
    assert config.to_dict() == told
    assert [numbers(model, stack) for stack in case.stacks] == places
    same(outputs(model, example), before)


@pytest.mark.parametrize("name", WRITERS)
def test_text_is_written_with_a_cache_as_without(name: str) -> None:
    case = CASES[name]
    model, example = without(case, case.first, 3), case.example()
    compact_(model, example)
    text = written(model, example, use_cache=True)
    assert torch.equal(text, written(model, example, use_cache=False))
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


# -- halves of layers -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stack", "half"), HALVES)
def test_a_muted_half_is_its_masked_branch(name: str, stack: str, half: str) -> None:
    case = CASES[name]
    model, example, which = case.model(), case.example(), case.halves[stack][half]
    layers = [f"{stack}.{case.first}", f"{stack}.3"]
    with hooked(model, layers, which):
        masked = outputs(model, example)
    same_anyway = outputs(model, example)
    for layer in layers:
        mute_(model, layer, which)
    same(outputs(model, example), masked, within=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(masked, same_anyway, strict=True))
    compact_(model, example)
    same(outputs(model, example), masked, within=1e-12)


@pytest.mark.parametrize(
    ("name", "padded"),
    # T5 cannot lose its first attention, and Gemma's eager one makes NaN of padding, dense too.
    [(n, p) for n in WRITERS for p in (False, True) if n != "t5" and (n, p) != ("gemma2", True)],
)
def test_a_cache_works_where_the_first_layers_lost_their_attention(name: str, padded: bool) -> None:
    case, which = CASES[name], [0, 3]
    stack = [*case.stacks][-1]
    model, example = case.model(), case.example()
    for i in which:
        mute_(model, f"{stack}.{i}", case.halves[stack]["attention"])
    expected = written(model, example, use_cache=False)
    compact_(model, example)
    ours = slice(3 * padded, None)
    got, all_at_once = cached(model, padded=padded), uncached(model, padded=padded)
    torch.testing.assert_close(got[:, ours], all_at_once[:, ours], rtol=0, atol=1e-12)
    assert torch.equal(written(model, example, use_cache=True), expected)


def test_without_new_numbers_the_cache_would_be_wrong() -> None:
    case = CASES["llama"]
    model, example = case.model(), case.example()
    mute_(model, "model.layers.0", case.halves["model.layers"]["attention"])
    assert (cached(model) - uncached(model)).abs().max() > 0.1
    compact_(model, example)
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


def test_a_type_that_lost_all_attentions_leaves_its_places_in_the_cache() -> None:
    case = CASES["qwen2"]
    model, example = case.model(), case.example()
    for i in (0, 2, 4):
        mute_(model, f"model.layers.{i}", case.halves["model.layers"]["attention"])
    compact_(model, example)
    assert set(model.config.layer_types) == {"full_attention"}
    assert [n for _, n in numbers(model, "model.layers")] == [0, 1]
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


def test_a_layer_that_became_a_scale_leaves_its_place_in_the_cache() -> None:
    case = CASES["llama"]
    model, example = case.model(), case.example()
    stand_in_(model, "model.layers.0", ChannelScale(WIDTH).double())
    compact_(model, example)
    assert [n for _, n in numbers(model, "model.layers")] == [0, 1, 2, 3]
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("path", "wiring"),
    [
        ("encoder.block.2.layer.0", ("x", "position_bias", None)),
        ("encoder.block.2.layer.1", "tensor"),
        ("decoder.block.2.layer.0", ("x", "position_bias", None)),
        ("decoder.block.2.layer.1", ("x", "position_bias", None)),
        ("decoder.block.2.layer.2", "tensor"),
    ],
)
def test_a_part_that_t5_looks_up_by_number_keeps_its_placeholder(path: str, wiring: Any) -> None:
    case = CASES["t5"]
    model, example = case.model(), case.example()
    stand_in_(model, path, Skip(wiring))
    before = outputs(model, example)
    assert not [p for p in compact_(model, example) if not p.endswith(".*")]
    assert isinstance(model.get_submodule(path), Skip)
    same(outputs(model, example), before)
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


def test_pruning_twice_keeps_the_cache_right() -> None:
    case = CASES["gpt2"]
    model, example, half = case.model(), case.example(), case.halves["transformer.h"]["attention"]
    mute_(model, "transformer.h.0", half)
    compact_(model, example)
    mute_(model, "transformer.h.1", half)
    stand_in_(model, "transformer.h.3", Skip())
    compact_(model, example)
    assert [n for _, n in numbers(model, "transformer.h")] == [0, 1]
    torch.testing.assert_close(cached(model), uncached(model), rtol=0, atol=1e-12)


# -- what layers return -----------------------------------------------------------------


def watched(model: nn.Module, example: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """Describe what modules return in one run."""
    calls: dict[str, Any] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            calls[path] = Visit(path, 0, args, kwargs, {}, output=out)

        return note

    modules = [(path, model.get_submodule(path)) for path in paths]
    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in modules]
    outputs(model, example)
    for handle in handles:
        handle.remove()
    return calls


def test_the_wiring_of_every_layer_is_found(case: Case) -> None:
    model = case.model()
    paths = [f"{stack}.{i}" for stack in case.stacks for i in range(case.first, DEPTH)]
    for path, call in watched(model, case.example(), paths).items():
        assert wiring_of(call) == case.stacks[path.rpartition(".")[0]]


@pytest.mark.parametrize(("name", "stack", "half"), HALVES)
def test_the_wiring_of_every_half_is_found(name: str, stack: str, half: str) -> None:
    case, which = CASES[name], CASES[name].halves[stack][half]
    wirings = {f"{stack}.2.{path}": wiring for path, wiring in (which.end, *which.inner)}
    for path, call in watched(case.model(), case.example(), [*wirings]).items():
        assert wiring_of(call, stream=False) == wirings[path]


def test_the_first_t5_block_makes_what_the_others_need() -> None:
    case = CASES["t5"]
    calls = watched(case.model(), case.example(), ["encoder.block.0", "decoder.block.0"])
    for call in calls.values():
        assert wiring_of(call) is None


# -- flags, checkpointing, odd architectures --------------------------------------------


def states(model: nn.Module, example: dict[str, Any]) -> set[int]:
    out = run(model, {**example, "output_hidden_states": True})
    return {len(v) for k, v in out.items() if k.endswith("hidden_states") and type(v) is tuple}


@torch.no_grad()
def test_hidden_states_are_one_more_than_layers(case: Case) -> None:
    model, example = without(case, 1, 3), case.example()
    assert states(model, example) == {DEPTH - 1}
    compact_(model, example)
    assert states(model, example) == {DEPTH - 1}


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_undo_brings_all_hidden_states_back(case: Case, when: str) -> None:
    model, example = case.model(), case.example()
    layout = Layout(model)
    if when == "before":
        states(model, example)
    compact_(without(case, 1, 3, model=model), example)
    if when == "after":
        states(model, example)
    layout.restore_()
    assert states(model, example) == {DEPTH + 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(case: Case, reentrant: bool) -> None:
    model, example = without(case, 1, 3), case.example()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and name_of(case) != "vit":
        model.enable_input_require_grads()
    before = gradients(model.train(), example)
    compact_(model, example)
    after = gradients(model, example)
    assert before.count(None) == after.count(None) == 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def name_of(case: Case) -> str:
    return next(name for name, other in CASES.items() if other is case)


def gradients(model: nn.Module, example: dict[str, Any]) -> list[Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # for the dropouts
    total = sum(t.square().sum() for t in flat_tensors(run(model, example)))
    assert isinstance(total, Tensor)
    total.backward()
    return [p.grad for p in model.parameters()]


def albert(groups: int, layers: int = 4) -> nn.Module:
    config = transformers.AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        num_attention_heads=4,
        intermediate_size=32,
    )
    return transformers.AlbertModel(config).double().eval()


@pytest.mark.parametrize(("groups", "path"), [(1, "0"), (1, "0.albert_layers.0"), (2, "1")])
def test_a_layer_that_runs_many_times_keeps_its_placeholder(groups: int, path: str) -> None:
    model, example = albert(groups), CASES["bert"].example()
    stand_in_(model, f"encoder.albert_layer_groups.{path}", Skip())
    before, config = outputs(model, example), model.config
    assert compact_(model, example) == ()
    assert model.config is config
    same(outputs(model, example), before)


def test_what_a_configuration_cannot_say_is_told_before_saving() -> None:
    case = CASES["modernbert"]
    model = case.model()
    stand_in_(model, "layers.0", Skip())
    compact_(model, case.example())
    assert unlike_config(model) == (
        "'layers.0.attn_norm' is LayerNorm, its configuration builds Identity.",
    )


def built(kind: str, **settings: Any) -> Any:
    """Build another model from the usual sizes."""
    usual = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{kind}Config")(**{**usual, **settings})
    suffix = "Model" if kind == "Qwen2Moe" else "ForCausalLM"
    return getattr(transformers, f"{kind}{suffix}")(config).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            "Qwen2Moe",
            {
                "num_key_value_heads": 2,
                "num_experts": 4,
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
                "mlp_only_layers": [1, 3],
            },
            {"mlp_only_layers": [0]},
        ),
        (
            "SmolLM3",
            {
                "num_key_value_heads": 2,
                "no_rope_layers": [1, 1, 0, 1, 0],
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            {"no_rope_layers": [1, 0, 0]},
        ),
    ],
)
def test_what_a_configuration_says_of_single_layers_follows(
    kind: str, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    model, example = built(kind, **settings), CASES["llama"].example()
    stack = "layers" if kind == "Qwen2Moe" else "model.layers"
    for i in (0, 3):
        stand_in_(model, f"{stack}.{i}", Skip())
    compact_(model, example)
    assert {key: getattr(model.config, key) for key in expected} == expected
    assert unlike_config(model) == ()


def test_a_stage_of_a_convolutional_model_is_counted() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic"
    )
    model = transformers.ResNetModel(config).double().eval()
    example = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    gone = ("encoder.stages.0.layers.1", "encoder.stages.0.layers.2")
    for path in gone:
        stand_in_(model, path, Skip())
    assert compact_(model, example) == gone
    assert model.config.depths == [1, 3]
    assert unlike_config(model) == ()


def test_parts_of_a_composite_model_are_counted_apart() -> None:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config={**sizes, "num_hidden_layers": 3, "vocab_size": VOCAB, "eos_token_id": 2},
        vision_config={**sizes, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).double().eval()
    example = CASES["bert"].example() | CASES["vit"].example()
    stand_in_(model, "vision_model.encoder.layers.1", Skip())
    compact_(model, example)
    assert model.config.vision_config.num_hidden_layers == 2
    assert model.config.text_config.num_hidden_layers == 3
    assert model.config.vision_config is model.vision_model.config
    assert config.vision_config.num_hidden_layers == 3
