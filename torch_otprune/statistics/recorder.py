"""Hooks that gather statistics while somebody else runs the model."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.patches import columns, pick, positions, rows
from torch_otprune.structure.graph import Graph

__all__ = ["Recorder", "consumers", "quote"]

_FLOOR = 8  # positions per sample at least: fewer would see one corner of the image


def consumers(graph: Graph, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """List the layers that read the channels of the chosen groups, in order of execution.

    Args:
        graph: the model's analysis.
        names: group names; all by default.

    Returns:
        module paths.
    """
    wanted = set(graph.full() if names is None else names)
    paths = {m.path for g in graph.groups if g.name in wanted for m in g.consumers}
    return tuple(path for path in graph.order if path in paths)


def quote(model: nn.Module, paths: Iterable[str]) -> int:
    """Tell how much memory the statistics will take, before the first batch.

    Args:
        model: the model.
        paths: the layers to observe.

    Returns:
        bytes, whatever the number of samples.
    """
    modules = (model.get_submodule(path) for path in paths)
    return sum(Moments.bytes(columns(m)) for m in modules)


class Recorder:
    """Second moments of every consumer's input.

    Args:
        model: the model to hook.
        paths: layers whose input is observed.
        samples: calibration samples expected; more are welcome, rows are thinned for this many.
        rows_per_column: rows wanted for each column of a layer's design matrix.
        seed: chooses the positions.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        *,
        samples: int,
        rows_per_column: int,
        seed: int,
    ) -> None:
        self.samples, self.rows_per_column, self.seed = samples, rows_per_column, seed
        self.active = True
        self.moments: dict[str, Moments] = {}
        self.at: dict[tuple[str, int], Tensor] = {}
        self.handles = [
            model.get_submodule(path).register_forward_pre_hook(_See(self, path)) for path in paths
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @torch.inference_mode(False)  # else only inference mode could go on with the sums
    @torch.no_grad()
    def see(self, path: str, module: nn.Module, x: Tensor) -> None:
        """Add one layer's input.

        Args:
            path: the layer.
            module: the layer.
            x: its input.

        Raises:
            CalibrationError: if the input is not finite.
        """
        if not self.active:
            return
        # half precision would overflow in the sum of finite numbers
        if not bool(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)))):
            raise CalibrationError(
                f"the input of '{path}' holds NaN or infinity.",
                where=f"first seen at '{path}', a {tuple(x.shape)} tensor",
                fix="clean the batch, or the layer before that produced it.",
            )
        if path not in self.moments:
            self.moments[path] = Moments.empty(columns(module), x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        self.moments[path].update(rows(module, x, self._positions(path, module, x)))

    def _positions(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        key = path, positions(module, x)  # batches may differ in size
        if key not in self.at:
            per_sample = ceil(self.rows_per_column * columns(module) / self.samples)
            self.at[key] = pick(key[1], max(per_sample, _FLOOR), path, self.seed)
        return self.at[key]


class _See:
    """The hook of one layer."""

    def __init__(self, recorder: Recorder | None, path: str) -> None:
        self.recorder, self.path = recorder, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.recorder is not None:
            self.recorder.see(self.path, module, inputs[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the statistics: a copy of the model is not observed."""
        return _See, (None, self.path)
