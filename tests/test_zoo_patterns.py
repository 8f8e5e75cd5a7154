"""Every pattern, picture net and recurrent net: pruned equals masked, or refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import patterns, recurrent, vision
from tests.zoo.net import Net
from tests.zoo.oracle import RATIOS, case_of, differences
from torch_otprune import doctor
from torch_otprune.structure import trace

SHELVES = {**patterns.ENTRIES, **recurrent.ENTRIES, **vision.ENTRIES}
TOLERANCE = 1e-5

# Where a number in forward counts channels, no cut of the weights can follow: the trial says so.
COUNTED = {
    "view_by_literals": {"a": "shape '[2, 280]' is invalid"},
    "channel_slice": {"a": "does not run", "a#2": "does not run"},
    "csp_split_concat": {"a": "split_sizes", "a#2": "split_sizes"},
    "write_into_slices": {"a": "does not run", "b": "does not run"},
    "write_over_a_part": {"b": "does not run"},
    "write_through_a_view": {"a": "differ by", "a#2": "does not run"},
    "shift_of_channels": {"a": "differ by"},
    "sum_of_pieces": {"a": "shape '[2, 3, 7]' is invalid"},
}

# How many units of each net go; a change of the analysis must not lose any.
UNITS = {
    "flatten_channels_first": 8,
    "flatten_channels_last": 8,
    "flatten_pooled": 18,
    "view_by_sizes": 8,
    "view_by_literals": 0,
    "channel_shuffle": 6,
    "channel_shuffle_op": 4,
    "channel_shuffle_grouped": 5,
    "channel_flip": 8,
    "channel_roll": 0,
    "channel_slice": 4,
    "channel_stride": 4,
    "index_select": 9,
    "narrow_and_repeat": 8,
    "repeat_interleave": 8,
    "pixel_shuffle": 14,
    "pixel_unshuffle": 5,
    "space_to_depth": 5,
    "channels_last_linear": 19,
    "csp_split_concat": 12,
    "csp_chunk_residual": 12,
    "dense_concat": 18,
    "concat_with_input": 6,
    "stack_and_sum": 6,
    "stack_and_flatten": 6,
    "glu_chunk_channels": 7,
    "glu_chunk_last": 7,
    "glu_chunk_minus_one": 7,
    "glu_interleaved": 7,
    "glu_functional_channels": 7,
    "glu_functional_last": 7,
    "gate_of_another_layer": 9,
    "squeeze_excite": 15,
    "spatial_attention": 10,
    "cbam_pooled_over_channels": 9,
    "grouped": 9,
    "grouped_transposed": 9,
    "transposed": 17,
    "depthwise": 9,
    "depthwise_multiplier": 9,
    "depthwise_multiplier_three": 7,
    "depthwise_transposed": 9,
    "depthwise_transposed_multiplier": 0,
    "grouped_from_one_channel": 0,
    "conv1d_causal": 9,
    "conv3d": 9,
    "conv_as_unfold": 8,
    "functional_conv": 8,
    "dynamic_kernel_conv": 8,
    "linear_with_own_weight": 11,
    "matmul_with_own_weights": 11,
    "einsum_with_own_weights": 11,
    "linear_of_another_linear": 11,
    "tied_autoencoder": 0,
    "outer_product": 6,
    "bilinear": 24,
    "inner_products": 0,
    "cosine_head": 19,
    "complex_spectrum_of_pictures": 8,
    "complex_spectrum_mixing_channels": 9,
    "complex_pairs": 5,
    "batch_norms": 17,
    "instance_norms": 17,
    "instance_norm_bare": 9,
    "group_norms": 21,
    "layer_norm_over_pictures": 17,
    "layer_norm_residual": 23,
    "rms_norm_residual": 23,
    "layer_norm_of_channels": 17,
    "layer_scale": 19,
    "weight_norm": 17,
    "spectral_norm": 17,
    "standardised_weights": 8,
    "attention_einsum": 3,
    "attention_fused_qkv": 3,
    "attention_fused_interleaved": 3,
    "attention_one_head": 11,
    "attention_grouped_queries": 4,
    "attention_repeated_keys": 4,
    "attention_linear": 11,
    "multihead_attention": 16,
    "multihead_attention_sequence_first": 16,
    "multihead_attention_kdim": 16,
    "multihead_attention_bias_kv": 16,
    "multihead_attention_masked": 18,
    "transformer_encoder": 42,
    "transformer_encoder_norm_first": 40,
    "transformer_decoder": 50,
    "transformer": 46,
    "transformer_of_tokens": 33,
    "class_token": 38,
    "embedding_bag": 17,
    "experts_by_index": 33,
    "experts_by_weight": 14,
    "write_into_slices": 0,
    "write_into_new_slices": 11,
    "write_over_a_part": 0,
    "write_through_a_view": 0,
    "shift_of_channels": 0,
    "scatter_over_tokens": 9,
    "graph_convolution": 9,
    "gather_tokens": 9,
    "masked": 9,
    "fixed_mask_buffer": 9,
    "data_dependent_branch": 9,
    "sorted_features": 9,
    "softmax_over_features": 9,
    "maxout": 7,
    "sum_of_pieces": 0,
    "inputs_by_name": 24,
    "output_dataclass": 17,
    "output_features": 9,
    "frozen_trunk": 17,
    "one_layer_twice": 9,
    "siamese": 17,
    "pad_shortcut": 6,
    "broadcast_of_one_channel": 9,
    "constant_table_added": 9,
    "upsampled": 17,
    "sampled_at_a_grid": 9,
    "nothing_inside": 0,
    "lstm": 16,
    "lstm_two_layers": 16,
    "lstm_bidirectional": 16,
    "lstm_projected": 21,
    "lstm_projected_deep": 21,
    "lstm_without_bias": 16,
    "gru": 16,
    "gru_bidirectional": 16,
    "rnn_tanh": 16,
    "rnn_relu": 16,
    "lstm_sequence_first": 9,
    "lstm_last_state": 16,
    "gru_both_directions_flattened": 16,
    "gru_given_state": 7,
    "lstm_zero_states": 16,
    "lstm_learnt_states": 16,
    "states_handed_over": 9,
    "attention_over_states": 16,
    "additive_attention": 24,
    "lstm_cell_in_a_loop": 16,
    "gru_cells_stacked": 17,
    "rnn_cell": 9,
    "own_gru_cell": 9,
    "own_lstm_of_matrices": 9,
    "conv_lstm": 9,
    "language_model": 17,
    "language_model_tied": 17,
    "convolutional_recurrent": 19,
    "residual_lstms": 9,
    "lstm_and_attention": 9,
    "packed_sequence": 9,
    "state_space_scan": 9,
    "vgg": 43,
    "resnet": 47,
    "resnet_bottleneck": 35,
    "resnet_preactivated": 24,
    "resnext": 15,
    "densenet": 49,
    "mobilenet_v1": 33,
    "mobilenet_v2": 50,
    "efficientnet": 58,
    "shufflenet_v2": 24,
    "ghostnet": 18,
    "squeezenet": 50,
    "inception": 41,
    "csp_darknet": 53,
    "unet": 53,
    "detector": 49,
    "segmentation": 49,
    "convnext": 46,
    "mlp_mixer": 66,
    "gmlp": 9,
    "swin": 43,
    "vision_transformer": 52,
    "super_resolution": 27,
    "generator": 24,
    "autoencoder": 30,
    "temporal_convolutions": 41,
    "wavenet": 48,
    "pointnet": 42,
    "nonlocal_block": 16,
    "selective_kernels": 21,
}


def test_the_shelves_are_as_large_as_promised() -> None:
    assert len(patterns.ENTRIES) >= 60
    assert set(UNITS) == set(SHELVES)


@pytest.mark.parametrize("name", SHELVES)
def test_no_unit_that_can_go_is_lost(name: str) -> None:
    counted = COUNTED.get(name, {})
    groups = [g for g in case_of(SHELVES[name]).graph.groups if g.name not in counted]
    assert sum(g.units for g in groups) >= UNITS[name]


@pytest.mark.parametrize("name", [n for n, e in SHELVES.items() if not e.refused])
def test_pruned_equals_masked_at_every_ratio(name: str) -> None:
    case = case_of(SHELVES[name])
    groups = [g for g in case.graph.groups if g.name not in COUNTED.get(name, {})]
    found = list(differences(case, groups))
    assert not [(what, far, said) for what, far, said in found if not far < TOLERANCE]


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n, e in SHELVES.items() if not e.refused])
def test_pruned_equals_masked_group_by_group(name: str) -> None:
    case = case_of(SHELVES[name])
    groups = [g for g in case.graph.groups if g.name not in COUNTED.get(name, {})]
    each = {(g.name, r): case.compared([g], r) for g in groups for r in RATIOS}
    assert not {key: told for key, told in each.items() if not told[0] < TOLERANCE}


@pytest.mark.parametrize(
    ("name", "group", "said"), [(n, g, s) for n, told in COUNTED.items() for g, s in told.items()]
)
def test_channels_that_forward_counts_are_refused_at_the_trial(
    name: str, group: str, said: str
) -> None:
    case = case_of(SHELVES[name])
    trials = [case.compared([case.graph.group(group)], ratio) for ratio in RATIOS]
    assert any(far > TOLERANCE and said in reason for far, reason in trials)


@pytest.mark.parametrize("name", [n for n, e in SHELVES.items() if e.refused])
def test_what_is_refused_says_why(name: str) -> None:
    graph = case_of(SHELVES[name]).graph
    assert not graph.groups
    assert any(SHELVES[name].refused in b.reason and b.fix for b in graph.blocked)


@pytest.mark.parametrize(
    "name", ["resnet", "densenet", "unet", "convnext", "shufflenet_v2", "vision_transformer", "vgg"]
)
def test_a_model_without_values_is_analysed_by_its_shapes(name: str) -> None:
    case = case_of(SHELVES[name])
    model = SHELVES[name].build().double().eval().to("meta")
    graph = trace(model, case.example.to("meta"))
    assert graph.full() == case.graph.full()
    assert graph.costs["params"] == case.graph.costs["params"]


def test_the_doctor_sees_a_model_without_values() -> None:
    case = case_of(SHELVES["resnet"])
    model = SHELVES["resnet"].build().double().eval().to("meta")
    seen, known = doctor(model, case.example.to("meta")), doctor(case.model, case.example)
    assert (seen.params, seen.macs, seen.groups) == (known.params, known.macs, known.groups)


def test_an_op_that_no_rule_follows_blocks_what_it_touches() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        return m.c(torch.linalg.matrix_exp(y.unsqueeze(1) * y.unsqueeze(2)).sum(1))

    net = Net(forward, a=nn.Linear(6, 9), b=nn.Linear(9, 5), c=nn.Linear(5, 4)).double()
    graph = trace(net, torch.randn(2, 6, dtype=torch.float64))
    assert list(graph.full()) == ["a"]
    (why,) = (b.reason for b in graph.blocked if "b" in b.modules)
    assert "op linalg_matrix_exp at test_zoo_patterns.py" in why
