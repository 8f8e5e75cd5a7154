"""Tiny Transformers models with random weights, and what mutes one of their halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

transformers: Any = pytest.importorskip("transformers", reason="Transformers is not installed")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("module names are those of Transformers 5", allow_module_level=True)

DEPTH, WIDTH, VOCAB, PAST = 5, 24, 50, 64

ATTENTION = ("x", None)
T5_ATTENTION = ("x", "position_bias", None)


@dataclass(frozen=True)
class Half:
    """One half of a layer, by paths within the layer.

    Args:
        end: the module whose output is added to the stream, and its wiring.
        inner: modules that only work for it, each with its wiring.
    """

    end: tuple[str, Any]
    inner: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        build: makes the model with so many layers.
        stacks: path of each list of layers, with a layer's own wiring.
        counts: the configuration's field that counts each stack's layers.
        halves: by stack, the halves of a layer by name.
        first: the first layer that may go.
        generates: whether it writes text with a cache.
    """

    build: Callable[[], nn.Module]
    stacks: dict[str, Any]
    counts: dict[str, str]
    halves: dict[str, dict[str, Half]]
    first: int = 0
    generates: bool = False
    batch: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"input_ids": (2, 7)})

    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        """Build it in evaluation mode, with weights that matter."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            for parameter in model.parameters():
                scale = 0.3 if parameter.dim() > 1 else 0.1
                parameter.data.add_(torch.randn_like(parameter), alpha=scale)
        return model.to(dtype).eval()

    def example(self, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Draw a batch."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype)
            if name == "pixel_values"
            else torch.randint(3, VOCAB, shape, generator=generator)
            for name, shape in self.batch.items()
        }


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=PAST,
        )
    )


def _vit() -> nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=DEPTH,
            n_head=4,
            n_positions=PAST,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=PAST,
            pad_token_id=0,
        )
    )


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=6,
            d_ff=32,
            num_layers=DEPTH,
            num_decoder_layers=DEPTH,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=2,
        )
    )


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            encoder_layers=DEPTH,
            decoder_layers=DEPTH,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=PAST,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def _modernbert() -> nn.Module:
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=PAST,
            local_attention=4,
            global_attn_every_n_layers=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    )


def _qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=PAST,
            use_sliding_window=True,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            pad_token_id=0,
        )
    )


def _gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=32,
            max_position_embeddings=PAST,
            sliding_window=3,
            pad_token_id=0,
        )
    )


_POST_NORM = {
    "attention": Half(("attention.output.dense", "tensor"), (("attention.self", ATTENTION),)),
    "mlp": Half(("output.dense", "tensor"), (("intermediate", "tensor"),)),
}
_LLAMA = {
    "attention": Half(("self_attn", ATTENTION), (("input_layernorm", "tensor"),)),
    "mlp": Half(("mlp", "tensor"), (("post_attention_layernorm", "tensor"),)),
}
_GEMMA = {
    "attention": Half(
        ("post_attention_layernorm", "tensor"),
        (("self_attn", ATTENTION), ("input_layernorm", "tensor")),
    ),
    "mlp": Half(
        ("post_feedforward_layernorm", "tensor"),
        (("mlp", "tensor"), ("pre_feedforward_layernorm", "tensor")),
    ),
}
_T5_ENCODER = {
    "attention": Half(("layer.0.SelfAttention", T5_ATTENTION), (("layer.0.layer_norm", "tensor"),)),
    "mlp": Half(("layer.1.DenseReluDense", "tensor"), (("layer.1.layer_norm", "tensor"),)),
}
_T5_DECODER = {
    "attention": _T5_ENCODER["attention"],
    "cross": Half(("layer.1.EncDecAttention", T5_ATTENTION), (("layer.1.layer_norm", "tensor"),)),
    "mlp": Half(("layer.2.DenseReluDense", "tensor"), (("layer.2.layer_norm", "tensor"),)),
}
# The normalisations come after the additions, and `fc2` alone writes the second branch.
_BART_ENCODER = {
    "attention": Half(("self_attn", ATTENTION)),
    "mlp": Half(("fc2", "tensor"), (("fc1", "tensor"),)),
}
_BART_DECODER = {**_BART_ENCODER, "cross": Half(("encoder_attn", ATTENTION))}

_SEQ2SEQ = {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}

CASES = {
    "bert": Case(
        _bert,
        {"encoder.layer": "tensor"},
        {"encoder.layer": "num_hidden_layers"},
        {"encoder.layer": _POST_NORM},
    ),
    "vit": Case(
        _vit,
        {"layers": "tensor"},
        {"layers": "num_hidden_layers"},
        {
            "layers": {
                "attention": Half(("attention", ATTENTION), (("layernorm_before", "tensor"),)),
                "mlp": Half(("mlp", "tensor"), (("layernorm_after", "tensor"),)),
            }
        },
        batch={"pixel_values": (2, 3, 8, 8)},
    ),
    "gpt2": Case(
        _gpt2,
        {"transformer.h": "tensor"},
        {"transformer.h": "n_layer"},
        {
            "transformer.h": {
                "attention": Half(("attn", ATTENTION), (("ln_1", "tensor"),)),
                "mlp": Half(("mlp", "tensor"), (("ln_2", "tensor"),)),
            }
        },
        generates=True,
    ),
    "llama": Case(
        _llama,
        {"model.layers": "tensor"},
        {"model.layers": "num_hidden_layers"},
        {"model.layers": _LLAMA},
        generates=True,
    ),
    "t5": Case(
        _t5,
        {"encoder.block": ("x", 2, None), "decoder.block": ("x", 2, 5)},
        {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
        {"encoder.block": _T5_ENCODER, "decoder.block": _T5_DECODER},
        first=1,
        generates=True,
        batch=_SEQ2SEQ,
    ),
    "bart": Case(
        _bart,
        {"model.encoder.layers": "tensor", "model.decoder.layers": "tensor"},
        {"model.encoder.layers": "encoder_layers", "model.decoder.layers": "decoder_layers"},
        {"model.encoder.layers": _BART_ENCODER, "model.decoder.layers": _BART_DECODER},
        generates=True,
        batch=_SEQ2SEQ,
    ),
    "modernbert": Case(
        _modernbert,
        {"layers": "tensor"},
        {"layers": "num_hidden_layers"},
        {
            "layers": {
                "attention": Half(("attn", ATTENTION), (("attn_norm", "tensor"),)),
                "mlp": Half(("mlp", "tensor"), (("mlp_norm", "tensor"),)),
            }
        },
    ),
    "qwen2": Case(
        _qwen2,
        {"model.layers": "tensor"},
        {"model.layers": "num_hidden_layers"},
        {"model.layers": _LLAMA},
        generates=True,
    ),
    "gemma2": Case(
        _gemma2,
        {"model.layers": "tensor"},
        {"model.layers": "num_hidden_layers"},
        {"model.layers": _GEMMA},
        generates=True,
    ),
}


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=PAST,
            pad_token_id=0,
        )
    )


def _classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=PAST,
            num_labels=3,
        )
    )


# Without halves: these are only saved, loaded and trained.
WHOLE = {
    **CASES,
    "mixtral": Case(_mixtral, {}, {}, {}, generates=True),
    "bert_classifier": Case(_classifier, {}, {}, {}),
}
