"""CIFAR-10 for the benchmarks: He et al.'s small ResNets, the images, and how accuracy is read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = [
    "NETS",
    "BasicBlock",
    "Net",
    "ResNet",
    "Shortcut",
    "Split",
    "accuracy",
    "batches",
    "calibration",
    "draw",
    "finetune_",
    "judged",
    "load_net",
    "load_split",
    "validation",
]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CALIBRATION = 1024
VALIDATION = 5000


class Shortcut(nn.Module):
    """Subsample in space and pad channels with zeros: "option A", without parameters.

    Args:
        stride: 1, where it is the identity, or 2.
        pad: zero channels added on either side.
    """

    def __init__(self, stride: int, pad: int) -> None:
        super().__init__()
        self.stride, self.pad = stride, pad

    def forward(self, x: Tensor) -> Tensor:
        """Map N x C x H x W to N x (C + 2 pad) x H/stride x W/stride."""
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Args:
        cin: input channels.
        cout: output channels.
        stride: 1, or 2 where the resolution halves.
    """

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = Shortcut(stride, (cout - cin) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map N x cin x H x W to N x cout x H/stride x W/stride."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2, with 6n + 2 layers.

    Args:
        blocks: n, the number of blocks per stage.
        width: channels of the first stage; 16 in the paper.
        classes: number of outputs.
    """

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks=blocks)
        self.layer2 = _stage(width, 2 * width, blocks=blocks)
        self.layer3 = _stage(2 * width, 4 * width, blocks=blocks)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised N x 3 x 32 x 32 images to N x classes logits."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        logits: Tensor = self.linear(y.mean(dim=(2, 3)))
        return logits


def _stage(cin: int, cout: int, *, blocks: int) -> nn.Sequential:
    first = BasicBlock(cin, cout, stride=1 if cin == cout else 2)
    return nn.Sequential(first, *(BasicBlock(cout, cout, stride=1) for _ in range(blocks - 1)))


@dataclass(frozen=True)
class Net:
    """A trained network of the data folder.

    Args:
        blocks: blocks per stage.
        weights: file name.
        images: which images it was trained for, `original` or `jpeg`.
    """

    blocks: int
    weights: str
    images: str


NETS: dict[str, Net] = {
    "resnet20": Net(3, "resnet20-cifar10.safetensors", "original"),
    "resnet32": Net(5, "resnet32-cifar10.safetensors", "original"),
    "resnet20-jpeg": Net(3, "resnet20-cifar10jpeg.safetensors", "jpeg"),
}


def load_net(name: str, weights: Path) -> ResNet:
    """Load a trained network in evaluation mode.

    Args:
        name: a key of `NETS`.
        weights: folder of the safetensors files.

    Returns:
        the network, laid out channels last: several times faster on CPUs.
    """
    net = NETS[name]
    model = ResNet(net.blocks)
    state = load_file(weights / net.weights)
    missing, extra = model.load_state_dict(state, strict=False)
    # The published files lack batch-norm's step counters, which inference ignores.
    if extra or any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"{net.weights} does not fit: missing {missing}, unexpected {extra}.")
    model.eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in place
    return model


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8, N x 3 x H x W.
        labels: int64, N.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: Tensor) -> Split:
        """Take some of the images."""
        return Split(self.images[index], self.labels[index])

    def inputs(self) -> Tensor:
        """Scale to [0, 1], normalise per channel and lay out channels last, in float32."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        scaled = (self.images.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=4)
def load_split(data: Path, images: str, part: str) -> Split:
    """Read all images of one part.

    Args:
        data: the data folder.
        images: `original` or `jpeg`.
        part: `train` or `test`.

    Returns:
        uint8 images; kept in memory for the next call.
    """
    if images == "jpeg":
        return _read_zip(data / "cifar10-jpeg.zip", part)
    with np.load(data / "cifar10-original-subset.npz") as arrays:
        pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels).long())


def _read_zip(path: Path, part: str) -> Split:
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{part}/") and "." in n)
        classes = sorted({name.split("/")[1] for name in names})
        pixels = np.empty((len(names), 32, 32, 3), dtype=np.uint8)
        for row, name in enumerate(names):
            pixels[row] = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def draw(train: Split, seed: int, samples: int = CALIBRATION) -> tuple[Split, Split]:
    """Split training images into those a method may see and those to tune it on.

    The dense networks were trained on both, so accuracies on the second are too high; they
    rank methods that do not train, and no more than that. Never tune on test images.

    Args:
        train: all training images.
        seed: of the draw.
        samples: how many a method may see.

    Returns:
        calibration images and up to 5 000 validation images, disjoint.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.pick(order[:samples]), train.pick(order[samples : samples + VALIDATION])


def calibration(data: Path, images: str, seed: int) -> Split:
    """Draw the 1 024 training images that a method may see."""
    return draw(load_split(data, images, "train"), seed)[0]


def validation(data: Path, images: str, seed: int) -> Split:
    """Hold out up to 5 000 training images that `calibration` did not draw, for tuning."""
    return draw(load_split(data, images, "train"), seed)[1]


def batches(inputs: Tensor, size: int = 128) -> Sequence[Tensor]:
    """Cut inputs into batches, the last one shorter."""
    return list(inputs.split(size))


def accuracy(model: nn.Module, split: Split, *, size: int = 256) -> float:
    """Measure top-1 accuracy.

    Args:
        model: any classifier; evaluated in evaluation mode and left in it.
        split: labelled images.
        size: images per batch.

    Returns:
        percent.
    """
    return judged(model, split, size=size)[0]


@torch.inference_mode()
def judged(model: nn.Module, split: Split, *, size: int = 256) -> tuple[float, float]:
    """Measure top-1 accuracy and cross-entropy.

    Args:
        model: any classifier; evaluated in evaluation mode and left in it.
        split: labelled images.
        size: images per batch.

    Returns:
        percent, and nats per image.
    """
    model.eval()
    right, loss = 0, 0.0
    for start in range(0, len(split), size):
        part = split.pick(torch.arange(start, min(start + size, len(split))))
        logits = model(part.inputs())
        right += int((logits.argmax(dim=1) == part.labels).sum())
        loss += float(F.cross_entropy(logits.double(), part.labels, reduction="sum"))
    return 100.0 * right / len(split), loss / len(split)


def finetune_(model: nn.Module, train: Split, *, epochs: float, seed: int) -> None:
    """Train with labels: SGD with momentum, one cycle up to rate 0.03, crop and flip.

    Args:
        model: trained in place, left in evaluation mode.
        train: labelled images.
        epochs: passes over them.
        seed: of shuffling and augmentation.
    """
    size, generator = 128, torch.Generator().manual_seed(seed)
    steps = max(1, int(epochs * len(train) / size))
    sgd = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.03, total_steps=steps + 1)
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        index, order = order[:size], order[size:]
        part = _augment(train.pick(index), generator)
        loss = F.cross_entropy(model(part.inputs()), part.labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        cycle.step()
    model.eval()


def _augment(split: Split, generator: torch.Generator) -> Split:
    """Shift every image by up to four pixels and mirror half of them."""
    count, _, height, width = split.images.shape
    padded = F.pad(split.images, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return Split(moved.permute(0, 3, 1, 2), split.labels)
