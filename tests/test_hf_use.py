"""What people do with a loaded model: a pruned one takes part in all of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers_cases import VOCAB, WHOLE, transformers
from torch_otprune import Budget, Channels, Experts, Heads, Layers, Policy, load, prune_, save

pytestmark = pytest.mark.filterwarnings("ignore")

UNEVEN = Policy(rules=[Heads(), Channels(), Layers()], budget=Budget(params="70%"))
SOME = Policy(
    rules=[Experts(targets="model.layers.1.*", keep=3), Heads(targets="model.layers.0.*", keep=1)]
)


def loaded(name: str, directory: Path, **options: Any) -> Any:
    """Prune, save, and load again."""
    case = WHOLE[name]
    model = case.model(dtype=torch.float32)
    data = [case.example(seed=seed, dtype=torch.float32) for seed in (1, 2)]
    prune_(model, SOME if name == "mixtral" else UNEVEN, data, timing=0)
    model.save_pretrained(directory)
    assert hasattr(model.config, "quantization_config")  # so the plan was needed
    return type(model).from_pretrained(directory, **options)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three pruned models on disk."""
    root = tmp_path_factory.mktemp("use")
    for name in ("llama", "bert_classifier", "mixtral"):
        loaded(name, root / name)
    return {name: root / name for name in ("llama", "bert_classifier", "mixtral")}


def classifier(places: dict[str, Path], **options: Any) -> Any:
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(places["bert_classifier"], **options)


def writer(places: dict[str, Path], name: str = "llama", **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(places[name], **options)


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(5))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Texts whose label is told by their first token."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = ids(32)[index].clone()
        text[0] = 3 + index % 3
        return {"input_ids": text, "labels": torch.tensor(index % 3)}


def trained(model: nn.Module, directory: Path, **options: Any) -> list[float]:
    settings = transformers.TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=16,
        num_train_epochs=60,
        learning_rate=3e-3,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_fine_tunes_it(places: dict[str, Path], tmp_path: Path) -> None:
    losses = trained(classifier(places), tmp_path)
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_gives_the_same_gradients(places: dict[str, Path]) -> None:
    found = []
    for checkpointing in (False, True):
        model = writer(places).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_lora_trains_on_top_of_it(places: dict[str, Path], tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(target_modules=["query", "value"], r=4, task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(places), settings)
    losses = trained(model, tmp_path)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(classifier(places), tmp_path / "adapter").eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_merged_lora_is_saved_as_a_pruned_model(places: dict[str, Path], tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(target_modules=["query"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(classifier(places), settings).merge_and_unload().eval()
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_cast_and_loaded_in_half_precision(places: dict[str, Path], dtype: Any) -> None:
    cast = writer(places).to(dtype)
    if dtype is torch.float16:
        cast = writer(places).half()
    read = writer(places, dtype=dtype)
    assert {p.dtype for p in (*cast.parameters(), *read.parameters())} == {dtype}
    with torch.no_grad():
        expected = writer(places)(input_ids=ids()).logits
        for model in (cast, read):
            far = (model(input_ids=ids()).logits.float() - expected).norm()
            assert far < 0.05 * expected.norm()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_places_it(places: dict[str, Path], device_map: str) -> None:
    model = writer(places, device_map=device_map)
    with torch.no_grad():
        expected = writer(places)(input_ids=ids()).logits
        assert torch.equal(model(input_ids=ids()).logits, expected)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_generate_writes_the_same_with_and_without_a_cache(
    places: dict[str, Path], name: str
) -> None:
    model = writer(places, name)
    given = {"attention_mask": torch.ones_like(ids()), "max_new_tokens": 8, "do_sample": False}
    found = [model.generate(ids(), use_cache=cache, **given) for cache in (True, False)]
    assert torch.equal(*found)


def test_a_pipeline_takes_the_directory(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    classify = transformers.pipeline(
        "text-classification", model=str(places["bert_classifier"]), tokenizer=tokenizer
    )
    assert classify("a b")[0]["label"].startswith("LABEL_")


def test_it_is_an_ordinary_model_again(places: dict[str, Path]) -> None:
    model = writer(places)
    marks = {"hf_quantizer", "is_quantized", "quantization_method"} & vars(model).keys()
    assert not marks
    assert isinstance(model.config.quantization_config, dict)


def test_another_head_is_put_on_a_pruned_body(places: dict[str, Path]) -> None:
    head = transformers.AutoModelForTokenClassification.from_pretrained(places["bert_classifier"])
    body = transformers.AutoModel.from_pretrained(places["bert_classifier"])
    with torch.no_grad():
        expected = body(input_ids=ids()).last_hidden_state
        assert torch.equal(head.bert(input_ids=ids()).last_hidden_state, expected)
        whole = classifier(places).bert(input_ids=ids()).last_hidden_state
    assert torch.equal(expected, whole)


def test_what_was_loaded_saves_in_our_own_format_too(
    places: dict[str, Path], tmp_path: Path
) -> None:
    model = writer(places)
    save(model, tmp_path / "ours")
    factory = partial(WHOLE["llama"].model, dtype=torch.float32)
    again = load(tmp_path / "ours", factory=factory)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def every_expert(model: Any) -> Iterator[int]:
    return (layer.mlp.experts.num_experts for layer in model.model.layers)


def test_the_loss_that_balances_experts_counts_those_that_are_left() -> None:
    case = WHOLE["mixtral"]
    model, data = case.model(dtype=torch.float32), [case.example()]
    report = prune_(model, Policy(rules=[Experts(keep=3)]), data, timing=0)
    assert set(every_expert(model)) == {model.num_experts, model.config.num_local_experts} == {3}
    out = model(**data[0], labels=data[0]["input_ids"], output_router_logits=True)
    # Exactly the number chosen per token where routing is even, and never less in expectation.
    assert out.aux_loss.item() == pytest.approx(2.0, rel=0.5)
    report.undo_()
    assert set(every_expert(model)) == {model.num_experts, model.config.num_local_experts} == {4}


def test_undoing_takes_the_plan_out_of_the_configuration() -> None:
    case = WHOLE["llama"]
    model = case.model(dtype=torch.float32)
    before = model.config
    report = prune_(model, UNEVEN, [case.example()], timing=0)
    assert hasattr(model.config, "quantization_config")
    assert not hasattr(before, "quantization_config")
    report.undo_()
    assert model.config is before


@pytest.mark.parametrize("serving", ["registered", "uniform", "plain"])
def test_our_own_format_comes_back_after_theirs_was_written(serving: Any, tmp_path: Path) -> None:
    case = WHOLE["llama"]
    factory = partial(case.model, dtype=torch.float32)
    model, data = factory(), [case.example(dtype=torch.float32)]
    policy = Policy(rules=Channels(keep=0.5, multiple_of=2), serving=serving)
    prune_(model, policy, data, timing=0)
    if serving != "plain":
        model.save_pretrained(tmp_path / "theirs")  # writes its own notes on the configuration
    save(model, tmp_path / "ours")
    again = load(tmp_path / "ours", factory=factory)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    said = (again.config.intermediate_size, factory().config.intermediate_size)
    assert (said[0] < said[1]) == (serving == "uniform")
