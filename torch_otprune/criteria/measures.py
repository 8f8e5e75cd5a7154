"""How the units of a group become probability laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torch_otprune.criteria.laws import Gaussians, Grids, Laws, Lines, Together
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.evidence import Evidence
from torch_otprune.statistics.filters import Filters

__all__ = ["MEASURES", "Seen", "unheard"]

_STILL = 1e-9  # of the largest: what varies less is rounding


@dataclass(frozen=True)
class Seen:
    """A group's units as laws.

    Args:
        laws: one per unit; those of dead units mean nothing.
        live: which units have one.
        rows: their weights, every producer brought to size one.
        notes: fallbacks that a reader should know of.
    """

    laws: Laws
    live: Bool[Tensor, " units"]
    rows: Float[Tensor, "units features"]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> Float[Tensor, " units"]:
        """Measure every unit's weights."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return norms


Measure = Callable[[Evidence, int, str, float], Seen]


def _weights(evidence: Evidence, p: int, normalise: str, eps: float) -> Seen:
    """Take the values of a filter for a law on the line."""
    blocks, rows = _blocks(evidence), _rows(evidence)
    live = _alive(torch.linalg.vector_norm(rows, dim=1))
    parts = [Lines(_scaled(b, live, normalise).sort(dim=1).values, p) for b in blocks]
    return Seen(Together(parts, p), live, rows, _told(live))


def _taps(evidence: Evidence, p: int, normalise: str, eps: float) -> Seen:
    """Take a filter's absolute weights by kernel position for its masses, sign by sign."""
    rows = _rows(evidence)
    live = _alive(torch.linalg.vector_norm(rows, dim=1))
    found = evidence.filters or (Filters("", rows[:, None, :, None], rows[:, :1] * 0, ()),)
    parts: list[Laws] = []
    flat: list[str] = []
    for one, block in zip(found, _blocks(evidence), strict=False):
        if prod(one.kernel) > 1:
            parts += _spread(one, live, p, eps)
        else:
            parts.append(Lines(_scaled(block, live, normalise).sort(dim=1).values, p))
            flat.append(one.path)
    note = f"{', '.join(map(repr, flat))} has one tap: its values are compared instead"
    return Seen(Together(parts, p), live, rows, (*_told(live), *([note] if flat else [])))


def _activations(evidence: Evidence, p: int, normalise: str, eps: float) -> Seen:
    """Take what consumers read of a channel for a law on the line."""
    heard = [c.signals.T for c in evidence.consumers if c.signals is not None]
    if not heard:
        raise unheard(evidence, "cpot")
    heard = [h / h.square().mean().sqrt().clamp_min(1e-300) for h in heard]
    live = _alive(torch.stack([h.std(dim=1, correction=0) for h in heard]).amax(0))
    parts = [Lines(_scaled(h, live, normalise).sort(dim=1).values, p) for h in heard]
    return Seen(Together(parts, p), live, _rows(evidence), _told(live))


def _gaussian(evidence: Evidence, p: int, normalise: str, eps: float) -> Seen:
    """Take mean and covariance of the patches that consumers read of a channel."""
    parts, spread = [], []
    for consumer in evidence.consumers:
        if consumer.second is None or consumer.mean is None:
            continue
        second = torch.einsum("iaib->iab", consumer.second)
        own = consumer.mean[:, :, None] * consumer.mean[:, None]
        cov = second if consumer.absorbs else second - own  # is about the mean where one absorbs
        power = (second + own if consumer.absorbs else second).diagonal(dim1=1, dim2=2).mean(1)
        scale = power.mean().sqrt().clamp_min(1e-300)
        spread.append(cov.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0).sqrt() / scale)
        unit = {"none": scale.expand(len(power)), "l2": power.clamp_min(0).sqrt()}.get(
            normalise, spread[-1] * scale
        )
        unit = torch.where(spread[-1] > 0, unit, torch.ones_like(unit)).clamp_min(1e-150)
        parts.append(Gaussians(consumer.mean / unit[:, None], cov / unit.square()[:, None, None]))
    if not parts:
        raise unheard(evidence, "cpot")
    live = _alive(torch.stack(spread).amax(0))
    return Seen(Together(_settled(parts, live), p), live, _rows(evidence), _told(live))


MEASURES: Mapping[str, Measure] = {
    "weights": _weights,
    "taps": _taps,
    "activations": _activations,
    "gaussian": _gaussian,
}


def _blocks(evidence: Evidence) -> list[Float[Tensor, "units features"]]:
    """List the weights of every producer, each brought to size one by itself."""
    # layers that write to one stream may differ so much that the largest alone would be seen
    found = [f.weight.flatten(1) for f in evidence.filters] or [evidence.producers]
    return [b / b.square().mean().sqrt().clamp_min(1e-300) for b in found if b.numel()]


def _rows(evidence: Evidence) -> Float[Tensor, "units features"]:
    return torch.cat(_blocks(evidence), dim=1)


def _alive(size: Tensor) -> Bool[Tensor, " units"]:
    return size > _STILL * float(size.max())


def _told(live: Tensor) -> tuple[str, ...]:
    dead = (~live).nonzero().flatten().tolist()
    if not dead:
        return ()
    named = ", ".join(map(str, dead[:5])) + (", ..." if len(dead) > 5 else "")
    return (f"dead channels go first: {named}",)


def _scaled(values: Tensor, live: Tensor, normalise: str) -> Float[Tensor, "units values"]:
    """Bring every row to size one, as the setting says; values that do not vary by their size."""
    if normalise == "none":
        return values
    size = values.square().mean(1, keepdim=True).sqrt()
    spread = values.std(dim=1, correction=0, keepdim=True)
    unit = torch.where(spread > _STILL * size, spread, size) if normalise == "std" else size
    return torch.where(live[:, None], values / unit.clamp_min(1e-150), torch.zeros_like(values))


def _spread(one: Filters, live: Tensor, p: int, eps: float) -> list[Laws]:
    """Lay the positive and the negative part of every filter out over its taps."""
    axes = [torch.arange(size, dtype=torch.float64, device="cpu") for size in one.kernel]
    at = torch.cartesian_prod(*axes).reshape(prod(one.kernel), -1)
    cost = at.new_zeros(len(at) + 1, len(at) + 1)
    cost[:-1, :-1] = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist") ** p
    cost[-1, :-1] = cost[:-1, -1] = cost.max()
    total = one.weight.abs().sum((1, 2, 3)).where(live, one.weight.new_ones(()))
    found: list[Laws] = []
    for sign in (1, -1):
        mass = (sign * one.weight).clamp_min(0).sum((1, 2)) / total.clamp_min(1e-300)[:, None]
        # what is of the other sign waits far away: both signs weigh the same, and balance counts
        rest = (1 - mass.sum(1, keepdim=True)).clamp_min(0)
        found.append(Grids(torch.cat([mass, rest], dim=1), cost, p, eps))
    return found


def _settled(parts: list[Gaussians], live: Tensor) -> list[Gaussians]:
    """Give dead units a law that no formula stumbles over."""
    blank = live[:, None, None]
    return [
        Gaussians(
            torch.where(live[:, None], g.means, torch.zeros_like(g.means)),
            torch.where(blank, (g.covs + g.covs.mT) / 2, torch.zeros_like(g.covs)),
        )
        for g in parts
    ]


def unheard(evidence: Evidence, criterion: str) -> CalibrationError:
    """Say that a law of activations is asked for, and none are there.

    Args:
        evidence: of the group.
        criterion: who asks.

    Returns:
        the error.
    """
    return CalibrationError(
        "no activations were gathered of what reads this group.",
        where=f"group '{evidence.name}', criterion {criterion}",
        fix="run calibration data through the model; of experts and bare parameters no signals "
        "are kept, so use measure='weights' there.",
    )
