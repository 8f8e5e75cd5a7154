"""Which solver couples two clouds fastest at equal accuracy, and how far is that from the floor?

Expected before measuring, on a CPU: the dispatch is nowhere slower than 1.3 times the best peer of
equal accuracy; plans at n >= 1 024 come at least 5 times faster than from geomloss alone; all
1-D laws of 8 192 channels at 10 000 samples in under 10 s; a soft top-k of 1e8 entries in under
3 s; the facility-location curve of 8 192 units in under 60 s and of 2 048 in under 4 s.

    python benchmarks/transport.py --sections rates,cases,bias,thresholds,grid,gpu --limit 20
    python benchmarks/plot_transport.py

Cells are written one by one and skipped when they are there already, measured by the same state of
the code; `--minutes` ends a run, and the next one goes on where it stopped. Each cell runs in its
own process, so that its memory is its own and a slow one is stopped at the limit. A cell that its
own smaller sizes show to be far over the limit is not started: it says `not run`, why, and the
seconds it would take. Imports and a first run are not timed. `seconds` are processor seconds of one
thread, which other work on the machine disturbs least; `wall` is the clock on the wall. Rows for a
GPU are measured where there is one, and say why not elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, read_json, write_json
from benchmarks.transport_cases import bias, cases, gpu
from benchmarks.transport_harness import SEED, alone, best_of, clouds, digest, warm
from benchmarks.transport_methods import METHODS, Method
from benchmarks.transport_thresholds import thresholds
from torch_otprune import transport
from torch_otprune.transport.dispatch import REDUCED, Problem, choose
from torch_otprune.transport.geometry import Cloud, softmin

OUT = Path(__file__).resolve().parent / "results" / "transport.json"
SIZES, DIMS = (64, 512, 2048, 8192, 100_000), (1, 4, 16, 64, 1024, 4096)
PURPOSES = ("value", "gradient", "plan")
THREADS = 1
TRUTH_UP_TO = 8192  # points up to which the exact value is computed in float64
NUMBERS = 2e8  # in a cloud, with its copies in float64, that fit in memory
OURS = 3.0  # times the limit that our own cells may take, as all others are compared with them
# Walks over all pairs, at the least, where costs do not fit: three problems for a distance, one for
# a plan, each with some thirty half steps.
WALKS = {"value": 90, "gradient": 90, "plan": 60}


def rates() -> dict[str, Any]:
    """Measure what this machine can do: the floor is made of these."""
    a = torch.randn(2048, 2048)
    v = torch.randn(2048)
    big = torch.randn(8192, 8192)
    product = best_of(lambda: (a @ a).sum().item())["seconds"]
    matvec = best_of(lambda: (big @ torch.randn(8192)).sum().item())["seconds"]
    exponent = best_of(lambda: a.exp().sum().item() + v[0].item())["seconds"]
    x, y = clouds(4096, REDUCED)
    walk = best_of(lambda: softmin(Cloud(x, y, 2.0), y[:, 0], 1.0))["seconds"]
    return {
        "gpairs": round(4096**2 / walk / 1e9, 3),
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
    """Say why a method is not tried, or None: only what memory or its kind rules out."""
    if n * n > method.pairs and not (method.line and d == 1):
        return f"not run: {n * n:.0e} costs do not fit in memory"
    if n * d > NUMBERS:
        return f"not run: clouds of {n * d:.0e} numbers, with their copies, do not fit in memory"
    return None


def foreseen(
    data: dict[str, Any], name: str, n: int, d: int, purpose: str
) -> tuple[float, str] | None:
    """Estimate the seconds of a cell from what is known, and say from what; None if nothing is."""
    solver = choose(Problem(n, n, d, purpose=purpose)).solver  # type: ignore[arg-type]
    if name == "ours" and solver in {"blocks", "keops"}:
        speed = data["rates"].get("gpairs")
        said = f"{WALKS[purpose]} walks over {n * n:.0e} costs at {speed}e9 a second"
        return (WALKS[purpose] * n * n / (speed * 1e9), said) if speed else None
    known = []
    for less in (size for size in SIZES if size < n):
        row = data["grid"].get(f"{less} {d} {purpose} {name}", {})
        seconds = row.get("seconds", row.get("estimate"))
        if seconds:
            known.append((less, seconds))
    if not known:
        return None
    growth = 1.0 if d == 1 and METHODS[name].line else 2.0
    if len(known) > 1:
        (less, before), (last, after) = known[-2:]
        growth = min(3.5, max(growth, math.log(after / before) / math.log(last / less)))
    last, after = known[-1]
    return after * (n / last) ** growth, f"{after:.2g} s at n = {last}, growing as n^{growth:.1f}"


def known_slow(rows: dict[str, Any], name: str, n: int, d: int) -> str | None:
    """Say which measured cell was over the limit although this one has more to do, or None."""
    limit = "over the limit of"
    first = METHODS[name].purposes[0]
    own = str(rows.get(f"{n} {d} {first} {name}", {}).get("skipped", ""))
    if own.startswith(limit):
        return f"{own}: its {first} alone"
    if not METHODS[name].grows:
        return None
    for less in (e for e in DIMS if 1 < e < d):
        said = str(rows.get(f"{n} {less} {first} {name}", {}).get("skipped", ""))
        if said.startswith(limit):
            return f"{said.partition(':')[0]}: at d = {less} already"
    return None


def grid(
    data: dict[str, Any],
    limit: float,
    *,
    sizes: Sequence[int] = SIZES,
    dims: Sequence[int] = DIMS,
) -> Iterator[None]:
    """Fill the grid cell by cell."""
    rows, exact = data.setdefault("grid", {}), data.setdefault("truth", {})
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
            row = _cell(data, name, n, d, purpose, limit)
            row["error"] = _error(row, exact.get(place))
            rows[key] = {"n": n, "d": d, "purpose": purpose, "method": name} | row
            yield
    data["verdict"] = verdict(data)


def _cell(
    data: dict[str, Any], name: str, n: int, d: int, purpose: str, limit: float
) -> dict[str, Any]:
    """Measure one cell, or say why not and what it would take."""
    method = METHODS[name]
    limit = limit * (OURS if name == "ours" else 1)
    guess = foreseen(data, name, n, d, purpose)
    estimate = {"estimate": guess[0]} if guess else {}
    why = fits(method, n, d) or known_slow(data["grid"], name, n, d)
    if why is None and guess and guess[0] > limit:
        why = f"not run: about {guess[0]:.2g} s expected ({guess[1]})"
    if why is not None:
        return {"skipped": why} | estimate
    found = alone(lambda: cell(method, n, d, purpose), limit)
    if "seconds" in found:
        return found
    return found | {"estimate": max(limit, guess[0] if guess else 0.0)}


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
            better = mine["error"] <= fastest["error"] and mine["marginal"] <= fastest["marginal"]
            if better:  # what the table picks, where it is at least as accurate
                entry["geomloss_auto"] = fastest["seconds"] / mine["seconds"]
            entry["geomloss_marginal"] = fastest["marginal"]
        found.append(entry)
    return found


def main() -> None:
    """Run the asked sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="rates,cases,bias,thresholds,grid,gpu")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one cell")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="points of the grid")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--dims", default=",".join(map(str, DIMS)), help="dimensions of the grid")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, end = read_json(args.out), time.monotonic() + 60 * args.minutes
    if data.get("environment", {}).get("source") != digest():
        data = {}  # one file, one state of the code
    data["environment"] = environment(SEED) | {"source": digest()}
    peers = {name: metadata.version(name) for name in ("POT", "geomloss", "pykeops")}
    data["environment"]["packages"] |= peers
    sizes, dims = (tuple(map(int, words.split(","))) for words in (args.sizes, args.dims))
    warm()
    wanted = args.sections.split(",")
    if "rates" in wanted or "rates" not in data:
        data["rates"] = alone(rates, args.limit)
    if "gpu" in wanted:
        gpu(data)
    sections = {"cases": cases, "bias": bias, "thresholds": thresholds}
    sections["grid"] = partial(grid, sizes=sizes, dims=dims)
    for _ in itertools.chain.from_iterable(
        section(data, args.limit) for name, section in sections.items() if name in wanted
    ):
        write_json(args.out, data)
        if time.monotonic() > end:
            break
    if "grid" in data:
        data["verdict"] = verdict(data)
    write_json(args.out, data)


if __name__ == "__main__":
    main()
