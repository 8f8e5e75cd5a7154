"""Transformers models that see, hear or do both: tiny, with random weights.

Left out: CvT, whose class reads lists of its configuration that a two-stage net lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.zoo.entry import Entry
from tests.zoo.transformers_text import QUIET, SEQ2SEQ, SIZES, VOCAB, entry

__all__ = ["ENTRIES"]


def pictures(size: int = 16, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    """Make a batch of square pictures."""

    def batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (2, channels, size, size)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}

    return batch


def sound(name: str, *shape: int, tokens: int = 0) -> Callable[[], dict[str, Tensor]]:
    """Make a batch of waves or spectra, with the first words of their text."""

    def batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = {name: torch.randn((2, *shape), generator=generator, dtype=torch.float64)}
        if tokens:
            made["decoder_input_ids"] = torch.randint(3, VOCAB, (2, tokens), generator=generator)
        return made

    return batch


def both(size: int = 16, length: int = 6) -> Callable[[], dict[str, Tensor]]:
    """Make a batch of pictures with texts."""

    def batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        numbers = torch.randint(3, VOCAB, (2, length), generator=generator)
        return {**pictures(size)(), "input_ids": numbers}

    return batch


def _masked() -> dict[str, Tensor]:
    """Make a batch of pictures and say which patches are hidden: by default that is chance."""
    return {**pictures()(), "noise": torch.linspace(0, 1, 32, dtype=torch.float64).view(2, 16)}


_VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
_SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [2, 3],
    "window_size": 2,
}
_WAVE: dict[str, Any] = {
    **SIZES,
    "conv_dim": (10, 14),
    "conv_kernel": (4, 3),
    "conv_stride": (3, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCAB,
    **QUIET,
}
_TEXT = {**SIZES, "projection_dim": 20, **QUIET}
_STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}


def _image(model: str, config: str = "", size: int = 16, **fields: Any) -> Entry:
    return entry(model, config, example=pictures(size), **fields)


def _wave(model: str, config: str = "", **fields: Any) -> Entry:
    return entry(model, config, example=sound("input_values", 100), **(_WAVE | fields))


ENTRIES: dict[str, Entry] = {
    # pictures, by attention
    "vit": _image("ViTForImageClassification", **_VIT),
    "vit-eager": _image("ViTModel", attn_implementation="eager", **_VIT),
    "deit": _image("DeiTForImageClassification", **_VIT),
    "beit": _image(
        "BeitForImageClassification", **_VIT, use_relative_position_bias=True, use_mask_token=False
    ),
    "data2vec-vision": _image(
        "Data2VecVisionModel", **_VIT, use_shared_relative_position_bias=True
    ),
    "dinov2": _image("Dinov2Model", **_VIT, mlp_ratio=2),
    "dinov2-swiglu": _image("Dinov2Model", **_VIT, mlp_ratio=2, use_swiglu_ffn=True),
    "dinov2-registers": _image(
        "Dinov2WithRegistersModel", **_VIT, mlp_ratio=2, num_register_tokens=3
    ),
    "dinov3-vit": _image(
        "DINOv3ViTModel", **_VIT | {"num_attention_heads": 3}, num_register_tokens=3
    ),
    "ijepa": _image("IJepaModel", **_VIT),
    "vit-msn": _image("ViTMSNModel", **_VIT),
    "vit-mae": entry("ViTMAEModel", example=_masked, **_VIT, mask_ratio=0.5),
    "yolos": _image(
        "YolosForObjectDetection", **_VIT | {"image_size": [16, 16]}, num_detection_tokens=5
    ),
    "swin": _image("SwinForImageClassification", **_SWIN),
    "swinv2": _image("Swinv2ForImageClassification", **_SWIN),
    "swin-eager": _image("SwinModel", attn_implementation="eager", **_SWIN),
    "focalnet": _image(
        "FocalNetModel",
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        hidden_sizes=[12, 24],
    ),
    "hiera": _image(
        "HieraModel",
        image_size=[16, 16],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        embed_dim=12,
        depths=[1, 1],
        num_heads=[2, 4],
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        num_query_pool=1,
    ),
    "segformer": _image(
        "SegformerForSemanticSegmentation",
        size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[12, 18],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 3],
        mlp_ratios=[2, 2],
        decoder_hidden_size=22,
    ),
    "pvt": _image(
        "PvtModel",
        image_size=32,
        depths=[1, 1],
        hidden_sizes=[12, 18],
        num_attention_heads=[2, 3],
        sequence_reduction_ratios=[2, 1],
        patch_sizes=[4, 2],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        num_encoder_blocks=2,
        size=32,
    ),
    "pvt-v2": _image(
        "PvtV2Model",
        image_size=32,
        depths=[1, 1],
        hidden_sizes=[12, 18],
        num_attention_heads=[2, 3],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        num_encoder_blocks=2,
        size=32,
    ),
    "glpn": _image(
        "GLPNModel",
        size=32,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[12, 18],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 3],
        mlp_ratios=[2, 2],
    ),
    "mobilevit": _image(
        "MobileViTForImageClassification",
        size=64,
        image_size=64,
        hidden_sizes=[24, 20, 28],
        neck_hidden_sizes=[8, 12, 12, 16, 16, 20, 32],
        num_attention_heads=4,
        mlp_ratio=2.0,
        expand_ratio=2.0,
    ),
    "mobilevitv2": _image("MobileViTV2Model", size=64, image_size=64, width_multiplier=0.25),
    "levit": _image(
        "LevitModel",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[6, 6, 6],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        drop_path_rate=0,
    ),
    "swiftformer": _image(
        "SwiftFormerModel",
        size=64,
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dims=[8, 12, 16, 20],
        mlp_ratio=2,
    ),
    # pictures, by convolution
    "convnext": _image("ConvNextForImageClassification", size=32, **_STAGES),
    "convnextv2": _image("ConvNextV2ForImageClassification", size=32, **_STAGES),
    "resnet": _image(
        "ResNetForImageClassification",
        size=32,
        embedding_size=8,
        layer_type="bottleneck",
        **_STAGES,
    ),
    "resnet-basic": _image("ResNetModel", size=32, embedding_size=8, layer_type="basic", **_STAGES),
    "regnet": _image(
        "RegNetForImageClassification", size=32, embedding_size=8, groups_width=4, **_STAGES
    ),
    "bit": _image(
        "BitModel",
        size=32,
        embedding_size=8,
        num_groups=4,
        **_STAGES | {"hidden_sizes": [16, 32, 48, 64]},
    ),
    "mobilenet-v1": _image("MobileNetV1Model", size=32, image_size=32, depth_multiplier=0.25),
    "mobilenet-v2": _image(
        "MobileNetV2ForImageClassification", size=32, image_size=32, depth_multiplier=0.25
    ),
    "efficientnet": _image(
        "EfficientNetForImageClassification",
        size=32,
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
    ),
    "poolformer": _image(
        "PoolFormerForImageClassification",
        size=32,
        mlp_ratio=2.0,
        **_STAGES,
    ),
    "dinov3-convnext": _image("DINOv3ConvNextModel", size=32, **_STAGES),
    "hgnet-v2": _image("HGNetV2Backbone", "HGNetV2Config", size=64),
    "upernet": _image(
        "UperNetForSemanticSegmentation",
        size=64,
        hidden_size=16,
        pool_scales=[1, 2],
    ),
    "vitdet": _image(
        "VitDetModel",
        **{k: v for k, v in _VIT.items() if k != "intermediate_size"},
        mlp_ratio=2,
        window_block_indices=[0],
        window_size=2,
        residual_block_indices=[1],
    ),
    # pictures and text
    "clip": entry(
        "CLIPModel",
        example=both(),
        text_config=_TEXT,
        vision_config={**_VIT, "projection_dim": 20},
        projection_dim=20,
    ),
    "siglip": entry(
        "SiglipModel",
        example=both(),
        text_config=_TEXT | {"projection_size": 24},
        vision_config=_VIT,
    ),
    "clip-vision": _image(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", **_VIT, projection_dim=20
    ),
    "blip": entry(
        "BlipForConditionalGeneration",
        "BlipConfig",
        example=both(),
        text_config={**SIZES, "encoder_hidden_size": 24, **QUIET},
        vision_config=_VIT,
        projection_dim=20,
    ),
    "groupvit": entry(
        "GroupViTModel",
        example=both(),
        text_config=_TEXT,
        vision_config={
            **_VIT,
            "depths": [1, 1, 1],
            "num_group_tokens": [5, 3, 0],
            "num_output_groups": [5, 3, 0],
        },
        projection_dim=20,
        projection_intermediate_dim=28,
    ),
    "git": entry(
        "GitForCausalLM", "GitConfig", example=both(), vision_config=_VIT, **SIZES, **QUIET
    ),
    "detr": _image(
        "DetrForObjectDetection",
        size=32,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=36,
        num_queries=5,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "layer_type": "basic",
            "out_features": ["stage4"],
            **_STAGES,
        },
    ),
    "maskformer-swin": _image("MaskFormerSwinModel", **_SWIN),
    "sam-vision": _image(
        "SamVisionModel",
        "SamVisionConfig",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        mlp_dim=40,
        output_channels=14,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=7,
    ),
    # sound
    "whisper": entry(
        "WhisperForConditionalGeneration",
        example=sound("input_features", 8, 20, tokens=5),
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "wav2vec2": _wave("Wav2Vec2Model"),
    "wav2vec2-stable": _wave("Wav2Vec2Model", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "wav2vec2-ctc": _wave("Wav2Vec2ForCTC", "Wav2Vec2Config"),
    "hubert": _wave("HubertModel"),
    "wavlm": _wave("WavLMModel"),
    "unispeech": _wave("UniSpeechModel"),
    "sew": _wave("SEWModel", "SEWConfig", squeeze_factor=2),
    "data2vec-audio": _wave("Data2VecAudioModel", num_conv_pos_embeddings=2),
    "wav2vec2-conformer": _wave("Wav2Vec2ConformerModel"),
    "speech-to-text": entry(
        "Speech2TextForConditionalGeneration",
        example=sound("input_features", 20, 8, tokens=5),
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        input_feat_per_channel=8,
        conv_channels=12,
        max_source_positions=20,
        max_target_positions=12,
    ),
    "ast": entry(
        "ASTModel",
        example=sound("input_values", 12, 8),
        **{k: v for k, v in _VIT.items() if k != "image_size"},
        max_length=12,
        num_mel_bins=8,
        frequency_stride=2,
        time_stride=2,
    ),
    "encodec": entry(
        "EncodecModel",
        example=sound("input_values", 1, 64),
        num_filters=4,
        hidden_size=8,
        codebook_size=16,
        codebook_dim=8,
        upsampling_ratios=[4, 2],
        num_lstm_layers=1,
    ),
    # series
    "patchtst": entry(
        "PatchTSTModel",
        example=sound("past_values", 16, 3),
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        num_hidden_layers=2,
        d_model=24,
        num_attention_heads=4,
        ffn_dim=40,
    ),
    "patchtsmixer": entry(
        "PatchTSMixerModel",
        example=sound("past_values", 16, 3),
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        num_layers=2,
        d_model=12,
    ),
    "gpt2-embeds": entry(
        "GPT2Model",
        "GPT2Config",
        example=sound("inputs_embeds", 6, 24),
        vocab_size=1,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
    ),
}
