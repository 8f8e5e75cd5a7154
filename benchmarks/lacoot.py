"""How many blocks of ResNet-18 can go after one training run, and what is left of the accuracy?

The protocol of LaCoOT on CIFAR-10: 160 epochs, SGD with momentum 0.9, batches of 128, weight decay
1e-4, rate 0.1 times 0.1 at epochs 80 and 120, crop and flip, 45 000 images to train on and 5 000
to rank blocks with. Then the four identity blocks go, one after another, without fine-tuning.

Expected: the dense net near the published 91.77 % (140.19 MMACs); ours at least the published
90.99 % with all four blocks gone (64.69 MMACs), at most 1.33 times the time of plain training; the
published distance behind ours, plain training far behind both; EGP and EASIER remove no block,
hence no MACs, for several times the training time.

    python benchmarks/lacoot.py --data DATA --minutes 10          # one data-centre GPU
    python benchmarks/lacoot.py --data DATA --stem plain          # the strong baseline
    python benchmarks/lacoot.py --data DATA --minutes 0           # the protocol, however long
    python benchmarks/lacoot.py --smoke                           # does it run? a minute on a CPU

With `--minutes` above 0 a step of every arm is timed first and as many epochs are run as fit, by
one cycle of the rate; the file says so. Arms that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, read_json, write_json
from benchmarks.lacoot_nets import SITES, Images, load, noise
from benchmarks.lacoot_train import Bench, accuracy, curve, remove, train_
from torch_otprune.training import EntropySchedule

OUT = Path(__file__).resolve().parent / "results" / "lacoot.json"
ARMS = ("plain", "lacoot", "ours", "egp", "easier")
PROTOCOL = 160  # epochs
ROUNDS = {"egp": 9, "easier": 17}  # trainings after the first, as published
SPARE = 0.85  # of the time: the rest goes to reading, ranking and measuring


def dense(bench: Bench) -> tuple[nn.Module, float]:
    """Train the plain network once; arms that start from it get a copy."""
    if bench.dense is None:
        model = bench.net()
        bench.dense = model, train_(bench, model)[0]
    return copy.deepcopy(bench.dense[0]), bench.dense[1]


def run_single(bench: Bench, arm: str) -> dict[str, Any]:
    """Train once, with or without a penalty, then remove blocks."""
    if arm == "plain":
        model, seconds = dense(bench)
        said: dict[str, Any] = {}
    else:
        model = bench.net()
        seconds, said = train_(bench, model, penalty=bench.penalty(arm))
    # As published, LaCoOT ranks by its own distance.
    found = curve(bench, model, "max_sliced" if arm == "lacoot" else "change")
    return {"train_seconds": seconds, "trainings": 1} | said | found


def observed(bench: Bench, schedule: EntropySchedule) -> EntropySchedule:
    """Show a schedule the training images, as they are."""
    with schedule.observe():
        for index in torch.arange(len(bench.train), device=bench.device).split(500):
            schedule.model(bench.train.plain(index))
    return schedule


def run_egp(bench: Bench) -> dict[str, Any]:
    """Prune by entropy and train again, as published: half of the weights a round."""
    model, seconds = dense(bench)
    schedule = EntropySchedule(model, SITES, share="softmax_ratio", max_layer_sparsity=1.0)
    rounds = []
    for _ in range(bench.rounds):
        taken = observed(bench, schedule).prune_()
        seconds += train_(bench, model, schedule=schedule)[0]
        seen = observed(bench, schedule)
        rounds.append({"pruned": taken, "collapsed": seen.collapsed(), "entropies": seen.entropies})
        rounds[-1]["held_out"] = accuracy(model, bench.held_out)
    head = {"train_seconds": seconds, "trainings": 1 + bench.rounds, "rounds": rounds}
    return head | curve(bench, model, "change")


def run_easier(bench: Bench) -> dict[str, Any]:
    """Drop the activation of lowest entropy and train again, as published."""
    model, seconds = dense(bench)
    rounds: list[dict[str, Any]] = []
    left = dict(SITES)
    for _ in range(min(bench.rounds, len(SITES) - 1)):
        entropies = observed(bench, EntropySchedule(model, left)).entropies
        lowest = min(entropies, key=lambda site: entropies[site])
        gone = [site for site, value in entropies.items() if value == 0 or site == lowest]
        for site in gone:
            model = remove(model, site)
            del left[site]
        seconds += train_(bench, model)[0]
        rounds.append({"linearised": gone, "held_out": accuracy(model, bench.held_out)})
        if len(left) < 2:
            break
    head = {"train_seconds": seconds, "trainings": 1 + len(rounds), "rounds": rounds}
    return head | curve(bench, model, "change")


def run(bench: Bench, arm: str) -> dict[str, Any]:
    """Run one arm."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = run_egp(bench) if arm == "egp" else None
    row = run_easier(bench) if arm == "easier" else row
    row = run_single(bench, arm) if row is None else row
    if bench.device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    settings = bench.penalty(arm)
    return row | {"penalty": settings.model_dump() if settings else None}


def fit_(bench: Bench, arms: Sequence[str], minutes: float) -> dict[str, float]:
    """Time a few steps of every arm and set as many epochs as the minutes allow.

    Returns:
        seconds per step by arm, and what the epochs were worked out from.
    """
    steps: dict[str, float] = {}
    for arm in dict.fromkeys(arm if arm in ("lacoot", "ours") else "plain" for arm in arms):
        model, penalty = bench.net(), bench.penalty(arm)
        train_(bench, model, penalty=penalty, steps=5)
        # A measurement of the automatic weight is in it, and costs what it costs on average.
        steps[arm] = train_(bench, model, penalty=penalty, steps=20)[0] / 20
    trainings = {"egp": bench.rounds, "easier": bench.rounds}
    # Arms that iterate start from the plain network, which is trained once.
    needs = dict.fromkeys(arms, 1) | {a: n for a, n in trainings.items() if a in arms}
    first = 0 if "plain" in arms or set(arms) <= {"lacoot", "ours"} else 1
    per_step = first * steps.get("plain", 0.0)
    per_step += sum(n * steps.get(arm, steps.get("plain", 0.0)) for arm, n in needs.items())
    per_epoch = per_step * -(-len(bench.train) // 128)
    bench.epochs = max(1, min(bench.epochs, int(SPARE * 60 * minutes / per_epoch)))
    return steps


def deviations(bench: Bench, source: str) -> list[str]:
    """List in words where a run departs from the published protocol."""
    found = [] if source == "published" else [f"images: {source}"]
    if bench.epochs != PROTOCOL:
        found.append(f"{bench.epochs} epochs instead of {PROTOCOL}")
    if bench.schedule == "cycle":
        found.append("one cycle of the rate, peak 0.1, instead of two steps down")
    if bench.width != 64:
        found.append(f"width {bench.width} instead of 64")
    if not bench.pool:
        found.append("no max-pool in the stem: the strong baseline")
    if bench.rounds < max(ROUNDS.values()):
        found.append(f"{bench.rounds} rounds of EGP and EASIER instead of {ROUNDS}")
    if bench.amp:
        found.append("bfloat16 autocast")
    return found


def prepare(given: argparse.Namespace, stem: str) -> tuple[Bench, str]:
    """Read the images and gather the settings."""
    device, train, test, source = torch.device(given.device), None, None, "noisy templates"
    if given.data is not None:
        train, test = load(given.data, "train"), load(given.data, "test")
        batches = any((given.data / f / "test_batch").exists() for f in ("", "cifar-10-batches-py"))
        source = "published" if batches else given.data.name if given.data.suffix else "JPEG copy"
    elif not given.smoke:
        raise SystemExit("give --data, the folder of the CIFAR-10 images, or --smoke.")
    train, test = train or noise(384, 0), test or noise(128, 1)
    if given.smoke:
        train, test = train.pick(torch.arange(0, len(train), max(1, len(train) // 384))[:384]), test
        test = test.pick(torch.arange(0, len(test), max(1, len(test) // 128))[:128])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(given.seed))
    held = min(5000, len(train) // 10)
    images = Images.of(train, device)
    bench = Bench(
        train=images.pick(order[held:]),
        held_out=images.pick(order[:held]),
        test=Images.of(test, device),
        pool=stem == "pool",
        width=8 if given.smoke else given.width,
        epochs=min(given.epochs, 2) if given.smoke else given.epochs,
        schedule=given.schedule or ("cycle" if given.smoke or given.minutes else "step"),
        rounds=1 if given.smoke else given.rounds,
        fraction=given.fraction,
        paired=given.paired,
        amp=device.type == "cuda" and not given.no_amp,
        compiled=given.compile,
        seed=given.seed,
    )
    return bench, source


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder or npz file of the CIFAR-10 images")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--stem", nargs="+", choices=["pool", "plain"], default=["pool"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10, help="per stem; 0: all epochs")
    parser.add_argument("--epochs", type=int, default=PROTOCOL, help="at most")
    parser.add_argument("--schedule", choices=["step", "cycle"], help="of the rate")
    parser.add_argument("--rounds", type=int, default=4, help="of EGP and EASIER")
    parser.add_argument("--fraction", type=float, default=0.3, help="of our penalty's gradient")
    parser.add_argument("--paired", type=float, default=0.0, help="factor of our paired term")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--no-amp", action="store_true", help="float32 on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass")
    parser.add_argument("--smoke", action="store_true", help="a tiny net and a few images")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(words)
    given.arms = given.arms.split(",")
    if unknown := set(given.arms) - set(ARMS):
        raise SystemExit(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}.")
    if given.smoke and given.out == OUT:
        given.out = OUT.with_name("lacoot_smoke.json")
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Run every arm that the file lacks, and write after each."""
    given = arguments(words)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.backends.cudnn.benchmark = True
    payload = read_json(given.out) or {"question": __doc__, "environments": {}, "rows": []}
    here = environment()
    key = hashlib.sha256(json.dumps(here).encode()).hexdigest()[:12]
    for stem in given.stem:
        todo = [arm for arm in given.arms if not _there(payload, arm, stem, given)]
        if not todo:
            continue
        bench, source = prepare(given, stem)
        timed = fit_(bench, todo, given.minutes) if given.minutes and not given.smoke else {}
        for arm in todo:
            start = bench.sync()
            row = {"arm": arm, "stem": stem, "width": given.width, "seed": given.seed}
            row |= {"smoke": given.smoke, "environment": key, "epochs": bench.epochs}
            row |= {"schedule": bench.schedule, "deviations": deviations(bench, source)}
            row |= {"step_seconds": timed, "train_images": len(bench.train)} | run(bench, arm)
            payload["rows"].append(row | {"seconds": bench.sync() - start})
            payload["environments"][key] = here
            write_json(given.out, payload)
            print(_line(row), flush=True)


def _there(payload: dict[str, Any], arm: str, stem: str, given: argparse.Namespace) -> bool:
    wanted = {"arm": arm, "stem": stem, "seed": given.seed, "smoke": given.smoke}
    wanted |= {"width": given.width}
    return any(all(row[k] == v for k, v in wanted.items()) for row in payload["rows"])


def _line(row: dict[str, Any]) -> str:
    points = " ".join(f"{p['test']:.2f}/{p['test_renormed']:.2f}" for p in row["curve"])
    return f"{row['arm']:7s} {row['train_seconds']:7.1f} s  {points}"


if __name__ == "__main__":
    main()
