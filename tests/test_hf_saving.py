"""What is written beside the weights, what is refused, and what importing costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tests.transformers_cases import WHOLE
from torch_otprune import Channels, Layers, OTPruneError, Plan, Policy, Report, attach, prune_
from torch_otprune.errors import PlanError
from torch_otprune.integrations.transformers import card, save_pretrained
from torch_otprune.integrations.transformers_hook import METHOD
from torch_otprune.plan.model import Cost, Cut, Slice
from torch_otprune.surgery import carried

pytestmark = pytest.mark.filterwarnings("ignore")


def pruned(name: str = "llama", **settings: Any) -> tuple[Any, Report]:
    case = WHOLE[name]
    model = case.model(dtype=torch.float32)
    data = [case.example(seed=seed, dtype=torch.float32) for seed in (1, 2)]
    return model, prune_(model, Policy(**(settings or {"rules": Channels(keep=0.6)})), data)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A pruned Llama on disk."""
    pruned()[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def reload(directory: Path) -> Any:
    return type(WHOLE["llama"].model()).from_pretrained(directory)


def edit(directory: Path, change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_importing_stays_silent_and_imports_neither_torch_nor_transformers() -> None:
    code = "import torch_otprune, sys; assert not {'torch', 'transformers'} & {*sys.modules}"
    assert run_python(code) == ""


@pytest.mark.parametrize(
    "order",
    [
        "import torch_otprune, transformers.quantizers.auto as auto",
        "import transformers.quantizers.auto as auto, torch_otprune",
        "import torch_otprune, transformers\nfrom transformers.quantizers import auto",
    ],
)
def test_whichever_is_imported_first_the_hook_is_registered_once(order: str) -> None:
    code = f"""{order}
import sys, importlib, inspect
assert "otprune" in auto.AUTO_QUANTIZER_MAPPING
assert "otprune" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
watching = [f for f in sys.meta_path if type(f).__module__.startswith("torch_otprune")]
assert not watching
assert inspect.getsource(auto)  # its own loader is back
importlib.reload(torch_otprune)
print(end="")"""
    run_python(code)


def test_a_card_tells_how_to_load_what_was_asked_and_what_it_cost(tmp_path: Path) -> None:
    model, report = pruned()
    assert save_pretrained(model, tmp_path / "out", report=report) == tmp_path / "out"
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "import torch_otprune" in text
    assert str(report) in text
    assert report.plan.policy.to_yaml().strip() in text
    assert report.plan.hash in text
    assert torch.__version__ in text
    with torch.no_grad():
        ids = WHOLE["llama"].example()["input_ids"]
        assert torch.equal(reload(tmp_path / "out")(ids).logits, model(ids).logits)


def test_a_card_of_a_uniform_model_asks_for_nothing(tmp_path: Path) -> None:
    model, report = pruned(rules=Layers(drop=1))
    assert "nothing else need be installed" in card(model, report)
    assert report.plan.hash in card(model, report)


def test_the_snippet_of_a_card_loads_the_model_with_its_head(directory: Path) -> None:
    model, report = pruned("llama")
    save_pretrained(model, directory, report=report)
    text = (directory / "README.md").read_text()
    assert "| torch-otprune | `" in text and "| transformers | `" in text
    snippet = text.split("```python")[1].split("```")[0]
    assert f"from transformers import {type(model).__name__}" in snippet
    found: dict[str, Any] = {}
    exec(snippet.replace("path/to/this/directory", str(directory)), found)
    assert type(found["model"]) is type(model)


def test_a_plain_model_is_sent_to_our_own_format(tmp_path: Path) -> None:
    model, report = pruned(rules=Channels(keep=0.6), serving="plain")
    with pytest.raises(PlanError, match="from_pretrained could not load this model: '") as error:
        save_pretrained(model, tmp_path / "out", report=report)
    assert "otp.save(model, directory)" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_has_lost_its_plan_is_refused() -> None:
    model, report = pruned()
    del model.config.quantization_config
    with pytest.raises(PlanError, match="from_pretrained could not load this model") as error:
        card(model, report)
    assert error.value.where == "LlamaForCausalLM.config, which holds no plan"


def test_a_model_that_was_never_pruned_gets_no_card(tmp_path: Path) -> None:
    model = WHOLE["llama"].model(dtype=torch.float32)
    with pytest.raises(PlanError, match="no pruning is known for this LlamaForCausalLM") as error:
        save_pretrained(model, tmp_path / "out")
    assert error.value.fix.startswith("pass the report of its pruning")


@pytest.mark.parametrize("settings", [{"rules": Channels(keep=0.6)}, {"rules": Layers(drop=1)}])
def test_a_report_of_another_pruning_is_refused(settings: Any) -> None:
    model, own = pruned(**settings)
    _, other = pruned(rules=Channels(keep=0.7), seed=1)
    dense = WHOLE["llama"].model(dtype=torch.float32)
    assert own.plan.hash in card(model, own)
    for stranger in (model, dense):
        with pytest.raises(PlanError, match="this report is of another pruning") as error:
            card(stranger, other)
        assert error.value.fix.startswith("pass the report that the last pruning")
        assert error.value.where.endswith(" of this model")


def test_a_loaded_model_without_a_plan_takes_the_report_whose_sizes_it_has(tmp_path: Path) -> None:
    model, report = pruned(rules=Layers(drop=1))
    model.save_pretrained(tmp_path / "model")
    assert report.plan.hash in card(reload(tmp_path / "model"), report)


def test_adapters_around_a_model_are_no_transformers_model(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    model, report = pruned()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(PlanError, match="is no Transformers model") as error:
        save_pretrained(adapted, tmp_path / "out", report=report)
    assert "merge adapters first" in error.value.fix


def test_an_earlier_save_is_replaced_and_what_lies_beside_it_stays(directory: Path) -> None:
    model, _ = pruned()
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (directory / "vocab.txt").write_text("mine")
    (directory / "checkpoint-7").mkdir()
    (directory / "checkpoint-7" / "state.json").write_text("mine too")
    save_pretrained(model, directory)
    assert not (directory / "model-00001-of-00002.safetensors").exists()
    assert (directory / "vocab.txt").read_text() == "mine"
    assert (directory / "checkpoint-7" / "state.json").read_text() == "mine too"
    assert reload(directory) is not None


def test_another_directory_is_not_replaced(directory: Path) -> None:
    model, _ = pruned()
    foreign = directory.parent / "mine"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(OTPruneError, match="no directory of a Transformers model") as error:
        save_pretrained(model, foreign)
    assert "name a new or empty directory" in str(error.value)
    assert (foreign / "thesis.tex").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only_is_refused(tmp_path: Path) -> None:
    model, _ = pruned()
    tmp_path.chmod(0o500)
    with pytest.raises(OTPruneError, match="cannot be saved"):
        save_pretrained(model, tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_save_that_fails_half_way_leaves_what_was_there(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pruned()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full(directory: str, **_: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OTPruneError, match="No space left on device") as error:
        save_pretrained(model, directory)
    assert "on a disk with room" in str(error.value)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_another_module_is_sent_to_our_own_format() -> None:
    with pytest.raises(OTPruneError, match="a Linear is no Transformers model") as error:
        save_pretrained(nn.Linear(2, 2), "nowhere")
    assert "otp.save" in str(error.value)


def test_a_plan_for_another_model_names_the_first_module_that_differs(directory: Path) -> None:
    edit(directory, lambda config: config.update(intermediate_size=48))
    with pytest.raises(OTPruneError, match="cuts 32 channels, the model has 48") as error:
        reload(directory)
    assert "'model.layers.0.mlp.gate_proj'" in str(error.value)
    assert "restore config.json" in str(error.value)


def test_a_changed_configuration_names_the_first_tensor_that_differs(directory: Path) -> None:
    edit(directory, lambda config: config.update(num_hidden_layers=6))
    with pytest.raises(OTPruneError, match=r"'model\.layers\.5\..+' is only in one") as error:
        reload(directory)
    assert "copy the directory again" in str(error.value)


def test_weights_of_another_shape_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(OTPruneError, match=r"'model.norm.weight' is \[5\] there, \[24\]"):
        reload(directory)


def test_an_edited_plan_is_refused(directory: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["plans"][0]["plan"]["cuts"][0]["units"] += 1

    edit(directory, change)
    with pytest.raises(OTPruneError, match="its hash differs, so it was edited") as error:
        reload(directory)
    assert "save the model again" in str(error.value)


def test_without_this_library_stock_transformers_does_not_guess(directory: Path) -> None:
    code = """
import sys, transformers
transformers.logging.set_verbosity_error()
try:
    transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    assert "size" in str(error), error
else:
    raise SystemExit("it loaded")
"""
    run_python(code, str(directory))


def test_both_sides_say_the_same_method() -> None:
    assert METHOD == carried.METHOD


keeps = st.lists(st.integers(0, 300), min_size=1, unique=True).map(sorted)


@given(keeps, keeps)
def test_any_plan_survives_being_packed(one: list[int], two: list[int]) -> None:
    pieces = tuple(Slice(path=p, side="out", size=301, keep=tuple(one)) for p in ("a", "b"))
    cut = Cut(
        group="a",
        rule=0,
        units=301,
        keep=tuple(two),
        criterion="random",
        reason="",
        error=0.5,
        slices=pieces,
    )
    plan = Plan(
        policy=Policy(rules=Channels(keep="50%")),
        fingerprint="",
        calibration="none",
        samples=0,
        cuts=(cut,),
        params=Cost(before=2, after=1),
        macs=Cost(before=2, after=1),
    )
    packed = json.loads(json.dumps(carried.pack(plan)))
    assert carried.unpack(packed) == plan
    assert len(packed["kept"]) <= 2


def test_a_plan_takes_no_more_room_than_a_bit_per_unit() -> None:
    keep = list(range(0, 11008, 2))
    assert len(carried._short(keep)) < 1.4 * 11008 / 8
    assert carried._short([*range(4096)]) == "0-4095"


def test_attached_hooks_do_not_matter_to_the_configuration() -> None:
    model = WHOLE["llama"].model(dtype=torch.float32)
    with attach(model, Policy(rules=Channels(keep=0.6))) as attached:
        model(**WHOLE["llama"].example())
        attached.plan()
    assert not hasattr(model.config, "quantization_config")
