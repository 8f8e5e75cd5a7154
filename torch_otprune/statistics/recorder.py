"""Hooks that gather statistics while somebody else runs the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.blame import finite
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.patches import columns, pick, positions, rows
from torch_otprune.structure.forward import first_tensor
from torch_otprune.structure.graph import Graph

__all__ = ["FLOOR", "Recorder", "check_memory", "consumers", "quote"]

_log = logging.getLogger(__name__)

_NOTHING: Mapping[str, int] = MappingProxyType({})
FLOOR = 8  # positions per sample at least: fewer would see one corner of the image


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


def check_memory(
    model: nn.Module,
    paths: Sequence[str],
    limit: float,
    *,
    streams: Mapping[str, int] = _NOTHING,
    signals: Mapping[str, int] = _NOTHING,
    tangents: Mapping[str, int] = _NOTHING,
    weights: Mapping[str, int] = _NOTHING,
    others: Mapping[str, int] = _NOTHING,
) -> None:
    """Refuse statistics that would not fit.

    Args:
        model: the model.
        paths: the layers to observe.
        limit: how much they may take, in GiB.
        streams: run of removable blocks to what its rows take, in bytes.
        signals: layer to what the rows of its signals take, in bytes.
        tangents: what the squared gradients of all parameters take, in bytes.
        weights: layer to what choosing single weights there takes, in bytes.
        others: what else is observed, by name, with its columns.

    Raises:
        CalibrationError: naming the widest layers.
    """
    parts = [(quote(model, [path]), f"'{path}'") for path in paths]
    parts += [(size, f"the stream at '{name}'") for name, size in streams.items()]
    parts += [(size, f"the signals at '{path}'") for path, size in signals.items()]
    parts += [(size, "the gradients of all parameters") for size in tangents.values()]
    parts += [(size, f"the weights of '{path}'") for path, size in weights.items()]
    parts += [(Moments.bytes(width), f"'{name}'") for name, width in others.items()]
    size = sum(part for part, _ in parts)
    _log.info("statistics will take %s", _binary(size))
    if size <= limit * 2**30:
        return
    sizes = [f"{name} {_binary(part)}" for part, name in sorted(parts, key=lambda p: -p[0])[:3]]
    raise CalibrationError(
        f"the statistics would take {_binary(size)}.",
        where=f"Calibration.memory = {limit:g}; {', '.join(sizes)}",
        fix="raise Calibration.memory, or ignore the layers that feed the widest ones.",
    )


def _nothing() -> None:
    """Begin nothing."""


def _binary(size: int) -> str:
    """Write bytes in the unit that fits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class Recorder:
    """Second moments of every consumer's input.

    Args:
        model: the model to hook.
        paths: layers whose input is observed.
        samples: calibration samples expected; more are welcome, rows are thinned for this many.
        rows_per_column: rows wanted for each column of a layer's design matrix.
        seed: chooses the positions.
        explain: asked for the error to raise where an input is not finite, given its name.
        active: whether it observes before `look` is called.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        *,
        samples: int,
        rows_per_column: int,
        seed: int,
        explain: Callable[[str], CalibrationError] | None = None,
        active: bool = True,
    ) -> None:
        self.paths, self.explain = tuple(paths), explain
        self.samples, self.rows_per_column, self.seed = samples, rows_per_column, seed
        self.active = active
        self.window: tuple[int, int] | None = None
        self.batch = 0, 0  # samples in it, and how many count
        self.moments: dict[str, Moments] = {}
        self.others: dict[str, int] = {}  # what else is filed with them, and its columns
        self.begin: Callable[[], None] = _nothing  # for what is hooked when the model runs already
        self.at: dict[tuple[str, int], Tensor] = {}
        self.handles = [
            model.get_submodule(path).register_forward_pre_hook(_See(self, path), with_kwargs=True)
            for path in self.paths
        ]

    def look(self, size: int, samples: int) -> None:
        """Say how much of the next batch counts: a plan must not depend on how data is split.

        Where a layer's input folds several rows per sample into its first axis, they are taken
        to lie sample by sample; where its first axis is none of the batch's, all of it counts.

        Args:
            size: samples in the batch.
            samples: how many of them to observe, from the first.
        """
        self.active, self.batch = samples > 0, (size, max(samples, 0))
        self.window = (size, samples) if samples < size else None

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
        x = self._part(x)
        if not finite(x):
            raise self._explained(path, x)
        if path not in self.moments:
            self.moments[path] = Moments.empty(columns(module), x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        self.moments[path].update(rows(module, x, self._positions(path, module, x)))

    def _part(self, x: Tensor) -> Tensor:
        if self.window is None or not x.dim() or len(x) % self.window[0]:
            return x
        size, samples = self.window
        return x[: len(x) // size * samples]

    def _explained(self, path: str, x: Tensor) -> CalibrationError:
        if self.explain is not None:
            return self.explain(f"the input of '{path}'")
        return CalibrationError(
            f"the input of '{path}' holds NaN or infinity.",
            where=f"first seen at '{path}', a {tuple(x.shape)} tensor",
            fix="clean the batch, or the layer before that produced it.",
        )

    def _positions(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        key = path, positions(module, x)  # batches may differ in size
        if key not in self.at:
            per_sample = ceil(self.rows_per_column * columns(module) / self.samples)
            self.at[key] = pick(key[1], max(per_sample, FLOOR), path, self.seed)
        return self.at[key]


class _See:
    """The hook of one layer."""

    def __init__(self, recorder: Recorder | None, path: str) -> None:
        self.recorder, self.path = recorder, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if self.recorder is not None and x is not None:
            self.recorder.see(self.path, module, x)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the statistics: a copy of the model is not observed."""
        return _See, (None, self.path)
