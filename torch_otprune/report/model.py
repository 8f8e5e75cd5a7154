"""The report: what a pruning did, measured, frozen, and the way back."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, computed_field, model_validator
from torch import nn

from torch_otprune.errors import OTPruneError
from torch_otprune.plan.model import Cost, Plan
from torch_otprune.repair.zeros import LayerZeros, OutputBound
from torch_otprune.report.images import Images
from torch_otprune.report.trainability import Trainability
from torch_otprune.surgery.rebind import Optimizes, Rebound

__all__ = [
    "Agreement",
    "Interval",
    "Latency",
    "LayerError",
    "OutputError",
    "RepairNote",
    "Report",
    "environment",
]

_DERIVED = ("plan_hash", "verdicts")  # written for readers, recomputed when read
_UNDONE = (
    "this pruning was already undone: the model is dense again.",
    "call undo_ once; prune again with otp.apply_(model, report.plan, data).",
)
_READ = (
    "this report was read from a file: it holds no dense tensors to go back to.",
    "call undo_ on the report that apply_ or prune_ returned, in the same process.",
)
_ELSEWHERE = (
    "this report was undone, or read from a file: it knows no pruned model.",
    "call rebind_ on the report that apply_ or prune_ returned, in the same process.",
)


class Follows(Protocol):
    """What carries optimisers and averaged copies over a pruning, and back."""

    def __call__(self, optimizers: Sequence[Optimizes], copies: Sequence[nn.Module]) -> Rebound:
        """Do it, all or nothing."""

    def release_(self) -> None:
        """Bring them back."""


@runtime_checkable
class Lasting(Protocol):
    """A way back that can be written to disk."""

    def __call__(self) -> None:
        """Go back."""

    def save(self, directory: str | Path, *, shard: str | int) -> Path:
        """Write it."""


class _Frozen(BaseModel):
    # JSON has no infinity, and an exploded layer error is one.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Interval(_Frozen):
    """A median and the 95 % bootstrap interval around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Print as `1.02 [0.97, 1.06]`."""
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Latency(_Frozen):
    """Time per batch of both nets, measured in turns."""

    before: Interval = Field(description="dense, milliseconds per batch")
    after: Interval = Field(description="pruned, milliseconds per batch")
    speedup: Interval = Field(description="dense time over pruned time, pair by pair")
    pairs: int = Field(gt=0, description="how many pairs were timed")
    samples: int = Field(gt=0, description="samples in the batch")


class LayerError(_Frozen):
    """How far one layer's output is from the dense net's, relative to the dense output."""

    path: str
    before_repair: float = Field(ge=0)
    after_repair: float = Field(ge=0)


class OutputError(_Frozen):
    """How far the model's output is from the dense net's, relative to the dense output."""

    before_repair: float = Field(ge=0)
    after_repair: float = Field(ge=0)


class Agreement(_Frozen):
    """How often, or how closely, the pruned net says what the dense one said."""

    kind: Literal["top1", "cosine"]
    value: float = Field(description="top-1 agreement in [0, 1], or mean cosine in [-1, 1]")
    chance: float = Field(description="what two unrelated nets with these answers would reach")
    samples: int = Field(ge=0)

    @property
    def above_chance(self) -> float:
        """Rescale so that chance is 0 and full agreement 1 (Cohen's kappa)."""
        if self.chance >= 1:
            return 1.0 if self.value >= 1 else 0.0
        return (self.value - self.chance) / (1 - self.chance)

    def __str__(self) -> str:
        """Print the value in the words of its kind."""
        if self.kind == "top1":
            return f"{self.value:.1%} top-1 agreement"
        return f"cosine {self.value:.3f}"


class RepairNote(_Frozen):
    """One repair: where, what it did to the calibration error, and whether it was kept."""

    kind: str
    site: str = Field(description="module path")
    before: float | None = Field(description="relative squared error; None where unmeasured")
    after: float | None = Field(description="the same afterwards")
    accepted: bool
    note: str = ""


class Report(_Frozen):
    """What a pruning did, measured; JSON in and out loses nothing but the way back.

    Limits: `undo_` works in the process that pruned, and only once.
    """

    version: Literal[1] = 1
    plan: Plan
    params: Cost
    macs: Cost
    latency: Latency | None = None
    layers: tuple[LayerError, ...] = ()
    output_error: OutputError
    agreement: Agreement
    repairs: tuple[RepairNote, ...] = ()
    images: Images | None = Field(
        default=None, description="a few outputs before and after, where they look like images"
    )
    seconds: dict[str, float] = Field(default_factory=dict, description="stage to seconds")
    environment: dict[str, str] = Field(default_factory=dict)
    zeros: tuple[LayerZeros, ...] = Field(
        default=(), description="layers in which single weights are zero, in order of execution"
    )
    bound: OutputBound | None = Field(
        default=None, description="how far zeros can move the output; null without zeros"
    )
    trainability: Trainability | None = Field(
        default=None, description="tangent kernels compared; None where nobody asked"
    )

    _undo: Callable[[], None] | None = PrivateAttr(default=None)
    _undone: bool = PrivateAttr(default=False)
    _follows: Follows | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _without_derived(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if key not in _DERIVED}
        return data

    @computed_field  # type: ignore[prop-decorator]
    @property
    def plan_hash(self) -> str:
        """Hash of the plan that was carried out."""
        return self.plan.hash

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdicts(self) -> tuple[str, ...]:
        """Say in plain sentences what the numbers mean."""
        from torch_otprune.report.verdicts import judge

        return judge(self)

    def bind_undo_(self, undo: Callable[[], None], follows: Follows | None = None) -> Report:
        """Hand over the way back.

        Args:
            undo: restores the dense model; called at most once.
            follows: what `rebind_` calls.

        Returns:
            this report.
        """
        self._undo, self._undone, self._follows = undo, False, follows
        return self

    def with_trainability(self, found: Trainability) -> Report:
        """Add what `otp.trainability` found about the dense and the pruned network.

        Args:
            found: the comparison.

        Returns:
            a copy of this report that prints, writes and saves it, and goes back the same way.
        """
        return self.model_copy(update={"trainability": found})

    def rebind_(self, *optimizers: Optimizes, ema: nn.Module | Iterable[nn.Module] = ()) -> Rebound:
        """Let optimisers go on with the pruned model, all or nothing.

        Parameters that live on are the same objects as before. State of their shape, and factors
        of it, are cut as they were; what cannot be cut starts anew. What is gone leaves its
        group, what is new joins the group of what stood in its place. Groups, and with them
        schedulers and scalers, stay the same objects. A second call changes nothing.

        `undo_` brings back the groups and the state that was cut or left; other state and all
        options stay as they are then.

        Args:
            *optimizers: those that train the model, or wrappers of them.
            ema: averaged copies of the dense model. They are pruned as well, and their average
                starts again from the pruned model's values.

        Returns:
            what was done.

        Raises:
            OTPruneError: if an optimiser or a copy is of another model, the model was pruned
                again since, or the report was undone or read from a file.
        """
        if self._follows is None:
            problem, fix = _ELSEWHERE
            raise OTPruneError(problem, where="Report.rebind_", fix=fix)
        return self._follows(optimizers, (ema,) if isinstance(ema, nn.Module) else tuple(ema))

    def undo_(self) -> None:
        """Turn the pruned model back into the dense one, bit for bit.

        Raises:
            OTPruneError: if it was undone before, or the report was read from a file.
        """
        if self._undo is None:
            problem, fix = _UNDONE if self._undone else _READ
            raise OTPruneError(problem, where="Report.undo_", fix=fix)
        self._undo()  # kept if it fails, so that the caller can try again
        if self._follows is not None:
            self._follows.release_()
        self._undo, self._undone, self._follows = None, True, None

    def save_undo(self, directory: str | Path, *, shard: str | int = "1GB") -> Path:
        """Write the dense model to disk, so that `otp.undo_` brings it back in another process.

        Call it before the model is pruned again, and before `undo_`.

        Args:
            directory: new, empty, or an earlier one of its kind, which is replaced.
            shard: size above which the tensors are split into several files: bytes, or such as
                "1GB".

        Returns:
            the directory: safetensors and JSON, about as large as the dense model.

        Raises:
            OTPruneError: if the report was undone or read from a file, the model was pruned
                again since, or the directory is someone else's or cannot be written.
        """
        if not isinstance(self._undo, Lasting):
            problem, fix = _UNDONE if self._undone else _READ
            fix = fix.replace("call undo_ once", "call save_undo before undo_")
            fix = fix.replace("call undo_ on", "call save_undo on")
            raise OTPruneError(problem, where="Report.save_undo", fix=fix)
        return self._undo.save(directory, shard=shard)

    def __eq__(self, other: object) -> bool:
        """Compare what was measured: a report that can undo equals its copy on disk."""
        return isinstance(other, Report) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.plan_hash)

    def to_json(self) -> str:
        """Write everything but the way back.

        Returns:
            indented JSON.
        """
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            an equal report that cannot be undone.

        Raises:
            OTPruneError: if the text is no report.
        """
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            raise OTPruneError(
                f"this is no report: {str(error).splitlines()[0]}.",
                where="Report.from_json",
                fix="pass the text that Report.to_json wrote, with the same library version.",
            ) from error

    def __str__(self) -> str:
        """Print the verdicts, the totals and the layers that suffered most."""
        from torch_otprune.report.table import render

        return render(self)

    def write(self, directory: str | Path) -> Path:
        """Write `report.json`, `report.html` and the pictures.

        Args:
            directory: made if it does not exist; other files in it are left alone.

        Returns:
            the path of `report.html`, one page that needs nothing else.
        """
        from torch_otprune.report.page import write

        return write(self, Path(directory))


def environment() -> dict[str, str]:
    """Describe where numbers were measured.

    Returns:
        versions, processor, threads.
    """
    # a CPU run must not wake the GPU
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "accelerator": accelerator,
    }
