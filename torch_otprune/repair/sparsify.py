"""Set single weights to zero, layer by layer, front to back, and fit what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from torch_otprune.criteria.weights.base import Thinned, WeightCase, WeightCriterion
from torch_otprune.criteria.weights.trim import behind
from torch_otprune.errors import CalibrationError
from torch_otprune.plan.model import Plan, Thinning
from torch_otprune.plan.weights import weight_rules
from torch_otprune.policy import Pattern
from torch_otprune.repair.base import Patient
from torch_otprune.repair.lockstep import Lockstep, Pause, Site
from torch_otprune.repair.readings import Reading, Sums
from torch_otprune.repair.rectified import rectified
from torch_otprune.repair.zeros import LayerZeros
from torch_otprune.statistics.ntk_sap import sap_scores
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure import batch_size
from torch_otprune.structure.layers import tensor
from torch_otprune.surgery.cut import put_
from torch_otprune.surgery.thin import check_zeros, laid, matrices, shaped

__all__ = ["mask_", "samples", "sparsify_"]

_NUDGES = 32  # of all weights: half as many of the weights kept change with the seed as for one
_ROUNDING = 1e-12  # of a constant's square: what rounding may leave of its variance


def sparsify_(patient: Patient, plan: Plan) -> tuple[LayerZeros, ...]:
    """Set the weights that a plan asks for to zero.

    Layers are taken in order of execution, so that one that is fitted to the inputs it has now
    makes up for what is lost in front of it.

    Args:
        patient: the model to write, and a copy of it that stays as it is.
        plan: how many weights stay in which layers.

    Returns:
        what was done to every layer, in that order.

    Raises:
        CalibrationError: if a layer has seen no data that its criterion needs, or none that
            vary; if a score is NaN; or if no weight keeps a layer's answers within the radius
            declared for it.
        VerificationError: if a layer has other zeros than the plan says.
    """
    worker = _Thinner(patient, plan)
    for entry in plan.thinned:
        if not worker.criterion(entry).needs:
            worker.blind(entry)
    sites = [patient.site(p) for p in patient.graph.order if p in worker.waiting]
    if sites:
        worker.look(sites)
        with Lockstep(patient.dense, patient.small, patient.batches, sites) as walk:
            walk.play(worker.mend)
    check_zeros(patient.small, plan.thinned)
    return tuple(worker.done[entry.layer] for entry in plan.thinned)


def mask_(model: nn.Module, like: nn.Module, entries: Sequence[Thinning]) -> None:
    """Give a model the zeros of another and nothing else.

    Args:
        model: to write.
        like: of the same shapes.
        entries: which layers.
    """
    for entry in entries:
        module, other = (net.get_submodule(entry.layer) for net in (model, like))
        weight = tensor(module, "weight")
        put_(module, "weight", weight * (tensor(other, "weight") != 0).to(weight.device))


def samples(batches: Sequence[Any]) -> int:
    """Count the samples of all batches on all ranks."""
    total = torch.tensor([float(sum(map(batch_size, batches)))], dtype=torch.float64, device="cpu")
    all_sum_([total])
    return int(total)


@dataclass(frozen=True)
class _Fit:
    """What became of one layer.

    Args:
        case: the layer as its criterion saw it.
        sums: of its inputs and of what it is to write.
        found: the layer with zeros.
        still: inputs that never vary.
    """

    case: WeightCase
    sums: Sums
    found: Thinned
    still: Bool[Tensor, "groups columns"]

    @property
    def power(self) -> float:
        """Average the squared answers, behind the rectifier where the criterion knows it."""
        told = self.case.samples
        if told is None:
            return float(self.sums.power.sum()) / self.sums.count
        return float((told.target * told.active).square().sum()) / told.target.shape[1]

    def missed(self, weight: Tensor, intercept: Tensor) -> float:
        """Average the squared distance from the dense answers, likewise."""
        told = self.case.samples
        if told is None:
            return self.sums.error(weight, intercept)
        scaled = (weight * told.scale[:, :, None]).mT
        if told.shifts:
            scaled = torch.cat([scaled, (intercept * told.scale)[:, None, :]], 1)
        return sum(float(e.square().sum()) for e in behind(told, scaled)) / told.target.shape[1]

    def notes(self, criterion: WeightCriterion) -> Iterator[str]:
        """Tell what a reader of the report should know."""
        if self.found.note:
            yield self.found.note
        rows, width = self.sums.count, self.case.weight.shape[2]
        if criterion.refits and self.case.samples is None and rows < width:
            yield f"only {rows} rows for {width} inputs: what is fitted may fit their noise"
        if count := int(self.still.sum()):
            yield f"{count} of {self.still.numel()} inputs never vary on the calibration data"
        if not bool(self.found.weight.any()):
            yield "no weight is left, so it writes a constant"


@dataclass
class _Thinner:
    """The work at one layer after the other."""

    patient: Patient
    plan: Plan
    rectified: frozenset[str] = frozenset()
    done: dict[str, LayerZeros] = field(default_factory=dict)
    saliency: dict[str, Tensor] = field(default_factory=dict)

    @property
    def waiting(self) -> dict[str, Thinning]:
        """List the layers that are not done, by path."""
        return {t.layer: t for t in self.plan.thinned if t.layer not in self.done}

    def criterion(self, entry: Thinning) -> WeightCriterion:
        """Find who chooses a layer's weights."""
        found = weight_rules(self.plan.policy)[entry.rule].criterion
        assert isinstance(found, WeightCriterion)
        return found

    def look(self, sites: Sequence[Site]) -> None:
        """Find out what is read off the whole model at once, where a criterion asks for it."""
        if any("saliency" in self.criterion(self.waiting[s.path]).needs for s in sites):
            seed = self.plan.policy.seed
            self.saliency = sap_scores(
                self.patient.dense, self.patient.batches, passes=_NUDGES, seed=seed
            )
        wanted = [s for s in sites if "rows" in self.criterion(self.waiting[s.path]).needs]
        if wanted:
            few = self.patient.batches[0]
            found = rectified(self.patient.dense, self.patient.small, wanted, few)
            self.rectified = frozenset(p for p in found if self.patient.scale(p) is not None)

    def blind(self, entry: Thinning) -> None:
        """Thin a layer without looking at data."""
        module = self.patient.small.get_submodule(entry.layer)
        weight = matrices(module).double()
        pattern = Pattern.read(entry.pattern)
        case = WeightCase(entry.layer, weight, weight, None, None, entry.keep, pattern)
        found = self.criterion(entry).thin(case)
        put_(module, "weight", shaped(module, found.weight))
        self.done[entry.layer] = _told(entry, found, mode="data-free", rows=0)

    def mend(self, site: Site, pauses: list[tuple[Pause, Pause]]) -> None:
        """Thin the layer at which both models stand."""
        entry = self.waiting[site.path]
        criterion = self.criterion(entry)
        read = Reading(self.patient, site, pauses, criterion.reads)
        fit, held = read.sums()
        sums = fit.plus(held)
        if not sums.count:
            raise CalibrationError(
                f"no calibration data reached '{site.path}'.",
                where=f"criterion {criterion.kind}, Plan.thinned",
                fix="calibrate on data that takes this way, or choose criterion='magnitude'.",
            )
        aim = read.weight
        if criterion.reads == "cascade" and criterion.refits:
            aim = read.aim(fit, held, centred=read.offset)
        case = self._case(entry, read, sums, aim)
        still = self._still(case, read)
        found = criterion.thin(case)
        if not bool(torch.isfinite(found.weight).all()):
            raise CalibrationError(
                f"the weights that stay in '{site.path}' would be NaN or infinite.",
                where=f"criterion {criterion.kind}",
                fix="look for NaN or infinity in the weights and the data, or raise damping.",
            )
        self._write(entry, read, _Fit(case, sums, found, still))
        self.patient.progress("weights", len(self.done), len(self.plan.thinned))

    def _still(self, case: WeightCase, read: Reading) -> Bool[Tensor, "groups columns"]:
        """Mark inputs that never vary; where none does, nothing tells the weights apart."""
        assert case.second is not None
        assert case.power is not None
        still = _constant(case.second, case.power)
        if not bool(still.all()):
            return still
        criterion = self.criterion(self.waiting[case.path])
        fit, held = Reading(self.patient, read.site, read.pauses, "parallel").sums()
        second = fit.plus(held).second(centred=read.offset and criterion.refits)
        if bool(_constant(second, case.power).all()):
            seen = f"on the calibration data ({case.rows} rows)"
            fix = "calibrate on data that differ there, choose criterion='magnitude'"
        else:
            seen = "any more behind the zeros in front of it"
            fix = "let more weights stay in the layers in front"
        raise CalibrationError(
            f"no input of '{case.path}' varies {seen}: nothing tells its weights apart.",
            where=f"layer '{case.path}', criterion {criterion.kind}",
            fix=f"{fix}, or ignore the layer.",
        )

    def _case(self, entry: Thinning, read: Reading, sums: Sums, aim: Tensor) -> WeightCase:
        criterion = self.criterion(entry)
        centred = read.offset and criterion.refits
        rows = "rows" in criterion.needs
        told = read.told(rectified=entry.layer in self.rectified) if rows else None
        saliency = self.saliency.get(f"{entry.layer}.weight")
        return WeightCase(
            path=entry.layer,
            weight=read.weight,
            aim=aim,
            second=sums.second(centred=centred),
            power=sums.second(centred=False).diagonal(dim1=1, dim2=2),
            amount=entry.keep,
            pattern=Pattern.read(entry.pattern),
            rows=sums.count,
            samples=told,
            saliency=None if saliency is None else laid(read.module, saliency),
        )

    def _write(self, entry: Thinning, read: Reading, fit: _Fit) -> None:
        criterion, module, sums, found = self.criterion(entry), read.module, fit.sums, fit.found
        intercept = read.bias
        if criterion.refits and read.offset:
            intercept = found.shift if found.shift is not None else _intercept(read, sums, found)
        masked = read.weight * (found.weight != 0)
        power = max(fit.power, 1e-300)
        error = fit.missed(found.weight, intercept)
        before = fit.missed(masked, read.bias)
        if read.offset and criterion.refits:
            self.patient.shift_(entry.layer, (intercept - read.bias).flatten())
        put_(module, "weight", shaped(module, found.weight))
        said = "; ".join(fit.notes(criterion))
        told = _told(entry, found, mode=criterion.reads, rows=sums.count, said=said)
        self.done[entry.layer] = told.model_copy(
            update={
                "masked": sqrt(before / power),
                "error": sqrt(error / power),
                "distance": sqrt(error) if found.certificate is None else found.certificate.spent,
            }
        )


def _constant(second: Tensor, power: Tensor) -> Bool[Tensor, "groups columns"]:
    return second.diagonal(dim1=1, dim2=2) <= _ROUNDING * power


def _intercept(read: Reading, sums: Sums, found: Thinned) -> Tensor:
    """Let the average output be what it was to be."""
    mean = sums.mean[:, :, None]
    wanted = sums.written
    if read.mode == "sequential":
        wanted = (read.weight @ mean)[:, :, 0] + read.bias
    return wanted - (found.weight @ mean)[:, :, 0]


def _told(entry: Thinning, found: Thinned, *, mode: str, rows: int, said: str = "") -> LayerZeros:
    proof = found.certificate
    return LayerZeros(
        layer=entry.layer,
        criterion=entry.criterion,
        pattern=entry.pattern,
        weights=entry.weights,
        left=int((found.weight != 0).sum()),
        radius=None if proof is None else proof.radius,
        gap=None if proof is None else proof.gap,
        growth=None if proof is None else proof.growth,
        mode=mode,
        rows=rows,
        note=said or found.note,
    )
