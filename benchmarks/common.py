"""What every benchmark here shares: the environment, the clock, counters, tables and pictures."""

from __future__ import annotations

import datetime
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Measured",
    "Panel",
    "count_macs",
    "count_params",
    "environment",
    "in_a_child",
    "macs_by_module",
    "markdown",
    "measured",
    "read_json",
    "save_picture",
    "write_json",
]

PACKAGES = ("torch-otprune", "torch", "torch-pruning", "numpy", "scipy", "pydantic", "safetensors")
MIB = 1024.0**2
COLOURS = 10


@dataclass
class Measured:
    """What one measured block took; filled in when the block ends.

    Args:
        seconds: wall-clock time.
        peak_mib: highest resident memory of the process during the block, in MiB.
        extra_mib: the same minus what was resident when the block began.
    """

    seconds: float = 0.0
    peak_mib: float = 0.0
    extra_mib: float = 0.0


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure time and peak resident memory of a `with` block.

    Yields:
        the record, filled in at the end of the block.
    """
    result, before = Measured(), _reset_peak()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - start
        result.peak_mib = _peak()
        result.extra_mib = max(0.0, result.peak_mib - before)


def in_a_child(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """Do one piece of work in a process of its own.

    Args:
        work: gives one row; its prints and warnings are lost.
        limit: seconds of processor time after which it is stopped, so that other work on the
            machine does not count; one that waits is stopped after ten times as long.

    Returns:
        its row with the `seconds` of processor time that it took; an empty one where the process
        died, None where it was stopped.
    """
    fork = multiprocessing.get_context("fork")  # what is imported need not be imported again
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(work, sender, limit))
    process.start()
    sender.close()
    found: dict[str, Any] | None = None
    if receiver.poll(10 * limit):
        try:
            found = receiver.recv()
        except EOFError:
            process.join()
            found = None if process.exitcode == -signal.SIGXCPU else {}
    process.kill()
    process.join()
    return found


def _child(work: Callable[[], dict[str, Any]], pipe: Any, limit: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seconds = math.ceil(time.process_time() + limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    start = time.process_time()
    with redirect_stdout(io.StringIO()):
        row = work()
    pipe.send(row | {"seconds": round(time.process_time() - start, 2)})


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


def _reset_peak() -> float:
    """Start a new high-water mark where the kernel allows it; return resident MiB."""
    # Not Linux, or not allowed: the mark then covers the whole process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak()


def _peak() -> float:
    high = _status("VmHWM")
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1.0 if platform.system() == "Darwin" else 1024.0
    return high or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def environment(seed: int | None = None) -> dict[str, Any]:
    """Record what a figure depends on; no paths, no host names.

    Args:
        seed: the one used, where the rows do not say it themselves.

    Returns:
        plain JSON values.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: _version(name) for name in PACKAGES},
    } | ({} if seed is None else {"seed": seed})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write JSON so that an interrupted run leaves the old file, never half a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(json.dumps(payload, indent=1) + "\n")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; an absent file reads as empty."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Count the multiply-accumulates of every convolution and linear layer.

    Args:
        model: any module; it is run once, in evaluation mode, and left as it was.
        example: one input; the count is per example, so its batch must be 1.

    Returns:
        MACs by module path. Biases, norms, activations and additions count nothing.
    """
    found: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(_Counter(name, found))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


@dataclass
class _Counter:
    name: str
    found: dict[str, int]

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        # Each output element costs one MAC per weight of its own filter.
        self.found[self.name] = self.found.get(self.name, 0) + output.numel() * weight[0].numel()


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Sum `macs_by_module`: the one counter that all methods are measured with."""
    return sum(macs_by_module(model, example).values())


def count_params(model: nn.Module) -> int:
    """Count parameters, without buffers."""
    return sum(p.numel() for p in model.parameters())


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table in markdown.

    Args:
        header: column names.
        rows: one cell per column; written with `str`.

    Returns:
        lines without a trailing newline.
    """
    lines = [tuple(header), tuple("---" for _ in header), *(tuple(map(str, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


CROWD = 6  # series whose legend still fits into a chart


@dataclass(frozen=True)
class Panel:
    """One chart of a picture.

    Args:
        title: above the chart.
        series: points (x, mean, standard deviation) by label.
        level: a dashed horizontal line, such as the dense accuracy.
        levelled: its name.
    """

    title: str
    series: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)
    level: float | None = None
    levelled: str = "dense"


def save_picture(path: Path, panels: Sequence[Panel], *, x: str, y: str) -> None:
    """Draw one chart per panel, side by side, with error bars.

    Args:
        path: where to; the ending decides the format.
        panels: at least one.
        x: name of the horizontal axis.
        y: name of the vertical axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    crowded = len(names) > CROWD
    size = (5 * len(panels), 5.2 if crowded else 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    drawn: dict[str, Any] = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        for label, points in panel.series.items():
            xs, means, spread = zip(*sorted(points), strict=True)
            number = names.index(label)  # one method looks the same in all charts
            mark = "o-" if number < COLOURS else "s--"  # no two series look alike
            drawn[label] = axis.errorbar(
                xs, means, yerr=spread, fmt=mark, color=f"C{number % COLOURS}", capsize=3
            )
        if panel.level is not None:
            drawn[panel.levelled] = axis.axhline(panel.level, linestyle="--", color="gray")
        axis.set(title=panel.title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if not crowded:
            own = [name for name in drawn if name in (*panel.series, panel.levelled)]
            axis.legend([drawn[name] for name in own], own, fontsize=7)
    if crowded:
        columns = 3 * len(panels)
        figure.legend(drawn.values(), drawn, fontsize=7, loc="lower center", ncols=columns)
        rows = -(-len(drawn) // columns)
    figure.tight_layout(rect=(0, 0.03 + 0.035 * rows if crowded else 0, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
