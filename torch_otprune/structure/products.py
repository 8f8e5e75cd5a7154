"""Every product of matrices that a run computes, op by op, as the sizes of its loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Product", "composed", "left_out", "named", "plain", "products"]


@dataclass(frozen=True)
class Product:
    """One product: its multiply-accumulates are the sizes of its loops, multiplied.

    Args:
        sizes: a letter for each loop, to how often it runs.
        operands: what is multiplied; a letter for each axis, `_` where an axis is no loop.
    """

    sizes: Mapping[str, int]
    operands: tuple[tuple[Tensor, str], ...] = ()

    @property
    def macs(self) -> int:
        """Multiply the sizes."""
        return prod(self.sizes.values())


_Given = Mapping[str, Any]
_Rule = Callable[[_Given, Any], list[Product]]


def products(function: Any, given: _Given, out: Any) -> list[Product]:
    """List the products that an op computes.

    Args:
        function: the op.
        given: its arguments by the names of its schema.
        out: what it returned.

    Returns:
        none for an op that multiplies no matrices.
    """
    rule = _rule(function)
    return rule(given, out) if rule else []


@cache
def _rule(function: Any) -> _Rule | None:
    name = function.overloadpacket.__name__
    return _TABLE.get(name) or _TABLE.get(name.removesuffix("_"))


def named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Write an op's arguments under the names of its schema."""
    names = (argument.name for argument in function._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def composed(mode: Any, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an op that stands for several as those: under inference mode torch hands it on whole.

    Args:
        mode: the dispatch mode that shall see the parts.
        function: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        what it returns; `NotImplemented` for an op that is one.
    """
    if not _several(function):
        return NotImplemented
    with mode:
        return function.decompose(*args, **kwargs)


@cache
def _several(function: Any) -> bool:
    return function.overloadpacket.__name__ in _COMPOSED


@cache
def left_out(function: Any) -> str:
    """Name an op whose products nobody can count: it multiplies inside, and does not say how.

    Args:
        function: the op.

    Returns:
        its name; empty for an op that is counted or multiplies no matrices.
    """
    name = function.overloadpacket.__name__
    if function.namespace not in _OURS:
        return f"{function.namespace}::{name}"
    return name if name in _CLOSED else ""


_OURS = frozenset(("aten", "prim", "prims", "_c10d_functional", "profiler", "quantized_decomposed"))
_CLOSED = frozenset(
    """_fft_r2c _fft_c2r _fft_c2c _cdist_forward _euclidean_dist linalg_inv_ex _linalg_solve_ex
    linalg_lstsq _linalg_svd linalg_qr _linalg_eigh linalg_eig linalg_cholesky_ex linalg_lu
    linalg_lu_factor_ex linalg_solve_triangular triangular_solve cholesky_solve linalg_matrix_exp
    _linalg_det _linalg_slogdet linalg_householder_product _lstm_mps
    _sparse_addmm _sparse_mm _sparse_mm_reduce_impl""".split()
)
_COMPOSED = frozenset(
    """linear matmul einsum bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    scaled_dot_product_attention tensordot chain_matmul linalg_multi_dot inner""".split()
)


@contextmanager
def plain() -> Iterator[None]:
    """Run every layer op by op: no fused recurrent layers, no fast path of attention.

    Yields:
        nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
        torch.backends.mha.set_fastpath_enabled(fast)


def _spelled(*operands: tuple[str, str]) -> _Rule:
    """Make the rule of an op that is an einsum, argument by argument."""

    def rule(given: _Given, out: Any) -> list[Product]:
        return [_einsum(*((given[name], letters) for name, letters in operands))]

    return rule


def _einsum(*operands: tuple[Tensor, str]) -> Product:
    sizes: dict[str, int] = {}
    for tensor, letters in operands:
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes.setdefault(letter, size)
    sizes.pop("_", None)
    return Product(sizes, operands)


def _attention(given: _Given, out: Any) -> list[Product]:
    """Scores of every query with every key, masked or not, and a mean of the values."""
    q, k, v = (given[name] for name in ("query", "key", "value"))
    return [_einsum((q, "bhsd"), (k, "bhtd")), _einsum((q, "bhs_"), (v, "bhte"))]


def _convolution(given: _Given, out: Any) -> list[Product]:
    """Every position uses every number of the filters once: of the output, or what is spread."""
    x, weight, across = given["input"], given["weight"], given["transposed"]
    grid, taps = x if across else out, weight.dim() - 2
    sizes = {
        "p": grid.numel() // max(grid.shape[1], 1),
        "k": prod(weight.shape[2:]),
        "o": weight.shape[0],
        "i": weight.shape[1],
    }
    operands = [(weight, "oi" + "_" * taps)]
    if given["groups"] == 1:  # a weight that is computed may have no labels of its own
        operands.append((x, ("_o" if across else "_i") + "_" * taps))
    return [Product(sizes, tuple(operands))]


def _trilinear(given: _Given, out: Any) -> list[Product]:
    operands = []
    for number in "123":
        tensor, grown = given[f"i{number}"], set(given[f"expand{number}"])
        every = range(tensor.dim() + len(grown))
        operands.append((tensor, "".join(chr(ord("a") + a) for a in every if a not in grown)))
    return [_einsum(*operands)]


def _grouped(given: _Given, out: Any) -> list[Product]:
    """Each row meets one of several matrices: as many rows as there are, whoever gets them."""
    one, two = given["self"], given["mat2"]
    spelled = {(2, 3): ("mk", "_kn"), (3, 3): ("bmk", "bkn"), (3, 2): ("_mk", "kn")}
    first, second = spelled.get((one.dim(), two.dim()), ("mk", "kn"))
    return [_einsum((one, first), (two, second))]


def _recurrent(given: _Given, out: Any) -> list[Product]:
    """A fused recurrent layer: every matrix once for every step of every sequence."""
    x = given["input"]
    numbers = sum(weight.numel() for weight in given["weight"] if weight.dim() > 1)
    return [Product({"p": x.numel() // x.shape[-1], "w": numbers})]


_MATRIX = _spelled(("self", "mk"), ("mat2", "kn"))
_TABLE: dict[str, _Rule] = {
    **dict.fromkeys(("mm", "_int_mm", "_scaled_mm"), _MATRIX),
    **dict.fromkeys(("addmm", "_addmm_activation"), _spelled(("mat1", "mk"), ("mat2", "kn"))),
    "bmm": _spelled(("self", "bmk"), ("mat2", "bkn")),
    **dict.fromkeys(("baddbmm", "addbmm"), _spelled(("batch1", "bmk"), ("batch2", "bkn"))),
    "mv": _spelled(("self", "mk"), ("vec", "k")),
    "addmv": _spelled(("mat", "mk"), ("vec", "k")),
    "dot": _spelled(("self", "k"), ("tensor", "k")),
    "vdot": _spelled(("self", "k"), ("other", "k")),
    "convolution": _convolution,
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped,
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_attention_math_for_mps",
        ),
        _attention,
    ),
}
