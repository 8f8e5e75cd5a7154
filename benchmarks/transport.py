"""Which solver couples two clouds fastest at equal accuracy, and how far is that from the floor?

Expected before measuring, on a CPU: the dispatch is nowhere slower than 1.3 times the best peer of
equal accuracy; plans at n >= 1 024 come at least 5 times faster than from geomloss alone; all
1-D laws of 8 192 channels at 10 000 samples in under 10 s; a soft top-k of 1e8 entries in under
3 s; the facility-location curve of 8 192 units in under 60 s and of 2 048 in under 4 s.

    python benchmarks/transport.py --sections rates,cases,bias,grid --limit 60
    python benchmarks/plot_transport.py

Cells are written one by one and skipped when they are there already. Each runs in its own process,
so that its memory is its own and a slow one can be stopped. `seconds` are processor seconds of one
thread, which other work on the machine disturbs least; `wall` is the clock on the wall. Rows for a
GPU are measured where there is one, and say `unmeasured` elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, measured, read_json, write_json
from benchmarks.transport_methods import METHODS, Method
from torch_otprune import transport

OUT = Path(__file__).resolve().parent / "results" / "transport.json"
SIZES, DIMS = (64, 512, 2048, 8192, 100_000), (1, 4, 16, 64, 1024, 4096)
PURPOSES = ("value", "gradient", "plan")
SEED = 0
THREADS = 1
TRUTH_UP_TO = 8192  # points up to which the exact value is computed in float64


def clouds(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw two Gaussian clouds that differ in mean and spread, as activations do."""
    generator = torch.Generator().manual_seed(SEED)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return x.to(dtype), (1.2 * y + 0.3 * scale).to(dtype)


def best_of(run: Callable[[], Any], *, seconds: float = 0.5, times: int = 20) -> dict[str, Any]:
    """Measure a call a few times: the fastest, and the most memory."""
    walls, cpus, peak, answer = [], [], 0.0, None
    while len(walls) < times and sum(walls) < seconds:
        start = time.process_time()
        with measured() as took:
            answer = run()
        cpus.append(time.process_time() - start)
        walls.append(took.seconds)
        peak = max(peak, took.extra_mib)
    took_both = {"seconds": min(cpus), "wall": min(walls)}
    return took_both | {"extra_mib": round(peak, 1), "answer": answer}


def alone(run: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """Run in a child process, and stop it after the limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(run, theirs))
    child.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(limit) else {"skipped": f"over the limit of {limit:g} s"}
    except EOFError:
        answer = {"skipped": "the process ended without an answer (memory)"}
    child.kill()
    child.join()
    return dict(answer)


def warm() -> None:
    """Import everything before the children are forked, so that no cell pays for it."""
    for name in ("scipy.optimize", "scipy.spatial.distance", "scipy.sparse", "geomloss", "ot"):
        importlib.import_module(name)


def _child(run: Callable[[], dict[str, Any]], pipe: Any) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        pipe.send(run())
    except Exception as error:
        pipe.send({"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"})


def rates() -> dict[str, Any]:
    """Measure what this machine can do: the floor is made of these."""
    a = torch.randn(2048, 2048)
    v = torch.randn(2048)
    big = torch.randn(8192, 8192)
    product = best_of(lambda: (a @ a).sum().item())["seconds"]
    matvec = best_of(lambda: (big @ torch.randn(8192)).sum().item())["seconds"]
    exponent = best_of(lambda: a.exp().sum().item() + v[0].item())["seconds"]
    return {
        "gflops": round(2 * 2048**3 / product / 1e9, 1),
        "gbytes": round(4 * 8192**2 / matvec / 1e9, 2),
        "gexp": round(2048**2 / exponent / 1e9, 3),
    }


def floor(n: int, d: int, known: dict[str, Any]) -> float:
    """Give the seconds to compute the cost matrix once and to read it twice (one iteration)."""
    if d == 1:  # sorting reads and writes both clouds about log2(n) / 8 times with radix passes
        return 2 * n * 4 * 2 / (known["gbytes"] * 1e9)
    build = 2.0 * n * n * d / (known["gflops"] * 1e9)
    return build + 3 * 4.0 * n * n / (known["gbytes"] * 1e9)


def truth(n: int, d: int) -> dict[str, Any]:
    """Find W_2 in float64, exactly."""
    x, y = clouds(n, d, torch.float64)
    solver = "line" if d == 1 else "exact"
    return {"value": transport.coupling_points(x, y, solver=solver).cost ** 0.5}


def cell(method: Method, n: int, d: int, purpose: str) -> dict[str, Any]:
    """Measure one method on one problem."""
    x, y = clouds(n, d)
    result = best_of(lambda: method.run(x.clone(), y, purpose))
    answer = result.pop("answer")
    return result | {"value": answer.value, "marginal": answer.marginal, "solver": answer.solver}


def fits(method: Method, n: int, d: int) -> str | None:
    """Say why a method is not tried, or None."""
    if method.pairs < n * n and d > 1:
        return f"{n * n:.1e} pairs do not fit, or take longer than the limit here"
    if method.pairs < n * n and method is not METHODS["ours"]:
        return f"{n * n:.1e} pairs: it has no solver for the line here"
    if n * n * d > method.work and d > 1:
        return f"{n * n * d:.1e} products take longer than the limit"
    return None


def grid(
    data: dict[str, Any],
    limit: float,
    *,
    sizes: Sequence[int] = SIZES,
    dims: Sequence[int] = DIMS,
) -> Iterator[None]:
    """Fill the grid cell by cell."""
    rows = data.setdefault("grid", {})
    exact = data.setdefault("truth", {})
    for n, d in itertools.product(sizes, dims):
        place = f"{n} {d}"
        if place not in exact and (n <= TRUTH_UP_TO or d == 1):
            exact[place] = alone(lambda n=n, d=d: truth(n, d), 4 * limit)
            yield
        for (name, method), purpose in itertools.product(METHODS.items(), PURPOSES):
            key = f"{n} {d} {purpose} {name}"
            other = purpose not in method.purposes or (method.only_line and d > 1)
            if key in rows or other:
                continue
            why = fits(method, n, d)
            if why is None and rows.get(f"{n} {d} value {name}", {}).get("skipped", "").startswith(
                "over"
            ):
                why = "its value alone was over the limit"
            row = (
                {"skipped": why}
                if why
                else alone(lambda m=method, n=n, d=d, p=purpose: cell(m, n, d, p), limit)
            )
            row["error"] = _error(row, exact.get(place))
            rows[key] = {"n": n, "d": d, "purpose": purpose, "method": name} | row
            yield
    data["verdict"] = verdict(data)


def _error(row: dict[str, Any], exact: dict[str, Any] | None) -> float | None:
    if exact is None or "value" not in exact or "value" not in row:
        return None
    return abs(row["value"] / exact["value"] - 1)


def verdict(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare ours with the best peer that is at least as accurate, cell by cell."""
    rows, found = data["grid"].values(), []
    for n, d, purpose in itertools.product(SIZES, DIMS, PURPOSES):
        here = [r for r in rows if (r["n"], r["d"], r["purpose"]) == (n, d, purpose)]
        mine = next((r for r in here if r["method"] == "ours" and "seconds" in r), None)
        if mine is None or mine["error"] is None:
            continue
        enough, slack = max(1.2 * mine["error"], 1e-5), max(mine["marginal"], 0.01)
        peers = [
            r for r in here
            if not r["method"].startswith("ours") and "seconds" in r
            and r["error"] is not None and r["error"] <= enough and r["marginal"] <= slack
        ]  # fmt: skip
        best = min(peers, key=lambda r: r["seconds"], default=None)
        entry = {
            "n": n,
            "d": d,
            "purpose": purpose,
            "seconds": mine["seconds"],
            "error": mine["error"],
        }
        entry |= {"solver": mine["solver"], "extra_mib": mine["extra_mib"]}
        entry["floor"] = floor(n, d, data["rates"])
        if best is not None:
            entry |= {"peer": best["method"], "ratio": mine["seconds"] / best["seconds"]}
        soft = [r for r in here if r["method"] == "ours, eps 0.02" and "seconds" in r] or [mine]
        others = [r for r in here if r["method"].startswith("geomloss") and "seconds" in r]
        if others:
            fastest = min(others, key=lambda r: r["seconds"])
            entry["geomloss"] = fastest["seconds"] / soft[0]["seconds"]
            entry["geomloss_marginal"] = fastest["marginal"]
        found.append(entry)
    return found


def cases(data: dict[str, Any], limit: float) -> Iterator[None]:
    """Measure the named promises."""
    rows = data.setdefault("cases", {})
    for name, (promise, run) in CASES.items():
        if "seconds" not in rows.get(name, {}):
            rows[name] = {"promise": promise} | alone(
                lambda run=run: {k: v for k, v in best_of(run, times=2).items() if k != "answer"},
                8 * limit,
            )
            yield


def _facility(n: int) -> float:
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(2048, 256, generator=generator) @ torch.randn(256, n, generator=generator)
    hidden = hidden.relu().double()
    gram = hidden.T @ hidden / 2048
    own = gram.diagonal()
    cost = (own[:, None] - gram.square() / own).clamp_(min=0).fill_diagonal_(0)
    start = time.perf_counter()
    transport.facility_location(cost, own)
    return time.perf_counter() - start


def _laws(channels: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    transport.pairwise_1d(torch.randn(10_000, channels, generator=generator))


CASES: dict[str, tuple[float, Callable[[], Any]]] = {
    "all 1-D laws of 8 192 channels, 10 000 samples": (10.0, lambda: _laws(8192)),
    "all 1-D laws of 512 channels, 10 000 samples": (1.0, lambda: _laws(512)),
    "soft top-k of 1e8 entries": (
        3.0,
        lambda: transport.soft_topk(torch.empty(10**8).uniform_(-3, 3), 3e7, eps=0.05),
    ),
    "facility-location curve, 2 048 units": (4.0, lambda: _facility(2048)),
    "facility-location curve, 8 192 units": (60.0, lambda: _facility(8192)),
    "256 couplings of 16 x 16 in one batch": (
        0.1, lambda: transport.couplings(torch.rand(256, 16, 16), eps=0.05)
    ),
}  # fmt: skip


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
        data["gpu"] = dict.fromkeys(GPU, "unmeasured")
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


def main() -> None:
    """Run the asked sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="rates,cases,bias,grid,gpu")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one cell")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="points of the grid")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--dims", default=",".join(map(str, DIMS)), help="dimensions of the grid")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, end = read_json(args.out), time.monotonic() + 60 * args.minutes
    data["environment"] = environment(SEED)
    peers = {name: metadata.version(name) for name in ("POT", "geomloss", "pykeops")}
    data["environment"]["packages"] |= peers
    sizes, dims = (tuple(map(int, words.split(","))) for words in (args.sizes, args.dims))
    warm()
    wanted = args.sections.split(",")
    if "rates" in wanted or "rates" not in data:
        data["rates"] = alone(rates, args.limit)
    if "gpu" in wanted:
        gpu(data)
    for name, section in (
        ("cases", cases),
        ("bias", bias),
        ("grid", partial(grid, sizes=sizes, dims=dims)),
    ):
        if name in wanted:
            for _ in section(data, args.limit):
                write_json(args.out, data)
                if time.monotonic() > end:
                    break
    if "grid" in data:
        data["verdict"] = verdict(data)
    write_json(args.out, data)


if __name__ == "__main__":
    main()
