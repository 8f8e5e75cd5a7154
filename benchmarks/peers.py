"""Torch-Pruning's own pruner, at its published settings and at the best ones we could give it.

Every peer is cut to the same MACs, counted by our one counter: its pruning ratio is found by
bisection, so that the smaller network just fits under the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cifar import BasicBlock, Shortcut, Split, batches
from benchmarks.common import count_macs

__all__ = ["GROUPS", "IMPORTANCES", "Peer", "find_ratio", "inner_paths", "prune", "renorm_"]

IMPORTANCES = ("magnitude", "taylor", "taylor_pseudo", "bn_scale", "fpgm")
GROUPS = ("all", "all_fixed", "inner")
STEPS = 14  # of the bisection: the ratio to 1e-4, finer than one channel of these networks


@dataclass(frozen=True)
class Peer:
    """One way to use Torch-Pruning.

    Args:
        importance: one of `IMPORTANCES`. `taylor` uses the labels of the calibration
            images, as published; `taylor_pseudo` the dense network's own answers.
        groups: `all` cuts whatever Torch-Pruning finds by itself; `all_fixed` the same after
            we taught it the zero-padding shortcut, whose channel offset it gets wrong;
            `inner` only the channels between a block's two convolutions.
        ranking: `local` removes the same share of every group, `global` ranks all channels
            together.
    """

    importance: str
    groups: str
    ranking: str

    @property
    def labels(self) -> bool:
        """Say whether it sees labels."""
        return self.importance == "taylor"


class Pick(nn.Module):
    """The zero-padding shortcut as a 1x1 convolution with a fixed 0/1 matrix.

    Torch-Pruning follows channels through it correctly, which it does not through padding.
    It is no `nn.Conv2d`: the importances do not score it and it counts no MACs.

    Args:
        shortcut: what it replaces.
        cin: input channels of the shortcut.
    """

    weight: Tensor

    def __init__(self, shortcut: Shortcut, cin: int) -> None:
        super().__init__()
        self.stride = shortcut.stride
        weight = F.pad(torch.eye(cin), (0, 0, shortcut.pad, shortcut.pad))
        self.register_buffer("weight", weight[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Do what the shortcut does."""
        return F.conv2d(x, self.weight, stride=self.stride)


class _PickPruner(tp.BasePruningFunc):  # type: ignore[misc]
    def prune_out_channels(self, layer: Pick, idxs: Sequence[int]) -> Pick:
        return _drop(layer, 0, idxs)

    def prune_in_channels(self, layer: Pick, idxs: Sequence[int]) -> Pick:
        return _drop(layer, 1, idxs)

    def get_out_channels(self, layer: Pick) -> int:
        return layer.weight.shape[0]

    def get_in_channels(self, layer: Pick) -> int:
        return layer.weight.shape[1]


def _drop(layer: Pick, dim: int, idxs: Sequence[int]) -> Pick:
    gone = set(idxs)
    keep = [i for i in range(layer.weight.shape[dim]) if i not in gone]
    layer.weight = layer.weight.index_select(dim, torch.tensor(keep))
    return layer


def inner_paths(model: nn.Module) -> list[str]:
    """Name every block's first convolution: its outputs are seen by that block only."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, BasicBlock)]
    return [f"{name}.conv1" for name in blocks]


def _teach_shortcuts(model: nn.Module) -> None:
    for module in model.modules():
        match module:
            case BasicBlock(shortcut=Shortcut(stride=2) as shortcut):
                module.shortcut = Pick(shortcut, module.conv1.in_channels)


def _importance(name: str) -> Callable[..., Any]:
    made: dict[str, type[Any]] = {
        "magnitude": tp.importance.MagnitudeImportance,
        "taylor": tp.importance.TaylorImportance,
        "taylor_pseudo": tp.importance.TaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "fpgm": tp.importance.FPGMImportance,
    }
    importance: Callable[..., Any] = made[name]()
    return importance


def _ignored(model: nn.Module, groups: str) -> list[nn.Module]:
    """List what must keep its outputs: the classifier, or all but the inner convolutions."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if groups == "inner":
        free = set(inner_paths(model))
        return [module for name, module in layers.items() if name not in free]
    return [module for module in layers.values() if isinstance(module, nn.Linear)]


def _cut(model: nn.Module, peer: Peer, example: Tensor, ratio: float) -> nn.Module:
    """Prune a copy; gradients, which Taylor reads, are copied along."""
    smaller = copy.deepcopy(model)
    for old, new in zip(model.parameters(), smaller.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    pruner = tp.pruner.BasePruner(
        smaller,
        example,
        importance=_importance(peer.importance),
        global_pruning=peer.ranking == "global",
        pruning_ratio=ratio,
        ignored_layers=_ignored(smaller, peer.groups),
        customized_pruners={Pick: _PickPruner()},
        # Its defaults are dicts shared by all pruners of the process.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    return smaller


def _prepare(model: nn.Module, peer: Peer, data: Split) -> nn.Module:
    """Copy the dense network and give it what the importance reads."""
    dense = copy.deepcopy(model).eval()
    if peer.groups == "all_fixed":
        _teach_shortcuts(dense)
    if peer.importance.startswith("taylor"):
        dense.zero_grad()
        for x, labels in zip(batches(data.inputs()), data.labels.split(128), strict=True):
            logits = dense(x)
            wanted = labels if peer.labels else logits.argmax(dim=1)
            (F.cross_entropy(logits, wanted, reduction="sum") / len(data)).backward()
    return dense


def find_ratio(model: nn.Module, peer: Peer, data: Split, *, target: int) -> float:
    """Find the smallest pruning ratio whose network has at most `target` MACs.

    Args:
        model: dense; not changed.
        peer: how to prune.
        data: calibration images.
        target: MACs to stay under.

    Returns:
        the ratio, in (0, 1).

    Raises:
        ValueError: if no ratio tried stays under the target.
    """
    dense, example = _prepare(model, peer, data), data.pick(torch.tensor([0])).inputs()
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        if count_macs(_cut(dense, peer, example, ratio), example) <= target:
            high = best = ratio
        else:
            low = ratio
    if best is None:
        raise ValueError(f"{peer} cannot reach {target} MACs.")
    return best


def prune(model: nn.Module, peer: Peer, data: Split, *, ratio: float) -> nn.Module:
    """Prune a copy of a network with Torch-Pruning and check that the result runs.

    Args:
        model: dense; not changed.
        peer: how to prune.
        data: calibration images; labels are read by `taylor` alone.
        ratio: Torch-Pruning's `pruning_ratio`.

    Returns:
        the smaller network, in evaluation mode.

    Raises:
        ValueError: if it answers with the wrong shape or with numbers that are not finite.
    """
    example = data.pick(torch.tensor([0])).inputs()
    smaller = _cut(_prepare(model, peer, data), peer, example, ratio)
    smaller.zero_grad()
    with torch.no_grad():
        wanted, got = model.eval()(example), smaller.eval()(example)
    if got.shape != wanted.shape or not got.isfinite().all():
        raise ValueError(f"{peer} at ratio {ratio:.3f} broke the network.")
    return smaller


@torch.no_grad()
def renorm_(model: nn.Module, inputs: Tensor) -> None:
    """Re-estimate every batch-norm's statistics, all inputs in one batch.

    Args:
        model: changed in place, left in evaluation mode.
        inputs: normalised images.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, here of one batch
    model.train()
    model(inputs)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
