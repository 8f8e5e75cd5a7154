"""What does CPOT leave of an image-to-image generator, with and without repair?

A small encoder-decoder with transposed convolutions and instance norms learns to clean noisy
handwritten digits, 16 x 16 pixels. Three of ten channels go everywhere, about half of the
multiplications; nothing is trained afterwards, and 256 noisy images without their clean ones are
all that a repair sees.

Expected: without repair every criterion loses most of what the net does beyond copying its input;
`coupling` brings back more than half of the lost decibels, and is the one repair that reaches
the transposed convolutions. CPOT is no better than FPGM by more than a decibel, nor worse.

    python benchmarks/generator.py            # under two minutes on one core
    python benchmarks/generator.py --smoke    # does it run? a few seconds, nothing is written

Writes `results/generator.json` and `results/generator.png`: images before and after.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks.common import environment, measured, write_json

OUT = Path(__file__).resolve().parent / "results"
TEST, CALIBRATION, NOISE = 397, 256, 0.35
STEPS, BATCH, RATE = 1200, 64, 3e-3
CRITERIA: dict[str, Any] = {
    "cpot": {"kind": "cpot"},
    "cpot, shapes alone": {"kind": "cpot", "normalise": "std"},
    "cpot, taps": {"kind": "cpot", "measure": "taps"},
    "cpot, activations": {"kind": "cpot", "measure": "activations"},
    "cpot, gaussian": {"kind": "cpot", "measure": "gaussian"},
    "fpgm": "fpgm",
    "magnitude": "magnitude",
    "transport": "transport",
}
REPAIRS = ("none", "least_squares", "coupling")


class Generator(nn.Module):
    """Strided down, transposed up, instance norms between."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, width, 3, 2, 1)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.down2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm2 = nn.InstanceNorm2d(2 * width, affine=True)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.norm3 = nn.InstanceNorm2d(2 * width, affine=True)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.norm4 = nn.InstanceNorm2d(width, affine=True)
        self.up2 = nn.ConvTranspose2d(width, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Clean images of shape samples x 1 x 16 x 16."""
        x = torch.relu(self.norm1(self.down1(x)))
        x = torch.relu(self.norm2(self.down2(x)))
        x = torch.relu(self.norm3(self.middle(x)))
        return torch.sigmoid(self.up2(torch.relu(self.norm4(self.up1(x)))))


def digits() -> tuple[Tensor, Tensor]:
    """Load clean and noisy digits, the same noise every time."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    clean = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(clean), generator=generator)
    clean = clean[order]
    return clean, clean + NOISE * torch.randn(clean.shape, generator=generator)


def trained(clean: Tensor, noisy: Tensor, steps: int) -> nn.Module:
    """Train the generator on all but the test images."""
    torch.manual_seed(0)
    model = Generator()
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        some = torch.randint(0, len(clean), (BATCH,))
        optimiser.zero_grad()
        F.mse_loss(model(noisy[some]), clean[some]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def decibels(images: Tensor, clean: Tensor) -> float:
    """Measure the signal-to-noise ratio of images in [0, 1]."""
    return float(-10 * (images.clamp(0, 1) - clean).square().mean().log10())


def pruned(model: nn.Module, seen: Tensor, criterion: Any, repair: str) -> tuple[nn.Module, Any]:
    """Keep seven of ten channels of every group."""
    small = copy.deepcopy(model)
    rule = otp.Channels(keep="70%", criterion=criterion, repair=repair)
    return small, otp.prune_(small, otp.Policy(rules=[rule]), list(seen.split(BATCH)), timing=0)


def row(name: str, repair: str, report: Any, quality: float, seconds: float) -> dict[str, Any]:
    """Write one measurement down."""
    accepted = [n for n in report.repairs if n.accepted]
    return {
        "criterion": name,
        "repair": repair,
        "psnr": round(quality, 3),
        "macs": round(report.macs.ratio, 4),
        "params": round(report.params.ratio, 4),
        "repaired": len(accepted),
        "left_alone": len(report.repairs) - len(accepted),
        "seconds": round(seconds, 2),
    }


def draw(path: Path, pictures: Mapping[str, Tensor], titles: Mapping[str, str]) -> None:
    """Put a few images per method below one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 0.92 * len(pictures)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, images) in zip(
        figure.subplots(len(pictures), 1), pictures.items(), strict=True
    ):
        strip = torch.cat(list(images[:10, 0].clamp(0, 1)), dim=1)
        axes.imshow(strip.numpy(), cmap="gray", vmin=0, vmax=1, aspect="equal")
        axes.set_ylabel(titles[name], rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)


@torch.no_grad()
def gallery(
    clean: Tensor, noisy: Tensor, models: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run some models on the first test images."""
    pictures = {"clean": clean, "noisy": noisy} | {n: m(noisy) for n, m in models.items()}
    titles = {n: n if n == "clean" else f"{n}\n{decibels(p, clean):.1f} dB"
              for n, p in pictures.items()}  # fmt: skip
    return pictures, titles


def main(words: Sequence[str] | None = None) -> None:
    """Train, prune by every criterion and repair, write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few steps, nothing written")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    clean, noisy = digits()
    with measured() as training:
        model = trained(clean[TEST:], noisy[TEST:], 20 if args.smoke else STEPS)
    seen, test = noisy[TEST : TEST + CALIBRATION], (clean[:TEST], noisy[:TEST])
    rows, shown = [], {"dense": model}
    chosen = dict(list(CRITERIA.items())[: 1 if args.smoke else None])
    for name, criterion in chosen.items():
        for repair in REPAIRS:
            with measured() as took:
                small, report = pruned(model, seen, criterion, repair)
            with torch.no_grad():
                quality = decibels(small(test[1]), test[0])
            rows.append(row(name, repair, report, quality, took.seconds))
            print(rows[-1])
            if name == "cpot":
                shown[f"pruned, {repair}"] = small
    if args.smoke:
        return
    with torch.no_grad():
        found = {"noisy": decibels(test[1], test[0]), "dense": decibels(model(test[1]), test[0])}
    payload = {
        "environment": environment(0),
        "training": {"steps": STEPS, "seconds": round(training.seconds, 1)},
        "psnr": {name: round(value, 3) for name, value in found.items()},
        "kept": "70% of every group's channels",
        "images": {"calibration": CALIBRATION, "test": TEST},
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "generator.json", payload)
    draw(args.out / "generator.png", *gallery(*test, shown))


if __name__ == "__main__":
    main()
