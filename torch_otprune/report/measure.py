"""Size, compute and time of a model, measured on the model itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.report.model import Interval, Latency
from torch_otprune.structure.forward import batch_size, evaluating, flat_tensors, run
from torch_otprune.structure.tally import tallied

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
    """Count the multiply-accumulates of all products of matrices on one sample.

    The plan's cost model counts the same: convolutions, dense and recurrent layers, scores and
    means of attention, whatever module or function runs them and as often as it runs. Biases,
    norms, embeddings and what works number by number are free.

    Args:
        model: any module; it is left as it was.
        batch: one batch, as the model takes it; attention costs what its tokens make it cost.

    Returns:
        MACs per sample; products that samples share, as of a table of positions, are shared out.
    """
    return tallied(model, batch).total


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
