"""What the numbers of a report mean, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch_otprune.report.sparsity import zero_verdicts
from torch_otprune.report.words import error, kept

if TYPE_CHECKING:
    from torch_otprune.plan.model import Cost
    from torch_otprune.report.model import Report

__all__ = ["judge"]

_COLLAPSED_ERROR = 0.9  # silence would be 1
_COLLAPSED_AGREEMENT = 0.1  # of the way from chance to full agreement


def judge(report: Report) -> tuple[str, ...]:
    """Draw every conclusion the numbers allow, the output first.

    Args:
        report: what was measured.

    Returns:
        one sentence each, without a full stop.
    """
    topics = (_output, _speed, zero_verdicts, _budget, _promise, _repairs)
    return tuple(sentence for topic in topics for sentence in topic(report))


def _output(report: Report) -> Iterator[str]:
    agreement, after = report.agreement, report.output_error.after_repair
    reasons = []
    if after > _COLLAPSED_ERROR:
        reasons.append(f"relative output error {error(after)} (a silent model has 1)")
    if agreement.above_chance < _COLLAPSED_AGREEMENT:
        reasons.append(f"{agreement} where chance gives {_level(report, agreement.chance)}")
    if reasons:
        yield f"the output has collapsed on the calibration data: {' and '.join(reasons)}"
    else:
        yield (
            f"the output holds on the calibration data: {agreement} with the dense model, "
            f"relative error {error(after)}"
        )


def _level(report: Report, value: float) -> str:
    return f"{value:.1%}" if report.agreement.kind == "top1" else f"{value:.3f}"


def _speed(report: Report) -> Iterator[str]:
    if report.latency is None:
        return
    speedup = report.latency.speedup
    if speedup.low > 1:
        yield f"faster: measured speed-up {speedup}"
    elif speedup.high < 1:
        yield f"not faster but slower: measured speed-up {speedup} lies below 1"
    else:
        yield f"not faster: measured speed-up {speedup} contains 1"


def _budget(report: Report) -> Iterator[str]:
    budget = report.plan.policy.budget
    for name, amount in (budget.limits if budget else {}).items():
        cost: Cost = report.plan.layers if name == "layers" else getattr(report, name)
        yield _within(name, cost, amount.of(cost.before))


def _within(name: str, cost: Cost, limit: int) -> str:
    state = "within" if cost.after <= limit else "over"
    share, allowed = kept(cost.after, cost.before), kept(limit, cost.before)
    return f"{state} budget: {cost.after:,} {name} kept ({share}), {limit:,} allowed ({allowed})"


def _promise(report: Report) -> Iterator[str]:
    for name in ("params", "macs"):
        promised, measured = getattr(report.plan, name), getattr(report, name)
        if promised.before != measured.before:
            yield f"{name} are those of other inputs, or of another model, than the plan's"
        elif promised != measured:
            yield (
                f"the plan was wrong about {name}: it promised {promised.before:,} -> "
                f"{promised.after:,}, measured are {measured.before:,} -> {measured.after:,}"
            )


def _repairs(report: Report) -> Iterator[str]:
    refused = [note for note in report.repairs if not note.accepted]
    if refused:
        yield (
            f"{len(refused)} of {len(report.repairs)} repairs refused, "
            f"the first at '{refused[0].site}': {refused[0].note or 'no gain'}"
        )
