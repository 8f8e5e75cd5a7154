"""Every Transformers architecture: pruned equals masked, without a hint, or refused with a reason.

`-m zoo` asks for all of them; without it, the twelve that between them meet every kind of trouble.
"""

from __future__ import annotations

import re
import time

import pytest

from tests.zoo import transformers_other, transformers_text
from tests.zoo.oracle import Case, case_of, differences
from torch_otprune.structure import Group

pytest.importorskip("transformers", reason="Transformers is not installed")

SHELVES = {**transformers_text.ENTRIES, **transformers_other.ENTRIES}
TOLERANCE = 1e-5
SECONDS = 60.0

# fused and grouped queries, one key for all, Conv1D, experts, scans, windows, two stacks, tables
FAST = (
    "albert",
    "bloom",
    "convnext",
    "gpt2",
    "llama-grouped",
    "llama-one-key",
    "mamba2",
    "mixtral",
    "phi3",
    "prophetnet",
    "swin",
    "t5",
    "vit",
)

# Where forward takes a size from something that stays, no cut of the weights can follow: the trial
# finds it, and says at which line.
COUNTED = {
    "blip",
    "convbert",
    "focalnet",
    "glpn",
    "groupvit",
    "led",
    "longformer",
    "mobilevitv2",
    "prophetnet",
    "pvt",
    "pvt-v2",
    "segformer",
    "squeezebert",
}

# Groups of channels, of heads, of streams that go; a change of the analysis must lose none.
FOUND = {
    "bert": (2, 2, 0),
    "bert-lm": (2, 2, 1),
    "bert-eager": (2, 2, 0),
    "roberta": (2, 2, 0),
    "roberta-prelayernorm": (2, 2, 0),
    "camembert": (2, 2, 0),
    "xlm-roberta": (2, 2, 0),
    "electra": (2, 2, 1),
    "albert": (1, 1, 1),
    "mobilebert": (9, 2, 0),
    "distilbert": (2, 2, 0),
    "deberta": (3, 2, 0),
    "deberta-v2": (3, 2, 0),
    "mpnet": (2, 1, 0),
    "megatron-bert": (2, 2, 0),
    "nystromformer": (2, 2, 0),
    "squeezebert": (2, 0, 0),
    "convbert": (2, 0, 1),
    "fnet": (2, 0, 1),
    "longformer": (2, 0, 0),
    "big-bird": (2, 2, 0),
    "rembert": (2, 2, 1),
    "roformer": (2, 0, 1),
    "esm": (2, 2, 0),
    "modernbert": (2, 2, 0),
    "xlm": (2, 2, 0),
    "flaubert": (2, 2, 0),
    "xlnet": (4, 0, 0),
    "funnel": (3, 0, 0),
    "gpt": (2, 2, 1),
    "gpt2": (2, 2, 1),
    "gpt2-eager": (2, 2, 1),
    "gpt-bigcode": (2, 2, 1),
    "gpt-neo": (2, 2, 1),
    "gptj": (2, 2, 1),
    "codegen": (2, 2, 1),
    "gpt-neox": (2, 2, 1),
    "gpt-neox-japanese": (2, 2, 1),
    "opt": (3, 2, 1),
    "bloom": (2, 0, 1),
    "mpt": (2, 0, 1),
    "falcon": (2, 0, 1),
    "falcon-grouped": (2, 2, 1),
    "falcon-alibi": (2, 0, 1),
    "ctrl": (2, 2, 1),
    "biogpt": (2, 2, 1),
    "llama": (2, 2, 1),
    "llama-grouped": (2, 2, 1),
    "llama-one-key": (2, 2, 1),
    "llama-eager": (2, 2, 1),
    "llama-wide-heads": (2, 2, 1),
    "llama-tied": (2, 2, 1),
    "mistral": (2, 2, 1),
    "ministral": (2, 2, 1),
    "qwen2": (2, 2, 1),
    "qwen3": (2, 2, 1),
    "gemma": (2, 2, 1),
    "gemma2": (2, 2, 1),
    "gemma3": (2, 2, 1),
    "phi": (2, 2, 1),
    "phi3": (2, 2, 1),
    "stablelm": (2, 2, 1),
    "starcoder2": (2, 2, 1),
    "olmo": (2, 2, 1),
    "olmo2": (2, 2, 1),
    "cohere": (2, 2, 1),
    "cohere2": (2, 2, 1),
    "granite": (2, 2, 1),
    "nemotron": (2, 2, 1),
    "persimmon": (2, 2, 1),
    "smollm3": (2, 2, 1),
    "glm": (2, 2, 1),
    "glm4": (2, 2, 1),
    "helium": (2, 2, 1),
    "diffllama": (2, 0, 1),
    "minicpm3": (2, 2, 5),
    "mixtral": (2, 2, 1),
    "mixtral-batched": (2, 2, 1),
    "gpt-oss": (2, 2, 1),
    "qwen2-moe": (4, 2, 1),
    "qwen3-moe": (2, 2, 1),
    "olmoe": (2, 2, 1),
    "deepseek-v3": (3, 2, 5),
    "switch": (6, 3, 0),
    "dbrx": (0, 2, 1),
    "granite-moe": (2, 2, 1),
    "mamba": (4, 0, 1),
    "mamba2": (0, 2, 1),
    "rwkv": (2, 0, 0),
    "recurrent-gemma": (2, 2, 1),
    "jamba": (3, 1, 2),
    "t5": (4, 3, 0),
    "t5-gated": (4, 3, 0),
    "mt5": (4, 3, 0),
    "umt5": (4, 6, 0),
    "long-t5": (4, 3, 0),
    "bart": (4, 6, 0),
    "mbart": (4, 6, 0),
    "pegasus": (4, 6, 0),
    "marian": (4, 6, 0),
    "blenderbot": (4, 6, 0),
    "m2m100": (4, 6, 0),
    "plbart": (4, 6, 0),
    "led": (4, 0, 0),
    "prophetnet": (4, 0, 0),
    "vit": (2, 2, 1),
    "vit-eager": (2, 2, 0),
    "deit": (2, 2, 1),
    "beit": (2, 2, 1),
    "data2vec-vision": (2, 1, 0),
    "dinov2": (2, 2, 0),
    "dinov2-swiglu": (2, 2, 0),
    "dinov2-registers": (2, 2, 0),
    "dinov3-vit": (2, 0, 0),
    "ijepa": (2, 2, 0),
    "vit-msn": (2, 2, 0),
    "vit-mae": (2, 2, 0),
    "yolos": (6, 2, 0),
    "swin": (3, 3, 2),
    "swinv2": (6, 3, 2),
    "swin-eager": (3, 3, 1),
    "focalnet": (2, 0, 0),
    "hiera": (2, 2, 1),
    "segformer": (5, 2, 1),
    "pvt": (2, 2, 0),
    "pvt-v2": (2, 0, 0),
    "glpn": (2, 2, 0),
    "mobilevit": (32, 9, 3),
    "mobilevitv2": (22, 0, 0),
    "levit": (10, 0, 0),
    "swiftformer": (12, 0, 4),
    "convnext": (4, 0, 4),
    "convnextv2": (0, 0, 8),
    "resnet": (12, 0, 0),
    "resnet-basic": (7, 0, 0),
    "regnet": (17, 0, 0),
    "bit": (0, 0, 0),
    "mobilenet-v1": (13, 0, 0),
    "mobilenet-v2": (25, 0, 0),
    "efficientnet": (24, 0, 0),
    "poolformer": (4, 0, 4),
    "dinov3-convnext": (4, 0, 3),
    "hgnet-v2": (50, 0, 0),
    "upernet": (45, 0, 0),
    "vitdet": (2, 2, 2),
    "clip": (4, 4, 0),
    "siglip": (5, 5, 0),
    "clip-vision": (2, 2, 0),
    "blip": (4, 4, 1),
    "groupvit": (16, 0, 0),
    "git": (4, 4, 2),
    "detr": (12, 3, 0),
    "maskformer-swin": (3, 3, 1),
    "sam-vision": (2, 0, 2),
    "whisper": (5, 6, 1),
    "wav2vec2": (3, 2, 0),
    "wav2vec2-stable": (2, 2, 1),
    "wav2vec2-ctc": (3, 2, 2),
    "hubert": (3, 2, 1),
    "wavlm": (3, 0, 0),
    "unispeech": (3, 2, 0),
    "sew": (3, 2, 2),
    "data2vec-audio": (2, 2, 2),
    "wav2vec2-conformer": (7, 0, 0),
    "speech-to-text": (5, 6, 1),
    "ast": (2, 2, 0),
    "encodec": (14, 0, 0),
    "patchtst": (2, 2, 0),
    "patchtsmixer": (4, 0, 0),
    "gpt2-embeds": (2, 2, 0),
}

_LINE = re.compile(r"\(at \w+\.py:\d+\)|differ by")
_SAYS_WHERE = re.compile(r"\(op [\w.]+ at \S+\)|are one tensor|'[\w.:]+' did not run as a module")
_SAYS_WHAT = (
    "reach the model's output",
    "no layer consumes",
    "into one unit",
    "compete in",
    "product of two activations",
    "is tied to read",
    "the router",
)


def split(case: Case) -> tuple[list[Group], dict[str, str]]:
    """Tell the groups that pass the trial one by one from those that do not, with its words."""
    kept, refused = [], {}
    for group in (g for g in case.graph.groups if g.kind in {"channels", "heads", "hidden"}):
        far, said = case.compared([group], 0.5)
        if far < TOLERANCE:
            kept.append(group)
        else:
            refused[group.name] = said
    return kept, refused


def hold(name: str) -> None:
    """Hold an architecture to the promise."""
    case = case_of(SHELVES[name])
    kept, refused = split(case)
    assert bool(refused) == (name in COUNTED), refused
    assert all(_LINE.search(said) for said in refused.values()), refused
    found = tuple(sum(g.kind == kind for g in kept) for kind in ("channels", "heads", "hidden"))
    assert found == FOUND[name]
    for blocked in case.graph.blocked:
        where = _SAYS_WHERE.search(blocked.reason)
        assert where or any(word in blocked.reason for word in _SAYS_WHAT), blocked.reason
        assert blocked.fix
    for what, far, said in differences(case, kept):
        assert far < TOLERANCE, f"{what}: {said}"


@pytest.mark.parametrize("name", FAST)
def test_pruned_equals_masked_or_is_refused_with_a_reason(name: str) -> None:
    hold(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(set(SHELVES) - set(FAST)))
def test_every_other_one_as_well(name: str) -> None:
    start = time.perf_counter()
    hold(name)
    assert time.perf_counter() - start < SECONDS


def test_the_shelves_hold_more_than_a_hundred_architectures() -> None:
    assert len(SHELVES) > 100
    assert set(FOUND) == set(SHELVES)
    assert set(SHELVES) >= COUNTED
