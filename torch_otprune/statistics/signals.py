"""Some rows of what every consumer reads, for criteria that look at whole distributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.statistics.patches import output_rows, pick
from torch_otprune.statistics.sites import real
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    first_tensor,
    outside_inference,
    run,
)
from torch_otprune.structure.layers import channels, is_dense, tensor

__all__ = ["WIDE_ROWS", "Ears", "hear", "signals_quote"]

ROWS = 2048  # per layer: quantiles of a law are known to about a hundredth of its spread
WIDE_ROWS = 256  # of a layer so wide


def hear(
    model: nn.Module,
    paths: Iterable[str],
    batches: Sequence[Any],
    *,
    rows: int = ROWS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run the model on every batch and keep some rows of what the layers read.

    Positions are chosen once per layer, the same for every sample; what a batch's
    `attention_mask` calls padding is left out. A layer's rows take 4 bytes per channel each.

    Args:
        model: any module; left as it was.
        paths: dense layers and convolutions of it; what is no module is left out.
        batches: as the model takes them.
        rows: how many rows of each layer to aim at.
        seed: chooses the positions.

    Returns:
        layer to rows x channels in float32 (float64 where the model is); layers that did not run
        are left out.
    """
    samples = sum(batch_size(batch) for batch in batches)
    modules = dict(model.named_modules())
    ears = Ears(
        model, [p for p in paths if p in modules], max(-(-rows // max(samples, 1)), 1), seed
    )
    with outside_inference(), evaluating(model), torch.no_grad(), ears:
        for batch in batches:
            ears.begin(batch)
            run(model, batch)
    return {path: torch.cat(heard) for path, heard in ears.heard.items()}


def signals_quote(
    model: nn.Module, paths: Iterable[str], *, samples: int, rows: int = ROWS
) -> dict[str, int]:
    """Tell how much memory the rows will take at most, before the first batch.

    Args:
        model: the dense model.
        paths: as for `hear`.
        samples: probes over all ranks, at most.
        rows: as for `hear`.

    Returns:
        layer to bytes, on each rank.
    """
    modules, found = dict(model.named_modules()), {}
    for path in (p for p in paths if p in modules):
        wide = torch.float64 if tensor(modules[path], "weight").dtype == torch.float64 else None
        each = (wide or torch.float32).itemsize * (channels(modules[path], "in") or 0)
        found[path] = each * max(rows + samples - 1, samples)  # rounded up, sample by sample
    return found


@dataclass
class Ears:
    """Hooks that keep rows of what layers read.

    Args:
        model: what to listen to.
        paths: of the layers.
        wanted: rows per sample.
        seed: chooses the positions.
    """

    model: nn.Module
    paths: Sequence[str]
    wanted: int
    seed: int
    heard: dict[str, list[Tensor]] = field(default_factory=dict)
    batch: Any = None

    def begin(self, batch: Any) -> None:
        """Take notice of the batch that is run next."""
        self.batch = batch

    def __enter__(self) -> Ears:
        self.handles = [
            self.model.get_submodule(path).register_forward_pre_hook(
                _Hear(self, path), with_kwargs=True
            )
            for path in self.paths
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def hear(self, path: str, module: nn.Module, x: Tensor) -> None:
        """Keep some rows of one layer's input."""
        total = x[0].numel() // x.shape[-1] if is_dense(module) else x[0, 0].numel()
        at = pick(total, self.wanted, path, self.seed)
        kept = output_rows(module, x.detach(), at)  # of an input's shape as well
        told = real(self.batch, len(x), total)[:, at].flatten().to(kept.device)
        wide = kept[told] if kept.dtype == torch.float64 else kept[told].float()
        self.heard.setdefault(path, []).append(wide.cpu())


class _Hear:
    """The hook of one layer."""

    def __init__(self, ears: Ears, path: str) -> None:
        self.ears, self.path = ears, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.dim() > 1:
            self.ears.hear(self.path, module, x)
