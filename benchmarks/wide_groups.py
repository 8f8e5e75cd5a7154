"""Can a group of 100 000 units be planned in minutes, and which neighbours do random trees miss?

Expected: planning 100 000 units of 64 numbers takes minutes on one core and less than 2 GiB;
trees find nine of ten neighbours where units come in kinds, fewer where they fill all directions
evenly, and there what they find instead is a few per cent further away.

    python benchmarks/wide_groups.py            # all sizes, some three minutes of one core
    python benchmarks/wide_groups.py --quick    # seconds
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks.common import environment, markdown, measured, read_json, write_json
from torch_otprune.transport import nearest

OUT = Path(__file__).resolve().parent / "results" / "wide_groups.json"
WIDTH, NEIGHBOURS, ASKED = 64, 16, 1000
PARTS = ("search", "plans", "all_pairs")


def clustered(n: int, generator: torch.Generator) -> Tensor:
    """Draw units that come in kinds: fifty noisy copies of each centre."""
    centres = torch.randn(max(n // 50, 1), WIDTH, generator=generator)
    kind = torch.randint(0, len(centres), (n,), generator=generator)
    return centres[kind] + 0.3 * torch.randn(n, WIDTH, generator=generator)


def low_rank(n: int, generator: torch.Generator) -> Tensor:
    """Draw units that fill twelve directions, and a little noise."""
    frame = torch.randn(12, WIDTH, generator=generator)
    noise = 0.05 * torch.randn(n, WIDTH, generator=generator)
    return torch.randn(n, 12, generator=generator) @ frame + noise


def white(n: int, generator: torch.Generator) -> Tensor:
    """Draw units that fill all directions evenly: the worst case."""
    return torch.randn(n, WIDTH, generator=generator)


KINDS = {"clustered": clustered, "low rank": low_rank, "white": white}


@contextmanager
def costed() -> Iterator[dict[str, float]]:
    """Measure a block: processor time as well, which a busy machine does not stretch.

    Yields:
        the record, filled in at the end.
    """
    found, start = dict[str, float](), time.process_time()
    with measured() as cost:
        yield found
    found["cpu_seconds"] = time.process_time() - start
    found |= {"seconds": cost.seconds, "extra_mib": cost.extra_mib}


def brute_force(points: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours of some points by looking at all distances."""
    places, far = [], []
    for part in asked.split(64):
        distance = torch.cdist(points[part], points, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(part)), part] = torch.inf
        near = distance.topk(NEIGHBOURS, dim=1, largest=False)
        places.append(near.indices)
        far.append(near.values)
    return torch.cat(places), torch.cat(far)


def search(kind: str, n: int) -> dict[str, Any]:
    """Measure trees against brute force on a thousand points."""
    generator = torch.Generator().manual_seed(0)
    points = KINDS[kind](n, generator)
    with costed() as cost:
        found = nearest(points, NEIGHBOURS, method="trees")
    asked = torch.randperm(n, generator=generator)[:ASKED]
    true, far = brute_force(points, asked)
    hits = (found.index[asked][:, :, None] == true[:, None]).any(2)
    return {
        "kind": kind,
        "units": n,
        **cost,
        "recall": float(hits.double().mean()),
        "first_found": float((found.index[asked, 0] == true[:, 0]).double().mean()),
        "further": float((found.distance[asked] / far.clamp_min(1e-12)).mean()) - 1,
    }


def exhaustive(n: int) -> dict[str, Any]:
    """Time the search that looks at all distances, block by block."""
    points = white(n, torch.Generator().manual_seed(0))
    with costed() as cost:
        nearest(points, NEIGHBOURS, method="exact")
    return {"units": n, **cost}


def plans(criterion: str, n: int, wide: int) -> dict[str, Any]:
    """Time a whole plan for a layer of n units between two of 64, and its cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, n), nn.ReLU(), nn.Linear(n, WIDTH)).eval()
    with torch.no_grad():
        model[0].weight.copy_(clustered(n, torch.Generator().manual_seed(1)) / WIDTH)
    batches = [torch.randn(32, WIDTH) for _ in range(2)]
    setting: dict[str, Any] = {"kind": criterion}
    setting |= {"wide": wide} if criterion == "transport" else {}
    rule = otp.Channels(keep="50%", criterion=setting, repair="none")
    with costed() as cost, otp.attach(model, otp.Policy(rules=[rule])) as attached:
        plan = otp.observe(attached, batches).plan()
    report = otp.apply_(model, plan, batches)
    return {
        "criterion": criterion,
        "units": n,
        **cost,
        "output_error": report.output_error.after_repair,
        "notes": list(plan.notes),
    }


def tables(result: Mapping[str, Any]) -> str:
    """Write what was measured in markdown.

    Args:
        result: as `main` returns it; a part may be missing.

    Returns:
        one table for each part.
    """
    heads = {
        "search": ["units come", "how many", "processor seconds", "MiB", "recall", "further away"],
        "plans": ["plan by", "units", "processor seconds", "MiB", "error of the output"],
        "all_pairs": ["all pairs of", "processor seconds", "MiB"],
    }
    rows = {
        "search": [
            [r["kind"], f"{r['units']:,}", *_costs(r), f"{r['recall']:.1%}", f"{r['further']:.2%}"]
            for r in result.get("search", ())
        ],
        "plans": [
            [r["criterion"], f"{r['units']:,}", *_costs(r), f"{r['output_error']:.3f}"]
            for r in result.get("plans", ())
        ],
        "all_pairs": [[f"{r['units']:,}", *_costs(r)] for r in result.get("all_pairs", ())],
    }
    return "\n\n".join(markdown(heads[part], rows[part]) for part in PARTS if rows[part])


def _costs(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['cpu_seconds']:.1f}", f"{row['extra_mib']:.0f}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = [1000, 2000] if asked.quick else [10_000, 100_000]
    brute = [1000, 2000] if asked.quick else [10_000, 30_000]
    wide = 500 if asked.quick else 32_768
    result: dict[str, Any] = {"environment": environment(), "quick": asked.quick}
    names = ("transport", "sliced_kernel", "magnitude")
    work: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        *(("search", partial(search, kind, sizes[-1])) for kind in KINDS),
        *(("plans", partial(plans, name, sizes[-1], wide)) for name in names),
        *(("search", partial(search, kind, sizes[0])) for kind in KINDS),
        *(("all_pairs", partial(exhaustive, n)) for n in brute),
    ]
    if asked.out.exists() and set(asked.parts) < set(PARTS):  # the other parts stay
        old = read_json(asked.out)
        result |= {part: old[part] for part in PARTS if part in old and part not in asked.parts}
    for key, measure in work:  # what is done is kept if the rest is stopped
        if key not in asked.parts:
            continue
        result.setdefault(key, []).append(measure())
        write_json(asked.out, result)
        asked.out.with_suffix(".md").write_text(tables(result) + "\n")
    sys.stdout.write(tables(result) + "\n")
    return result


if __name__ == "__main__":
    main()
