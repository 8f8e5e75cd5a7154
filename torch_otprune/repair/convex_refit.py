"""Refit a hidden layer and the layer behind its rectifier by a convex program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, RepairError
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.convex import LOSSES, ConvexHead, LossName, Refit
from torch_otprune.repair.lockstep import distance
from torch_otprune.statistics.reduce import all_rows
from torch_otprune.structure.forward import batch_size, evaluating, run
from torch_otprune.surgery.cut import put_

__all__ = ["ConvexRefit"]

_SOFTER = (1.0, 0.1, 0.01)  # shares of the penalty, tried until the error does not rise


@register
class ConvexRefit(Repair):
    """Solve one hidden layer and the layer behind its rectifier together, as a convex program.

    The present units' activation patterns and random ones are the program's; a group penalty says
    which units carry weight. With `loss="squared"` the pair comes near the dense network's
    answers and no label is needed; `hinge` and `logistic` read labels. With `robust`, the worst
    case over features that move as far as pruning moved them is lowered instead. The objective is
    never above the present pair's, and a change that would increase the error is not made.

    The pair keeps its shape, because the plan promised it: units that the penalty dropped are
    written as zeros. `ConvexHead` builds the pair as narrow as the penalty makes it.

    Limits: two dense layers with biases and nothing but a rectifier between them; as for
    `ConvexHead`, which see.

    Source: Pilanci & Ergen 2020; Bai, Gautam, Gai & Sojoudi 2021; radii from what pruning moved
    are ours.
    """

    kind: Literal["convex_refit"] = "convex_refit"
    pair: tuple[str, str] | None = Field(
        default=None, description="hidden and output layer; null takes the last pair that was cut"
    )
    loss: LossName = Field(default="squared", description="squared, hinge or logistic")
    labels: Literal["given", "dense"] = Field(
        default="given", description="of hinge and logistic: the batches', or the dense choices"
    )
    penalty: float = Field(
        default=1e-3, gt=0, lt=1, description="share of the penalty that leaves no unit at all"
    )
    patterns: int = Field(default=64, ge=0, description="random units to choose from")
    rounds: int = Field(default=200, ge=1, description="of the solver, per program")
    sweeps: int = Field(default=2, ge=1, description="programs, one around the other's units")
    robust: float | None = Field(
        default=None, gt=0, le=1, description="quantile of what pruning moved that radii cover"
    )
    samples: int = Field(default=4096, ge=2, description="rows at most")

    @property
    def apart(self) -> bool:
        """Tell whether labels or a worst case are the goal; held-out rows then judge."""
        return LOSSES[self.loss].labelled or self.robust is not None

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Find the pair, read both models, refit, and keep what does not harm."""
        found = self._pairs(patient)
        for hidden, output in reversed(found):
            if why := _objection(patient, hidden, output):
                if self.pair is not None:
                    raise RepairError(
                        f"'{hidden}' and '{output}' are no rectified pair: {why}.",
                        where=f"repair convex_refit, pair {list(self.pair)}",
                        fix="name two nn.Linear with biases and only a ReLU between them, or "
                        "choose repair='least_squares'.",
                    )
                continue
            return (self._mend(patient, (hidden, output)),)
        text = "no cut lies between two dense layers with biases and only a ReLU between them"
        return (Note(self.kind, "model", None, None, accepted=False, text=text),)

    def _pairs(self, patient: Patient) -> list[tuple[str, str]]:
        """List pairs that a cut lies between, in order of execution."""
        if self.pair is not None:
            return [self.pair]
        order = {path: at for at, path in enumerate(patient.graph.order)}
        found = []
        for cut in patient.cuts:
            sides = {side: [s.path for s in cut.slices if s.side == side] for side in ("out", "in")}
            if len(cut.slices) == 2 and all(len(p) == 1 and p[0] in order for p in sides.values()):
                found.append((sides["out"][0], sides["in"][0]))
        return sorted(found, key=lambda pair: order[pair[1]])

    def _mend(self, patient: Patient, pair: tuple[str, str]) -> Note:
        seen = _seen(patient, pair)
        if len(seen.inputs) <= seen.inputs.shape[1] + 1:
            text = f"{len(seen.inputs)} rows cannot tell {seen.inputs.shape[1]} features apart"
            if self.pair is None:
                return Note(self.kind, pair[0], None, None, accepted=False, text=text)
            raise CalibrationError(
                f"{text}.",
                where=f"repair convex_refit, pair {list(pair)}",
                fix="pass more calibration data, at least two rows per feature.",
            )
        target = self._target(patient, seen)
        layers = tuple(patient.small.get_submodule(path) for path in pair)
        return self._tried(patient, layers, (pair, seen, target))

    def _tried(self, patient: Patient, layers: Any, case: tuple[Any, _Seen, Tensor]) -> Note:
        """Lower the penalty until the error does not rise."""
        pair, seen, target = case
        names = [(layer, name) for layer in layers for name in ("weight", "bias")]
        before, old = self._error(patient, case, layers), _values(names)
        at = _spaced(
            ~_held(len(seen.inputs)) if self.apart else None, len(seen.inputs), self.samples
        )
        radii = None if self.robust is None else seen.moved(self.robust)
        site, after = f"{pair[0]}, {pair[1]}", before
        for share in _SOFTER:
            made = self._head(share, patient.seed).fit(
                seen.inputs[at], target[at], start=layers, width=layers[0].out_features, radii=radii
            )
            _write_(layers, made)
            after = self._error(patient, case, layers)
            if after <= before:
                text = _told(made, layers[0].out_features, share)
                return Note(self.kind, site, before, after, accepted=True, text=text)
            for (layer, name), value in zip(names, old, strict=True):
                put_(layer, name, value)
        text = f"the error would be {after:.3g}"
        return Note(self.kind, site, before, before, accepted=False, text=text)

    def _head(self, share: float, seed: int) -> ConvexHead:
        return ConvexHead(
            loss=self.loss,
            penalty=self.penalty * share,
            patterns=self.patterns,
            rounds=self.rounds,
            sweeps=self.sweeps,
            seed=seed,
        )

    @torch.no_grad()
    def _error(self, patient: Patient, case: tuple[Any, _Seen, Tensor], layers: Any) -> float:
        """Measure what must not rise: the distance from the dense outputs, or the labels' loss."""
        _, seen, target = case
        if not self.apart:
            return distance(patient.dense, patient.small, patient.batches)
        hidden, output = layers
        own, held = hidden.weight, _held(len(seen.inputs)).to(seen.inputs.device)
        middle = hidden(seen.inputs[held].to(own))
        reach = torch.zeros_like(middle[0])
        if self.robust is not None:
            reach = own.abs() @ seen.moved(self.robust).to(own)
        bounds = (middle - reach).relu(), (middle + reach).relu()
        return float(_worst(self.loss, output, bounds, target[held]))

    def _target(self, patient: Patient, seen: _Seen) -> Tensor:
        """Give dense answers, or labels."""
        if not LOSSES[self.loss].labelled:
            return seen.answers
        if self.labels == "dense":
            return seen.answers.argmax(1)
        if seen.labels is None:
            raise CalibrationError(
                f"loss '{self.loss}' needs one label per row, and the batches hold none.",
                where=f"repair convex_refit, loss '{self.loss}'",
                fix="pass batches of (inputs, labels), or set labels='dense' or loss='squared'.",
            )
        return seen.labels


@dataclass(frozen=True)
class _Seen:
    """What both models show around a pair; rows of all batches and ranks."""

    inputs: Tensor
    home: Tensor
    answers: Tensor
    labels: Tensor | None

    def moved(self, level: float) -> Tensor:
        """Measure how far pruning moved each feature, at a quantile."""
        return (self.inputs - self.home).abs().double().quantile(level, dim=0)


class _Tap:
    """Keep what a layer reads and writes."""

    def __init__(self) -> None:
        self.read: list[Tensor] = []
        self.written: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.read.append(args[0].detach().flatten(0, -2))
        self.written.append(out.detach().flatten(0, -2))


@torch.no_grad()
def _tapped(model: nn.Module, pair: tuple[str, str], batches: Any) -> list[_Tap]:
    taps = [_Tap() for _ in pair]
    hooks = [
        model.get_submodule(path).register_forward_hook(tap)
        for path, tap in zip(pair, taps, strict=True)
    ]
    try:
        with evaluating(model):
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return taps


def _seen(patient: Patient, pair: tuple[str, str]) -> _Seen:
    """Run both models."""
    small, _ = _tapped(patient.small, pair, patient.batches)
    home, away = _tapped(patient.dense, pair, patient.batches)
    inputs, reads = (torch.cat(tap.read) for tap in (small, home))
    answers = torch.cat(away.written)
    ends = [s for cut in patient.every for s in cut.slices]
    left = set(range(reads.shape[1]))  # each cut names what it leaves of all
    for end in (s for s in ends if s.side == "in" and s.path == pair[0]):
        left &= set(end.keep)
    reads = reads[:, torch.tensor(sorted(left), device=reads.device)]
    kept = patient.kept(pair[1])
    answers = answers if kept is None else answers[:, kept.to(answers.device)]
    own = [_labels(batch) for batch in patient.batches]
    labels = None
    if own and all(found is not None for found in own):
        every = torch.cat([found for found in own if found is not None]).to(inputs.device)
        labels = every if len(every) == len(inputs) else None
    device = inputs.device
    parts = [all_rows(part).to(device) for part in (inputs, reads, answers)]
    told = None if labels is None else all_rows(labels[:, None])[:, 0].long().to(device)
    return _Seen(parts[0], parts[1], parts[2], told)


def _labels(batch: Any) -> Tensor | None:
    """Find one class number per sample."""
    if isinstance(batch, Mapping):
        value = batch.get("labels")
    else:
        value = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
        return None
    return value if len(value) == batch_size(batch) else None


def _objection(patient: Patient, hidden: str, output: str) -> str:
    """Say why two layers are no rectified pair; empty where they are."""
    there = dict(patient.small.named_modules())
    for path in (hidden, output):
        if path not in there:
            return f"there is no '{path}'"
        if why := patient.unfit(path):
            return f"'{path}' {why}" if not why.startswith("a ") else why
        module = there[path]
        if not isinstance(module, nn.Linear):
            return f"'{path}' is a {type(module).__name__}"
        if module.bias is None:
            return f"'{path}' has no bias"
        if any(bool(patient.signs[k].any()) for k in patient.signs if k.startswith(f"{path}.")):
            return f"weights of '{path}' must not become negative"
    own = [g for g in patient.graph.groups if any(_is(m, hidden, "out") for m in g.members)]
    if any({m.path for m in g.members} != {hidden, output} for g in own):
        return f"'{hidden}' is read by other layers too"
    return _between(patient, hidden, output)


def _is(member: Any, path: str, side: str) -> bool:
    return bool(member.path == path and member.side == side)


def _between(patient: Patient, hidden: str, output: str) -> str:
    """Compare what the output layer reads with the rectified hidden layer."""
    if patient.keeper is not None:
        return "the policy preserves a property that a free refit may lose"
    first, last = _tapped(patient.small, (hidden, output), patient.batches)
    for made, read in zip(first.written, last.read, strict=False):
        if made.shape != read.shape or not torch.equal(made.relu(), read):
            return "what lies between them is no ReLU"
    return "" if first.written and last.read else "they are not both run"


def _held(rows: int) -> Tensor:
    """Mark every eighth row, which no fit sees where rows judge."""
    return torch.arange(rows, device="cpu") % 8 == 7


def _spaced(which: Tensor | None, rows: int, most: int) -> Tensor:
    """Pick evenly spaced rows."""
    every = torch.arange(rows, device="cpu") if which is None else which.nonzero()[:, 0]
    count = min(len(every), most)
    return every[torch.arange(count, device="cpu") * len(every) // count]


def _values(names: list[tuple[nn.Module, str]]) -> list[Tensor]:
    return [getattr(layer, name).detach().clone() for layer, name in names]


def _write_(layers: Any, made: Refit) -> None:
    """Write the pair in its present width; further units are zero."""
    weight, bias, out, offset = made.weights()
    more = layers[0].out_features - made.units
    pad = torch.nn.functional.pad
    put_(layers[0], "weight", pad(weight, (0, 0, 0, more)))
    put_(layers[0], "bias", pad(bias, (0, more)))
    put_(layers[1], "weight", pad(out, (0, more)))
    put_(layers[1], "bias", offset)


def _told(made: Refit, width: int, share: float) -> str:
    """Put what the program said into one line."""
    said = f"objective {made.before:.4g} to {made.objective:.4g}"
    if made.gap is not None:
        said += f", at most {max(made.gap, 0.0):.2g} above the best over {made.patterns} patterns"
    else:
        said += f" in the worst case, {made.stable:.1%} of units and rows stable"
    said += f"; {made.units} of {width} units carry weight"
    return said + (f"; penalty lowered to {share:g} of it" if share < 1 else "")


def _worst(
    loss: LossName, output: nn.Linear, bounds: tuple[Tensor, Tensor], target: Tensor
) -> Tensor:
    """Measure the mean loss, units within bounds."""
    from torch_otprune.repair.convex.program import Pair
    from torch_otprune.repair.convex.robust import worst

    kind = LOSSES[loss]
    assert output.bias is not None
    goal = target
    if kind.labelled:
        goal = nn.functional.one_hot(target, output.out_features)
    pair = Pair(output.weight[:0].double(), output.weight.T.double(), output.bias.double())
    low, high = bounds
    return worst(kind, pair, goal.double(), high.double(), low.double()).mean()
