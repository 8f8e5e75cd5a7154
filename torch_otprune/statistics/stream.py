"""What flows between blocks: paired rows, and what the network's output feels of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence
from torch_otprune.statistics.patches import columns, pick, positions, rows, supported
from torch_otprune.statistics.reduce import all_rows, all_sum_, ranks_where
from torch_otprune.statistics.sensitivity import chunks, gradients, signs, slopes_of
from torch_otprune.statistics.sites import mean_weights, real, watch_sites
from torch_otprune.statistics.taps import Taps, flat
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

__all__ = ["listen", "runs", "streams_quote"]

_ROWS = 8192  # rows per chain, over all samples


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
    *,
    probes: Sequence[tuple[Sequence[int], Any]],
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
        probes: this rank's batches, each with the numbers of its samples in the stream of all
            ranks: which rank has a sample must not matter.
        draws: random sign vectors.
        seed: the policy's seed.
        sites: whether to look at the activations inside the blocks, in one more pass.

    Returns:
        the evidence of every run of blocks, by the name of its first.

    Source: Hutchinson 1990 for the estimator.
    """
    inside = {s.name: s for b in blocks if sites for s in sites_in(graph.sites, b)}
    batches = [batch for _, batch in probes]
    acts = watch_sites(model, inside.values(), batches) if sites else {}
    numbers = [number for known, _ in probes for number in known]
    total = torch.tensor([len(numbers)], dtype=torch.float64, device="cpu")
    all_sum_([total])
    wanted = _wanted(int(total))
    found = {}
    for run_ in runs(blocks):
        chain = _Chain(model, graph, run_, numbers, wanted, draws=draws, seed=seed, acts=acts)
        with outside_inference(), evaluating(model), gradients(model):
            for batch in batches:
                for piece in chunks(batch):
                    chain.look(piece)
        trial = _Trial(model, run_, batches)
        found[run_[0].name] = chain.evidence(trial)
    return found


def _wanted(samples: int) -> int:
    """Say how many positions of each sample become rows."""
    return ceil(_ROWS / max(samples, 1))


def streams_quote(
    model: nn.Module, graph: Graph, blocks: Sequence[Block], *, samples: int
) -> dict[str, int]:
    """Tell how much memory the rows will take, before the first batch.

    Args:
        model: the dense model.
        graph: its analysis.
        blocks: what may go.
        samples: probes over all ranks, at most.

    Returns:
        the first block of each run to bytes, on each rank.
    """
    found = {}
    for run_ in runs(blocks):
        rows = samples * min(_wanted(samples), run_[0].positions)
        writers = [path for b in run_ if (path := _writer(model, graph, b)) is not None]
        wide = sum(columns(model.get_submodule(path)) for path in writers)
        found[run_[0].name] = 8 * rows * (wide + (len(run_) + 1) * run_[0].channels)
    return found


def _writer(model: nn.Module, graph: Graph, block: Block) -> str | None:
    """Name the layer in front that could write what the block does, if it can be refitted."""
    path = block.front
    if path is None or path in graph.repeated:
        return None
    return path if supported(model.get_submodule(path)) else None


@dataclass
class _Chain:
    """One run of blocks while it is watched."""

    model: nn.Module
    graph: Graph
    blocks: tuple[Block, ...]
    numbers: Sequence[int]  # of this rank's samples
    wanted: int  # positions of each sample
    _: KW_ONLY
    draws: int
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
        self.together, self.power, self.felt = _zeros(n), _zeros(2), _zeros(1)
        self.points = [[] for _ in range(n + 1)]
        self.writers = [_writer(self.model, self.graph, block) for block in self.blocks]
        self.fed = [[] for _ in range(n)]

    def look(self, piece: Any) -> None:
        """Run one piece of a batch and take notes."""
        taps = Taps(self.model, self.blocks, [w for w in self.writers if w])
        with taps:
            outputs = [t for t in flat_tensors(run(self.model, piece)) if t.requires_grad]
        pairs = [taps.pairs[block.name] for block in self.blocks]
        self.power += torch.tensor(
            [batch_size(piece), sum(float(t.detach().double().square().sum()) for t in outputs)],
            dtype=torch.float64,
            device="cpu",
        )
        self._take(piece, pairs, taps.fed)
        self._feel(outputs, pairs)

    def _take(
        self, piece: Any, pairs: list[tuple[Tensor, Tensor]], fed: Mapping[str, Tensor]
    ) -> None:
        axis, first = self.blocks[0].axis, pairs[0][0]
        size, total = flat(first, axis).shape[:2]
        told = real(piece, size, total)
        end = total - 1 - told.flip(1).int().argmax(1)  # each sample's last real position
        drawn = pick(total, self.wanted, self.blocks[0].name, self.seed)
        at = torch.cat([drawn, end]).unique()
        last = at == end[:, None]
        valid = (told[:, at] & (torch.isin(at, drawn) | last)).flatten()
        for place, tensor in enumerate((first, *(y for _, y in pairs))):
            self.points[place].append(flat(tensor, axis)[:, at].flatten(0, 1)[valid])
        for place, writer in enumerate(self.writers):
            module = self.model.get_submodule(writer) if writer else None
            if module is not None and positions(module, fed[writer or ""]) == total:
                design = rows(module, fed[writer or ""].detach(), at).double().cpu()
                self.fed[place].append(design[valid])
        samples = batch_size(piece)
        known = torch.tensor(self.numbers[self.seen : self.seen + samples], device="cpu")
        self.seen += samples
        # a stream of windows has several entries per sample, next to one another
        own = known[torch.arange(size, device="cpu") * samples // size]
        self.owners.append(own.repeat_interleave(len(at))[valid])
        self.lasts.append(last.flatten()[valid])

    def _feel(self, outputs: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
        written = [y for _, y in pairs]
        if not outputs or not all(y.requires_grad for y in written):
            return
        self.felt += 1
        generator = torch.Generator("cpu").manual_seed(self.seed)
        axis = self.blocks[0].axis
        moves = [flat(y, axis) - flat(x, axis) for x, y in pairs]
        self.spread += torch.stack([m.square().mean(1).sum(0) for m in moves])
        for draw in range(self.draws):
            drawn = [signs(t, generator) for t in outputs]
            slopes = slopes_of(outputs, written, drawn, more=draw + 1 < self.draws)
            for place, (move, slope) in enumerate(zip(moves, slopes, strict=True)):
                if slope is not None:
                    each = (move * flat(slope, axis)).sum(1)
                    self.alone[place] += each.square().sum(0)
                    self.together[place] += each.sum(1).square().sum()

    def evidence(self, trial: _Trial) -> ChainEvidence:
        """Sum up over ranks, rows in the order of the stream."""
        all_sum_([self.alone, self.spread, self.together, self.power, self.felt])
        owner = self._rows([o[:, None] for o in self.owners], 1)[:, 0].long()
        order = owner.argsort(stable=True)
        last = self._rows([t[:, None].double() for t in self.lasts], 1)[order, 0] > 0
        points = _zeros(len(self.points), len(order), self.blocks[0].channels)
        for place, rows_ in enumerate(self.points):
            points[place] = self._rows(rows_, points.shape[2])[order]
        fed = [self._design(place, order) for place in range(len(self.blocks))]
        return ChainEvidence(
            name=self.blocks[0].name,
            blocks=tuple(block.name for block in self.blocks),
            points=points,
            sample=owner[order],
            last=last,
            writers=tuple(fed),
            feel=torch.cat([torch.ones_like(self.alone[:1]), self._weights()]),
            power=float(self.power[1] / self.power[0].clamp_min(1)) if self.felt else 1.0,
            sites=tuple(
                tuple(self.acts[s.name] for s in sites_in(self.graph.sites, b) if self.acts)
                for b in self.blocks
            ),
            weights=mean_weights(self.model, self.blocks),
            trial=trial,
            seed=self.seed,
        )

    def _rows(self, pieces: list[Tensor], width: int) -> Tensor:
        """Put the rows of all ranks together; this one may have none. Its pieces are let go."""
        mine = torch.cat([_zeros(0, width), *pieces])
        pieces.clear()
        return all_rows(mine)

    def _design(self, place: int, order: Tensor) -> Tensor | None:
        path, pieces = self.writers[place], self.fed[place]
        if path is None or ranks_where(len(pieces) != len(self.owners)):
            return None
        return self._rows(pieces, columns(self.model.get_submodule(path)))[order]

    def _weights(self) -> Tensor:
        """Weigh every channel so that a block's own contribution costs what it was felt."""
        if not self.felt:  # no gradient gets to the output, as under the user's `no_grad`
            return torch.ones_like(self.alone)
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
        sums = _zeros(2)
        for before, after in zip(self.dense, now, strict=True):
            for a, b in zip(before, after, strict=True):
                sums += torch.tensor(
                    [(a - b).square().sum(), a.square().sum()], dtype=torch.float64, device="cpu"
                )
        all_sum_([sums])
        return float(sums[0] / sums[1].clamp_min(1e-300))

    def _outputs(self, batch: Any) -> list[Tensor]:
        found = flat_tensors(run(self.model, batch))
        return [t.double().cpu() for t in found if t.is_floating_point()]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")
