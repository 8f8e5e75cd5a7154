"""A fixed number of samples out of a stream, chosen by hash: no order, batch or rank matters."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from torch_otprune.statistics.reduce import all_objects, all_sum_, rank, ranks
from torch_otprune.structure.forward import batch_size, flat_tensors, joined, make, map_tensors

__all__ = ["Reservoir"]


class Reservoir:
    """The samples whose number in the stream hashes lowest.

    With several ranks, sample j of rank r counts as number `j * ranks + r`, as samplers deal
    them; so one rank and many keep the same samples of the same data.

    Args:
        size: how many samples to keep over all ranks.
        seed: chooses the hash.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.seen = 0
        self.kept: list[tuple[int, int, Any]] = []

    def add(self, batch: Any) -> None:
        """Look at the next batch of the stream.

        Args:
            batch: as the model takes it; what is kept is copied.
        """
        size = batch_size(batch)
        first, world, mine = self.seen, ranks(), rank()
        self.seen += size
        for row in range(size):
            number = (first + row) * world + mine
            mark = self._mark(number)
            if len(self.kept) < self.size or mark < self.kept[-1][0]:
                self.kept.append((mark, number, _row(batch, row, size)))
                self.kept.sort(key=lambda entry: entry[:2])
                del self.kept[self.size :]

    def _mark(self, number: int) -> int:
        return zlib.crc32(f"{self.seed}:{number}".encode())

    def batches(self) -> list[Any]:
        """Hand the samples out, in the order of the stream, batched where shapes agree.

        Returns:
            this rank's share of what all ranks together keep.
        """
        return [batch for _, batch in self.numbered()]

    def numbered(self) -> list[tuple[list[int], Any]]:
        """Hand the samples out as `batches` does, each batch with its samples' numbers.

        Returns:
            pairs of numbers in the stream of all ranks, and the batch that they make.
        """
        limit = self._limit()
        mine = sorted((e for e in self.kept if e[0] <= limit), key=lambda entry: entry[1])
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for _, number, sample in mine:
            groups.setdefault(make(sample), []).append((number, sample))
        return [
            ([number for number, _ in group], joined([sample for _, sample in group]))
            for group in groups.values()
        ]

    def everywhere(self) -> list[Any]:
        """Hand out what all ranks keep, in the order of the stream.

        Returns:
            batches, the same on every rank, on the devices of this rank's own samples.
        """
        limit = self._limit()
        mine = [entry for entry in self.kept if entry[0] <= limit]
        here = {t.device for _, _, sample in mine for t in flat_tensors(sample)}
        every = sorted((e for es in all_objects(mine) for e in es), key=lambda entry: entry[1])
        groups: dict[Any, list[Any]] = {}
        for _, _, sample in every:
            groups.setdefault(make(sample), []).append(sample)
        place = here.pop() if len(here) == 1 else None
        found = [joined(samples) for samples in groups.values()]
        return [
            map_tensors(batch, lambda t: t if place is None else t.to(place)) for batch in found
        ]

    def _limit(self) -> float:
        """Find the highest mark that all ranks together still keep."""
        marks = torch.zeros(ranks(), self.size, dtype=torch.float64, device="cpu")
        mine = [float(mark) + 1 for mark, _, _ in self.kept]
        marks[rank(), : len(mine)] = marks.new_tensor(mine)
        all_sum_([marks])
        every = marks[marks > 0].sort().values[: self.size]
        return float(every[-1]) - 1 if len(every) else 0.0


def _row(batch: Any, row: int, size: int) -> Any:
    def take(t: torch.Tensor) -> torch.Tensor:
        return t[row : row + 1].detach().clone() if t.dim() and len(t) == size else t

    with torch.inference_mode(False):  # gradients will be asked of these
        return map_tensors(batch, take)
