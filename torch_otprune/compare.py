"""Which of several policies keeps a network's outputs best, on data that none of them saw."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, OTPruneError, PolicyError
from torch_otprune.pipeline import Data, prune_
from torch_otprune.plan import Cost
from torch_otprune.policy import Policy
from torch_otprune.report import sample_errors, tabulated
from torch_otprune.statistics import collect, rebatched
from torch_otprune.statistics.reduce import all_sum_, share
from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.surgery import copied
from torch_otprune.verify import Progress, quiet

__all__ = ["Comparison", "Standing", "compare"]

_LEVEL = 2.0  # standard errors within which two policies are not told apart


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Standing(_Frozen):
    """What one policy came to."""

    name: str
    output_error: float = Field(description="RMS of the change over RMS of the dense output")
    behind: float = Field(
        description="how much larger its squared error is than that of the best, in standard "
        "errors of the difference, sample by sample"
    )
    params: Cost
    macs: Cost
    seconds: float = Field(description="to calibrate, decide, cut, repair and verify")

    @property
    def level(self) -> bool:
        """Say whether these samples do not tell it from the best."""
        return self.behind <= _LEVEL


class Comparison(_Frozen):
    """What several policies came to, the least output error first."""

    standings: tuple[Standing, ...]
    failed: Mapping[str, str] = Field(
        default_factory=dict, description="policy to the reason why it could not be carried out"
    )
    samples: int = Field(description="on which all were judged")

    @property
    def best(self) -> str:
        """Name the policy whose network is nearest to the dense one."""
        return self.standings[0].name

    @property
    def front(self) -> tuple[str, ...]:
        """Name the policies that no other beats in MACs and output error at once."""
        found: list[Standing] = []
        for one in self.standings:  # by error, so a later one must cost less
            if not found or one.macs.after < found[-1].macs.after:
                found.append(one)
        return tuple(one.name for one in found)

    def __str__(self) -> str:
        rows = [
            (
                one.name + (" *" if one.name in self.front else ""),
                f"{one.output_error:.4f}",
                "level" if one.level else f"{one.behind:.1f} se",
                f"{one.params.after / max(one.params.before, 1):.1%}",
                f"{one.macs.after / max(one.macs.before, 1):.1%}",
                f"{one.seconds:.1f}",
            )
            for one in self.standings
        ]
        head = ("policy", "output error", "behind", "parameters", "MACs", "s")
        lines = [
            tabulated(head, rows),
            f"* no other has less of both; {self.samples} samples judge",
        ]
        lines += [f"{name} failed: {reason}" for name, reason in self.failed.items()]
        return "\n".join(lines)


def compare(
    model: nn.Module,
    policies: Mapping[str, Policy],
    data: Data,
    *,
    held: Data,
    progress: Progress = quiet,
) -> Comparison:
    """Carry out every policy on a copy, and see whose output is nearest on data it did not see.

    Which criterion is best, and where to cut, depends on the network: this measures it, without
    labels. Each policy costs as much as `prune_` with it; then prune with `policies[found.best]`.

    Args:
        model: the dense model; left as it was.
        policies: name to declaration; to be comparable, with one budget.
        data: calibration batches, as for `prune_`.
        held: batches that `data` does not hold; what repairs were fitted on would flatter them.
        progress: told the policy's name, how many are done and how many there are.

    Returns:
        all policies, the nearest first, with those that could not be carried out and why.

    Raises:
        OTPruneError: if no policy can be carried out; as the only one raises.

    Limits: a small output error is not accuracy; where labels are there, look at those as well.
    The best of many looks better than it is: those `level` with it are as good a choice.
    """
    _check(policies)
    samples = share(max(policy.calibration.samples for policy in policies.values()))
    batches, judges = collect(model, data, samples), _held(model, held, samples)
    found, failed = list[_Tried](), dict[str, OTPruneError]()
    for done, (name, policy) in enumerate(policies.items()):
        progress(name, done, len(policies))
        try:
            found.append(_tried(model, name, policy, batches, judges))
        except OTPruneError as error:
            failed[name] = error
    if not found:
        first: OTPruneError = next(iter(failed.values()))
        raise first
    found.sort(key=lambda one: one.error)
    return Comparison(
        standings=tuple(_standing(one, found[0]) for one in found),
        failed={name: str(error) for name, error in failed.items()},
        samples=int(_summed(torch.ones(sum(map(batch_size, judges))))[0]),
    )


def _check(policies: Mapping[str, Policy]) -> None:
    if not isinstance(policies, Mapping) or not all(
        isinstance(name, str) and isinstance(policy, Policy) for name, policy in policies.items()
    ):
        raise PolicyError(
            "names with a Policy each are expected.",
            where="policies",
            fix='write {"default": otp.Policy(...), "other": otp.Policy(...)}.',
        )
    if not policies:
        raise PolicyError("there is nothing to compare.", where="policies", fix="name one or more.")


def _held(model: nn.Module, held: Data, samples: int) -> list[Any]:
    try:
        return rebatched(collect(model, held, samples))
    except CalibrationError as error:
        raise CalibrationError(error.problem, where=f"held: {error.where}", fix=error.fix) from None


@dataclass(frozen=True)
class _Tried:
    """A policy that was carried out, with the squared errors it left, of this rank's samples."""

    name: str
    changes: Float[Tensor, " samples"]
    error: float
    params: Cost
    macs: Cost
    seconds: float


def _tried(
    model: nn.Module, name: str, policy: Policy, batches: Sequence[Any], judges: Sequence[Any]
) -> _Tried:
    small, start = copied(model), time.perf_counter()
    report = prune_(small, policy, batches, timing=0)
    seconds = time.perf_counter() - start
    pairs = [_judged(model, small, batch) for batch in judges]
    changes, sizes = (torch.cat(each) for each in zip(*pairs, strict=True))
    change, size = _summed(changes, sizes)
    error = (change / size) ** 0.5 if size else math.inf if change else 0.0
    return _Tried(name, changes, error, report.params, report.macs, seconds)


@torch.no_grad()
def _judged(dense: nn.Module, small: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    with evaluating(dense), evaluating(small):
        return sample_errors(run(dense, batch), run(small, batch), samples=batch_size(batch))


def _standing(one: _Tried, best: _Tried) -> Standing:
    gaps = one.changes - best.changes
    total, squares, count = _summed(gaps, gaps.square(), torch.ones_like(gaps))
    # of a sum of `count` independent gaps
    spread = max(squares - total**2 / count, 0.0) ** 0.5
    behind = 0.0 if one is best or not total else total / spread if spread else math.inf
    return Standing(
        name=one.name,
        output_error=one.error,
        behind=math.inf if math.isnan(behind) else behind,
        params=one.params,
        macs=one.macs,
        seconds=one.seconds,
    )


def _summed(*tables: Tensor) -> list[float]:
    """Add up every table over samples and ranks."""
    totals = [table.sum() for table in tables]
    all_sum_(totals)
    return [float(total) for total in totals]
