"""The whole story in one screen: decide, cut, repair, verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_otprune.attach import (
    EXAMPLE,
    attach,
    carries_out,
    check_unattached,
    looks_at_channels,
    observe,
)
from torch_otprune.certify import Keeper, keeper
from torch_otprune.errors import OTPruneError, VerificationError
from torch_otprune.fold import changes, linearize_, lines_of, refold_, refolded
from torch_otprune.plan import Plan
from torch_otprune.policy import Layers, Policy
from torch_otprune.repair import Note, Patient, Repair
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.replace import Fitted, left_to_repair
from torch_otprune.repair.replace.base import hand_norms_
from torch_otprune.repair.sparsify import mask_, samples, sparsify_
from torch_otprune.repair.zeros import bound
from torch_otprune.report import Report
from torch_otprune.statistics import collect, rebatched
from torch_otprune.statistics.reduce import share
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.store import Rebinding, WayBack
from torch_otprune.structure import Graph, head, trace_head
from torch_otprune.structure.mute import muted
from torch_otprune.structure.trace import check_counts
from torch_otprune.surgery import (
    Lineage,
    Snapshot,
    check_plan,
    check_slices,
    copied,
    cut_,
    exchange_,
    inscribe_,
    stumbled,
    take_out_,
)
from torch_otprune.verify import Progress, Stopwatch, measure_layers, quiet, verify

_NAMED = 3  # groups and blocks named in one error
_GUARD = 4  # batches on which a repair must not do harm

__all__ = ["apply_", "prune_", "repair_"]

Data = Iterable[Any] | Callable[[nn.Module], Any]


def prune_(
    model: nn.Module,
    policy: Policy | None,
    data: Data,
    *,
    timing: float = 2.0,
    progress: Progress = quiet,
) -> Report:
    """Make a model smaller in place: observe, plan, cut, repair, verify.

    Args:
        model: the dense model.
        policy: the declaration; None takes the one on the class.
        data: calibration batches, or a function that runs the model it is given.
        timing: seconds to spend on measuring latency; 0 leaves it out of the report.
        progress: told the stage, the steps done and the steps in all.

    Returns:
        the report; `report.undo_()` goes back.

    Raises:
        OTPruneError: with the model as it was.
    """
    with attach(model, policy) as attached:
        with attached.unwatched():  # where data is a function, its runs are listened to
            batches = collect(model, data, share(attached.policy.calibration.samples))
            keeper(model, attached.policy.preserve, batches[0])  # before an hour of statistics
        with _counted(model, batches, attached.unwatched):
            observe(attached, batches)
            progress("plan", 0, 1)
            plan = attached.plan()
    return apply_(model, plan, batches, timing=timing, progress=progress)


@contextmanager
def _counted(
    model: nn.Module,
    batches: Sequence[Any],
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Where something fails since forward counts samples by a number, say that."""
    try:
        yield
    except OTPruneError:
        with quiet():
            check_counts(model, batches[0], EXAMPLE)
        raise


def apply_(
    model: nn.Module,
    plan: Plan,
    data: Data,
    *,
    timing: float = 2.0,
    progress: Progress = quiet,
) -> Report:
    """Carry out a plan in place, all or nothing, then prove what it did.

    Args:
        model: the dense model that the plan was made for.
        plan: what to do.
        data: calibration batches for the repairs and the report.
        timing: seconds to spend on measuring latency; 0 leaves it out of the report.
        progress: told the stage, the steps done and the steps in all.

    Returns:
        the report; `report.undo_()` goes back, bit for bit.

    Raises:
        OTPruneError: with the model as it was.
    """
    return _apply_(model, plan, data, timing=timing, progress=progress)[0]


@carries_out
def _apply_(
    model: nn.Module, plan: Plan, data: Data, *, timing: float, progress: Progress = quiet
) -> tuple[Report, WayBack]:
    """Do what `apply_` does, and hand out the way back, for a schedule to add to."""
    check_unattached(model)
    check_plan(model, plan)
    with torch.inference_mode(mode=False):  # its tensors could never be trained again
        batches = collect(model, data, share(plan.policy.calibration.samples))
        watch = Stopwatch(progress)
        with _counted(model, batches):
            return _carry_out_(model, plan, rebatched(batches), timing=timing, watch=watch)


def _carry_out_(
    model: nn.Module, plan: Plan, batches: Sequence[Any], *, timing: float, watch: Stopwatch
) -> tuple[Report, WayBack]:
    snapshot, dense, lineage = Snapshot(model), copied(model), Lineage(model)
    with watch("analyse"):
        held = keeper(dense, plan.policy.preserve, batches[0])
        graph, some = _traced(dense, batches[0], plan.policy)
    check_slices(graph, plan)
    try:
        with muted(dense, [d.swaps[0] for d in plan.drops if d.silent]):
            notes, raw, added, zeros = _operate(
                lineage, dense, graph, plan, batches, watch=watch, held=held
            )
            with watch("verify"):
                layers = measure_layers((dense, raw, model), graph, plan, batches)
                lineage.pair()
                take_out_(model, plan.compacted)  # last: paths change
                inscribe_(model, plan, dense)
                report = verify(
                    (dense, raw, model),
                    graph,
                    plan,
                    batches,
                    example=some,
                    layers=layers,
                    added=added,
                    notes=notes,
                    seconds=watch.seconds,
                    timing=timing,
                ).model_copy(update=zeros)
        lineage.settle_()
    except BaseException as error:  # whatever happened, the model must be as it was
        said = stumbled(model, error)
        snapshot.restore_()
        if said:
            raise _unseen(said, plan) from error
        raise
    way = WayBack(snapshot, plan, dense)
    return report.bind_undo_(way, Rebinding(lineage, plan)), way


def _unseen(said: str, plan: Plan) -> VerificationError:
    """Explain a way through the model that the example, on which the plan was tried, did not take.

    Args:
        said: what failed, and at which line.
        plan: what was being carried out.

    Returns:
        what to raise.
    """
    return VerificationError(
        f"the smaller model does not run on the calibration data: {said}.",
        where=f"the plan for {', '.join(list(plan.keep())[:_NAMED])}, tried on {EXAMPLE} samples",
        fix="let every way through forward do without what the plan takes, or `ignore` it.",
    )


def _traced(model: nn.Module, batch: Any, policy: Policy) -> tuple[Graph, Any]:
    return trace_head(model, batch, EXAMPLE, channels=looks_at_channels(policy))


def _operate(
    lineage: Lineage,
    dense: nn.Module,
    graph: Graph,
    plan: Plan,
    batches: Sequence[Any],
    *,
    watch: Stopwatch,
    held: Keeper | None,
) -> tuple[list[Note], nn.Module, dict[str, int], dict[str, Any]]:
    """Cut, fold, repair, thin; return notes, a copy from before repairs, what folds cost, zeros."""
    model = lineage.model
    with watch("cut"):
        lineage.follow(cut_(model, plan.cuts))
        exchange_(model, plan.drops)
    added = {"params": 0, "macs": 0}
    if plan.lines or plan.foldings:
        with watch("fold"):
            added = _fold_(model, dense, graph, plan, batches)
    if held is not None:
        held.check(model, "the cut")
    raw = copied(model)
    with watch("repair"):
        notes = repair_(model, dense, graph, plan, batches, progress=watch.progress, held=held)
    if held is not None:
        held.check(model, "the repairs")
    zeros = _thin_((dense, raw, model), graph, plan, batches, watch=watch)
    if held is not None and zeros:
        held.check(model, "the zeros")
    return notes, raw, added, zeros


def _thin_(
    models: tuple[nn.Module, nn.Module, nn.Module],
    graph: Graph,
    plan: Plan,
    batches: Sequence[Any],
    *,
    watch: Stopwatch,
) -> dict[str, Any]:
    """Set single weights to zero, last; return what the report says of them."""
    if not plan.thinned:
        return {}
    dense, raw, model = models
    with watch("weights"):
        kept = copied(model) if plan.cuts else dense
        seed, told = plan.policy.seed, watch.progress
        patient = Patient(kept, model, graph, (), (), batches, seed=seed, progress=told)
        zeros = sparsify_(patient, plan)
        mask_(raw, model, plan.thinned)
        return {"zeros": zeros, "bound": bound((kept, model), graph, zeros, samples(batches))}


def _fold_(
    model: nn.Module, dense: nn.Module, graph: Graph, plan: Plan, batches: Sequence[Any]
) -> dict[str, int]:
    """Make activations linear and fold what is linear then; return what that adds to each cost."""
    chosen = {line.site for line in plan.lines}
    sites = [site for site in graph.sites if site.name in chosen]
    with torch.no_grad():
        linearize_(model, plan.lines, lines_of(plan, watch_sites(dense, sites, batches)))
        some = head(batches[0], EXAMPLE)
        added = changes(model, plan, some)
        refold_(model, plan.foldings, example=some)
    return added


def repair_(
    model: nn.Module,
    dense: nn.Module,
    graph: Graph,
    plan: Plan,
    batches: Sequence[Any],
    *,
    progress: Progress = quiet,
    held: Keeper | None = None,
) -> list[Note]:
    """Run every rule's repairs, in the order in which the rules name them.

    Args:
        model: the cut model, written in place.
        dense: the original.
        graph: the original's analysis.
        plan: what was cut.
        batches: calibration batches.
        progress: told the stage, the steps done and the steps in all.
        held: what the model must stay.

    Returns:
        what every repair did.
    """
    left, aims = refolded(graph, plan)
    whole = Patient(
        dense,
        model,
        left,
        plan.cuts,
        plan.cuts,
        batches,
        drops=plan.drops,
        gone=plan.drops,
        foldings=plan.foldings,
        rewritten=aims,
        seed=plan.policy.seed,
        progress=progress,
        keeper=held,
    )
    notes, since = _replace_(whole, plan)
    for repair, rules in _asked(plan.policy):
        cuts = [cut for cut in plan.cuts if cut.rule in rules]
        drops = [drop for drop in plan.drops if drop.rule in rules]
        lines = [line for line in plan.lines if line.rule in rules]
        if cuts or drops or lines:
            own = replace(whole, cuts=cuts, drops=drops, lines=lines)
            notes += _guarded(repair, own, since)
            since = None
    return notes


def _asked(policy: Policy) -> list[tuple[Repair, list[int]]]:
    """List the repairs in the order in which rules name them, with the rules that ask for each."""
    asked: dict[tuple[int, Repair], list[int]] = {}
    for index, rule in enumerate(policy.rules):
        for place, repair in enumerate(rule.repair):
            assert isinstance(repair, Repair)
            asked.setdefault((place, repair), []).append(index)
    found = sorted(asked.items(), key=lambda item: item[0][0])
    return [(repair, rules) for (_, repair), rules in found]


_Since = tuple[float, Snapshot]
"""How far a model was from the dense one at some moment, and the model of that moment."""


def _replace_(patient: Patient, plan: Plan) -> tuple[list[Note], _Since | None]:
    """Fit what stands in for removed blocks, unless a repair is about to do just that.

    Returns:
        the notes, and the moment before norms were handed over: that is right only together with
        the refit, so the first repair answers for both.
    """
    notes: list[Note] = []
    since: _Since | None = None
    for index, rule in enumerate(plan.policy.rules):
        drops = [drop for drop in plan.drops if drop.rule == index]
        if not (drops and isinstance(rule, Layers) and isinstance(rule.replace, Fitted)):
            continue
        own = replace(patient, cuts=(), drops=drops)
        if left_to_repair(rule.replace, rule.repair):
            since = since or _now(patient)
            hand_norms_(own)
        else:
            notes += _guarded(rule.replace, own)
    return notes, since


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _now(patient: Patient) -> _Since:
    far = distance(patient.dense, patient.small, patient.batches[:_GUARD])
    return far, Snapshot(patient.small)


def _guarded(repair: Repair | Fitted, patient: Patient, since: _Since | None = None) -> list[Note]:
    """Run a repair, and take it back whole if the output ends further from the dense one."""
    before, snapshot = since or _now(patient)
    values: dict[str, torch.Tensor] = {}
    if patient.keeper is not None:
        values = _copied(patient.small)
        patient = replace(patient, signs=patient.keeper.signs(patient.small))
    notes = list(repair.apply_(patient))
    if patient.keeper is not None and (text := patient.keeper.settle_(patient.small, values)):
        if text.startswith("lost"):
            snapshot.restore_()
            return [Note(repair.kind, "model", before, before, accepted=False, text=text)]
        notes.append(Note(repair.kind, "model", None, None, accepted=True, text=text))
    after = distance(patient.dense, patient.small, patient.batches[:_GUARD])
    if after <= before or (isinstance(repair, Repair) and repair.apart):
        return notes
    snapshot.restore_()
    text = f"the output's squared error would rise from {before:.2e} to {after:.2e}"
    return [Note(repair.kind, "model", before, before, accepted=False, text=text)]
