"""The named promises, the bias of samples and the rows for a GPU, as `transport.py` asks them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.transport_harness import SEED, alone, best_of, clouds
from torch_otprune import transport

__all__ = ["bias", "cases", "gpu"]


def cases(data: dict[str, Any], limit: float) -> Iterator[None]:
    """Measure the named promises."""
    rows = data.setdefault("cases", {})
    for name, (promise, prepare) in CASES.items():
        if "seconds" not in rows.get(name, {}):
            threads = 2 if name.endswith("2 threads") else torch.get_num_threads()
            rows[name] = {"promise": promise, "threads": threads} | alone(
                lambda prepare=prepare, threads=threads: _timed(prepare, threads), 8 * limit
            )
            yield


def _timed(prepare: Callable[[], Callable[[], Any]], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    took = best_of(prepare(), times=2)
    del took["answer"]
    return took


def _facility(n: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(2048, 256, generator=generator) @ torch.randn(256, n, generator=generator)
    hidden = hidden.relu().double()
    gram = hidden.T @ hidden / 2048
    own = gram.diagonal()
    cost = (own[:, None] - gram.square() / own).clamp_(min=0).fill_diagonal_(0)
    return lambda: transport.facility_location(cost, own)


def _laws(channels: int) -> Callable[[], Any]:
    x = torch.randn(10_000, channels, generator=torch.Generator().manual_seed(SEED))
    return lambda: transport.pairwise_1d(x)


def _topk(count: int) -> Callable[[], Any]:
    scores = torch.empty(count).uniform_(-3, 3, generator=torch.Generator().manual_seed(SEED))
    return lambda: transport.soft_topk(scores, 0.3 * count, eps=0.05)


def _batch() -> Callable[[], Any]:
    costs = torch.rand(256, 16, 16, generator=torch.Generator().manual_seed(SEED))
    return lambda: transport.couplings(costs, eps=0.05)


def _divergences() -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(SEED)
    x, y = (torch.randn(256, 16, 8, generator=generator) for _ in range(2))
    return lambda: transport.divergence(x, y)


# What is promised in seconds, and what draws the data and returns the call to measure.
CASES: dict[str, tuple[float, Callable[[], Callable[[], Any]]]] = {
    "all 1-D laws of 8 192 channels, 10 000 samples": (10.0, lambda: _laws(8192)),
    "all 1-D laws of 8 192 channels, 10 000 samples, 2 threads": (10.0, lambda: _laws(8192)),
    "all 1-D laws of 512 channels, 10 000 samples": (1.0, lambda: _laws(512)),
    "soft top-k of 1e8 entries": (3.0, lambda: _topk(10**8)),
    "facility-location curve, 2 048 units": (4.0, lambda: _facility(2048)),
    "facility-location curve, 8 192 units": (60.0, lambda: _facility(8192)),
    "256 couplings of 16 x 16 in one batch": (0.1, _batch),
    "256 divergences of 16 x 16 points in one batch": (0.2, _divergences),
}


def bias(data: dict[str, Any], limit: float) -> Iterator[None]:
    """Measure known distances from samples: what each estimator reads, and its null."""
    rows = data.setdefault("bias", {})
    for d, n in itertools.product((2, 16, 64), (500, 2000)):
        if f"{d} {n}" not in rows:
            rows[f"{d} {n}"] = alone(lambda d=d, n=n: _bias(d, n), 4 * limit)
            yield


def _bias(d: int, n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    spread = torch.arange(1, d + 1, dtype=torch.float64).reciprocal()
    spread = (spread / spread.sum()).sqrt()  # total variance 1
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    shift = torch.zeros(d, dtype=torch.float64)
    shift[0] = 0.02**0.5
    y = 1.1 * y + shift
    verbs = {
        "exact": lambda s, t: transport.wasserstein(s, t),
        "Sinkhorn divergence": lambda s, t: transport.divergence(s, t),
        "Gaussian": lambda s, t: transport.gaussian_points(s, t).distance,
        "sliced x sqrt(d)": lambda s, t: transport.sliced(s, t) * d**0.5,
    }
    out: dict[str, Any] = {"d": d, "n": n, "truth": 0.03**0.5}
    for name, verb in verbs.items():
        found = transport.estimate(verb, x, y, splits=4, resamples=8)
        out[name] = {"value": found.value, "null": found.null, "low": found.low, "high": found.high}
    out["paired"] = {"value": float(transport.paired_distance(x, 1.1 * x + shift))}
    return out


def gpu(data: dict[str, Any]) -> None:
    """Measure the rows for a GPU, or say that there is none."""
    if not torch.cuda.is_available():
        data["gpu"] = dict.fromkeys(GPU, "not run: this machine has no CUDA device")
        return
    data["gpu"] = {name: run() for name, run in GPU.items()}


def _cuda_time(run: Callable[[], Any]) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _gpu_cloud(n: int, d: int) -> dict[str, Any]:
    from torch_otprune.transport.keops import softmin_keops

    x, y = (c.cuda() for c in clouds(n, d))
    h = torch.zeros(n, device="cuda")
    one = _cuda_time(lambda: softmin_keops(x, y, h, 1.0, 2.0))
    found = transport.coupling_points(x, y, eps=0.1, solver="keops", limit=50, tol=9e-3)
    took = _cuda_time(
        lambda: transport.coupling_points(x, y, eps=0.1, solver="keops", limit=50, tol=9e-3)
    )
    return {"reduction": one, "coupling": took, "iterations": found.iterations}


def _gpu_dense(n: int) -> dict[str, Any]:
    x, y = (c.cuda() for c in clouds(n, 64))
    cost = transport.sqdist(x, y)
    read = _cuda_time(lambda: cost.sum())
    found = transport.coupling(cost, eps=0.02)
    took = _cuda_time(lambda: transport.coupling(cost, eps=0.02))
    return {"read": read, "coupling": took, "iterations": found.iterations}


GPU: dict[str, Callable[[], Any]] = {
    "KeOps 1e6 x 3": lambda: _gpu_cloud(10**6, 3),
    "KeOps 1e5 x 64": lambda: _gpu_cloud(10**5, 64),
    "dense coupling 8 192": lambda: _gpu_dense(8192),
}
