"""What flows between blocks: paired rows, and what the network's output feels of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence
from torch_otprune.statistics.patches import pick, positions, rows, supported
from torch_otprune.statistics.reduce import all_rows, all_sum_, rank
from torch_otprune.statistics.sensitivity import chunks, gradients, signs, slopes_of
from torch_otprune.statistics.sites import mean_weights, real, watch_sites
from torch_otprune.structure.blocks import adds_two
from torch_otprune.structure.flow import tensors
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    flat_tensors,
    outside_inference,
    run,
)
from torch_otprune.structure.graph import Block, Graph
from torch_otprune.structure.mute import muted
from torch_otprune.structure.sites import sites_in
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["Taps", "flat", "listen", "runs"]

_ROWS = 8192  # rows per chain, over all samples
_FAR = 1 << 32  # samples of one rank count from here to the next multiple


def runs(blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """Split blocks into those that follow one another directly.

    Args:
        blocks: in order of execution.

    Returns:
        runs, each within one chain and without a gap.
    """
    ordered = sorted(blocks, key=lambda b: (b.chain, b.place))
    apart = groupby(enumerate(ordered), key=lambda e: (e[1].chain, e[1].place - e[0]))
    return [tuple(block for _, block in group) for _, group in apart]


def listen(
    model: nn.Module,
    graph: Graph,
    blocks: Sequence[Block],
    batches: Sequence[Any],
    *,
    draws: int,
    seed: int,
    sites: bool = False,
) -> dict[str, ChainEvidence]:
    """Run the model on a few batches and lay out what every block reads and writes.

    Besides rows it probes how the output moves when a block's contribution goes: with random
    signs `v`, `<grad <v, f>, y - x>^2` is the squared first-order change of the output f in
    expectation. It is split over the channels of the stream in proportion to what each does
    alone, so that prices of single channels add up to that of the block.

    Args:
        model: the dense model; left as it was.
        graph: its analysis.
        blocks: what may go.
        batches: this rank's probes.
        draws: random sign vectors.
        seed: the policy's seed.
        sites: whether to look at the activations inside the blocks, in one more pass.

    Returns:
        the evidence of every run of blocks, by the name of its first.

    Source: Hutchinson 1990 for the estimator.
    """
    inside = {s.name: s for b in blocks if sites for s in sites_in(graph.sites, b)}
    acts = watch_sites(model, inside.values(), batches) if sites else {}
    found = {}
    for run_ in runs(blocks):
        chain = _Chain(model, graph, run_, sum(map(batch_size, batches)), seed, acts)
        with outside_inference(), evaluating(model), gradients(model):
            for batch in batches:
                for piece in chunks(batch):
                    chain.look(piece, draws)
        trial = _Trial(model, run_, batches)
        found[run_[0].name] = chain.evidence(trial)
    return found


@dataclass
class _Chain:
    """One run of blocks while it is watched."""

    model: nn.Module
    graph: Graph
    blocks: tuple[Block, ...]
    samples: int
    seed: int
    acts: Mapping[str, SiteEvidence]
    points: list[list[Tensor]] = field(default_factory=list)
    fed: list[list[Tensor]] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    lasts: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        channels = self.blocks[0].channels
        n = len(self.blocks)
        self.alone, self.spread = _zeros(n, channels), _zeros(n, channels)
        self.together, self.power = _zeros(n), _zeros(2)
        self.points = [[] for _ in range(n + 1)]
        self.writers = [self._writer(block) for block in self.blocks]
        self.fed = [[] for _ in range(n)]
        self.draws = 1

    def _writer(self, block: Block) -> str | None:
        """Name the layer in front that could write what the block does, if it can be refitted."""
        path = block.front
        if path is None or path in self.graph.repeated:
            return None
        return path if supported(self.model.get_submodule(path)) else None

    def look(self, piece: Any, draws: int) -> None:
        """Run one piece of a batch and take notes."""
        taps = Taps(self.model, self.blocks, [w for w in self.writers if w])
        with taps:
            outputs = [t for t in flat_tensors(run(self.model, piece)) if t.requires_grad]
        pairs = [taps.pairs[block.name] for block in self.blocks]
        self.power += torch.tensor(
            [batch_size(piece), sum(float(t.detach().double().square().sum()) for t in outputs)],
            dtype=torch.float64,
        )
        self._take(piece, pairs, taps.fed)
        self._feel(outputs, pairs, draws)

    def _take(
        self, piece: Any, pairs: list[tuple[Tensor, Tensor]], fed: Mapping[str, Tensor]
    ) -> None:
        axis, first = self.blocks[0].axis, pairs[0][0]
        size, total = flat(first, axis).shape[:2]
        at = pick(total, max(ceil(_ROWS / max(self.samples, 1)), 1), self.blocks[0].name, self.seed)
        valid = real(piece, size, total)[:, at].flatten()
        ends = (at == total - 1).expand(size, -1).flatten()
        for place, tensor in enumerate((first, *(y for _, y in pairs))):
            self.points[place].append(flat(tensor, axis)[:, at].flatten(0, 1)[valid])
        for place, writer in enumerate(self.writers):
            module = self.model.get_submodule(writer) if writer else None
            if module is not None and positions(module, fed[writer or ""]) == total:
                design = rows(module, fed[writer or ""].detach(), at).double().cpu()
                self.fed[place].append(design[valid])
        owner = self.seen + torch.arange(size).repeat_interleave(len(at))
        self.seen += size
        self.owners.append(owner[valid])
        self.lasts.append(ends[valid])

    def _feel(self, outputs: list[Tensor], pairs: list[tuple[Tensor, Tensor]], draws: int) -> None:
        written = [y for _, y in pairs]
        self.draws = draws
        if not outputs or not all(y.requires_grad for y in written):
            return
        generator = torch.Generator("cpu").manual_seed(self.seed)
        axis = self.blocks[0].axis
        moves = [flat(y, axis) - flat(x, axis) for x, y in pairs]
        self.spread += torch.stack([m.square().mean(1).sum(0) for m in moves])
        for draw in range(draws):
            drawn = [signs(t, generator) for t in outputs]
            slopes = slopes_of(outputs, written, drawn, more=draw + 1 < draws)
            for place, (move, slope) in enumerate(zip(moves, slopes, strict=True)):
                if slope is not None:
                    each = (move * flat(slope, axis)).sum(1)
                    self.alone[place] += each.square().sum(0)
                    self.together[place] += each.sum(1).square().sum()

    def evidence(self, trial: _Trial) -> ChainEvidence:
        """Sum up over ranks."""
        all_sum_([self.alone, self.spread, self.together, self.power])
        points = torch.stack([all_rows(torch.cat(p)) for p in self.points])
        owner = all_rows(torch.cat(self.owners)[:, None] + rank() * _FAR)[:, 0]
        last = all_rows(torch.cat(self.lasts)[:, None].long())[:, 0].bool()
        whole = [len(f) == len(self.owners) for f in self.fed]
        fed = [all_rows(torch.cat(f)) if w else None for f, w in zip(self.fed, whole, strict=True)]
        return ChainEvidence(
            name=self.blocks[0].name,
            blocks=tuple(block.name for block in self.blocks),
            points=points,
            sample=owner,
            last=last,
            writers=tuple(fed),
            feel=torch.cat([torch.ones_like(self.alone[:1]), self._weights()]),
            power=float(self.power[1] / self.power[0].clamp_min(1)),
            sites=tuple(
                tuple(self.acts[s.name] for s in sites_in(self.graph.sites, b) if self.acts)
                for b in self.blocks
            ),
            weights=mean_weights(self.model, self.blocks),
            trial=trial,
            seed=self.seed,
        )

    def _weights(self) -> Tensor:
        """Weigh every channel so that a block's own contribution costs what it was felt."""
        apart = self.alone / self.spread.clamp_min(1e-30)
        scale = self.together / self.alone.sum(1).clamp_min(1e-300)
        weights: Tensor = apart * scale[:, None] / self.draws
        return weights


@dataclass
class _Trial:
    """Removes blocks from the real network for a moment and measures its output."""

    model: nn.Module
    blocks: tuple[Block, ...]
    batches: Sequence[Any]
    dense: list[list[Tensor]] = field(default_factory=list)

    def __call__(self, gone: Collection[int]) -> float:
        swaps = [self.blocks[number].swaps[0] for number in sorted(gone)]
        with outside_inference(), evaluating(self.model), torch.no_grad():
            if not self.dense:
                self.dense = [self._outputs(batch) for batch in self.batches]
            with muted(self.model, swaps):
                now = [self._outputs(batch) for batch in self.batches]
        sums = torch.zeros(2, dtype=torch.float64)
        for before, after in zip(self.dense, now, strict=True):
            for a, b in zip(before, after, strict=True):
                sums += torch.tensor(
                    [(a - b).square().sum(), a.square().sum()], dtype=torch.float64
                )
        all_sum_([sums])
        return float(sums[0] / sums[1].clamp_min(1e-300))

    def _outputs(self, batch: Any) -> list[Tensor]:
        found = flat_tensors(run(self.model, batch))
        return [t.double().cpu() for t in found if t.is_floating_point()]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def flat(tensor: Tensor, axis: int) -> Tensor:
    """Lay a stream out.

    Args:
        tensor: samples first.
        axis: of the channels.

    Returns:
        samples x positions x channels, in float64 on the CPU.
    """
    wide = tensor.detach().double().cpu().movedim(axis, -1)
    return wide.reshape(len(wide), -1, wide.shape[-1])


class Taps(TorchFunctionMode):
    """Keep what every block reads and writes in one run, as points to differentiate at."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], writers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.blocks, self.writers = model, blocks, writers
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self.fed: dict[str, Tensor] = {}
        self.joints = {b.joint[0]: (b.name, b.joint[1]) for b in blocks if b.joint}
        self.added = -1
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Taps:
        for block in (b for b in self.blocks if b.joint is None):
            module = self.model.get_submodule(block.name)
            self.handles.append(
                module.register_forward_hook(_Through(self, block.name), with_kwargs=True)
            )
        for path in self.writers:
            module = self.model.get_submodule(path)
            self.handles.append(
                module.register_forward_pre_hook(_Fed(self, path), with_kwargs=True)
            )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {id(t): t for t in tensors((args, kwargs))}
        if not adds_two(getattr(function, "__name__", ""), len(given)):
            return function(*args, **(kwargs or {}))
        self.added += 1
        if self.added not in self.joints:
            return function(*args, **(kwargs or {}))
        name, side = self.joints[self.added]
        stream = list(given.values())[side].clone()  # an addition in place would change it
        out = function(*args, **(kwargs or {}))
        self.pairs[name] = stream, out
        return out


@dataclass
class _Through:
    """The hook behind a block."""

    taps: Taps
    path: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        stream, written = stream_of(args, kwargs), first_of(out)
        assert stream is not None
        assert written is not None
        self.taps.pairs[self.path] = stream, written


@dataclass
class _Fed:
    """The hook before a linear layer that writes to the stream."""

    taps: Taps
    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = stream_of(args, kwargs)
        assert given is not None
        self.taps.fed[self.path] = given.detach()
