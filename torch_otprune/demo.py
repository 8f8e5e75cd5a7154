"""The whole path on real data: a residual network on handwritten digits, pruned and checked."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_otprune.errors import OTPruneError, VerificationError
from torch_otprune.pipeline import prune_
from torch_otprune.policy import Budget, Channels, Policy
from torch_otprune.report import Report
from torch_otprune.store import save

__all__ = ["DigitsNet", "Outcome", "Result", "digits_held", "digits_loader", "digits_net", "run"]

Progress = Callable[[str, int, int], None]
_TEST = 597  # of 1 797 images: never trained nor calibrated on
_EPOCHS, _QUICK, _BATCH, _RATE = 16, 3, 100, 1e-2
_GOOD = 0.97  # what the dense network should reach at least
_KEPT = "50%"
_YARDSTICKS = {
    "magnitude without repair": "none",
    "magnitude with batch-norms re-estimated": "norm",
}


def digits_net() -> nn.Module:
    """Build the demo's network, untrained: for `otprune ... torch_otprune.demo:digits_net`.

    Returns:
        a residual network for 8 x 8 grey images in ten classes.
    """
    return DigitsNet()


def digits_loader() -> list[Tensor]:
    """Load the training images without their labels.

    Returns:
        batches of shape 100 x 1 x 8 x 8, in [0, 1].
    """
    return list(_digits()[0].split(_BATCH))


def digits_held() -> list[Tensor]:
    """Load the images that nothing is trained or calibrated on, without their labels.

    Returns:
        batches of at most 100 x 1 x 8 x 8, in [0, 1].
    """
    return list(_digits()[2].split(_BATCH))


@dataclass(frozen=True)
class Result:
    """What one network reaches on the test images.

    Args:
        name: how it came about.
        accuracy: top-1, a fraction.
        macs: multiply-accumulates per image.
    """

    name: str
    accuracy: float
    macs: int

    @property
    def right(self) -> int:
        """Count the images answered right."""
        return round(self.accuracy * _TEST)


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Args:
        report: of the pruning.
        dense: the trained network.
        pruned: the same after our pruning.
        yardsticks: others pruned to the same budget.
        seconds: stage to seconds.
    """

    report: Report
    dense: Result
    pruned: Result
    yardsticks: tuple[Result, ...]
    seconds: dict[str, float]

    def rows(self) -> list[tuple[str, str, str]]:
        """List accuracies and costs.

        Returns:
            rows of network, test accuracy, MACs.
        """
        results = (self.dense, self.pruned, *self.yardsticks)
        return [(r.name, f"{r.accuracy:.1%}", f"{r.macs:,}") for r in results]

    def verdicts(self) -> tuple[str, ...]:
        """Say in plain sentences what the numbers mean.

        Returns:
            one sentence each.
        """
        lost = self.dense.right - self.pruned.right
        best = max(self.yardsticks, key=lambda result: result.accuracy)
        gain = self.pruned.right - best.right
        verdicts = [
            f"pruning {'costs' if lost >= 0 else 'gains'} {abs(lost)} of {_TEST} test images",
            f"it answers {abs(gain)} {'more' if gain >= 0 else 'fewer'} of them than {best.name}",
            "reloaded in a new process: logits equal bit for bit",
        ]
        if self.dense.accuracy < _GOOD:
            verdicts.append(f"the dense network is not well trained: below {_GOOD:.0%}")
        return tuple(verdicts)

    def to_json(self) -> str:
        """Write the accuracies, the verdicts and the costs; the report is in `report.json`.

        Returns:
            indented JSON.
        """
        content = {
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "yardsticks": [asdict(result) for result in self.yardsticks],
            "verdicts": (*self.verdicts(), *self.report.verdicts),
            "seconds": self.seconds,
        }
        return json.dumps(content, indent=2)


def run(out: Path, *, seed: int, quick: bool, progress: Progress) -> Outcome:
    """Train, prune, compare, save, and check the saved model in a new process.

    Args:
        out: directory for the report, `model/`, and what the command line needs to do it again.
        seed: fixes every random choice.
        quick: train less.
        progress: told the stage, the steps done and the steps in all.

    Returns:
        what was found.

    Raises:
        OTPruneError: if scikit-learn is missing, or the reloaded model computes anything else.
    """
    start = time.perf_counter()
    with _one_thread():
        model = train(seed, epochs=_QUICK if quick else _EPOCHS, progress=progress)
        trained, dense = time.perf_counter() - start, copy.deepcopy(model)
        policy = Policy(rules=[Channels()], budget=Budget(macs=_KEPT), seed=seed)
        report = prune_(model, policy, digits_loader(), progress=progress)
        yardsticks = [_yardstick(dense, policy, *row) for row in _YARDSTICKS.items()]
        progress("compare", 1, 1)
        _write(out, dense, model, report)
        progress("reload", 0, 1)
        _check_elsewhere(out / "model", logits_hash(model))
        progress("reload", 1, 1)
        seconds = {"train": trained, **report.seconds, "all": time.perf_counter() - start}
        return Outcome(
            report,
            Result("dense", accuracy(dense), report.macs.before),
            Result("pruned and repaired, not trained", accuracy(model), report.macs.after),
            tuple(yardsticks),
            {stage: round(spent, 2) for stage, spent in seconds.items()},
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work in one thread: sharing images this small costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _yardstick(dense: nn.Module, policy: Policy, name: str, repair: str) -> Result:
    """Prune to the same budget as most do: the smallest filters go."""
    model = copy.deepcopy(dense)
    rule = Channels(criterion="magnitude", repair=repair)
    found = prune_(model, policy.model_copy(update={"rules": (rule,)}), digits_loader())
    return Result(name, accuracy(model), found.macs.after)


def _write(out: Path, dense: nn.Module, model: nn.Module, report: Report) -> None:
    from safetensors.torch import save_file

    report.write(out)
    save(model, out / "model")
    (out / "policy.yaml").write_text(report.plan.policy.to_yaml(), encoding="utf-8")
    (out / "plan.json").write_text(report.plan.to_json() + "\n", encoding="utf-8")
    save_file(dense.state_dict(), out / "dense.safetensors")
    # safetensors makes files that only the owner can read
    shutil.copymode(out / "plan.json", out / "dense.safetensors")


def train(seed: int, *, epochs: int, progress: Progress) -> nn.Module:
    """Train the network on the digits, shifted by up to a pixel.

    Args:
        seed: of the first weights and the order.
        epochs: passes over the training images.
        progress: told the epochs done.

    Returns:
        the network in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images, labels, *_ = _digits()
        model, steps = digits_net(), epochs * len(images) // _BATCH
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for epoch in range(epochs):
            for batch in torch.randperm(len(images)).split(_BATCH):
                x = images[batch].roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3))
                loss = F.cross_entropy(model(x), labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress("train", epoch + 1, epochs)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Measure how many test images a network answers right.

    Args:
        model: the network, in evaluation mode.

    Returns:
        a fraction.
    """
    *_, images, labels = _digits()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def logits_hash(model: nn.Module) -> str:
    """Hash a network's logits on the test images: equal only if every bit is.

    Args:
        model: the network, in evaluation mode.

    Returns:
        64 hexadecimal digits.
    """
    with torch.no_grad():
        logits: Tensor = model(_digits()[2])
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


_CHILD = """
import sys, torch
from torch_otprune import demo, store
torch.set_num_threads(1)  # the order of a sum depends on it
sys.stdout.write(demo.logits_hash(store.load(sys.argv[1], factory=demo.digits_net)))
"""


def _check_elsewhere(directory: Path, wanted: str) -> None:
    """Load a saved model in a new process, and compare its logits there by their hash."""
    home = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _CHILD, str(directory)]
    place = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    if done.stdout != wanted:
        said = done.stderr.strip().splitlines()[-1:] or ["other logits than here"]
        raise VerificationError(
            f"the saved model is not the same in a new process: {said[0].rstrip('.')}.",
            where=str(directory),
            fix="report this with the library versions in model/plan.json.",
        )


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load the images that come with scikit-learn, and split them the same way every time."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise OTPruneError(
            "the demo's images come with scikit-learn, which is not installed.",
            where="torch_otprune.demo",
            fix="install it with `pip install 'torch-otprune[demo]'`.",
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[_TEST:], order[:_TEST]
    return images[train], labels[train], images[test], labels[test]


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where widths differ."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            wide = nn.Conv2d(into, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(wide, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A stem, three residual blocks at 8, 4 and 2 pixels, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.layer1 = _Block(24, 24, 1)
        self.layer2 = _Block(24, 48, 2)
        self.layer3 = _Block(48, 96, 2)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        features = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
