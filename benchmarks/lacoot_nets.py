"""What `lacoot.py` trains: CIFAR's ResNet-18, and the images on the device they are used on."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.cifar import MEAN, STD, Split

__all__ = ["BLOCKS", "SITES", "Images", "ResNet18", "load", "noise"]

# The blocks with an identity shortcut that LaCoOT's code pulls on and removes.
BLOCKS = tuple(f"layer{stage}.1" for stage in range(1, 5))
_PAIRS = [
    (f"layer{s}.{b}.relu{i}", f"layer{s}.{b}.conv{i}")
    for s in range(1, 5)
    for b in range(2)
    for i in (1, 2)
]
SITES: dict[str, str] = {"relu": "conv1", **dict(_PAIRS)}  # as EGP's code pairs them


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, every activation a module of its own."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            down = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.shortcut = nn.Sequential(down, nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images.

    Args:
        pool: whether the stem ends with a max-pool: 140.19 MMACs as in the published table;
            without it 556, about 95 % on CIFAR-10.
        width: channels of the first stage; 64 in the paper.
    """

    def __init__(self, *, pool: bool = True, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.pool: nn.Module = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(Block(cin, 2 * cin, 2), Block(2 * cin, 2 * cin, 1))
            for cin in (width, 2 * width, 4 * width)
        )
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised N x 3 x 32 x 32 images to N x 10 logits."""
        y = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


@lru_cache(maxsize=4)
def load(data: Path, part: str) -> Split:
    """Read CIFAR-10 in whatever form it lies there.

    Args:
        data: a folder with `cifar10-jpeg.zip`, `cifar-10-batches-py`, or the batches themselves;
            or one npz file with `train_images` (uint8, N x 3 x 32 x 32), `train_labels`, ....
        part: `train` or `test`.

    Returns:
        uint8 images and labels.
    """
    if data.suffix == ".npz":
        with np.load(data) as arrays:
            pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        return Split(torch.from_numpy(pixels), torch.from_numpy(labels).long())
    folder = next(
        (f for f in (data / "cifar-10-batches-py", data) if (f / "test_batch").exists()), None
    )
    if folder is None:
        return cifar.load_split(data.parent if data.suffix == ".zip" else data, "jpeg", part)
    names = [f"data_batch_{i}" for i in range(1, 6)] if part == "train" else ["test_batch"]
    # The published files are pickles: read only what you trust.
    files = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
    pixels = np.concatenate([f[b"data"] for f in files]).reshape(-1, 3, 32, 32)
    labels = torch.tensor([label for f in files for label in f[b"labels"]])
    return Split(torch.from_numpy(pixels), labels)


def noise(count: int, seed: int) -> Split:
    """Make images that can be learnt without any data: a noisy template per class."""
    generator = torch.Generator().manual_seed(0)
    templates = torch.randint(0, 256, (10, 3, 4, 4), generator=generator).float()
    generator.manual_seed(seed + 1)
    labels = torch.randint(0, 10, (count,), generator=generator)
    smooth = F.interpolate(templates, size=32)[labels]
    grain = 60 * torch.randn(count, 3, 32, 32, generator=generator)
    return Split((smooth + grain).clamp(0, 255).to(torch.uint8), labels)


@dataclass(frozen=True)
class Images:
    """Labelled images on their device, padded once so that a crop is one gather.

    Args:
        padded: uint8, N x 3 x 40 x 40.
        labels: int64, N.
    """

    padded: Tensor
    labels: Tensor

    @staticmethod
    def of(split: Split, device: torch.device) -> Images:
        """Move a split to a device."""
        images = split.images.to(device)
        return Images(F.pad(images, (4, 4, 4, 4)), split.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: Tensor) -> Images:
        """Take some of the images."""
        index = index.to(self.labels.device)
        return Images(self.padded[index], self.labels[index])

    def plain(self, index: Tensor) -> Tensor:
        """Return images as they are, normalised, channels last."""
        return self._normalised(self.padded[index, :, 4:36, 4:36].permute(0, 2, 3, 1))

    def augmented(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Shift every image by up to four pixels and mirror half of them."""
        device, count = self.padded.device, len(index)
        down, right = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
        line = torch.arange(32, device=device)
        rows, columns = down + line, right + line
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        pixels = self.padded.permute(0, 2, 3, 1)
        return self._normalised(pixels[index[:, None, None], rows[:, :, None], columns[:, None]])

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device) for v in (MEAN, STD))
        scaled = (pixels.float() / 255 - mean) / std
        return scaled.permute(0, 3, 1, 2)  # N x 3 x H x W, laid out channels last
