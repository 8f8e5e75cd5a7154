"""Straight paths between samples, whatever a model takes as a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.structure.forward import (
    Call,
    batch_size,
    called,
    flat_tensors,
    joined,
    make,
    map_tensors,
)

__all__ = ["Pairs", "Paths", "paths_between", "paths_from"]

Pairs = Literal["any", "inter", "intra", "local"]
_SHORT = 0.1  # share of the way that a local path goes
_DRAWS = 50  # shuffles of the samples, at most, until enough pairs are found


@dataclass(frozen=True)
class Paths:
    """Where paths start and where they end.

    Args:
        starts: one row per path, as the model takes them.
        ends: likewise.
        share: of the way between them that is followed.
    """

    starts: Call
    ends: Call
    share: float = 1.0

    def __len__(self) -> int:
        return batch_size(self.starts)

    def points(self, first: int, last: int, steps: int) -> Call:
        """Lay points out along some of the paths.

        Args:
            first: path.
            last: path, not included.
            steps: pieces of each path.

        Returns:
            one batch: the first points of all these paths, then their second points, and so on.
        """
        a, b = (_rows(call, slice(first, last)) for call in (self.starts, self.ends))
        size, others = last - first, iter(flat_tensors(b))
        way = torch.linspace(0, self.share, steps + 1, dtype=torch.float64, device="cpu")

        def between(start: Tensor) -> Tensor:
            end = next(others)
            if not start.dim() or len(start) != size:
                return start
            if not start.is_floating_point():  # masks and the like, equal at both ends
                return start.repeat(steps + 1, *(1 for _ in start.shape[1:]))
            t = way.to(start).view(-1, *(1 for _ in start.shape))
            # Exact at both ends, and at every point where they agree.
            return torch.lerp(start, end, t).flatten(0, 1)

        found: Call = map_tensors(a, between)
        return found


def paths_from(model: nn.Module, starts: Any, ends: Any) -> Paths:
    """Follow the paths that the caller chose.

    Args:
        model: any module.
        starts: one batch.
        ends: another, of the same shapes; row i of both makes a path.

    Returns:
        the paths.

    Raises:
        CalibrationError: if the batches do not fit, or hold no numbers that could be mixed.
    """
    a, b = called(model, starts), called(model, ends)
    if make(a) != make(b) or batch_size(a) != batch_size(b):
        raise CalibrationError(
            f"{batch_size(a)} starts and {batch_size(b)} ends of another make are no paths.",
            where="folds, argument ends",
            fix="pass one end per sample of the batches, of the same shape.",
        )
    _mixable(a, b)
    return Paths(a, b)


def paths_between(
    model: nn.Module, batches: Sequence[Any], *, count: int, pairs: Pairs = "any", seed: int = 0
) -> Paths:
    """Pair samples at random.

    Args:
        model: any module.
        batches: as the model takes them; with class numbers behind for `inter` and `intra`.
        count: paths wanted; fewer where the samples give fewer different pairs.
        pairs: `any` two samples, two of different classes (`inter`), of one class (`intra`), or a
            tenth of the way to another sample (`local`).
        seed: of the pairs.

    Returns:
        the paths.

    Raises:
        CalibrationError: if there are no two samples to pair, labels are asked for and missing, or
            samples cannot be mixed.
    """
    if pairs not in get_args(Pairs) or not isinstance(count, int) or count < 1:
        raise CalibrationError(
            f"{count} paths between {pairs!r} samples are none.",
            where="folds, arguments pairs and paths",
            fix=f"pass at least one path, between one of {', '.join(get_args(Pairs))}.",
        )
    made = _joined(model, batches)
    wanted = pairs in ("inter", "intra")
    classes = _classes(batches, batch_size(made)) if wanted else None
    a, b = _drawn(batch_size(made), count, pairs=pairs, classes=classes, seed=seed)
    starts, ends = _rows(made, a), _rows(made, b)
    _mixable(starts, ends)
    return Paths(starts, ends, _SHORT if pairs == "local" else 1.0)


def _joined(model: nn.Module, batches: Sequence[Any]) -> Call:
    """Put the samples of the commonest shape side by side."""
    calls = [called(model, batch) for batch in batches]
    kinds = Counter(make(call) for call in calls)
    kind = kinds.most_common(1)[0][0] if kinds else None
    same = [call for call in calls if make(call) == kind]
    found: Call | None = joined(same) if same else None
    if found is None or batch_size(found) < 2:
        raise CalibrationError(
            f"{0 if found is None else batch_size(found)} samples of one shape make no path.",
            where="space folds, the calibration data",
            fix="pass at least two samples of one shape.",
        )
    return found


def _mixable(a: Call, b: Call) -> None:
    """Refuse what has nothing between one sample and another, such as token numbers."""
    size = batch_size(a)
    rows = [
        (x, y)
        for x, y in zip(flat_tensors(a), flat_tensors(b), strict=True)
        if x.dim() and len(x) == size
    ]
    for side in zip(*rows, strict=True):
        for values in side:
            _finite(values)
    fixed = [x for x, y in rows if not x.is_floating_point() and not torch.equal(x, y)]
    if not fixed and any(x.is_floating_point() for x, _ in rows):
        if not all(torch.equal(x, y) for x, y in rows):
            return
        raise CalibrationError(
            f"all {size} paths end where they start.",
            where="space folds, the calibration data",
            fix="pass samples that differ, or ends that are no starts.",
        )
    kind = fixed[0].dtype if fixed else "no numbers"
    raise CalibrationError(
        f"there is no straight path between samples of {kind}.",
        where=f"space folds, batch of shape {tuple(fixed[0].shape) if fixed else '()'}",
        fix="rank by 'stein', or follow paths of a part of the model that takes real numbers.",
    )


def _finite(values: Tensor) -> None:
    """Refuse samples between which no number lies."""
    if bad := int((~values.isfinite()).sum()):
        raise CalibrationError(
            f"{bad} of {values.numel()} entries of the samples are NaN or infinite.",
            where=f"space folds, batch of shape {tuple(values.shape)}",
            fix="clean the data.",
        )


def _classes(batches: Sequence[Any], size: int) -> Int[Tensor, " samples"]:
    labels = [b[-1] for b in batches if isinstance(b, (tuple, list)) and len(b) > 1]
    fits = all(isinstance(x, Tensor) and x.dim() == 1 for x in labels)
    whole = fits and all(not x.is_floating_point() for x in labels)
    if not whole or sum(map(len, labels)) != size:
        raise CalibrationError(
            "pairs of classes are asked for, and the batches hold no class numbers.",
            where="folds, argument pairs",
            fix="pass batches of (input, class numbers) of one shape, or pairs='any'.",
        )
    return torch.cat([x.cpu() for x in labels])


def _drawn(
    size: int, count: int, *, pairs: Pairs, classes: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw pairs by shuffling: each sample starts about equally many paths."""
    found = list(_distinct(size, pairs=pairs, classes=classes, seed=seed, count=count))
    if not found:
        raise CalibrationError(
            f"no two of {size} samples make a pair of kind {pairs!r}.",
            where="folds, argument pairs",
            fix="pass samples of more classes, or pairs='any'.",
        )
    a, b = zip(*found, strict=True)
    return torch.tensor(a, device="cpu"), torch.tensor(b, device="cpu")


def _distinct(
    size: int, *, pairs: Pairs, classes: Tensor | None, seed: int, count: int
) -> Iterator[tuple[int, int]]:
    generator, met = torch.Generator("cpu").manual_seed(seed), set[tuple[int, int]]()
    for _ in range(_DRAWS):
        order = torch.randperm(size, generator=generator, device="cpu").tolist()
        for a, b in zip(order, [*order[1:], order[0]], strict=True):
            same = classes is None or bool(classes[a] == classes[b])
            fits = classes is None or same == (pairs == "intra")
            if len(met) < count and a != b and fits and (a, b) not in met:
                met.add((a, b))
                yield a, b


def _rows(call: Call, rows: Any) -> Call:
    size = batch_size(call)
    found: Call = map_tensors(call, lambda t: t[rows] if t.dim() and len(t) == size else t)
    return found
