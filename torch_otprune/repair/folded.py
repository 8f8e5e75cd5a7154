"""Means of units through the batch-norm behind the layer that writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.statistics.filters import gain_and_shift
from torch_otprune.structure.graph import Graph, Member
from torch_otprune.structure.layers import axes, norm_behind, tensor

__all__ = ["Fold", "folds"]

_LEAVES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Fold:
    """A layer and the batch-norm behind it, which together are one affine map.

    With gains `g` the mean `sum_i f_i y_i` of normalised channels is written by the filter
    `sum_i (f_i g_i / g') w_i` and a norm of gain `g'`; `g'` is the root mean square of the gains,
    so no gain near zero is ever divided by, and the running mean stays the mean of what arrives.

    Args:
        producer: the layer.
        norm: the batch-norm.
        axis: name and axis of the producer's weight that the channels run along.
        gain: what the norm multiplies each channel by.
        eps: the norm's.
        affine: whether it has a weight of its own.
    """

    producer: str
    norm: str
    axis: tuple[str, int]
    gain: Float[Tensor, " old"]
    eps: float
    affine: bool

    def leaves(self, model: nn.Module) -> list[str]:
        """List the tensors of the norm."""
        norm = model.get_submodule(self.norm)
        return [name for name in _LEAVES if isinstance(getattr(norm, name, None), Tensor)]

    def new_gain(self, along: Float[Tensor, "new old"]) -> Float[Tensor, " new"]:
        """Choose the gain of every new channel, of the sign that most of it has."""
        size = (along @ self.gain.square() / along.sum(1).clamp_min(1e-300)).sqrt()
        sign = torch.where(along @ self.gain < 0, -1.0, 1.0)
        return size * sign

    def weighed(self, along: Float[Tensor, "new old"]) -> Float[Tensor, "new old"]:
        """Weigh what the layer's filters are summed with."""
        new = self.new_gain(along)
        ratio = self.gain / torch.where(new == 0, 1.0, new)[:, None]
        return along * torch.where((new == 0)[:, None], torch.ones_like(ratio), ratio)

    def values(
        self, along: Float[Tensor, "new old"], old: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, " new"]]:
        """Compute the norm's tensors."""
        weighed, new = self.weighed(along), self.new_gain(along)
        # the spread of what arrives, if the channels that are summed vary together
        power = along * self.gain.square()
        power = torch.where((new == 0)[:, None], along, power)
        power = power / power.sum(1, keepdim=True).clamp_min(1e-300)
        var = power @ old["running_var"]
        if not self.affine:  # then the variance alone sets the gain
            var = (1 / new.square() - self.eps).clamp_min(0)
        found = {"running_mean": weighed @ old["running_mean"], "running_var": var}
        if "weight" in old:
            found["weight"] = new * (var + self.eps).sqrt()
        if "bias" in old:
            found["bias"] = along @ old["bias"]
        return found


def folds(
    model: nn.Module, graph: Graph, members: Sequence[Member], ties: frozenset[str]
) -> dict[str, Fold]:
    """Find the batch-norms that stand behind one producer each.

    Args:
        model: the model that values come from.
        graph: its analysis.
        members: of all groups that change.
        ties: modules that share tensors.

    Returns:
        path of the batch-norm to the pair.
    """
    producers = dict.fromkeys(m.path for m in members if m.side == "out")
    carried = {m.path for m in members if m.side == "through"}
    modules = dict(model.named_modules())
    pairs = [(p, norm_behind(model, graph, p, ties)) for p in producers if p in modules]
    times = Counter(norm for _, norm in pairs)
    found = {}
    for path, norm in pairs:
        if norm is None or norm not in carried or times[norm] > 1:
            continue
        fold = _fold(modules[path], modules[norm], path, norm)
        if fold is not None:
            found[norm] = fold
    return found


def _fold(layer: nn.Module, norm: nn.Module, path: str, name: str) -> Fold | None:
    gain = gain_and_shift(norm)[0]
    at = axes(layer, "out")
    if not at or tensor(layer, at[0][0]).shape[at[0][1]] != len(gain):
        return None
    affine, eps = getattr(norm, "weight", None) is not None, float(getattr(norm, "eps", 0.0))
    return Fold(path, name, at[0], gain, eps, affine)
