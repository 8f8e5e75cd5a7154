"""Ways to remove layers of a BERT encoder that do without this library, as published."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.depth_baselines import Moments

__all__ = [
    "CHOICES",
    "REPAIRS",
    "Batch",
    "affine_",
    "best_subset",
    "block_influence",
    "contiguous",
    "embed",
    "layers",
    "pooled",
    "remove",
    "uniform",
]

Batch = dict[str, Tensor]
REPAIRS = ("none", "affine")


def layers(model: Any) -> list[nn.Module]:
    """List the layers that compute something, in order."""
    return [m for m in model.encoder.layer if any(True for _ in m.parameters())]


def pooled(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average every text's states over its tokens and scale to length 1."""
    mask = attention_mask[:, :, None].to(states.dtype)
    return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


@torch.inference_mode()
def embed(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Embed every text: its last states, pooled."""
    states = (model.eval()(**batch).last_hidden_state for batch in batches)
    return torch.cat([pooled(x, b["attention_mask"]) for x, b in zip(states, batches, strict=True)])


def remove(model: Any, gone: Sequence[int]) -> Any:
    """Copy an encoder without some of its layers."""
    smaller = copy.deepcopy(model)
    left = [layer for i, layer in enumerate(smaller.encoder.layer) if i not in set(gone)]
    smaller.encoder.layer = nn.ModuleList(left)
    smaller.config.num_hidden_layers = len(left)
    return smaller


@dataclass
class _Layer:
    """What a layer adds up, a row per token: the MLP's branch, what it is added to, the result."""

    branch: Tensor
    stream: Tensor
    state: Tensor

    @property
    def total(self) -> Tensor:
        return self.branch + self.stream


class _Watch:
    """Keep what every layer computes for one batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[str, Tensor] = {}
        self.hooks = [
            hook
            for i, layer in enumerate(model.encoder.layer)
            for hook in (
                layer.output.dense.register_forward_hook(self._keep(f"branch{i}")),
                layer.attention.register_forward_hook(self._keep(f"stream{i}")),
                layer.register_forward_hook(self._keep(f"state{i}")),
            )
        ]
        self.hooks.append(model.embeddings.register_forward_hook(self._keep("state-1")))

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def rows(self, name: str, batch: Batch) -> Tensor:
        """Give one row per token that is no padding."""
        return self.seen[name][batch["attention_mask"].bool()]

    @torch.no_grad()
    def walk(self, batches: Sequence[Batch]) -> Iterator[list[_Layer]]:
        """Run batch by batch and give all layers, after the embeddings as layer 0's input."""
        try:
            for batch in batches:
                self.model.eval()(**batch)
                start = self.rows("state-1", batch)
                found = [_Layer(start, start, start)]
                for i in range(len(self.model.encoder.layer)):
                    names = (f"branch{i}", f"stream{i}", f"state{i}")
                    found.append(_Layer(*(self.rows(name, batch) for name in names)))
                yield found
        finally:
            for hook in self.hooks:
                hook.remove()


def _cosines(model: Any, batches: Sequence[Batch], span: int) -> list[float]:
    """Measure the mean cosine between the states before and after every `span` layers."""
    depth = len(model.encoder.layer)
    sums, count = torch.zeros(depth - span + 1, dtype=torch.float64), 0
    for seen in _Watch(model).walk(batches):
        count += len(seen[0].state)
        for i in range(len(sums)):
            sums[i] += torch.cosine_similarity(seen[i].state, seen[i + span].state).sum()
    return (sums / count).tolist()


def block_influence(
    model: Any, removed: int, *, calibration: Sequence[Batch], validation: Sequence[Batch]
) -> list[int]:
    """Drop the layers that turn the tokens' states least.

    Source: Men et al. 2024 (ShortGPT), section 2.2.
    """
    cosines = _cosines(model, calibration, 1)
    return sorted(sorted(range(len(cosines)), key=lambda i: -cosines[i])[:removed])


def contiguous(
    model: Any, removed: int, *, calibration: Sequence[Batch], validation: Sequence[Batch]
) -> list[int]:
    """Drop the run of layers with the largest cosine between the states before and after it.

    Source: the choice of ReplaceMe (Shopkhoev et al. 2025) and of Gromov et al. 2024.
    """
    cosines = _cosines(model, calibration, removed)
    first = max(range(len(cosines)), key=lambda i: cosines[i])
    return list(range(first, first + removed))


def uniform(
    model: Any, removed: int, *, calibration: Sequence[Batch], validation: Sequence[Batch]
) -> list[int]:
    """Drop evenly spaced layers: the middle one, or every second one for half of them."""
    depth = len(model.encoder.layer)
    return [int((i + 0.5) * depth / removed) for i in range(removed)]


def best_subset(
    model: Any, removed: int, *, calibration: Sequence[Batch], validation: Sequence[Batch]
) -> list[int]:
    """Try every subset, without repair, and take the one closest to the dense embedding."""
    wanted, stack = embed(model, validation), model.encoder.layer

    def cosine(gone: tuple[int, ...]) -> float:
        # The embedding matrix is most of the model: no copy of it for every subset.
        model.encoder.layer = nn.ModuleList(m for i, m in enumerate(stack) if i not in gone)
        return float((embed(model, validation) * wanted).sum(dim=1).mean())

    try:
        return list(max(combinations(range(len(stack)), removed), key=cosine))
    finally:
        model.encoder.layer = stack


CHOICES: dict[str, Callable[..., list[int]]] = {
    "best_subset": best_subset,
    "block_influence": block_influence,
    "contiguous": contiguous,
    "uniform": uniform,
}


@torch.no_grad()
def affine_(small: Any, dense: Any, gone: Sequence[int], batches: Sequence[Batch]) -> None:
    """Let the MLP before each run of removed layers add up to what the run's end did.

    The MLP's output is mapped by plain least squares, with an intercept, so that with the stream
    it gives the sum before the last removed layer-norm; the map is folded into `output.dense`, and
    that layer-norm takes the place of the layer's own. A run at the very start has no MLP before
    it and stays as it is.

    Source: Shopkhoev et al. 2025 (ReplaceMe); the layer-norm is our reading for post-norm encoders.

    Args:
        small: without the layers; changed in place.
        dense: the reference.
        gone: the removed layers.
        batches: calibration texts.
    """
    pairs = [(before, last) for before, last in _runs(gone) if before >= 0]
    moments = {before: Moments() for before, _ in pairs}
    for seen in _Watch(dense).walk(batches):
        for before, last in pairs:
            here, wanted = seen[before + 1], seen[last + 1].total
            moments[before].add(here.branch, wanted - here.stream)
    left = [i for i in range(len(dense.encoder.layer)) if i not in set(gone)]
    for before, last in pairs:
        output = small.encoder.layer[left.index(before)].output
        matrix, offset = moments[before].solve()
        weight, bias = output.dense.weight.double(), output.dense.bias.double()
        output.dense.weight.copy_(matrix @ weight)
        output.dense.bias.copy_(matrix @ bias + offset)
        output.LayerNorm.load_state_dict(dense.encoder.layer[last].output.LayerNorm.state_dict())


def _runs(gone: Sequence[int]) -> list[tuple[int, int]]:
    """Give each run of removed layers by the layer before it and its last one."""
    found: list[tuple[int, int]] = []
    for i in sorted(gone):
        if found and found[-1][1] == i - 1:
            found[-1] = (found[-1][0], i)
        else:
            found.append((i - 1, i))
    return found
