"""One rule per torch function: what its result is as a function of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_otprune.certify.context import Context
from torch_otprune.certify.curves import CURVES, apply_curve
from torch_otprune.certify.facts import UNBOUNDED, Facts, constant, unknown
from torch_otprune.certify.linear import plus, scaled, weighted, widened
from torch_otprune.structure.forward import flat_tensors

__all__ = ["RULES"]

Rule = Callable[..., Facts | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enrol a rule under the names of its functions."""

    def enrol(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enrol


def _curved(name: str) -> Rule:
    def found(c: Context, x: Any, *settings: Any, **named: Any) -> Facts | None:
        if not isinstance(x, Tensor):  # a number to the power of a tensor
            return None
        c.why["convex"] = f"`{name}` is not convex and non-decreasing on what it reads"
        c.why["lipschitz"] = f"the slope of `{name}` has no bound"
        named = {k: v for k, v in named.items() if k != "inplace"}
        return apply_curve(name, c.facts(x), c.inputs, *settings, **named)

    return found


RULES.update({name: _curved(name) for name in CURVES})


@rule("to", "double", "float", "half", "bfloat16", "type", "type_as", "cpu", "cuda")
def _cast(c: Context, x: Tensor, *_: Any, **__: Any) -> Facts:
    return c.facts(x)  # slopes are kept in float64 whatever the dtype


@rule("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout")
def _dropped(
    c: Context, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Facts | None:
    return None if training else c.facts(x)


def _with_bias(c: Context, found: Facts, bias: Tensor | None, shape: tuple[int, ...]) -> Facts:
    if bias is None:
        return found
    return plus(found, c.facts(bias).shaped(lambda t: t.reshape(shape)), c.inputs)


def _mapped(c: Context, x: Tensor, weight: Tensor, apply: Callable[..., Tensor]) -> Facts | None:
    """Apply known weights, and note which of them must not be negative."""
    if not c.known(weight):
        return None
    f = c.facts(x)
    full = _columns(f.cvx & ~f.ccv, weight)
    c.noted(weight, full, _columns(_live(f), weight))
    c.negative(weight, full)
    return weighted(f, weight, apply, c.inputs)


def _live(f: Facts) -> Tensor:
    """Mark what depends on the input and never falls where it rises."""
    return ~f.flat if f.lo is None else ~f.flat & (f.lo >= 0).all(0)


def _columns(marked: Tensor, weight: Tensor) -> Tensor:
    """Spread marks of a layer's inputs over its weight."""
    axis = 1 if weight.dim() > 2 else -1
    mask = marked.movedim(axis if marked.dim() > 1 else 0, -1)
    mask = mask.reshape(-1, mask.shape[-1]).any(0)
    if weight.shape[1] != len(mask):  # a grouped convolution
        mask = mask.any().expand(weight.shape[1])
    return mask.reshape(1, -1, *[1] * (weight.dim() - 2)).expand(weight.shape)


@rule("linear")
def _linear(c: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Facts | None:
    found = _mapped(c, x, weight, lambda t, w: t @ w.T)
    return found if found is None else _with_bias(c, found, bias, (-1,))


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    c: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> Facts | None:
    if isinstance(named.get("padding", 0), str):
        return None
    found = _mapped(c, x, weight, lambda t, w: c.function(t, w, None, *rest, **named))
    shape = (-1, *[1] * (weight.dim() - 2))
    return found if found is None else _with_bias(c, found, bias, shape)


@rule("matmul", "mm", "bmm", "mv", "rmatmul")
def _product(c: Context, a: Tensor, b: Tensor) -> Facts | None:
    if c.function.__name__ == "__rmatmul__":
        a, b = b, a
    f, g = c.facts(a), c.facts(b)
    c.why["convex"] = "a matrix product of two signals that both depend on the input"
    if not (f.fixed or g.fixed):
        return None
    weight = a if f.fixed else b
    if not c.known(weight):
        return None
    other = g if f.fixed else f
    marks = (other.cvx & ~other.ccv, _live(other))
    mask, live = (m.any().expand(weight.shape) for m in marks)
    c.noted(weight, mask, live)
    c.negative(weight, mask)
    if f.fixed:
        return weighted(g, a, lambda t, w: w @ t, c.inputs)
    return weighted(f, b, lambda t, w: t @ w, c.inputs)


@rule("addmm")
def _addmm(c: Context, bias: Tensor, x: Tensor, weight: Tensor, **named: Any) -> Facts | None:
    if named or not c.known(weight):
        return None
    return plus(weighted(c.facts(x), weight, lambda t, w: t @ w, c.inputs), c.facts(bias), c.inputs)


@rule("sum", "mean")
def _summed(c: Context, x: Tensor, *axes: Any, **named: Any) -> Facts | None:
    f = c.facts(x)
    one = torch.ones((), dtype=torch.float64, device=x.device)
    # vmap sees one axis less, so that axes counted from the front are still right
    return weighted(f, one, lambda t, w: c.function(t * w, *axes, **named), c.inputs)


@rule("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
def _pooled(c: Context, x: Tensor, *settings: Any, **named: Any) -> Facts | None:
    if len(settings) > 5 or named.get("divisor_override") is not None:
        return None  # it may be negative
    one = torch.ones((), dtype=torch.float64, device=x.device)
    return weighted(c.facts(x), one, lambda t, w: c.function(t * w, *settings, **named), c.inputs)


def _read(c: Context, value: Any, like: Tensor) -> tuple[Facts, Tensor]:
    """Give the facts of an operand that may be a number."""
    if isinstance(value, Tensor):
        return c.facts(value), value
    number = torch.as_tensor(float(value), dtype=torch.float64, device=like.device)
    return (unknown(number, c.inputs) if number.isnan() else constant(number)), number


def _is_one(value: Any) -> bool:
    """Tell whether a factor of the call is the number one, in every call."""
    return not isinstance(value, Tensor) and bool(value == 1)


@rule("add", "radd")
def _add(c: Context, a: Tensor, b: Any, *, alpha: float = 1) -> Facts | None:
    if not _is_one(alpha):
        return None
    return plus(_read(c, a, b)[0], _read(c, b, a)[0], c.inputs)


@rule("sub", "rsub")
def _sub(c: Context, a: Tensor, b: Any, *, alpha: float = 1) -> Facts | None:
    if not _is_one(alpha):
        return None
    f, g = _read(c, a, b)[0], _read(c, b, a)[0]
    if c.function.__name__ in ("__rsub__", "rsub"):
        f, g = g, f
    c.why["convex"] = "a convex signal is subtracted"
    return plus(f, g, c.inputs, minus=True)


@rule("neg")
def _neg(c: Context, x: Tensor) -> Facts | None:
    c.why["convex"] = "a convex signal is negated"
    c.why["monotone"] = "the input is negated: `doubled=False` reads it as it is"
    minus = torch.tensor(-1.0, dtype=torch.float64, device=x.device)
    return scaled(c.facts(x), _read(c, minus.item(), x)[0], minus, c.inputs)


@rule("mul", "rmul", "multiply")
def _mul(c: Context, a: Any, b: Any) -> Facts | None:
    (f, u), (g, v) = _read(c, a, b), _read(c, b, a)
    if bool(g.flat.all()):
        return _times(c, f, g, v)
    if bool(f.flat.all()):
        return _times(c, g, f, u)
    c.why["convex"] = "two signals that both depend on the input are multiplied"
    c.why["lipschitz"] = "two signals that both depend on the input are multiplied"
    return _multiplied(f, g, c.inputs)


@rule("addcmul")
def _add_product(c: Context, x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Facts | None:
    product = _mul(c, a, b)
    return None if product is None or not _is_one(value) else plus(c.facts(x), product, c.inputs)


def _times(c: Context, f: Facts, by: Facts, value: Tensor) -> Facts | None:
    if by.fixed and not bool(value.isfinite().all()):
        return None
    if by.fixed and id(value) in c.names:
        shape = torch.broadcast_shapes(f.cvx.shape, value.shape)
        wide = widened(f, shape)
        marks = (wide.cvx & ~wide.ccv, _live(wide))
        mask, live = (m.double().sum_to_size(value.shape) > 0 for m in marks)
        c.noted(value, mask, live)
        c.negative(value, mask)
    return scaled(f, by, value if by.fixed else None, c.inputs)


def _multiplied(f: Facts, g: Facts, inputs: int) -> Facts:
    """Carry facts through a product of two signals."""
    shape = torch.broadcast_shapes(f.cvx.shape, g.cvx.shape)
    f, g = widened(f, shape), widened(g, shape)
    pos, logs = f.pos & g.pos, f.lcx & g.lcx
    one = torch.zeros_like(pos)
    if f.origin is g.origin and f.origin.cvx.shape == shape:
        one = pos & f.follows & g.follows
    (lo, hi), (low, high) = f.slopes(inputs), g.slopes(inputs)
    rises, falls = pos & (lo >= 0) & (low >= 0), pos & (hi <= 0) & (high <= 0)
    big = torch.full_like(lo, UNBOUNDED)
    found = Facts(
        logs | (one & f.origin.cvx) | (f.flat & g.flat),
        f.flat & g.flat,
        pos,
        logs,
        f.flat & g.flat,
        torch.where(rises, torch.zeros_like(big), -big),
        torch.where(falls, torch.zeros_like(big), big),
    )
    return found.rooted(f.origin, one) if bool(one.any()) else found


@rule("div", "truediv", "divide")
def _div(c: Context, a: Tensor, b: Any) -> Facts | None:
    g, v = _read(c, b, a)
    by = 1 / v.double()
    if not g.fixed or not bool(by.isfinite().all()):
        return None
    return scaled(_read(c, a, v)[0], g, by, c.inputs)


def _envelope(c: Context, a: Tensor, b: Tensor, *, greater: bool) -> Facts:
    """Carry facts through what lies between two signals, above both or below both."""
    f, g = c.facts(a), c.facts(b)
    shape = torch.broadcast_shapes(f.cvx.shape, g.cvx.shape)
    f, g = widened(f, shape), widened(g, shape)
    (lo, hi), (low, high) = f.slopes(c.inputs), g.slopes(c.inputs)
    flat = f.flat & g.flat
    pos = (f.pos | g.pos) if greater else (f.pos & g.pos)
    cvx, ccv = (f.cvx & g.cvx) & greater, (f.ccv & g.ccv) & (not greater)
    lows, highs = torch.minimum(lo, low), torch.maximum(hi, high)
    return Facts(cvx | flat, ccv | flat, pos, flat & pos, flat, lows, highs)


@rule("maximum", "logaddexp")
def _greater(c: Context, a: Tensor, b: Tensor) -> Facts:
    return _envelope(c, a, b, greater=True)


@rule("minimum")
def _lesser(c: Context, a: Tensor, b: Tensor) -> Facts:
    c.why["convex"] = "the lesser of two convex signals is not convex"
    return _envelope(c, a, b, greater=False)


@rule("amax", "logsumexp")
def _greatest(c: Context, x: Tensor, dim: Any, keepdim: bool = False) -> Facts | None:
    if not isinstance(dim, int):
        return None
    f = c.facts(x)
    (lo, hi), at = f.slopes(c.inputs), dim + 1 if dim >= 0 else dim
    cvx, flat = f.cvx.all(dim, keepdim), f.flat.all(dim, keepdim)
    pos = f.pos.any(dim, keepdim)
    lows, highs = lo.amin(at, keepdim), hi.amax(at, keepdim)
    return Facts(cvx, flat, pos, flat & pos, flat, lows, highs)


@rule("batch_norm")
def _normed(c: Context, x: Tensor, *settings: Any, **named: Any) -> Facts | None:
    if c.function is not F.batch_norm:
        return None  # `torch.batch_norm` takes its arguments in another order
    words = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    said = dict(zip(words, settings, strict=False)) | named
    if said.get("training") or said.get("running_var") is None:
        return None
    if not all(c.known(t) for t in flat_tensors(list(said.values()))):
        return None
    gain = (said["running_var"].double() + said.get("eps", 1e-5)).rsqrt()
    if said.get("weight") is not None:
        gain = gain * said["weight"].double()
    shape = (-1, *[1] * (x.dim() - 2))
    gain = gain.reshape(shape)
    shift = torch.full_like(gain, -1.0)  # of unknown sign
    return plus(scaled(c.facts(x), constant(gain), gain, c.inputs), constant(shift), c.inputs)
