"""Where rectifiers switch along straight paths, and how much of it the path undoes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, StructureError
from torch_otprune.statistics.codes import changed, pack, popcount, unpack
from torch_otprune.statistics.depth import SiteEvidence, SiteFold
from torch_otprune.statistics.paths import Paths
from torch_otprune.statistics.sites import Watch
from torch_otprune.structure.forward import evaluating, outside_inference, run
from torch_otprune.structure.graph import Site

__all__ = ["BITS", "KINKS", "Folding", "bend_weights", "follow", "rectifiers", "site_folds"]

KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leakyrelu": (0.0,),
    "prelu": (0.0,),
    "rrelu": (0.0,),
}
"""Activations made of straight pieces, and where one piece meets the next."""

BITS = 2**14  # of one rectifier, at most; of more, a fixed random part is watched
_ROWS = 256  # points that the model runs on at a time
_SYMMETRIC = 512  # steps up to which all pairs of points of a path are compared


@dataclass(frozen=True)
class Folding:
    """What was counted, rectifier by rectifier in order of execution, path by path.

    Lengths add up the switches along a path; reaches are the largest distance from its start.
    In `upto`, every rectifier up to this one counts the same, whatever its width.

    Args:
        sites: the rectifiers.
        bits: watched units, both kinks of a ReLU6 counted.
        units: all there are.
        length: switches.
        reach: distance from the start, at most.
        half: switches that every other point would have found.
        bent: weighted switches; weights of a rectifier add up to 1.
        bent_reach: the weighted distance.
        upto: fold score of all rectifiers so far; then weighted.
        running: the same along the path, averaged over paths.
        whole: fold score of all rectifiers together, each bit counted the same; then each
            rectifier counted the same and the reach taken between any two points of the path.
        packed: bytes of codes held at a time.
        plain: bytes that one byte per bit would take.
    """

    sites: tuple[Site, ...]
    bits: tuple[int, ...]
    units: tuple[int, ...]
    length: Float[Tensor, "sites paths"]
    reach: Float[Tensor, "sites paths"]
    half: Float[Tensor, "sites paths"]
    bent: Float[Tensor, "sites paths"]
    bent_reach: Float[Tensor, "sites paths"]
    upto: Float[Tensor, "2 sites paths"]
    running: Float[Tensor, "sites points"]
    whole: tuple[Float[Tensor, " paths"], Float[Tensor, " paths"] | None]
    packed: int
    plain: int

    @property
    def score(self) -> Float[Tensor, "sites paths"]:
        """Give the fold score of each rectifier's own units."""
        return undone(self.reach, self.length)

    @property
    def bent_score(self) -> Float[Tensor, "sites paths"]:
        """Give the same, weighted."""
        return undone(self.bent_reach, self.bent)

    def increments(self, weighted: bool = False) -> Float[Tensor, " sites"]:
        """Tell what each rectifier adds to the score of all in front of it.

        Args:
            weighted: whether units count by how much they bend.

        Returns:
            differences of `upto`, averaged over paths.
        """
        upto = self.upto[int(weighted)].mean(1)
        return torch.diff(upto, prepend=upto.new_zeros(1))

    def folds(self) -> dict[str, SiteFold]:
        """Average over the paths, as criteria take it."""
        count = torch.tensor(self.bits, dtype=torch.float64, device="cpu").clamp_min(1)
        columns = (
            self.length.mean(1) / count,
            self.score.mean(1),
            self.increments(),
            self.bent.mean(1),
            self.bent_score.mean(1),
            self.increments(weighted=True),
        )
        rows, names = torch.stack(columns, dim=1).tolist(), [f.name for f in fields(SiteFold)]
        told = [
            SiteFold(**dict(zip(names, [*row, self.length.shape[1]], strict=True))) for row in rows
        ]
        return {site.name: fold for site, fold in zip(self.sites, told, strict=True)}


def undone(reach: Float[Tensor, "*any"], length: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Tell which share of a path's switches does not lead further away; 0 where there is none."""
    moved = length > 0
    share = 1 - reach / torch.where(moved, length, 1.0)
    # Sums of weights in two orders differ by rounding; a flat path is exactly flat.
    return torch.where(moved & (share > 1e-12), share, 0.0)


def rectifiers(sites: Sequence[Site]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Part activations into those with kinks and the others.

    Args:
        sites: of a graph.

    Returns:
        those that can be followed, and those that cannot: smooth ones.
    """
    single = [site for site in sites if site.channels]
    kinked = tuple(site for site in single if site.function in KINKS)
    return kinked, tuple(site for site in single if site.function not in KINKS)


def site_folds(
    model: nn.Module,
    sites: Sequence[Site],
    paths: Paths,
    evidence: Mapping[str, SiteEvidence],
    *,
    steps: int,
    seed: int = 0,
) -> dict[str, SiteFold]:
    """Follow paths through every rectifier of a model, for a criterion.

    Args:
        model: left as it was.
        sites: all activations of its graph; smooth ones have no place in what is counted.
        paths: to follow.
        evidence: for the weights of units; rectifiers that are not in it weigh all alike.
        steps: pieces of each path.
        seed: of the units watched.

    Returns:
        rectifier to what was counted.
    """
    kinked, _ = rectifiers(sites)
    weights = {name: bend_weights(seen) for name, seen in evidence.items()}
    return follow(model, kinked, paths, steps=steps, weights=weights, seed=seed).folds()


def bend_weights(evidence: SiteEvidence) -> Float[Tensor, " channels"]:
    """Weigh a unit by how much its kink bends what the next layers read.

    What goes in, batch-norm and residual stream included, scales a unit's input; its spread
    stands for the norm of the weights in front. Scaling a unit up in front and down behind
    does not change its own weight; it does change the weights of the rectifier in front.

    Args:
        evidence: of the activation.

    Returns:
        spread of the input times the norm of what reads it; not scaled.
    """
    spread = evidence.var.clamp_min(0).sqrt()
    return spread if evidence.reads is None else spread * evidence.reads.clamp_min(0).sqrt()


def follow(
    model: nn.Module,
    sites: Sequence[Site],
    paths: Paths,
    *,
    steps: int,
    weights: Mapping[str, Tensor] | None = None,
    bits: int = BITS,
    seed: int = 0,
) -> Folding:
    """Run the model along paths and count the switches of its rectifiers.

    A few paths are held at a time, as packed codes. Batch-norms use what they learnt and dropout
    is off.

    Args:
        model: left as it was.
        sites: rectifiers, in order of execution.
        paths: to follow.
        steps: pieces of each path, even; too few find too few switches.
        weights: activation to a weight per channel; where there is none, all weigh the same.
        bits: watched of one rectifier, at most.
        seed: chooses them.

    Returns:
        the counts.

    Raises:
        CalibrationError: if the number of steps is odd or too small.
        StructureError: if a rectifier's input has no row per sample.
    """
    if not isinstance(steps, int) or steps < 2 or steps % 2:
        raise CalibrationError(
            f"{steps} steps do not halve.",
            where="folds, argument steps",
            fix="pass an even number of steps, such as 32.",
        )
    takers = [_Taker(site, bits, seed, (weights or {}).get(site.name)) for site in sites]
    group, counts = max(1, _ROWS // (steps + 1)), list[_Counts]()
    with outside_inference(), evaluating(model), torch.no_grad():
        for first in range(0, len(paths), group):
            last = min(first + group, len(paths))
            for taker in takers:
                taker.begin(steps + 1, last - first)
            with Watch(model, sites, takers) as watch:
                batch = paths.points(first, last, steps)
                watch.begin(batch)
                run(model, batch)
            counts.append(_counted(takers))
    return _gathered(sites, takers, counts)


@dataclass
class _Taker:
    """Keeps the codes of one rectifier along a few paths."""

    site: Site
    limit: int
    seed: int
    weight: Tensor | None  # per channel
    shape: tuple[int, int] = (0, 0)  # points, paths
    held: tuple[int, int] = (0, 0)  # bytes of the largest batch's codes, packed and not
    codes: Tensor | None = None
    picked: Tensor | None = None  # which units
    units: int = 0
    weights: Tensor = field(
        default_factory=lambda: torch.ones(0, device="cpu")
    )  # per bit, adding up to 1

    def begin(self, points: int, paths: int) -> None:
        """Expect a batch."""
        self.shape, self.codes = (points, paths), None

    def take(self, z: Tensor, phi: Tensor, batch: Any) -> None:
        """Pack the states of one call."""
        points, paths = self.shape
        wide = z.movedim(self.site.axis, -1)
        if wide.shape[0] % (points * paths):
            raise StructureError(
                f"activation '{self.site.name}' has {wide.shape[0]} rows for {points * paths} "
                "samples.",
                where=f"space folds, input of shape {tuple(z.shape)}",
                fix="leave it out with `ignore`, or rank by 'stein'.",
            )
        flat = wide.reshape(points * paths, -1)
        if not bool(flat.isfinite().all()):
            raise StructureError(
                f"activation '{self.site.name}' reads NaN or infinity on a path.",
                where=f"space folds, input of shape {tuple(z.shape)}",
                fix="look for NaN or infinity in the weights, or run the model in float32.",
            )
        if self.picked is None:
            self._choose(flat)
        assert self.picked is not None
        part = flat if len(self.picked) == flat.shape[1] else flat[:, self.picked.to(flat.device)]
        bits = torch.cat([part > kink for kink in KINKS[self.site.function]], dim=1)
        self.codes = pack(bits).view(points, paths, -1)
        self.held = max(self.held, (self.codes.numel(), bits.numel()))

    def _choose(self, flat: Tensor) -> None:
        """Draw the units that are watched, and spread the channels' weights over them."""
        self.units = flat.shape[1]
        kinks = len(KINKS[self.site.function])
        generator = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(self.units, generator=generator, device="cpu")[
            : max(1, self.limit // kinks)
        ]
        self.picked = order.sort().values
        weight = torch.ones(self.site.channels, dtype=torch.float64, device="cpu")
        if self.weight is not None and bool(self.weight.sum() > 0):
            weight = self.weight.double().cpu()
        spread = weight[self.picked % self.site.channels].repeat(kinks)
        total = spread.sum()
        self.weights = spread / total if total > 0 else torch.full_like(spread, 1 / len(spread))
        self.weights = self.weights.to(torch.float64 if flat.device.type != "mps" else flat.dtype)
        self.weights = self.weights.to(flat.device)


@dataclass
class _Counts:
    """The counts of a few paths."""

    rows: list[tuple[Tensor, ...]]  # length, reach, half, bent, bent reach, by site
    upto: Tensor  # 2 x sites x paths
    running: Tensor  # sites x points, summed over paths
    whole: Tensor
    symmetric: Tensor | None


@dataclass
class _Sum:
    """Switches and distances of several rectifiers together."""

    steps: Tensor | float = 0.0  # points - 1 x paths
    apart: Tensor | float = 0.0  # points x paths

    def add(self, steps: Tensor, apart: Tensor, share: float = 1.0) -> None:
        self.steps, self.apart = self.steps + share * steps, self.apart + share * apart

    def score(self) -> Tensor:
        assert isinstance(self.steps, Tensor)
        assert isinstance(self.apart, Tensor)
        return undone(self.apart.amax(0), self.steps.sum(0))

    def running(self) -> Tensor:
        """Score every beginning of the path; sum over paths."""
        assert isinstance(self.steps, Tensor)
        assert isinstance(self.apart, Tensor)
        length = torch.cat([torch.zeros_like(self.steps[:1]), self.steps.cumsum(0)])
        return undone(self.apart.cummax(0).values, length).sum(1)


def _counted(takers: Sequence[_Taker]) -> _Counts:
    rows, upto, running = list[tuple[Tensor, ...]](), list[tuple[Tensor, Tensor]](), list[Tensor]()
    even, plain, bent = _Sum(), _Sum(), _Sum()
    between: Tensor | None = None
    for taker in takers:
        if taker.codes is None:
            raise StructureError(
                f"activation '{taker.site.name}' did not run on a path.",
                where="space folds",
                fix="leave it out with `ignore`, or rank by 'stein'.",
            )
        codes, size = taker.codes, len(taker.weights)
        steps, apart = _bits_set(codes[1:] ^ codes[:-1]), _bits_set(codes ^ codes[:1])
        half = _bits_set(codes[2::2] ^ codes[:-2:2]).sum(0)
        bits = unpack(codes, size)
        heavy = changed(bits[1:], bits[:-1], taker.weights).cpu().double()
        far = changed(bits, bits[:1], taker.weights).cpu().double()
        plain.add(steps, apart)
        even.add(steps, apart, 1 / max(size, 1))
        bent.add(heavy, far)
        rows.append((steps.sum(0), apart.amax(0), half, heavy.sum(0), far.amax(0)))
        upto.append((even.score(), bent.score()))
        running.append(even.running())
        if len(codes) <= _SYMMETRIC + 1:
            more = _apart(bits) / max(size, 1)
            between = more if between is None else between + more
    whole = None if between is None else undone(between.amax((1, 2)), even.steps.sum(0))  # type: ignore[union-attr]
    both = torch.stack([torch.stack(pair) for pair in upto], dim=1)
    return _Counts(rows, both, torch.stack(running), plain.score(), whole)


def _bits_set(words: UInt8[Tensor, "*rows words"]) -> Float[Tensor, "*rows"]:
    return popcount(words).cpu().double()


def _apart(bits: Bool[Tensor, "points paths units"]) -> Float[Tensor, "paths points points"]:
    """Compare every two points of a path."""
    ones = bits.transpose(0, 1).float()  # counts are exact in float32 up to 2^24
    on = ones.sum(-1)
    return (on[:, :, None] + on[:, None, :] - 2 * ones @ ones.mT).cpu().double()


def _gathered(
    sites: Sequence[Site], takers: Sequence[_Taker], counts: Sequence[_Counts]
) -> Folding:
    columns = [
        torch.cat([torch.stack([row[i] for row in c.rows]) for c in counts], dim=1).double()
        for i in range(5)
    ]
    paths = columns[0].shape[1]
    symmetric = [c.symmetric for c in counts if c.symmetric is not None]
    sizes = tuple(len(taker.weights) for taker in takers)
    return Folding(
        sites=tuple(sites),
        bits=sizes,
        units=tuple(t.units * len(KINKS[t.site.function]) for t in takers),
        length=columns[0],
        reach=columns[1],
        half=columns[2],
        bent=columns[3],
        bent_reach=columns[4],
        upto=torch.cat([c.upto for c in counts], dim=2),
        running=torch.stack([c.running for c in counts]).sum(0) / paths,
        whole=(torch.cat([c.whole for c in counts]), torch.cat(symmetric) if symmetric else None),
        packed=sum(taker.held[0] for taker in takers),
        plain=sum(taker.held[1] for taker in takers),
    )
