"""Which rule an op follows."""

from __future__ import annotations

from torch_otprune.structure.coupling import joins, lookups, mixing, moves, rules, writes
from torch_otprune.structure.coupling.bilinear import grouped, trilinear
from torch_otprune.structure.coupling.contract import convolution
from torch_otprune.structure.coupling.mixing import chooses, mixes, routes
from torch_otprune.structure.coupling.rules import Rule, matrix

__all__ = ["rule_of"]

_MOVES = """view _unsafe_view _reshape_alias reshape permute transpose t expand squeeze unsqueeze
    slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind
    flip roll repeat unfold pixel_shuffle pixel_unshuffle channel_shuffle alias detach
    diagonal movedim swapaxes repeat_interleave native_channel_shuffle rot90 as_strided
    view_copy permute_copy unsqueeze_copy squeeze_copy expand_copy slice_copy""".split()
_KEEPS = """clone contiguous _to_copy lift_fresh lift_fresh_copy native_dropout tril triu _conj
    _neg_view resolve_conj bernoulli alias_copy rand_like randn_like""".split()
_FILLERS = """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor
    empty_strided new_empty_strided""".split()
_SEQUENCES = "arange linspace eye randn rand randint normal tril_indices".split()
_GRIDS = """max_pool avg_pool adaptive upsample reflection_pad replication_pad
    grid_sampler""".split()
_POINTWISE = """masked_fill where lerp addcmul addcdiv clamp _prelu_kernel
    rrelu_with_noise hardswish mish softplus hardtanh logit softshrink hardshrink threshold
    log_sigmoid_forward celu elu selu relu6 hardsigmoid gelu silu leaky_relu polar
    nan_to_num isnan bitwise_not complex""".split()

_TABLE: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, rules.move),
    **dict.fromkeys(_KEEPS, rules.keep),
    **dict.fromkeys(_FILLERS, rules.filler),
    **dict.fromkeys(_SEQUENCES, rules.sequence),
    **dict.fromkeys(_POINTWISE, rules.pointwise),
    **dict.fromkeys(("view_as_real", "view_as_complex"), moves.paired),
    "copy": writes.write,
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), writes.like),
    "fill_": writes.fill,
    "zero_": writes.fill,
    "constant_pad_nd": rules.pad,
    "cat": joins.cat,
    "stack": joins.cat,
    "mm": matrix("mk,kn->mn"),
    "addmm": matrix("mk,kn->mn"),
    "bmm": matrix("bmk,bkn->bmn"),
    "baddbmm": matrix("bmk,bkn->bmn"),
    "mv": matrix("mk,k->m"),
    "dot": matrix("k,k->"),
    "convolution": convolution,
    "native_layer_norm": mixing.norm,
    "native_batch_norm": mixing.batch_norm,
    "_native_batch_norm_legit_no_training": mixing.batch_norm,
    "cudnn_batch_norm": mixing.batch_norm,
    "native_group_norm": mixing.group_norm,
    "embedding": lookups.embedding,
    "index": lookups.lookup,
    "index_select": lookups.lookup,
    "gather": lookups.lookup,
    "index_add": lookups.scatter,
    "index_put": lookups.scatter,
    "index_copy": lookups.scatter,
    "scatter": lookups.scatter,
    "scatter_add": lookups.scatter,
    "glu": rules.glu,
    "_pack_padded_sequence": lookups.pack,
    "_pad_packed_sequence": lookups.unpack,
    "_trilinear": trilinear,
    "_grouped_mm": grouped,
    "_embedding_bag": lookups.embedding,
    "_embedding_bag_forward_only": lookups.embedding,
    "im2col": rules.patches,
    "_safe_softmax": routes("they compete in a softmax"),
    "_softmax": routes("they compete in a softmax"),
    "_log_softmax": routes("they compete in a softmax"),
    **dict.fromkeys(
        ("_fft_r2c", "_fft_c2r", "_fft_c2c"),
        mixes("mix", "they are mixed by a Fourier transform", "dim"),
    ),
    "cumsum": mixes("mix", "they are added up", "dim"),
    "sort": chooses("they are sorted"),
    "topk": chooses("the largest of them are chosen"),
    "argmax": chooses("they are compared"),
    "max": chooses("they are compared"),
    "mean": mixes("norm", "a mean takes all of them together", "dim"),
    "var": mixes("norm", "a norm takes all of them together", "dim"),
    "var_mean": mixes("norm", "a norm takes all of them together", "dim"),
    "linalg_vector_norm": mixes("norm", "a norm takes all of them together", "dim"),
    "sum": mixes("mix", "they are summed without a weight", "dim"),
}
_TABLE |= dict.fromkeys(
    (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    rules.attention,
)
_REDUCE = mixes("mix", "this op compares or adds up all of them", "dim")


def rule_of(op: object, name: str, tags: frozenset[str]) -> Rule:
    """Find the rule of an op.

    Args:
        op: the overload.
        name: its name without the overload.
        tags: names of its tags.

    Returns:
        the rule; that of unknown ops where there is none.
    """
    bare = name.removesuffix("_") if name not in _TABLE else name
    if (found := _TABLE.get(bare)) is not None:
        return found
    if any(word in name for word in _GRIDS):
        return mixing.grid
    if "pointwise" in tags:
        return rules.pointwise
    return _REDUCE if "reduction" in tags else rules.unknown
