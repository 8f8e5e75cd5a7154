"""Size, compute and time of a model, measured on the model itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_otprune.report.model import Interval, Latency
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    first_tensor,
    flat_tensors,
    run,
)
from torch_otprune.structure.layers import Counted, is_dense, is_depthwise, is_linear

__all__ = ["count_macs", "count_params", "latency"]

_RESAMPLES = 1000
_FEWEST, _MOST = 3, 400  # pairs: enough for an interval; no gain beyond


def count_params(model: nn.Module) -> int:
    """Count the elements of a model's parameters, tied ones once.

    Args:
        model: any module.

    Returns:
        parameters; buffers are not counted.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, batch: Any) -> int:
    """Count the multiply-accumulates of convolutions and dense layers on one sample.

    Same convention as the plan's cost model: output positions x weight elements, biases and
    norms and embeddings free, a shared layer counted at every call.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as the model takes it.

    Returns:
        MACs per sample.
    """
    counter = _Macs(batch_size(batch))
    layers = [
        m for m in model.modules() if is_linear(m) or is_depthwise(m) or isinstance(m, Counted)
    ]
    leaves = [m for m in layers if not list(m.children()) or is_parametrized(m)]
    handles = [m.register_forward_hook(counter, with_kwargs=True) for m in leaves]
    try:
        with evaluating(model), torch.no_grad():
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counter.total


class _Macs:
    """The hook that sums."""

    def __init__(self, samples: int) -> None:
        self.samples, self.total = samples, 0

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        read = first_tensor(args, kwargs)
        if read is not None and isinstance(module, Counted):
            self.total += module.macs(read) // self.samples
        if read is None or not isinstance(out, Tensor) or isinstance(module, Counted):
            return
        # A weight holds out x in/groups x taps, and each position uses every element once.
        grid = read if getattr(module, "transposed", False) else out
        positions = grid.numel() // grid.shape[-1 if is_dense(module) else 1]
        weight: Tensor = module.weight  # type: ignore[assignment]
        self.total += positions // self.samples * weight.numel()


def latency(
    dense: nn.Module, pruned: nn.Module, batch: Any, *, seconds: float = 2.0, seed: int = 0
) -> Latency:
    """Time both models in turns on one batch, so that what slows one slows the other.

    Args:
        dense: the model before; it is left as it was.
        pruned: the model after, on the same device; it is left as it was.
        batch: one batch on that device.
        seconds: when to stop; exceeded only by models so slow that three pairs take longer.
        seed: of the bootstrap.

    Returns:
        medians with 95 % bootstrap intervals, the speed-up from ratios within pairs.
    """
    with evaluating(dense), evaluating(pruned), torch.no_grad():
        pairs = torch.tensor(_pairs(dense, pruned, batch, seconds), dtype=torch.float64)
    before, after = pairs.T * 1e3
    return Latency(
        before=interval(before, seed=seed),
        after=interval(after, seed=seed),
        speedup=interval(before / after, seed=seed),
        pairs=len(pairs),
        samples=batch_size(batch),
    )


def _pairs(
    dense: nn.Module, pruned: nn.Module, batch: Any, seconds: float
) -> Sequence[tuple[float, float]]:
    deadline = time.perf_counter() + seconds
    for model in (dense, pruned, dense, pruned):  # fills caches, picks kernels
        _time(model, batch)
        if time.perf_counter() > deadline:
            break
    pairs: list[tuple[float, float]] = []
    while len(pairs) < _FEWEST or (len(pairs) < _MOST and time.perf_counter() < deadline):
        if len(pairs) % 2:  # going second may be cheaper: take turns
            after = _time(pruned, batch)
            pairs.append((_time(dense, batch), after))
        else:
            before = _time(dense, batch)
            pairs.append((before, _time(pruned, batch)))
    return pairs


def _time(model: nn.Module, batch: Any) -> float:
    devices = {tensor.device.type for tensor in flat_tensors(batch)}
    _wait(devices)
    start = time.perf_counter()
    run(model, batch)
    _wait(devices)
    return time.perf_counter() - start


def _wait(devices: set[str]) -> None:
    if "cuda" in devices:
        torch.cuda.synchronize()
    if "mps" in devices:
        torch.mps.synchronize()


def interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Bracket a median by the percentile bootstrap.

    Args:
        values: one number per measurement, at least one.
        seed: of the resampling.

    Returns:
        the median and its 95 % interval, in the unit of `values`.

    Source: Efron 1979, percentile interval.

    Limits: takes measurements for independent; with three of them it is their range.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(
        len(values), (_RESAMPLES, len(values)), generator=generator, device="cpu"
    )
    medians = values.cpu()[chosen].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=medians.dtype)).tolist()
    return Interval(median=values.quantile(0.5).item(), low=low, high=high)
