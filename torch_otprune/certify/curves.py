"""Functions of one number: which are convex, which rise, and how steep they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


_Made = Callable[..., Curve | None]


class _Spelt(NamedTuple):
    """A curve and the names of its settings, in order."""

    made: _Made
    names: tuple[str, ...] = ()

    def said(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the settings by name; None where there are others, which are not understood."""
        more = args[len(self.names) :]  # at most whether it works in place
        if len(more) > 1 or not all(isinstance(value, bool) for value in more):
            return None
        found = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return found if found.keys() <= set(self.names) else None


def _fixed(*values: Any, names: tuple[str, ...] = (), **flags: bool) -> _Spelt:
    return _Spelt(lambda **_: Curve(*values, **flags), names)


def _leaky(negative_slope: float = 0.01) -> Curve:
    slope = float(negative_slope)
    return Curve(slope <= 1, slope >= 1, min(slope, 1.0), max(slope, 1.0), pos=slope <= 0)


def _elu(alpha: float = 1.0) -> Curve:
    alpha = float(alpha)
    return Curve(0 <= alpha <= 1, False, min(0.0, alpha), max(1.0, alpha), pos=alpha <= 0)


def _celu(alpha: float = 1.0) -> Curve | None:
    return Curve(True, False, 0.0, 1.0) if alpha > 0 else None


def _softplus(beta: float = 1.0, threshold: float = _SWITCH) -> Curve | None:
    if beta <= 0 or threshold < _SWITCH:
        return None  # concave, or it jumps where it becomes a line
    return Curve(True, False, 0.0, 1.0, pos=True)


def _clamp(min: float | None = None, max: float | None = None) -> Curve:
    pos = min is not None and min >= 0 and (max is None or max >= 0)
    return Curve(max is None, min is None, 0.0, 1.0, pos=pos)


def _square() -> Curve:
    return Curve(True, False, -UNBOUNDED, UNBOUNDED, pos=True, even=True)


def _power(exponent: Any = None) -> Curve | None:
    return _square() if exponent == 2 else None


CURVES: dict[str, _Spelt] = {
    "relu": _fixed(True, False, 0.0, 1.0, pos=True),
    "softplus": _Spelt(_softplus, ("beta", "threshold")),
    "celu": _Spelt(_celu, ("alpha",)),
    "leaky_relu": _Spelt(_leaky, ("negative_slope",)),
    "elu": _Spelt(_elu, ("alpha",)),
    "exp": _fixed(True, False, 0.0, UNBOUNDED, pos=True, logs=True),
    "abs": _fixed(True, False, -1.0, 1.0, pos=True, even=True),
    "square": _Spelt(_square),
    "pow": _Spelt(_power, ("exponent",)),
    "clamp": _Spelt(_clamp, ("min", "max")),
    "clamp_min": _Spelt(_clamp, ("min",)),
    "clamp_max": _Spelt(lambda max=None: _clamp(max=max), ("max",)),
    "log": _fixed(False, True, 0.0, UNBOUNDED, half=True),
    "sqrt": _fixed(False, True, 0.0, UNBOUNDED, pos=True, half=True),
    "logsigmoid": _fixed(False, True, 0.0, 1.0),
    "sigmoid": _fixed(False, False, 0.0, 0.25, pos=True),
    "tanh": _fixed(False, False, 0.0, 1.0),
    "hardtanh": _fixed(False, False, 0.0, 1.0, names=("min_val", "max_val")),
    "relu6": _fixed(False, False, 0.0, 1.0, pos=True),
    "hardsigmoid": _fixed(False, False, 0.0, 0.25, pos=True),
    "softsign": _fixed(False, False, 0.0, 1.0),
    "selu": _fixed(False, False, 0.0, 1.7581),
    "gelu": _fixed(False, False, -0.13, 1.13, names=("approximate",)),
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
    said = CURVES[name].said(settings, named)
    curve = None if said is None else CURVES[name].made(**said)
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
