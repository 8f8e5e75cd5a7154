"""What PyTorch's attention cannot do with fewer heads, a stand-in does."""

from __future__ import annotations

from torch import nn

from torch_otprune.nn.attention import SlimAttention

__all__ = ["fit_attention_"]


def fit_attention_(model: nn.Module) -> None:
    """Exchange every `nn.MultiheadAttention` that no longer fits its own integers.

    Args:
        model: with its tensors cut; written in place.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention)
    ]
    made: dict[nn.Module, nn.Module] = {}
    for parent, name, child in found:
        if child not in made:
            made[child] = _fitted(child)
        parent._modules[name] = made[child]
    for encoder in filter(_packs, model.modules()):
        encoder.enable_nested_tensor = encoder.use_nested_tensor = False  # type: ignore[assignment]


def _packs(module: nn.Module) -> bool:
    """Tell whether an encoder may pack its tokens as only PyTorch's own attention reads them."""
    return isinstance(module, nn.TransformerEncoder) and any(
        isinstance(inner, SlimAttention) for inner in module.modules()
    )


def _fitted(module: nn.MultiheadAttention) -> nn.Module:
    """Give the module itself if it runs, with its integers put right, else its stand-in."""
    packed = module.in_proj_weight is not None
    q = module.in_proj_weight if packed else module.q_proj_weight
    inner, rest = divmod(q.shape[0], 3 if packed else 1)
    embed, heads = q.shape[1], inner // module.head_dim
    if rest or inner % module.head_dim or not heads:
        return module  # the trial will say so
    module.kdim = embed if packed else module.k_proj_weight.shape[1]
    module.vdim = embed if packed else module.v_proj_weight.shape[1]
    module.embed_dim, module.num_heads = embed, heads
    out = module.out_proj
    out.out_features, out.in_features = out.weight.shape
    if isinstance(module, SlimAttention) or embed == inner == out.out_features:
        return module
    return SlimAttention(embed, heads, module.head_dim, like=module)
