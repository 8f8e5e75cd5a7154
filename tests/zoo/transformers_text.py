"""Language models of Transformers: tiny, random weights, numbers that no coincidence can hide.

Left out: XGLM, whose eager attention masks by a number that float64 cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry

__all__ = ["ENTRIES", "entry", "ids"]

VOCAB, PAST = 50, 64
# four heads of six numbers, an inner width of 40, two layers: no two of these agree
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": PAST,
}
QUIET: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
WIDTHS = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2}
SEQ2SEQ: dict[str, Any] = {
    **WIDTHS,
    "vocab_size": VOCAB,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": PAST,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **QUIET,
}


def entry(
    model: str, config: str = "", *, example: Callable[[], Any], refused: str = "", **fields: Any
) -> Entry:
    """Describe an architecture by the names of its classes and the fields of its configuration.

    Args:
        model: name of the model's class.
        config: name of the configuration's class; the model's with another ending if not given.
        example: makes one batch.
        refused: as in `Entry`.
        fields: of the configuration.
    """

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, config or f"{_stem(model)}Config")
        made = getattr(transformers, model)(kind(**fields))
        return stirred(made)

    return Entry("transformers", build, example, refused, needs="transformers")


_HEADS = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForImageClassification")


def _stem(model: str) -> str:
    for head in (*_HEADS, "ForMaskedLM", "ForObjectDetection", "ForSemanticSegmentation", "Model"):
        if model.endswith(head):
            return model.removesuffix(head)
    return model


def stirred(model: nn.Module) -> nn.Module:
    """Give every parameter a share of chance, so that no bias, scale or gate is trivial."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def ids(length: int = 7, *more: str, short: int = 5) -> Callable[[], dict[str, Tensor]]:
    """Make a batch of token numbers.

    Args:
        length: tokens per sample.
        more: further inputs of `short` tokens.
        short: their length.
    """

    def batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        sizes = {"input_ids": length, **dict.fromkeys(more, short)}
        return {
            name: torch.randint(3, VOCAB, (2, size), generator=generator)
            for name, size in sizes.items()
        }

    return batch


_PAIR = ids(7, "decoder_input_ids")


def _text(model: str, config: str = "", **fields: Any) -> Entry:
    return entry(model, config, example=ids(), **(SIZES | QUIET | fields))


def _own(model: str, config: str = "", **fields: Any) -> Entry:
    return entry(model, config, example=ids(), **(QUIET | {"vocab_size": VOCAB} | fields))


def _pair(model: str, config: str = "", **fields: Any) -> Entry:
    return entry(model, config, example=_PAIR, **(SEQ2SEQ | fields))


_GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": PAST, "n_inner": 40}
_NEO = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "intermediate_size": 40}
_T5: dict[str, Any] = {
    "d_model": 24,
    "d_kv": 7,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_HALF_TURNED = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}
}
_MOE = {**GROUPED, "num_experts_per_tok": 2, "experts_implementation": "eager"}

ENTRIES: dict[str, Entry] = {
    # encoders
    "bert": _text("BertModel"),
    "bert-lm": _text("BertForMaskedLM"),
    "bert-eager": _text("BertModel", attn_implementation="eager"),
    "roberta": _text("RobertaModel"),
    "roberta-prelayernorm": _text("RobertaPreLayerNormModel"),
    "camembert": _text("CamembertModel"),
    "xlm-roberta": _text("XLMRobertaModel"),
    "electra": _text("ElectraModel", embedding_size=20),
    "albert": _text("AlbertModel", embedding_size=20),
    "mobilebert": _text(
        "MobileBertModel",
        embedding_size=16,
        hidden_size=24,
        intra_bottleneck_size=20,
        true_hidden_size=20,
        num_feedforward_networks=2,
    ),
    "distilbert": _own(
        "DistilBertModel",
        dim=24,
        n_layers=2,
        n_heads=4,
        hidden_dim=40,
        max_position_embeddings=PAST,
    ),
    "deberta": _text("DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _text(
        "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "mpnet": _text("MPNetModel"),
    "megatron-bert": _text("MegatronBertModel"),
    "nystromformer": _text("NystromformerModel", num_landmarks=7, segment_means_seq_len=7),
    "squeezebert": _text("SqueezeBertModel", embedding_size=24),
    "convbert": _text("ConvBertModel", embedding_size=20, conv_kernel_size=3, head_ratio=2),
    "fnet": _text("FNetModel"),
    "longformer": _text("LongformerModel", attention_window=[4, 4]),
    "big-bird": _text("BigBirdModel", attention_type="original_full"),
    "rembert": _text("RemBertModel", input_embedding_size=20, output_embedding_size=18),
    "roformer": _text("RoFormerModel", embedding_size=20),
    "esm": _text("EsmModel", position_embedding_type="rotary", mask_token_id=3),
    "modernbert": _text(
        "ModernBertModel",
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "xlm": _own("XLMModel", emb_dim=24, n_layers=2, n_heads=4, max_position_embeddings=PAST),
    "flaubert": _own(
        "FlaubertModel", emb_dim=24, n_layers=2, n_heads=4, max_position_embeddings=PAST
    ),
    "xlnet": _own("XLNetModel", d_model=24, n_layer=2, n_head=4, d_inner=40),
    "funnel": _own(
        "FunnelModel",
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=24,
        n_head=4,
        d_head=7,
        d_inner=40,
    ),
    # decoders
    "gpt": _own(
        "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=24, n_layer=2, n_head=4, n_positions=PAST
    ),
    "gpt2": _own("GPT2LMHeadModel", **_GPT2),
    "gpt2-eager": _own("GPT2LMHeadModel", attn_implementation="eager", **_GPT2),
    "gpt-bigcode": _own("GPTBigCodeForCausalLM", **_GPT2),
    "gpt-neo": _own(
        "GPTNeoForCausalLM",
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        max_position_embeddings=PAST,
        **_NEO,
    ),
    "gptj": _own("GPTJForCausalLM", rotary_dim=4, **_GPT2),
    "codegen": _own("CodeGenForCausalLM", rotary_dim=4, **_GPT2 | {"n_embd": 32, "n_head": 8}),
    "gpt-neox": _text("GPTNeoXForCausalLM"),
    "gpt-neox-japanese": _text("GPTNeoXJapaneseForCausalLM", intermediate_multiple_size=2),
    "opt": _text("OPTForCausalLM", ffn_dim=40, word_embed_proj_dim=20),
    "bloom": _own("BloomForCausalLM", hidden_size=24, n_layer=2, n_head=4),
    "mpt": _own("MptForCausalLM", d_model=24, n_heads=4, n_layers=2, max_seq_len=PAST),
    "falcon": _text("FalconForCausalLM", multi_query=True, ffn_hidden_size=40),
    "falcon-grouped": _text(
        "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=40
    ),
    "falcon-alibi": _text(
        "FalconForCausalLM", alibi=True, multi_query=False, parallel_attn=False, ffn_hidden_size=40
    ),
    "ctrl": _own("CTRLLMHeadModel", n_embd=24, n_layer=2, n_head=4, dff=40, n_positions=PAST),
    "biogpt": _text("BioGptForCausalLM"),
    "llama": _text("LlamaForCausalLM", num_key_value_heads=4),
    "llama-grouped": _text("LlamaForCausalLM", **GROUPED),
    "llama-one-key": _text("LlamaForCausalLM", num_key_value_heads=1),
    "llama-eager": _text("LlamaForCausalLM", attn_implementation="eager", **GROUPED),
    "llama-wide-heads": _text("LlamaForCausalLM", head_dim=10, **GROUPED),
    "llama-tied": _text("LlamaForCausalLM", tie_word_embeddings=True, **GROUPED),
    "mistral": _text("MistralForCausalLM", sliding_window=3, **GROUPED),
    "ministral": _text("MinistralForCausalLM", head_dim=6, **GROUPED),
    "qwen2": _text("Qwen2ForCausalLM", **GROUPED),
    "qwen3": _text("Qwen3ForCausalLM", head_dim=10, **GROUPED),
    "gemma": _text("GemmaForCausalLM", head_dim=10, **GROUPED),
    "gemma2": _text("Gemma2ForCausalLM", head_dim=10, sliding_window=3, **GROUPED),
    "gemma3": _text(
        "Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=10, sliding_window=3, **GROUPED
    ),
    "phi": _text("PhiForCausalLM", partial_rotary_factor=0.34, **GROUPED),
    "phi3": _text("Phi3ForCausalLM", **GROUPED),
    "stablelm": _text("StableLmForCausalLM", partial_rotary_factor=0.34, **GROUPED),
    "starcoder2": _text("Starcoder2ForCausalLM", **GROUPED),
    "olmo": _text("OlmoForCausalLM", **GROUPED),
    "olmo2": _text("Olmo2ForCausalLM", **GROUPED),
    "cohere": _text("CohereForCausalLM", **GROUPED),
    "cohere2": _text("Cohere2ForCausalLM", sliding_window=3, **GROUPED),
    "granite": _text("GraniteForCausalLM", **GROUPED),
    "nemotron": _text("NemotronForCausalLM", **GROUPED),
    "persimmon": _text("PersimmonForCausalLM", **_HALF_TURNED),
    "smollm3": _text("SmolLM3ForCausalLM", **GROUPED),
    "glm": _text("GlmForCausalLM", head_dim=6, **GROUPED),
    "glm4": _text("Glm4ForCausalLM", head_dim=6, **GROUPED),
    "helium": _text("HeliumForCausalLM", head_dim=6, **GROUPED),
    "diffllama": _text("DiffLlamaForCausalLM", **GROUPED),
    "minicpm3": _text(
        "MiniCPM3ForCausalLM",
        q_lora_rank=14,
        kv_lora_rank=11,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    ),
    # experts
    "mixtral": _text("MixtralForCausalLM", num_local_experts=3, **_MOE),
    "mixtral-batched": _text(
        "MixtralForCausalLM", num_local_experts=3, **_MOE | {"experts_implementation": "batched_mm"}
    ),
    "gpt-oss": _text("GptOssForCausalLM", head_dim=6, num_local_experts=3, **_MOE),
    "qwen2-moe": _text(
        "Qwen2MoeForCausalLM",
        num_experts=3,
        moe_intermediate_size=18,
        shared_expert_intermediate_size=14,
        **_MOE,
    ),
    "qwen3-moe": _text(
        "Qwen3MoeForCausalLM", num_experts=3, moe_intermediate_size=18, head_dim=10, **_MOE
    ),
    "olmoe": _text("OlmoeForCausalLM", num_experts=3, **_MOE),
    "deepseek-v3": _text(
        "DeepseekV3ForCausalLM",
        q_lora_rank=14,
        kv_lora_rank=11,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=18,
        first_k_dense_replace=1,
        **_MOE | {"num_key_value_heads": 4},
    ),
    "switch": _pair(
        "SwitchTransformersForConditionalGeneration",
        **_T5,
        num_experts=3,
        num_sparse_encoder_layers=1,
    ),
    "dbrx": _own(
        "DbrxForCausalLM",
        d_model=24,
        n_heads=4,
        n_layers=2,
        max_seq_len=PAST,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "ffn_hidden_size": 14,
            "hidden_size": 24,
            "moe_num_experts": 3,
            "moe_top_k": 2,
        },
    ),
    "granite-moe": _text("GraniteMoeForCausalLM", num_local_experts=3, **_MOE),
    # state spaces
    "mamba": _own("MambaForCausalLM", hidden_size=24, num_hidden_layers=2, state_size=5),
    "mamba2": _own(
        "Mamba2ForCausalLM",
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    "rwkv": _own("RwkvForCausalLM", hidden_size=24, num_hidden_layers=2, attention_hidden_size=24),
    "recurrent-gemma": _text(
        "RecurrentGemmaForCausalLM",
        num_key_value_heads=1,
        lru_width=24,
        attention_window_size=3,
        use_cache=False,
    ),
    "jamba": _text(
        "JambaForCausalLM",
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=5,
        **_MOE,
    ),
    # two stacks
    "t5": _pair("T5ForConditionalGeneration", **_T5),
    "t5-gated": _pair("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", **_T5),
    "mt5": _pair("MT5ForConditionalGeneration", **_T5),
    "umt5": _pair("UMT5ForConditionalGeneration", **_T5),
    "long-t5": _pair("LongT5ForConditionalGeneration", local_radius=3, **_T5),
    "bart": _pair("BartForConditionalGeneration"),
    "mbart": _pair("MBartForConditionalGeneration"),
    "pegasus": _pair("PegasusForConditionalGeneration"),
    "marian": _pair("MarianMTModel", "MarianConfig"),
    "blenderbot": _pair("BlenderbotForConditionalGeneration"),
    "m2m100": _pair("M2M100ForConditionalGeneration"),
    "plbart": _pair("PLBartForConditionalGeneration"),
    "led": _pair(
        "LEDForConditionalGeneration",
        attention_window=[4, 4],
        max_encoder_position_embeddings=PAST,
        max_decoder_position_embeddings=PAST,
    ),
    "prophetnet": entry(
        "ProphetNetForConditionalGeneration",
        example=_PAIR,
        vocab_size=VOCAB,
        hidden_size=24,
        encoder_ffn_dim=40,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=36,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        max_position_embeddings=PAST,
        decoder_start_token_id=1,
        **QUIET,
    ),
}
