"""Ways to remove residual blocks that do without this library, each as its paper has it.

Scores say which blocks go, lowest first; cheap repairs mend what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar import BasicBlock, Shortcut
from benchmarks.peers import renorm_

__all__ = [
    "REPAIRS",
    "SCORES",
    "Moments",
    "affine_",
    "block_influence",
    "blocks",
    "lacoot",
    "magnitude",
    "order",
    "random_order",
    "removable",
    "remove",
    "repair_",
    "spans",
]

REPAIRS = ("none", "norm", "affine", "affine+norm")
DIRECTIONS = 50  # of the published score
RIDGE = 1e-8  # of the mean variance: for solvability alone
BATCH = 64


def blocks(model: nn.Module) -> list[str]:
    """Name the residual blocks in order of execution."""
    return [name for name, module in model.named_modules() if isinstance(module, BasicBlock)]


def removable(model: nn.Module) -> list[str]:
    """Name the blocks whose output has the shape of their input."""

    def keeps(block: nn.Module) -> bool:
        shortcut = block.shortcut
        return isinstance(shortcut, Shortcut) and shortcut.stride == 1 and shortcut.pad == 0

    return [name for name in blocks(model) if keeps(model.get_submodule(name))]


@dataclass
class _Show:
    """Show every call's input and output, a row per sample."""

    take: Callable[[Tensor, Tensor], None]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.take(args[0].flatten(1), output.flatten(1))


@torch.no_grad()
def watch(
    model: nn.Module, inputs: Tensor, takes: dict[str, Callable[[Tensor, Tensor], None]]
) -> None:
    """Run all inputs and show each named module's flattened input and output, batch by batch.

    Args:
        model: run in evaluation mode.
        inputs: N x 3 x H x W.
        takes: who looks at which module.
    """
    hooks = [
        model.get_submodule(path).register_forward_hook(_Show(take)) for path, take in takes.items()
    ]
    try:
        for batch in inputs.split(BATCH):
            model.eval()(batch)
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Cosine:
    total: float = 0.0
    count: int = 0

    def __call__(self, before: Tensor, after: Tensor) -> None:
        self.total += float(torch.cosine_similarity(before, after).double().sum())
        self.count += len(before)


def block_influence(model: nn.Module, inputs: Tensor, *, seed: int) -> dict[str, float]:
    """Score a block by one minus the mean cosine between its input and its output.

    Source: Men et al. 2024 (ShortGPT), section 2.2; a feature map is one vector here.
    """
    takes = {path: _Cosine() for path in removable(model)}
    watch(model, inputs, dict(takes))
    return {path: 1 - take.total / take.count for path, take in takes.items()}


@dataclass
class _Project:
    seed: int
    before: list[Tensor]
    after: list[Tensor]
    directions: Tensor | None = None

    def __call__(self, before: Tensor, after: Tensor) -> None:
        if self.directions is None:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(before.shape[1], DIRECTIONS, generator=generator)
            self.directions = drawn / drawn.norm(dim=0)
        self.before.append(before @ self.directions)
        self.after.append(after @ self.directions)

    def distance(self) -> float:
        """Take the largest W_2 over the directions; equal sizes couple in sorted order."""
        x, y = (torch.cat(seen).double().sort(dim=0).values for seen in (self.before, self.after))
        return float((x - y).square().mean(dim=0).max().sqrt())


def lacoot(model: nn.Module, inputs: Tensor, *, seed: int) -> dict[str, float]:
    """Score a block by the max-sliced W_2 between its input and its output.

    Source: Quétu et al. 2025 (LaCoOT): order 2, the maximum over 50 random unit directions, drawn
    anew for every block; a whole feature map is one point.
    """
    paths = removable(model)
    takes = {path: _Project(1000 * seed + i, [], []) for i, path in enumerate(paths)}
    watch(model, inputs, dict(takes))
    return {path: take.distance() for path, take in takes.items()}


def magnitude(model: nn.Module, inputs: Tensor, *, seed: int) -> dict[str, float]:
    """Score a block by the mean absolute weight of its convolutions."""

    def mean(block: nn.Module) -> float:
        weights = [m.weight.detach().flatten() for m in block.modules() if isinstance(m, nn.Conv2d)]
        return float(torch.cat(weights).abs().mean())

    return {path: mean(model.get_submodule(path)) for path in removable(model)}


def random_order(model: nn.Module, inputs: Tensor, *, seed: int) -> dict[str, float]:
    """Score blocks by a shuffled rank."""
    paths = removable(model)
    ranks = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    return dict(zip(paths, ranks.double().tolist(), strict=True))


Score = Callable[..., dict[str, float]]
SCORES: dict[str, Score] = {
    "block_influence": block_influence,
    "lacoot": lacoot,
    "magnitude": magnitude,
    "random": random_order,
}


def order(scores: dict[str, float]) -> list[str]:
    """Sort blocks: the first to go comes first; ties by execution."""
    return sorted(scores, key=lambda path: scores[path])


def remove(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Copy a network and put identities where the named blocks were."""
    smaller = copy.deepcopy(model)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(smaller.get_submodule(parent), name, nn.Identity())
    return smaller


def spans(names: Sequence[str], gone: Sequence[str]) -> list[tuple[str | None, str]]:
    """Group removed blocks into contiguous spans.

    Args:
        names: all blocks in order.
        gone: those removed.

    Returns:
        per span, the block before it (None at the start) and its last block.
    """
    found: list[tuple[str | None, str]] = []
    before: str | None = None
    for name in names:
        if name not in gone:
            before = name
        elif found and found[-1][0] == before:
            found[-1] = (before, name)
        else:
            found.append((before, name))
    return found


@dataclass
class Moments:
    """Sums for a least-squares map from x to y with an intercept, in float64.

    Args:
        xx: of [x, 1] with itself.
        xy: of [x, 1] with y.
    """

    xx: Tensor | None = None
    xy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()
        self.xx = x.T @ x + (0 if self.xx is None else self.xx)
        self.xy = x.T @ y.double() + (0 if self.xy is None else self.xy)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the matrix, out x in, and the intercept."""
        mean, around = self._centred()
        assert self.xx is not None
        assert self.xy is not None
        wanted = self.xy[-1] / self.xx[-1, -1]
        cross = self.xy[:-1] / self.xx[-1, -1] - torch.outer(mean, wanted)
        strength = RIDGE * around.diagonal().mean() * torch.eye(len(mean)).double()
        matrix = torch.linalg.solve(around + strength, cross).T
        return matrix, wanted - matrix @ mean

    def spread(self, matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of what the map writes."""
        mean, around = self._centred()
        return matrix @ mean + offset, (matrix @ around @ matrix.T).diagonal().clamp_min(1e-12)

    def _centred(self) -> tuple[Tensor, Tensor]:
        assert self.xx is not None
        mean, second = self.xx[-1, :-1] / self.xx[-1, -1], self.xx[:-1, :-1] / self.xx[-1, -1]
        return mean, second - torch.outer(mean, mean)


@dataclass
class _Sum:
    """What a block adds up: its branch, its shortcut, and their sum before the last ReLU."""

    name: str
    branch: Tensor
    shortcut: Tensor

    @property
    def total(self) -> Tensor:
        return self.branch + self.shortcut


def _sums(model: nn.Module, batch: Tensor) -> Iterator[_Sum]:
    """Walk a CIFAR ResNet block by block; the stem comes first, under the name ""."""
    found = _Sum("", model.bn1(model.conv1(batch)), torch.zeros(()))
    yield found
    for name in blocks(model):
        block, x = model.get_submodule(name), F.relu(found.total)
        branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        found = _Sum(name, branch, block.shortcut(x))
        yield found


@torch.no_grad()
def affine_(small: nn.Module, dense: nn.Module, gone: Sequence[str], inputs: Tensor) -> None:
    """Let the block before each span add up to what the span's end did, by plain least squares.

    The branch of that block gets a channel map and an intercept, fitted on the dense network's
    paired activations and folded into its second convolution; its batch-norm keeps the statistics
    of what it now writes, so that re-estimation is possible afterwards.

    Source: Shopkhoev et al. 2025 (ReplaceMe), their least-squares map, which they fold into the
    second linear layer of a transformer's MLP.

    Args:
        small: without the blocks; changed in place.
        dense: the reference, with the same block names.
        gone: the removed blocks.
        inputs: calibration images.
    """
    pairs = [(before or "", last) for before, last in spans(blocks(dense), gone)]
    moments = {before: Moments() for before, _ in pairs}
    for batch in inputs.split(BATCH):
        seen = {found.name: found for found in _sums(dense.eval(), batch)}
        for before, last in pairs:
            wanted = seen[last].total - seen[before].shortcut
            moments[before].add(_rows(seen[before].branch), _rows(wanted))
    for before, found in moments.items():
        block = small.get_submodule(before)
        ends = (block.conv2, block.bn2) if before else (block.conv1, block.bn1)
        _fold_(*ends, found)


def _rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _fold_(conv: nn.Conv2d, norm: nn.BatchNorm2d, moments: Moments) -> None:
    """Write an affine map behind a batch-norm into the convolution before it."""
    matrix, offset = moments.solve()
    mean, variance = moments.spread(matrix, offset)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = torch.einsum("oc,c,cihw->oihw", matrix, scale, conv.weight.double())
    conv.weight.copy_(weight)
    norm.weight.copy_(variance.sqrt())
    norm.bias.copy_(mean)
    norm.running_mean.copy_(mean - (matrix @ shift + offset))
    norm.running_var.copy_(variance - norm.eps)


@torch.no_grad()
def repair_(
    small: nn.Module, dense: nn.Module, repair: str, *, gone: Sequence[str], inputs: Tensor
) -> None:
    """Mend a network that lost blocks.

    Args:
        small: changed in place.
        dense: the reference.
        repair: one of `REPAIRS`.
        gone: the removed blocks.
        inputs: calibration images.
    """
    if "affine" in repair:
        affine_(small, dense, gone, inputs)
    if "norm" in repair:
        renorm_(small, inputs)
