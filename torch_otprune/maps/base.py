"""The contract of a map between two sets of activations: fit, apply, fold, report."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import TransportError
from torch_otprune.maps.fold import fold_
from torch_otprune.maps.gap import Cost, monge_gap
from torch_otprune.maps.samples import Pairs, Samples, apart, warn_of_few
from torch_otprune.policy.registry import MAPS, Setting
from torch_otprune.transport.checks import refuse

__all__ = [
    "AffineFit",
    "FittedMap",
    "FreeFit",
    "MapReport",
    "TransportMap",
    "register",
]

register = MAPS.register

_MOVED = 0.01  # of the spread of its points: a channel that is displaced less stays


@dataclass(frozen=True)
class MapReport:
    """What a map achieved, and what sampling alone would look like.

    Args:
        kind: of the map.
        rows: source rows it was fitted on.
        channels: width of the target.
        fit_before: debiased Sinkhorn distance from source to target; None across widths.
        fit_after: the same from the mapped source.
        null: the same between random halves of the target: a perfect map looks like this.
        error_before: relative squared error of pairs without a map; None where unpaired.
        error_after: the same with it.
        gap_before: Monge gap of the pairs as they come, or of the map that was started from.
        gap_after: Monge gap of the map.
        moved: channels that are displaced by more than 1 % of their points' spread.
        notes: what the member has to add.
    """

    kind: str
    rows: int
    channels: int
    fit_before: float | None
    fit_after: float
    null: float
    error_before: float | None
    error_after: float | None
    gap_before: float | None
    gap_after: float | None
    moved: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: {self.rows} rows, {self.moved} of {self.channels} channels moved",
            f"  distance to the target  {_word(self.fit_before)} -> {_word(self.fit_after)}"
            f" (halves of the target: {_word(self.null)})",
            f"  squared error of pairs  {_word(self.error_before)} -> {_word(self.error_after)}",
            f"  Monge gap               {_word(self.gap_before)} -> {_word(self.gap_after)}",
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    @property
    def line(self) -> str:
        """Say all but the errors of pairs in one line."""
        told = (
            f"distance of laws {_word(self.fit_before)} -> {_word(self.fit_after)}, by chance "
            f"{_word(self.null)}",
            f"Monge gap {_word(self.gap_before)} -> {_word(self.gap_after)}",
            f"{self.moved} of {self.channels} channels moved",
        )
        return "; ".join([*told, *self.notes])


def _word(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


@dataclass(frozen=True, eq=False)
class FittedMap(ABC):
    """A map that was fitted.

    Args:
        kind: of the map.
        samples: what it was fitted on.
        cost: that its Monge gap is measured with.
        start: the map it was improved from; None is the identity.
        notes: for the report.
    """

    kind: str
    samples: Samples = field(repr=False)
    cost: Cost = "squared"
    start: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Map points, in their own dtype."""
        width = self.samples.x.shape[1]
        refuse(
            not x.is_floating_point() or not x.dim() or x.shape[-1] != width,
            f"points of shape {tuple(x.shape)} and type {x.dtype} cannot be mapped.",
            where=f"a fitted map of kind {self.kind}, {width} channels",
            fix=f"pass floating-point numbers with {width} channels in the last axis.",
        )
        return self.mapped(x)

    @abstractmethod
    def mapped(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Map points that were checked."""

    @abstractmethod
    def module(self) -> nn.Module:
        """Make a small module of its own, acting on the last axis, in float32."""

    def fold_into(
        self,
        layer: nn.Module,
        *,
        side: Literal["out", "in"] = "out",
        norm: nn.Module | None = None,
    ) -> None:
        """Multiply the map into a layer.

        Args:
            layer: a linear layer or a convolution; written.
            side: `out` maps what it writes, `in` what it reads.
            norm: batch-norm behind a layer without bias; takes up the constant.

        Raises:
            TransportError: for a map that is not affine.
        """
        raise TransportError(
            f"a map of kind {self.kind} is not affine.",
            where=f"fold_into, {type(layer).__name__}, side {side}"
            + ("" if norm is None else ", with a norm"),
            fix="put `module()` in the place of a removed block, or fit an affine form.",
        )

    @cached_property
    def report(self) -> MapReport:
        """Measure the map, on up to 512 rows of each side."""
        few = self.samples.shown
        moved = self(few.x)
        wrong, right = (None, None) if few.matched is None else _errors(self, *few.matched)
        before, after = self._gaps(few)
        return MapReport(
            self.kind,
            len(self.samples.x),
            self.samples.y.shape[1],
            apart(few.x, few.y) if few.same else None,
            apart(moved, few.y),
            self.samples.null,
            wrong,
            right,
            before,
            after,
            _moved(few.x, moved) if few.same else moved.shape[1],
            self.notes,
        )

    def _gaps(self, few: Samples) -> tuple[float | None, float | None]:
        """Measure the gap before and after, by assignment."""
        if not few.same:
            return None, None
        measure = _Gap(self.cost)
        after = measure(few.x, self(few.x))
        if few.matched is not None:
            return measure(*few.matched), after
        return measure(few.x, few.x if self.start is None else self.start(few.x)), after


@dataclass(frozen=True)
class _Gap:
    cost: Cost

    def __call__(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(monge_gap(x, y, cost=self.cost, solver="exact"))


def _errors(fitted: FittedMap, x: Tensor, y: Tensor) -> tuple[float | None, float]:
    power = float(y.square().sum().clamp_min(1e-300))
    before = float((x - y).square().sum()) / power if x.shape == y.shape else None
    return before, float((fitted(x) - y).square().sum()) / power


def _moved(x: Tensor, y: Tensor) -> int:
    spread = x.std(0).clamp_min(x.std(0).mean() * 1e-3)
    return int(((y - x).square().mean(0).sqrt() > _MOVED * spread).sum())


@dataclass(frozen=True, eq=False)
class AffineFit(FittedMap):
    """The map x to matrix x + shift.

    Args:
        matrix: in float64.
        shift: in float64.
    """

    matrix: Float[Tensor, "e d"] = field(default_factory=lambda: torch.empty(0, 0))
    shift: Float[Tensor, " e"] = field(default_factory=lambda: torch.empty(0))

    def mapped(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Map points."""
        return (x.to(self.matrix) @ self.matrix.T + self.shift).to(x)

    def module(self) -> nn.Module:
        """Make a linear layer of it."""
        with torch.random.fork_rng(devices=[]):  # its first values are overwritten
            made = nn.Linear(self.matrix.shape[1], self.matrix.shape[0])
        with torch.no_grad():
            made.weight.copy_(self.matrix)
            made.bias.copy_(self.shift)
        return made

    def fold_into(
        self,
        layer: nn.Module,
        *,
        side: Literal["out", "in"] = "out",
        norm: nn.Module | None = None,
    ) -> None:
        """Multiply the map into a layer; see `fold_`."""
        fold_(layer, self.matrix, self.shift, side=side, norm=norm)


@dataclass(frozen=True, eq=False)
class FreeFit(FittedMap):
    """A map that is not affine.

    Args:
        body: computes it in float64, on the last axis.
    """

    body: nn.Module = field(default_factory=nn.Identity)

    def mapped(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Map points."""
        found: Tensor = self.body(x.double())
        return found.detach().to(x)

    def module(self) -> nn.Module:
        """Hand out a copy of what computes it."""
        return copy.deepcopy(self.body).float()


class TransportMap(Setting, ABC):
    """A way to fit a map that carries one set of activations onto another.

    A subclass is one file: its settings and `fitted`.
    """

    across: ClassVar[bool] = False  # whether pairs may have different widths

    @property
    def affine(self) -> bool:
        """Tell whether what it fits is affine, so that it can be folded."""
        return True

    @abstractmethod
    def fitted(self, samples: Samples) -> FittedMap:
        """Fit to samples that were checked.

        Args:
            samples: in float64.

        Returns:
            the map.
        """

    def fit(
        self, source: Float[Tensor, "n d"], target: Float[Tensor, "m e"], pairs: Pairs = None
    ) -> FittedMap:
        """Fit a map from a source to a target.

        Args:
            source: activations that are to be moved, one row per sample.
            target: activations whose law, or whose values, they should get.
            pairs: True where row i of both is the same input, or a k x 2 matrix of row numbers;
                None where nothing is known, and only laws are compared.

        Returns:
            the map, with its report.
        """
        samples = Samples.read(source, target, pairs)
        self.fitting(samples)
        warn_of_few(samples)
        return self.fitted(samples)

    def fitting(self, samples: Samples) -> None:
        """Refuse sets that no map of this kind connects."""
        refuse(
            not samples.same and not (self.across and samples.matched is not None),
            f"unpaired sets of {samples.x.shape[1]} and {samples.y.shape[1]} dimensions have no "
            "common space."
            if samples.matched is None
            else f"{self.kind} maps no {samples.x.shape[1]} dimensions onto {samples.y.shape[1]}.",
            where=f"TransportMap.fit, kind {self.kind}, arguments source and target",
            fix="pad the narrower set with zeros or its means, or use `affine` with pairs.",
        )
