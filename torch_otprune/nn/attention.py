"""Multi-head attention whose heads need not fill the width of its stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SlimAttention"]


class SlimAttention(nn.MultiheadAttention):
    """An exact stand-in for `nn.MultiheadAttention` that knows its head's width.

    PyTorch's own divides the stream's width by the number of heads, so it cannot run once
    heads, or channels of the stream, are gone. Parameters have the same names.

    Args:
        embed_dim: width of the stream: of the queries and of the output.
        num_heads: how many heads.
        head_dim: width of each.
        like: what it stands in for, with its tensors already cut; it takes them over.

    Source: ours; the computation is that of Vaswani et al. 2017, section 3.2.

    Limits: no fused fast path, no scripting.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, *, like: nn.MultiheadAttention
    ) -> None:
        super().__init__(embed_dim, 1, dropout=like.dropout, device="meta")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.kdim, self.vdim = like.kdim, like.vdim
        self.batch_first, self.add_zero_attn = like.batch_first, like.add_zero_attn
        # the fused paths of PyTorch's transformer layers divide the width as it does
        self._qkv_same_embed_dim = False
        self.bias_k, self.bias_v = like.bias_k, like.bias_v
        self._parameters = dict(like._parameters)
        self.out_proj = like.out_proj
        self.train(like.training)

    def forward(  # noqa: PLR0917  # in the order of PyTorch
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and results of `nn.MultiheadAttention`.

        Args:
            query: batch, tokens and channels, in the order of `batch_first`; one sample may
                come without its batch axis.
            key: the same for the keys.
            value: the same for the values.
            key_padding_mask: true, or what is added, at keys that nobody reads.
            need_weights: whether the weights are returned.
            attn_mask: true, or what is added, where a query may not read a key.
            average_attn_weights: whether returned weights are averaged over heads.
            is_causal: a hint; the mask itself decides.

        Returns:
            the output, and the weights or None.
        """
        single = query.dim() == 2
        q, k, v = (self._batched(t, single=single) for t in (query, key, value))
        q, k, v = self._projected(q, k, v)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        # as PyTorch does it: the module itself is not called
        out = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        if single:
            out, weights = out[0], weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(-3) if average_attn_weights else weights

    def _batched(self, x: Tensor, *, single: bool) -> Tensor:
        if single:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to heads, and add the keys and values that are parameters or zeros."""
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        shape = (self.num_heads, self.head_dim)
        q, k, v = (x.unflatten(-1, shape).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _mask(
        self, q: Tensor, k: Tensor, among: Tensor | None, of_keys: Tensor | None
    ) -> Tensor | None:
        """Write both masks as what is added to the scores."""
        total: Tensor | None = None
        if among is not None:
            added = _added(among, q.dtype)
            total = added.unflatten(0, (-1, self.num_heads)) if added.dim() == 3 else added
        if of_keys is not None:
            added = _added(of_keys, q.dtype).reshape(len(q), 1, 1, -1)
            total = added if total is None else total + added
        if total is None:
            return None
        return F.pad(total, (0, k.shape[-2] - total.shape[-1]))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
