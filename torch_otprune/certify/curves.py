"""Functions of one number: which are convex, which rise, and how steep they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_otprune.certify.facts import UNBOUNDED, Facts

__all__ = ["CURVES", "Curve", "apply_curve"]

_SWITCH = 20.0  # from here on a softplus and its line differ by rounding only


class Curve(NamedTuple):
    """A function of one number.

    Attributes:
        cvx: whether it is convex.
        ccv: whether it is concave.
        low: least slope.
        high: greatest slope.
        pos: whether it is never negative.
        even: whether it is symmetric about zero, and so rises where its input is not negative.
        logs: whether its logarithm is convex and rises.
        half: whether it has values only where its input is not negative.
    """

    cvx: bool
    ccv: bool
    low: float
    high: float
    pos: bool = False
    even: bool = False
    logs: bool = False
    half: bool = False


def _fixed(*values: Any, **flags: bool) -> Callable[..., Curve]:
    return lambda *args, **kwargs: Curve(*values, **flags)


def _leaky(*args: Any, **kwargs: Any) -> Curve:
    slope = float(kwargs.get("negative_slope", args[0] if args else 0.01))
    return Curve(slope <= 1, slope >= 1, min(slope, 1.0), max(slope, 1.0), pos=slope <= 0)


def _elu(*args: Any, **kwargs: Any) -> Curve:
    alpha = float(kwargs.get("alpha", args[0] if args else 1.0))
    return Curve(0 <= alpha <= 1, False, min(0.0, alpha), max(1.0, alpha), pos=alpha <= 0)


def _celu(*args: Any, **kwargs: Any) -> Curve | None:
    alpha = float(kwargs.get("alpha", args[0] if args else 1.0))
    return Curve(True, False, 0.0, 1.0) if alpha > 0 else None


def _softplus(*args: Any, **kwargs: Any) -> Curve | None:
    said = dict(zip(("beta", "threshold"), args, strict=False)) | kwargs
    if said.get("beta", 1) <= 0 or said.get("threshold", _SWITCH) < _SWITCH:
        return None  # concave, or it jumps where it becomes a line
    return Curve(True, False, 0.0, 1.0, pos=True)


def _clamp(*args: Any, **kwargs: Any) -> Curve:
    low = kwargs.get("min", args[0] if args else None)
    high = kwargs.get("max", args[1] if len(args) > 1 else None)
    pos = low is not None and low >= 0 and (high is None or high >= 0)
    return Curve(high is None, low is None, 0.0, 1.0, pos=pos)


def _least(*args: Any, **kwargs: Any) -> Curve:
    return _clamp(kwargs.get("min", args[0] if args else None))


def _most(*args: Any, **kwargs: Any) -> Curve:
    return _clamp(None, kwargs.get("max", args[0] if args else None))


def _power(*args: Any, **kwargs: Any) -> Curve | None:
    exponent = kwargs.get("exponent", args[0] if args else None)
    return CURVES["square"]() if exponent == 2 else None


CURVES: dict[str, Callable[..., Curve | None]] = {
    "relu": _fixed(True, False, 0.0, 1.0, pos=True),
    "softplus": _softplus,
    "celu": _celu,
    "leaky_relu": _leaky,
    "elu": _elu,
    "exp": _fixed(True, False, 0.0, UNBOUNDED, pos=True, logs=True),
    "abs": _fixed(True, False, -1.0, 1.0, pos=True, even=True),
    "square": _fixed(True, False, -UNBOUNDED, UNBOUNDED, pos=True, even=True),
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _least,
    "clamp_max": _most,
    "log": _fixed(False, True, 0.0, UNBOUNDED, half=True),
    "sqrt": _fixed(False, True, 0.0, UNBOUNDED, pos=True, half=True),
    "logsigmoid": _fixed(False, True, 0.0, 1.0),
    "sigmoid": _fixed(False, False, 0.0, 0.25, pos=True),
    "tanh": _fixed(False, False, 0.0, 1.0),
    "hardtanh": _fixed(False, False, 0.0, 1.0),
    "relu6": _fixed(False, False, 0.0, 1.0, pos=True),
    "hardsigmoid": _fixed(False, False, 0.0, 0.25, pos=True),
    "softsign": _fixed(False, False, 0.0, 1.0),
    "selu": _fixed(False, False, 0.0, 1.7581),
    "gelu": _fixed(False, False, -0.13, 1.13),
    "silu": _fixed(False, False, -0.1, 1.1),
    "mish": _fixed(False, False, -0.12, 1.1),
    "hardswish": _fixed(False, False, -0.5, 1.5),
}


def apply_curve(name: str, f: Facts, inputs: int, *settings: Any, **named: Any) -> Facts | None:
    """Carry facts through a function of one number.

    Args:
        name: the function.
        f: of its argument.
        inputs: number of inputs that slopes are kept for.
        *settings: further arguments of the call.
        **named: the same by name.

    Returns:
        the facts of the result; None where the settings are not understood, or where the function
        may have no value.
    """
    if any(isinstance(value, Tensor) for value in (*settings, *named.values())):
        return None  # its value here need not be that of the next call
    curve = CURVES[name](*settings, **named)
    if curve is None or (curve.half and not bool(f.pos.all())):
        return None
    rising = torch.full_like(f.cvx, curve.low >= 0) | (f.pos if curve.even else False)
    affine = f.cvx & f.ccv
    least = torch.full(f.pos.shape, curve.low, dtype=torch.float64, device=f.pos.device)
    low = torch.where(rising, least.clamp_min(0), least)
    lo, hi = f.slopes(inputs)
    corners = torch.stack([low * lo, low * hi, curve.high * lo, curve.high * hi])
    found = f.bent(
        curve.cvx & (affine | (rising & f.cvx)),
        curve.ccv & (affine | (rising & f.ccv)),
        torch.full_like(f.pos, curve.pos),
        lo=corners.amin(0),
        hi=corners.amax(0),
        lcx=f.cvx & curve.logs,
    )
    if name == "relu":  # where nothing is negative it does nothing
        found = _chosen(f.pos, f, found, inputs)
    return found.rooted(f.origin, f.follows & curve.cvx & rising)


def _chosen(where: Tensor, yes: Facts, no: Facts, inputs: int) -> Facts:
    """Take some elements' facts from one, the others from another."""
    pairs = ((yes.cvx, no.cvx), (yes.ccv, no.ccv), (yes.pos, no.pos), (yes.lcx, no.lcx))
    cvx, ccv, pos, lcx = (torch.where(where, a, b) for a, b in pairs)
    slopes = zip(yes.slopes(inputs), no.slopes(inputs), strict=True)
    lo, hi = (torch.where(where, a, b) for a, b in slopes)
    return Facts(cvx, ccv, pos, lcx, torch.where(where, yes.flat, no.flat), lo, hi)
