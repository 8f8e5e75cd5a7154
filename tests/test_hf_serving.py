"""`serving="uniform"`: one width everywhere, and a directory that stock Transformers reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.transformers_cases import WHOLE
from torch_otprune import (
    Budget,
    Channels,
    Experts,
    Heads,
    Hidden,
    Layers,
    OTPruneError,
    Policy,
    apply_,
    attach,
    prune_,
)
from torch_otprune.errors import PlanError
from torch_otprune.plan.allocate import Choice, allocate
from torch_otprune.plan.ties import kinds
from torch_otprune.structure.forward import flat_tensors, run
from torch_otprune.structure.graph import CostModel, Dim, Group, Term

pytestmark = pytest.mark.filterwarnings("ignore")

DEEP: dict[str, Any] = {"rules": [Channels(), Layers()], "budget": Budget(params="70%")}
ALL: dict[str, Any] = {"rules": [Hidden(keep=0.5), Heads(keep=0.5), Channels(keep=0.5)]}
JOBS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "bert": ("bert_classifier", ALL, {"hidden_size", "num_attention_heads", "intermediate_size"}),
    "gpt2": ("gpt2", DEEP, {"n_inner"}),
    "llama": (
        "llama",
        ALL,
        {"hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"},
    ),
    "t5": ("t5", {"rules": [Heads(keep=0.5), Channels(keep=0.5)]}, {"num_heads", "d_ff"}),
    "vit": ("vit", {"rules": [Heads(keep=0.5)]}, {"num_attention_heads"}),
    "mixtral": ("mixtral", {"rules": [Experts(keep=3)]}, {"num_local_experts"}),
    "qwen2": ("qwen2", {"rules": [Hidden(keep=0.5)]}, {"hidden_size"}),
    "modernbert": ("modernbert", DEEP, {"intermediate_size", "num_hidden_layers", "layer_types"}),
    "bart": ("bart", {"rules": [Channels(keep=0.5)]}, {"encoder_ffn_dim", "decoder_ffn_dim"}),
}

STOCK = """
import json, sys, warnings
warnings.filterwarnings("ignore")
sys.modules["torch_otprune"] = None  # whatever is installed: nobody can import it here
import torch, transformers
transformers.logging.set_verbosity_error()
found = {}
for directory in sys.argv[2:]:
    asked = torch.load(f"{directory}/asked.pt")
    kind = getattr(transformers, asked["kind"])
    model, told = kind.from_pretrained(directory, output_loading_info=True)
    with torch.no_grad():
        out = model(**asked["example"])[0]
    found[directory] = [torch.equal(out, asked["out"]), not any(told.values())]
json.dump(found, open(sys.argv[1], "w"))
"""


def dense(name: str) -> tuple[Any, list[Any]]:
    case = WHOLE[name]
    data = [case.example(seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    return case.model(dtype=torch.float32), data


def changed(model: Any, before: dict[str, Any]) -> set[str]:
    return {key for key, value in model.config.to_dict().items() if before.get(key) != value}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every job here, and in a process that cannot import this library."""
    root = tmp_path_factory.mktemp("uniform")
    found: dict[str, Any] = {}
    for job, (name, settings, _) in JOBS.items():
        model, data = dense(name)
        before = model.config.to_dict()
        prune_(model, Policy(**settings, serving="uniform"), data, timing=0)
        model.save_pretrained(root / job)
        with torch.no_grad():
            out = flat_tensors(run(model, data[0]))[0]
        asked = {"kind": type(model).__name__, "example": data[0], "out": out}
        torch.save(asked, root / job / "asked.pt")
        found[job] = [changed(model, before)]
    directories = [str(root / job) for job in JOBS]
    command = [sys.executable, "-I", "-c", STOCK, str(root / "found.json"), *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for directory, seen in json.loads((root / "found.json").read_text()).items():
        found[Path(directory).name] += seen
    return found


@pytest.mark.parametrize("job", JOBS)
def test_stock_transformers_computes_the_same_bits(told: dict[str, Any], job: str) -> None:
    _, equal, complete = told[job]
    assert complete  # nothing missing, nothing left over, no shape that differs
    assert equal


@pytest.mark.parametrize("job", JOBS)
def test_the_fields_that_speak_of_what_went_follow(told: dict[str, Any], job: str) -> None:
    assert told[job][0] >= JOBS[job][2]
    assert "quantization_config" not in told[job][0]


def test_without_a_plugin_a_configuration_says_nothing_new_when_serving_is_plain() -> None:
    model, data = dense("bert_classifier")
    before = model.config.to_dict()
    prune_(model, Policy(rules=[Channels(keep=0.5)], serving="plain"), data, timing=0)
    assert changed(model, before) == set()


def test_a_size_of_heads_that_no_field_holds_is_refused_before_anything_is_written() -> None:
    model, data = dense("bert_classifier")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(OTPruneError, match="the configuration cannot say that 2 of them") as error:
        prune_(model, Policy(rules=[Heads(keep=0.5)], serving="uniform"), data, timing=0)
    assert "serving='registered'" in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_stand_in_that_stays_is_refused_before_anything_is_written() -> None:
    model, data = dense("llama")
    policy = Policy(rules=[Layers(drop=1, replace="low_rank")], serving="uniform")
    with pytest.raises(OTPruneError, match="cannot say what would be left of the model") as error:
        prune_(model, policy, data, timing=0)
    assert "remove whole layers without a stand-in" in str(error.value)


def test_a_plan_made_for_another_way_of_serving_is_refused_and_rolled_back() -> None:
    model, data = dense("llama")
    config = model.config
    rule = Channels(targets="model.layers.0.*", keep=0.5)
    with attach(model, Policy(rules=[rule])) as attached:
        model(**data[0])
        plan = attached.plan()
    policy = plan.policy.model_copy(update={"serving": "uniform"})
    with pytest.raises(OTPruneError, match="cannot say what is left of the model") as error:
        apply_(model, plan.model_copy(update={"policy": policy}), data, timing=0)
    assert "intermediate_size" in str(error.value) or "out_features" in str(error.value)
    assert model.config is config
    assert model.model.layers[0].mlp.gate_proj.out_features == 32


def test_rules_that_leave_layers_of_a_kind_no_common_width_are_refused() -> None:
    model, data = dense("llama")
    rules = [
        Channels(
            targets=[f"model.layers.{at}.mlp.{name}" for name in ("gate_proj", "up_proj")],
            keep=keep,
        )
        for at, keep in (("0", 0.5), ("[1-4]", 0.25))
    ]
    with pytest.raises(OTPruneError, match="leave no number that all of them may keep") as error:
        prune_(model, Policy(rules=rules, serving="uniform"), data, timing=0)
    assert "give them one rule" in str(error.value)


class Plain(nn.Module):
    """Two blocks of one kind, and no configuration."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(3)]
        self.blocks = nn.Sequential(*block)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_a_model_without_a_configuration_gets_equal_widths() -> None:
    torch.manual_seed(0)
    model = Plain()
    policy = Policy(
        rules=[Channels(targets="blocks.*.0")], budget=Budget(params="60%"), serving="uniform"
    )
    prune_(model, policy, [torch.randn(64, 6)], timing=0)
    widths = {model.get_submodule(f"blocks.{i}.0").out_features for i in range(3)}
    assert len(widths) == 1
    assert widths < {*range(12)}


def three(*curves: list[float]) -> dict[str, Any]:
    """Three groups whose units cost 1, 2 and 3."""
    names = ("a", "b", "c")
    choices = [
        Choice(name, torch.tensor(curve, dtype=torch.float64), tuple(range(1, len(curve))))
        for name, curve in zip(names, curves, strict=True)
    ]
    terms = tuple(Term(n, 1, (Dim(0, ((n, i),)),)) for i, n in enumerate(names, start=1))
    return {"choices": choices, "costs": {"params": CostModel("params", terms)}}


@pytest.mark.parametrize("solver", ["milp", "greedy"])
def test_tied_groups_take_the_width_that_is_best_for_their_sum(solver: Any) -> None:
    # Alone, a would be wide and b narrow. Together they cost 3 a unit, and c costs 3 as well:
    # five units in all, of which c gains 2 for its second and the two others 10 for theirs.
    given = three([20, 19, 9, 8, 7], [20, 10, 10, 10, 10], [9, 4, 2, 1, 0])
    found = allocate(**given, limits={"params": 15}, kind={"b": "a"}, solver=solver)
    best = min(
        (
            sum(
                float(choice.curve[k])
                for choice, k in zip(given["choices"], (w, w, v), strict=True)
            ),
            (w, w, v),
        )
        for w in range(1, 5)
        for v in range(1, 5)
        if 3 * w + 3 * v <= 15
    )
    assert tuple(found.keep[name] for name in "abc") == best[1]


def test_groups_are_of_a_kind_where_one_field_speaks_of_them() -> None:
    model = WHOLE["bart"].model()
    names = [f"model.{side}.layers.{i}.fc1" for side in ("encoder", "decoder") for i in (0, 1)]
    found = kinds(model, [Group(name, 32, ()) for name in names])
    assert found == {
        names[0]: names[0],
        names[1]: names[0],
        names[2]: names[2],
        names[3]: names[2],
    }


def test_policies_name_the_three_ways_of_serving() -> None:
    with pytest.raises(OTPruneError, match="serving"):
        Policy(rules="channels", budget=Budget(macs="50%"), serving="onnx")  # type: ignore[arg-type]
    assert Policy(rules="channels", budget=Budget(macs="50%")).serving == "registered"


def test_hidden_and_heads_of_gpt2_write_down_what_was_left_to_a_rule() -> None:
    model, data = dense("gpt2")
    assert model.config.n_inner is None
    wide = model.config.n_embd
    policy = Policy(rules=[Hidden(keep=0.5), Heads(keep=0.5)], serving="uniform")
    prune_(model, policy, data, timing=0)
    assert model.config.n_embd == wide // 2
    assert model.config.n_inner == 4 * wide


def test_a_layer_that_shares_a_number_of_the_configuration_is_named() -> None:
    model, data = dense("bert_classifier")
    policy = Policy(rules=[Hidden(keep=0.5), Heads(keep=0.5)], serving="uniform")
    with pytest.raises(PlanError) as raised:
        prune_(model, policy, data, timing=0)
    assert "'bert.pooler.dense', which keeps its width" in raised.value.problem
    assert "add Channels(targets=['bert.pooler.dense'])" in raised.value.fix
    pooler = Channels(targets=["bert.pooler.dense"], keep=0.5)
    before = model.config.hidden_size
    whole = Policy(rules=[*policy.rules, pooler], serving="uniform")
    prune_(model, whole, data, timing=0)
    assert model.config.hidden_size == before // 2
