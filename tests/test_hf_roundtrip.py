"""A pruned Transformers model comes back with `from_pretrained` in a fresh process, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.transformers_cases import WHOLE
from torch_otprune import Budget, Channels, Experts, Heads, Hidden, Layers, Policy, prune_
from torch_otprune.structure.forward import flat_tensors, run

pytestmark = pytest.mark.filterwarnings("ignore")

UNEVEN = Policy(rules=[Heads(), Channels(), Layers()], budget=Budget(params="70%"))
STANDINS = Policy(rules=[Layers(drop=1, replace="low_rank")])
HIDDEN = Policy(rules=[Hidden(keep=0.75)])  # 18, no multiple of the four heads
SOME = Policy(
    rules=[Experts(targets="model.layers.1.*", keep=3), Heads(targets="model.layers.0.*", keep=1)]
)
WIDTHS = Policy(rules=[Channels(keep=0.6)])

JOBS: dict[str, tuple[str, tuple[Policy, ...]]] = {
    **{
        f"{name}, uneven in width and depth": (name, (UNEVEN,))
        for name in ("bert", "gpt2", "llama", "t5", "vit", "qwen2", "modernbert", "bart", "gemma2")
    },
    "bert_classifier, uneven in width and depth": ("bert_classifier", (UNEVEN,)),
    "mixtral, experts and heads of some layers": ("mixtral", (SOME,)),
    "llama, stand-ins": ("llama", (STANDINS,)),
    "bart, stand-ins": ("bart", (STANDINS,)),
    "llama, stream": ("llama", (HIDDEN,)),
    "gpt2, stream and tied weights": ("gpt2", (HIDDEN,)),
    "qwen2, stream without a size of heads": ("qwen2", (HIDDEN,)),
    "bert_classifier, stream": ("bert_classifier", (HIDDEN,)),
    "llama, pruned twice": ("llama", (WIDTHS, UNEVEN)),
    "gpt2, stream, then layers": ("gpt2", (HIDDEN, STANDINS)),
}

LOAD = """
import sys, json, warnings
warnings.filterwarnings("ignore")
import torch_otprune
assert "torch" not in sys.modules
import torch, transformers
from torch_otprune.structure.forward import flat_tensors, run
transformers.logging.set_verbosity_error()
def equal(ones, others):
    return len(ones) == len(others) and all(map(torch.equal, ones, others))
found = {}
for directory in sys.argv[2:]:
    asked = torch.load(f"{directory}/asked.pt")
    model = getattr(transformers, asked["kind"]).from_pretrained(directory)
    with torch.no_grad():
        out = flat_tensors(run(model, asked["example"]))
        model.save_pretrained(f"{directory}/again")
        model = type(model).from_pretrained(f"{directory}/again")
        again = flat_tensors(run(model, asked["example"]))
    found[directory] = [equal(out, asked["out"]), equal(again, asked["out"])]
json.dump(found, open(sys.argv[1], "w"))
"""


def pruned(name: str, policies: tuple[Policy, ...]) -> tuple[Any, dict[str, Any]]:
    case = WHOLE[name]
    model = case.model(dtype=torch.float32)
    data = [case.example(seed=seed, dtype=torch.float32) for seed in (1, 2, 3)]
    for policy in policies:
        prune_(model, policy, data, timing=0)
    return model, data[0]


def written(model: nn.Module, example: dict[str, Any], directory: Path) -> None:
    model.save_pretrained(directory)
    with torch.no_grad():
        out = flat_tensors(run(model, example))
    asked = {"kind": type(model).__name__, "example": example, "out": out}
    torch.save(asked, directory / "asked.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job, pruned and saved here, then loaded in one other process."""
    root = tmp_path_factory.mktemp("hf")
    for job, (name, policies) in JOBS.items():
        directory = root / job.replace(" ", "_").replace(",", "")
        written(*pruned(name, policies), directory)
    directories = sorted(map(str, root.iterdir()))
    command = [sys.executable, "-c", LOAD, str(root / "found.json"), *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("job", JOBS)
def test_a_fresh_process_computes_the_same_bits(root: Path, job: str) -> None:
    directory = root / job.replace(" ", "_").replace(",", "")
    loaded, again = json.loads((root / "found.json").read_text())[str(directory)]
    assert loaded
    assert again  # saved and loaded once more


@pytest.mark.parametrize("job", JOBS)
def test_a_directory_holds_safetensors_and_no_code(root: Path, job: str) -> None:
    directory = root / job.replace(" ", "_").replace(",", "")
    names = {path.name for path in directory.iterdir()} - {"asked.pt", "again"}
    assert names <= {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((directory / "config.json").read_text())
