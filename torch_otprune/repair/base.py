"""The contract of a repair: a cut model and its dense original in, a better cut model out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from torch_otprune.certify import Keeper
from torch_otprune.criteria.base import Need
from torch_otprune.plan.model import Cut, Drop, Folding, Line
from torch_otprune.plan.replacement import Replacement
from torch_otprune.policy.registry import REPAIRS, REPLACEMENTS, Setting
from torch_otprune.repair.lockstep import Pause, Site
from torch_otprune.statistics.patches import output_rows, supported
from torch_otprune.statistics.stream import runs
from torch_otprune.structure.graph import Graph, Tail
from torch_otprune.structure.layers import (
    BatchNorm,
    channels,
    is_dense,
    is_linear,
    norm_behind,
    norms_behind,
    shared,
    tensor,
)
from torch_otprune.surgery.cut import merged, put_
from torch_otprune.surgery.exchange import gone

__all__ = ["STEERED", "Note", "Patient", "Repair", "register"]

STEERED = 1e-3  # of the largest scale of a norm; what is below cannot be undone

register = REPAIRS.register


@dataclass(frozen=True)
class Note:
    """What a repair did at one place.

    Args:
        kind: the repair.
        site: module path, or `model`.
        before: relative squared error against the dense model before; None where unmeasured.
        after: the same afterwards.
        accepted: whether the change was kept.
        text: why not, or what is worth knowing.
    """

    kind: str
    site: str
    before: float | None
    after: float | None
    accepted: bool
    text: str = ""


def _quiet(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Patient:
    """A cut model, its original, and the data to compare them on.

    Args:
        dense: the original; never written.
        small: the cut model. Write it through `surgery.put_`, which replaces a tensor; a repair
            that trains the parameters writes into them, in place.
        graph: the original's analysis.
        cuts: what is to be repaired.
        every: all that was cut.
        drops: blocks that were taken out, and are to be made up for.
        gone: all blocks that were taken out.
        lines: activations that became linear, and are to be made up for.
        foldings: all layers that one layer stands for; `graph` knows that one alone.
        rewritten: layer to whose output of the dense model it is to write, and what that passes
            next, where it is not its own.
        batches: calibration batches; may be empty for repairs that need none.
        seed: the policy's seed.
        progress: told the stage, the steps done and the steps in all.
        keeper: what the model must stay; None where nothing is asked.
        signs: which entries of the cut model's tensors must not become negative, by name.
    """

    dense: nn.Module
    small: nn.Module
    graph: Graph
    cuts: Sequence[Cut]
    every: Sequence[Cut]
    batches: Sequence[Any]
    drops: Sequence[Drop] = ()
    gone: Sequence[Drop] = ()
    lines: Sequence[Line] = ()
    foldings: Sequence[Folding] = ()
    rewritten: Mapping[str, tuple[str, Tail]] = field(default_factory=dict)
    seed: int = 0
    progress: Callable[[str, int, int], None] = field(default=_quiet)
    keeper: Keeper | None = None
    signs: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _left(self) -> dict[str, Tensor]:
        pieces = (p for p in merged(self.every) if p.side != "in")
        return {piece.path: torch.tensor(piece.keep, device="cpu") for piece in pieces}

    @cached_property
    def _folds(self) -> dict[str, Folding]:
        return {path: folding for folding in self.foldings for path in folding.layers}

    def heir(self, path: str) -> str:
        """Name the layer that stands for a layer: itself, unless it was folded."""
        return self._folds[path].into if path in self._folds else path

    def _end(self, path: str) -> str:
        """Name the layer of the dense model whose output channels a layer has."""
        if path not in self._folds:
            return path
        members = self._folds[path].layers
        return next(p for p in reversed(members) if is_linear(self.dense.get_submodule(p)))

    @property
    def behind_lines(self) -> set[str]:
        """Name the layers that stand around the activations that became linear."""
        sites = {site.name: site for site in self.graph.sites}
        near = {path for line in self.lines for path in sites[line.site].readers}
        near |= {line.into for line in self.lines if line.into is not None}
        return {self.heir(path) for path in near}

    @cached_property
    def _routed(self) -> list[str]:
        """List the experts that see some tokens only, and those of which some are gone."""
        cut = {c.group for c in self.every}
        mixed = [g for g in self.graph.groups if g.kind == "experts"]
        groups = [g for g in mixed if g.least or g.name in cut]
        routed = [m.path for g in groups for m in g.members if m.side == "expert"]
        blocked = [b for b in self.graph.blocked if b.kind == "experts"]
        return [*routed, *(path for b in blocked for path in b.modules)]

    @cached_property
    def _shared(self) -> frozenset[str]:
        return shared(self.small)

    @cached_property
    def aims(self) -> dict[str, str]:
        """Map each layer in front of removed blocks to the last of them that wrote to its stream.

        Only where the block's replacement says that the layer in front stands in for it.
        """
        found: dict[str, str] = {}
        removed = {drop.block for drop in self.drops if _aims(drop)}
        for run in runs([b for b in self.graph.blocks if b.name in removed]):
            front, behind = run[0].front, run[-1].writer
            if front is None or behind is None or gone(self.gone, front) or self.unfit(front):
                continue
            tails = [self.graph.tails.get(path) for path in (front, behind)]
            if all(tail is not None and tail.added for tail in tails) and self._alike(
                front, behind
            ):
                found[front] = behind
        return found

    def _alike(self, front: str, behind: str) -> bool:
        """Tell whether two layers write streams of one width with one kind of norm behind."""
        ends, norms = (self._end(front), behind), self.graph.norms
        widths = [channels(self.dense.get_submodule(p), "out") for p in ends]
        alike = (front in norms) == (behind in norms)
        # the norm behind a pre-norm network's last block is none of the block's own
        stays = front not in norms and behind in norms and not gone(self.gone, norms[behind])
        return widths[0] == widths[1] and (alike or stays)

    def site(self, path: str) -> Site:
        """Describe where to stop for a layer, and what it is to write."""
        aim = self.aims.get(path)
        tails = self.graph.tails
        own = self.rewritten.get(path)
        return Site(path, tails[path], own if aim is None else (aim, tails[aim]))

    def kept(self, path: str) -> Tensor | None:
        """List the output channels that a layer kept; None where all did."""
        return self._left.get(self._end(path))

    def norm_behind(self, path: str) -> nn.Module | None:
        """Find the batch-norm of the cut model that can take up a shift of a layer's output."""
        name = norm_behind(self.small, self.graph, path, self._shared)
        return None if name is None else self.small.get_submodule(name)

    def floor(self, path: str) -> Bool[Tensor, "columns out"] | None:
        """Mark the weights of a layer that must not become negative, as columns x out.

        Args:
            path: a dense layer or a convolution.

        Returns:
            marks; None where all are free.
        """
        mask = self.signs.get(f"{path}.weight")
        if mask is None or not bool(mask.any()):
            return None
        return mask.reshape(len(mask), -1).T

    def absorbs(self, path: str) -> bool:
        """Tell whether a constant at a layer's output has somewhere to go."""
        bias = getattr(self.small.get_submodule(path), "bias", None)
        return bias is not None or self.norm_behind(path) is not None

    def shift_(self, path: str, by: Float[Tensor, " out"]) -> None:
        """Move a layer's output by a constant: in its bias, or in the batch-norm behind it.

        Args:
            path: the layer; one that `absorbs`.
            by: what to add, in float64.
        """
        module, norm = self.small.get_submodule(path), self.norm_behind(path)
        if getattr(module, "bias", None) is not None:
            put_(module, "bias", tensor(module, "bias").double() + by)
        elif norm is not None:
            put_(norm, "running_mean", tensor(norm, "running_mean").double() - by)

    def width(self, path: str) -> int:
        """Count a layer's output channels in the cut model."""
        return channels(self.small.get_submodule(path), "out") or 0

    def unfit(self, path: str) -> str:
        """Say why a layer cannot be refitted; empty where it can."""
        if any(path.startswith(f"{experts}.") for experts in self._routed):
            return "its router may send it other tokens than it did"
        module = self.small.get_submodule(path)
        if path in self.graph.repeated:
            return "runs more than once per forward pass"
        if path in self._shared:
            return "shares a tensor with another layer"
        if not supported(module) or path not in self.graph.tails:
            return f"a {type(module).__name__} is not refitted"
        return ""

    def target(
        self, site: Site, dense: Pause, small: Pause, at: Tensor, *, drift: bool
    ) -> Float[Tensor, "rows out"]:
        """Say what a layer should write: the dense output, and what its stream has lost.

        Args:
            site: the layer.
            dense: what the dense model shows there.
            small: what the cut model shows there.
            at: output positions.
            drift: whether to make up for the stream, where it is known how to.

        Returns:
            rows in float64, one column per output channel that the layer kept.
        """
        module = self.small.get_submodule(site.path)
        if site.path in self.aims:
            return self._aimed(site, dense, small, at)
        assert dense.output is not None
        y = output_rows(module, dense.output, at).double()
        kept = self.kept(site.path)
        y = y if kept is None else y[:, kept.to(y.device)]
        if not drift or kept is not None or dense.stream is None or small.stream is None:
            return y
        gain = self._gain(site.path)
        if gain is None:
            return y
        moved = dense.stream.double() - small.stream.double()
        if moved.shape != dense.output.shape:  # a broadcast stream
            return y
        return y + output_rows(module, moved, at) * gain

    def _aimed(self, site: Site, dense: Pause, small: Pause, at: Tensor) -> Tensor:
        """Say what a layer should write so that its stream is the dense one behind the gap."""
        module, gain = self.small.get_submodule(site.path), self._gain(site.path)
        assert small.stream is not None
        assert small.written is not None
        y = output_rows(module, small.output, at).double()
        if gain is None or dense.stream is None or dense.written is None:
            return y
        wanted = dense.stream.double() + dense.written.double()
        if (kept := self.kept(site.path)) is not None:  # the stream itself was cut
            axis = -1 if is_dense(module) else 1
            wanted = wanted.index_select(axis, kept.to(wanted.device))
        moved = wanted - small.stream.double() - small.written.double()
        return y + output_rows(module, moved, at) * gain

    def _gain(self, path: str) -> Tensor | float | None:
        """Undo the scale of the batch-norm between a layer and the stream, if there is just one.

        Returns:
            a factor per channel, 0 where the scale is too small to be undone; None where it
            cannot be told.
        """
        scale = self.scale(path)
        if not isinstance(scale, Tensor):
            return scale
        floor = STEERED * scale.abs().max()
        return torch.where(scale.abs() > floor, 1 / scale, torch.zeros_like(scale))

    def scale(self, path: str) -> Float[Tensor, " out"] | float | None:
        """Tell what the tail of a layer multiplies its output by.

        Args:
            path: the layer.

        Returns:
            a factor per channel; None where it cannot be told: several norms, one that serves
            other layers too, or one that normalises with the batch.
        """
        norms = norms_behind(self.small, self.graph, path)
        if not norms:
            return 1.0
        norm = self.norm_behind(path)
        if len(norms) > 1 or not isinstance(norm, BatchNorm) or norm.running_var is None:
            return None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        return scale


def _aims(drop: Drop) -> bool:
    kind = REPLACEMENTS[drop.replace]
    return issubclass(kind, Replacement) and kind.aims


class Repair(Setting, ABC):
    """Bring a cut model closer to its original. A subclass is one file."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # statistics that pricing with it takes
    refits: ClassVar[bool] = False  # whether a cut is priced by what a refit leaves

    @property
    def apart(self) -> bool:
        """Tell whether it aims at something else than the dense outputs, and judges itself."""
        return False

    @abstractmethod
    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Write the cut model.

        Args:
            patient: both models and the data.

        Returns:
            one note per place; a change that would increase the calibration error is not made
            and noted as not accepted.
        """
