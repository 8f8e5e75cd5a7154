"""Where a network of rectifiers bends between samples, layer by layer: numbers and a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from os import PathLike
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from torch_otprune.criteria.layers.sites import affine_residual
from torch_otprune.errors import CalibrationError, StructureError
from torch_otprune.policy.targets import module_classes, selects
from torch_otprune.report.words import short_names
from torch_otprune.statistics.depth import SiteEvidence, SiteFold
from torch_otprune.statistics.folds import BITS, Folding, bend_weights, follow, rectifiers
from torch_otprune.statistics.paths import Pairs, Paths, paths_between, paths_from
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import trace
from torch_otprune.structure.forward import head, joined
from torch_otprune.structure.graph import Site

__all__ = ["Folds", "LayerFolds", "folds"]

_EXAMPLE = 2  # samples that the analysis runs on
_COARSE = 0.05  # share of switches that half the points would miss


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerFolds(_Frozen):
    """One rectifier along straight paths between samples; means over the paths."""

    name: str
    function: str
    switch: float = Field(ge=0, description="switches per unit and path")
    score: float = Field(ge=0, le=1, description="share of switches that are undone again")
    upto: float = Field(ge=0, le=1, description="the same of all rectifiers up to this one")
    increment: float = Field(description="what this rectifier adds to `upto`")
    residual: float = Field(
        ge=0, le=1, description="share of the output that the best line per channel misses"
    )
    weighted_switch: float = Field(ge=0, description="as `switch`, units by how much they bend")
    weighted_score: float = Field(ge=0, le=1)
    weighted_upto: float = Field(ge=0, le=1)
    weighted_increment: float
    dead: int = Field(ge=0, description="channels that are never on in the data")
    always_on: int = Field(ge=0, description="channels that are never off")
    channels: int = Field(gt=0)
    bits: int = Field(gt=0, description="units watched")
    units: int = Field(gt=0, description="units there are, positions counted")
    running: tuple[float, ...] = Field(description="`upto` along the path, at equal steps")


class Folds(_Frozen):
    """Where a network switches between samples, and how much of that it undoes.

    Limits: it counts where units switch along straight lines, which leave the data, and not how
    much the function bends; the weighted numbers go half the way. A later rectifier inherits the
    folds of those in front, so its own `score` grows with depth and says little about it; a first
    one has the score 0 whatever it does. Rank by `residual` and `increment`.
    """

    layers: tuple[LayerFolds, ...]
    phi: float = Field(ge=0, le=1, description="fold score of all rectifiers, each counted alike")
    phi_high: float = Field(ge=0, le=1, description="the same, on the path at the 95th percentile")
    phi_bits: float = Field(ge=0, le=1, description="the same, every unit counted alike")
    phi_weighted: float = Field(ge=0, le=1, description="the same, units by how much they bend")
    phi_symmetric: float | None = Field(
        description="the same with the widest distance on the path, which does not depend on the "
        "direction; None for more than 512 steps"
    )
    pairs: str = Field(description="what the paths join")
    paths: int = Field(gt=0)
    steps: int = Field(gt=0)
    missed: float = Field(ge=0, le=1, description="switches that half the steps would not find")
    left_out: dict[str, str] = Field(description="activations that have no kinks, by function")
    packed: int = Field(ge=0, description="bytes of codes held at a time")
    plain: int = Field(ge=0, description="bytes at one byte per bit")
    seconds: float = Field(ge=0)

    def ranking(self, increment: float = 1.0) -> tuple[str, ...]:
        """Order the rectifiers from the first that can become linear to the last.

        Args:
            increment: weight of the fold increment beside the affine residual.

        Returns:
            names; what `Linearize(criterion="space_folds")` would take first comes first, as far
            as layers fold.
        """
        price = {x.name: x.residual + increment * max(x.weighted_increment, 0) for x in self.layers}
        return tuple(sorted(price, key=lambda name: price[name]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what a reader should know about the numbers."""
        found = []
        if self.missed > _COARSE:
            said = f"half the steps would miss {self.missed:.0%} of the switches"
            found.append(f"{said}: take more than {self.steps} steps")
        if self.left_out:
            smooth = ", ".join(f"{name} ({kind})" for name, kind in self.left_out.items())
            found.append(f"left out, as they have no kinks: {smooth}")
        watched = [x.name for x in self.layers if x.bits < x.units]
        if watched:
            found.append(f"only a part of the units is watched of {', '.join(watched)}")
        return tuple(found)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the numbers.

        Args:
            path: of the picture; its ending decides the format.
        """
        from torch_otprune.report.pictures_folds import draw_folds

        draw_folds(self, path)

    def __str__(self) -> str:
        """Print one line per rectifier, the whole, and what it rests on."""
        head = ("activation", "switch", "score", "up to", "increment", "residual", "dead", "on")
        rows = [head, *(_row(x) for x in self.layers)]
        wide = max(len(row[0]) for row in rows)
        lines = [f"{r[0]:<{wide}}" + "".join(f"{c:>11}" for c in r[1:]) for r in rows]
        phi = f"all: {self.phi:.3f} (95 % of paths below {self.phi_high:.3f}), "
        phi += f"every unit alike {self.phi_bits:.3f}, by bend {self.phi_weighted:.3f}"
        rest = f"{self.paths} paths between {self.pairs} samples, {self.steps} steps, "
        rest += f"{self.seconds:.1f} s; {self.packed / 2**20:.2f} MiB of codes held, "
        rest += f"{self.plain / 2**20:.2f} MiB unpacked"
        return "\n".join([*lines, phi, rest, *(f"note: {note}" for note in self.notes)])


def _row(x: LayerFolds) -> tuple[str, ...]:
    numbers = (x.switch, x.score, x.upto, x.increment, x.residual)
    counts = (f"{n}/{x.channels}" for n in (x.dead, x.always_on))
    return (short_names([x.name])[0], *(f"{n:.3f}" for n in numbers), *counts)


def folds(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    ends: Any = None,
    pairs: Pairs = "any",
    paths: int = 64,
    steps: int = 32,
    ignore: str | Sequence[str] = (),
    bits: int = BITS,
    seed: int = 0,
) -> Folds:
    """Follow straight paths between samples, and count where the rectifiers switch.

    Only forward passes: paths x (steps + 1) samples, and the batches twice. The model is left as
    it was.

    Args:
        model: any module with rectifiers.
        batches: samples, as the model takes them; class numbers behind them for `pairs`.
        ends: where the path of every sample leads, one batch like all batches together; None
            draws pairs of samples.
        pairs: `any`, `inter` (two classes), `intra` (one class) or `local` (a tenth of the way to
            another sample, nearer to the data).
        paths: how many, at most.
        steps: of each path, even.
        ignore: activations to leave out, as patterns of module paths; one or several.
        bits: units watched of one rectifier, at most; of more, a fixed random part.
        seed: of pairs and of the part.

    Returns:
        the numbers; `print` them, or `.plot("folds.png")`.

    Raises:
        CalibrationError: if there are no batches, they are not finite, or nothing lies between
            two samples.
        StructureError: if the model has no activation with a kink, such as a ReLU, computes NaN,
            or has none that `ignore` names.

    Source: Lewandowski et al. 2025, "On Space Folds of ReLU Neural Networks", for the score; the
    weights, the increments and the switch rate of a layer are ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> folds(net, [torch.randn(20, 4)]).layers[0].score  # one layer never folds
        0.0
    """
    start, batches = time.perf_counter(), _checked(batches, bits)
    kinked, smooth = _found(model, batches[0], ignore)
    way = (
        paths_between(model, batches, count=paths, pairs=pairs, seed=seed)
        if ends is None
        else paths_from(model, joined(batches), ends)
    )
    seen = watch_sites(model, kinked, batches)
    weights = {name: bend_weights(evidence) for name, evidence in seen.items()}
    run = follow(model, kinked, way, steps=steps, weights=weights, bits=bits, seed=seed)
    return _told(run, way, seen).model_copy(
        update={
            "pairs": "given" if ends is not None else pairs,
            "left_out": {site.name: site.function for site in smooth},
            "seconds": time.perf_counter() - start,
        }
    )


def _checked(batches: Sequence[Any], bits: int) -> list[Any]:
    if not isinstance(bits, int) or bits < 1:
        raise CalibrationError(
            f"{bits!r} bits watch nothing.",
            where="folds, argument bits",
            fix=f"pass a whole number of bits per rectifier, such as {BITS}.",
        )
    if isinstance(batches, Tensor) or not (found := list(batches)):
        raise CalibrationError(
            "batches is a tensor." if isinstance(batches, Tensor) else "there are no batches.",
            where="folds, argument batches",
            fix="pass a list of batches, as the model takes them.",
        )
    return found


def _found(
    model: nn.Module, batch: Any, ignore: str | Sequence[str]
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Find the rectifiers, and refuse a model that has none."""
    classes = module_classes(model)
    ignore = [ignore] if isinstance(ignore, str) else ignore
    sites = trace(model, head(batch, _EXAMPLE), channels=False).sites
    for pattern in ignore:
        if not any(selects([pattern], site.module, classes) for site in sites):
            raise StructureError(
                f"{pattern!r} matches no activation of this model.",
                where=f"folds, argument ignore; activations: {', '.join(s.name for s in sites)}",
                fix="use the module path of an activation, or a glob.",
            )
    kinked, smooth = rectifiers([s for s in sites if not selects(ignore, s.module, classes)])
    if kinked:
        return kinked, smooth
    what = ", ".join(f"{site.name} ({site.function})" for site in smooth[:3])
    raise StructureError(
        "the model has no activation with a kink, so no path folds"
        + (f"; it has {what}." if what else "."),
        where=f"folds, model {type(model).__name__}",
        fix="pass a model with ReLU, ReLU6, LeakyReLU or PReLU; for others rank with "
        "Linearize(criterion='stein').",
    )


def _told(run: Folding, way: Paths, seen: dict[str, SiteEvidence]) -> Folds:
    """Write the counts out."""
    means, upto = run.folds(), run.upto.mean(2).tolist()
    layers = tuple(
        _layer(run, i, means[site.name], seen[site.name], (upto[0][i], upto[1][i]))
        for i, site in enumerate(run.sites)
    )
    alike, symmetric = run.whole
    total = float(run.length.sum())
    return Folds(
        layers=layers,
        phi=upto[0][-1],
        phi_high=float(run.upto[0, -1].quantile(0.95)),
        phi_bits=float(alike.mean()),
        phi_weighted=upto[1][-1],
        phi_symmetric=None if symmetric is None else float(symmetric.mean()),
        pairs="",
        paths=len(way),
        steps=run.running.shape[1] - 1,
        missed=1 - float(run.half.sum()) / total if total > 0 else 0.0,
        left_out={},
        packed=run.packed,
        plain=run.plain,
        seconds=0,
    )


def _layer(
    run: Folding, i: int, fold: SiteFold, seen: SiteEvidence, upto: tuple[float, float]
) -> LayerFolds:
    site, never = run.sites[i], seen.positive
    return LayerFolds(
        name=site.name,
        function=site.function,
        **{k: v for k, v in vars(fold).items() if k != "paths"},
        upto=upto[0],
        weighted_upto=upto[1],
        residual=affine_residual(seen),
        dead=_count(never == 0),
        always_on=_count(never == 1),
        channels=site.channels,
        bits=run.bits[i],
        units=run.units[i],
        running=tuple(run.running[i].tolist()),
    )


def _count(facts: Tensor) -> int:
    return int(facts.sum())
