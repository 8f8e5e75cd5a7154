"""How do time and memory grow with depth, and what does calibration cost beside a plain forward?

Expected: seconds and peak memory linear in the number of blocks; calibration at most twice a
plain forward pass over the same batches; plan plus apply of ResNet-20 under 30 s, of a net the
size of ResNet-50 under 180 s, on two cores.

    python benchmarks/scaling.py --data DATA
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cifar
from benchmarks.common import Panel, environment, markdown, measured, save_picture, write_json

OUT = Path(__file__).resolve().parent / "results" / "scaling.json"


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut, as in He et al. 2016."""

    def __init__(self, into: int, inner: int, stride: int) -> None:
        super().__init__()
        out = 4 * inner
        self.conv1, self.bn1 = nn.Conv2d(into, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or into != out:
            down = nn.Conv2d(into, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    """Build a net of ResNet-50's size with random weights, for 224 x 224 images."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    stem += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks, into = [], 64
    for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            blocks.append(Bottleneck(into, inner, stride if i == 0 else 1))
            into = 4 * inner
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000)]
    return nn.Sequential(*stem, *blocks, *head)


class Plain(nn.Module):
    """A residual stream of one width with any number of two-layer blocks."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Run the stream."""
        x = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(first(x).relu())
        return self.head(x.mean((2, 3)))


def measure(name: str, model: nn.Module, batches: Sequence[Tensor], budget: str) -> dict[str, Any]:
    """Time every stage of one pruning."""
    import torch_otprune as otp

    model.eval()
    policy = otp.Policy(
        rules=otp.Channels(),
        budget=otp.Budget(macs=budget),
        calibration=otp.Calibration(samples=sum(map(len, batches)), probe=min(64, len(batches[0]))),
    )
    stages: dict[str, float] = {}
    with measured() as took:
        with torch.no_grad():
            start = time.perf_counter()
            for batch in batches:
                model(batch)
            stages["forward"] = time.perf_counter() - start
        start = time.perf_counter()
        with otp.attach(model, policy, example=batches[0][:2]) as attached:
            stages["trace"] = time.perf_counter() - start
            start = time.perf_counter()
            otp.observe(attached, batches)
            stages["calibrate"] = time.perf_counter() - start
            start = time.perf_counter()
            plan = attached.plan()
            stages["plan"] = time.perf_counter() - start
        start = time.perf_counter()
        report = otp.apply_(model, plan, batches)
        stages["apply"] = time.perf_counter() - start
    row = {
        "net": name,
        "params": plan.params.before,
        "groups": len(attached.graph.groups) if attached.graph else 0,
    }
    row |= {"statistics_mib": attached.bytes / 2**20, "extra_mib": took.extra_mib}
    row |= {f"{stage}_s": round(value, 3) for stage, value in stages.items()}
    row["calibrate_over_forward"] = round(stages["calibrate"] / stages["forward"], 3)
    row["macs_kept"] = report.macs.ratio
    print(row, flush=True)
    return row


def main(words: Sequence[str] | None = None) -> None:
    """Measure, then write JSON and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the CIFAR images and weights")
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    images = torch.randn(128, 3, 16, 16)
    growth = [measure(f"plain-{n}", Plain(n), images.split(64), "50%") for n in given.blocks]
    rows = list(growth)
    if given.data is not None:
        inputs = cifar.calibration(given.data, "original", 0).inputs()
        net = cifar.load_net("resnet20", given.data)
        rows.append(measure("resnet20", net, cifar.batches(inputs), "50%"))
    rows.append(
        measure("resnet50-sized", resnet50(), torch.randn(64, 3, 224, 224).split(16), "50%")
    )
    write_json(given.out, {"question": __doc__, "environment": environment(0), "rows": rows})
    given.out.with_suffix(".md").write_text(table(rows) + "\n")
    draw(growth, given.out.with_suffix(".png"))


COLUMNS = {
    "net": "net",
    "groups": "groups",
    "forward_s": "plain forward, s",
    "trace_s": "trace, s",
    "calibrate_s": "calibrate, s",
    "calibrate_over_forward": "calibrate / forward",
    "plan_s": "plan, s",
    "apply_s": "apply, s",
    "statistics_mib": "statistics, MiB",
    "extra_mib": "extra memory, MiB",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows in markdown."""
    cells = [[_cell(row[key]) for key in COLUMNS] for row in rows]
    return markdown(list(COLUMNS.values()), cells)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot seconds and memory against the number of blocks."""
    blocks = [int(row["net"].split("-")[1]) for row in rows]
    stages = ("trace_s", "calibrate_s", "plan_s", "apply_s")
    times = {
        s[:-2]: [(b, row[s], 0.0) for b, row in zip(blocks, rows, strict=True)] for s in stages
    }
    memory = {"extra": [(b, row["extra_mib"], 0.0) for b, row in zip(blocks, rows, strict=True)]}
    save_picture(path, [Panel("seconds", times), Panel("MiB", memory)], x="blocks", y="")


if __name__ == "__main__":
    main()
