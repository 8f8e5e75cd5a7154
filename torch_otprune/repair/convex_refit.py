"""Refit a hidden layer and the layer behind its rectifier by a convex program."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, RepairError
from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.convex import LOSSES, ConvexHead, LossName, Refit
from torch_otprune.repair.convex.seen import Seen, decides, look, tapped
from torch_otprune.repair.lockstep import distance
from torch_otprune.surgery.cut import put_

__all__ = ["ConvexRefit"]

_SOFTER = (1.0, 0.1, 0.01)  # shares of the penalty, tried until the error does not rise
_CLASSES = 2
_ROOM = 2**31  # bytes of a program, at most


@register
class ConvexRefit(Repair):
    """Solve one hidden layer and the layer behind its rectifier together, as a convex program.

    The present units' activation patterns and random ones are the program's; a group penalty says
    which units carry weight. With `loss="squared"` the pair comes near the dense network's
    answers and no label is needed; `hinge` and `logistic` read labels. With `robust`, the worst
    case over features that move as far as pruning moved them is lowered instead. How far that is,
    channel by channel, `radii` says: row by row, or by the transport between the channel's laws
    before and after. The objective is never above the present pair's, and a change that would
    increase the error is not made.

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
    rounds: int = Field(
        default=200,
        ge=1,
        description="of the solver, per program, and steps towards the worst case",
    )
    sweeps: int = Field(default=2, ge=1, description="programs, one around the other's units")
    robust: float | None = Field(
        default=None, gt=0, le=1, description="quantile of what pruning moved that radii cover"
    )
    radii: Literal["pairs", "laws"] = Field(
        default="pairs",
        description="of `robust`: how far each row moved, or how far the optimal transport between "
        "a feature's laws moves it, whichever row it was",
    )
    samples: int = Field(default=4096, ge=2, description="rows at most")

    @property
    def apart(self) -> bool:
        """Tell whether labels or a worst case are the goal; held-out rows then judge."""
        return LOSSES[self.loss].labelled or self.robust is not None

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Find the pair, read both models, refit, and keep what does not harm."""
        text = "no cut lies between two dense layers alone"
        for hidden, output in reversed(self._pairs(patient)):
            if why := _objection(patient, hidden, output):
                if self.pair is not None:
                    raise RepairError(
                        f"'{hidden}' and '{output}' are no rectified pair: {why}.",
                        where=f"repair convex_refit, pair {list(self.pair)}",
                        fix="name two nn.Linear with biases and only a ReLU between them, or "
                        "choose repair='least_squares'.",
                    )
                text = f"no cut pair can be refitted; '{hidden}' and '{output}': {why}"
                continue
            return (self._mend(patient, (hidden, output)),)
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
        seen = look(patient, pair)
        layers = tuple(patient.small.get_submodule(path) for path in pair)
        rows, columns = seen.inputs.shape
        text, fix = "", "pass more calibration data, at least two rows per feature."
        if rows <= columns + 1:
            text = f"{rows} rows cannot tell {columns} features apart"
        elif (size := self._size(seen, patient.width(pair[0]))) > _ROOM:
            text = f"the program would hold {size / 2**30:.1f} GiB"
            fix = "lower `samples` or `patterns`, or choose repair='least_squares'."
        elif LOSSES[self.loss].labelled and not decides(patient, pair[1]):
            text = f"'{pair[1]}' does not write the model's answer, so no label is about it"
            fix = "use loss='squared', or name the last pair."
        if text and self.pair is not None:
            raise CalibrationError(
                f"{text}.", where=f"repair convex_refit, pair {list(pair)}", fix=fix
            )
        if text:
            note = f"{text}: {fix.rstrip('.')}"
            return Note(self.kind, ", ".join(pair), None, None, accepted=False, text=note)
        return self._tried(patient, layers, (pair, seen, self._target(seen, pair)))

    def _size(self, seen: Seen, units: int) -> int:
        """Estimate the bytes that a program holds: a matrix of all outputs per row, and units."""
        rows, outputs = min(len(seen.inputs), self.samples), seen.answers.shape[1]
        return 8 * rows * (4 * outputs**2 + 16 * (units + self.patterns))

    def _tried(self, patient: Patient, layers: Any, case: tuple[Any, Seen, Tensor]) -> Note:
        """Lower the penalty until the error does not rise."""
        pair, seen, target = case
        names = [(layer, name) for layer in layers for name in ("weight", "bias")]
        before, old = self._error(patient, case, layers), _values(names)
        at = _spaced(
            ~_held(len(seen.inputs)) if self.apart else None, len(seen.inputs), self.samples
        )
        radii = self._radii(seen)
        site, after = f"{pair[0]}, {pair[1]}", before
        for share in _SOFTER:
            made = self._head(share, patient.seed).fit(
                seen.inputs[at], target[at], start=layers, width=layers[0].out_features, radii=radii
            )
            _write_(layers, made)
            after = self._error(patient, case, layers)
            if after <= before:
                text = _told(made, layers[0].out_features, share, radii)
                return Note(self.kind, site, before, after, accepted=True, text=text)
            for (layer, name), value in zip(names, old, strict=True):
                put_(layer, name, value)
        text = f"the error would be {after:.3g}"
        return Note(self.kind, site, before, before, accepted=False, text=text)

    def _radii(self, seen: Seen) -> Tensor | None:
        return None if self.robust is None else seen.moved(self.robust, self.radii)

    def _head(self, share: float, seed: int) -> ConvexHead:
        return ConvexHead(
            loss=self.loss,
            penalty=self.penalty * share,
            patterns=self.patterns,
            rounds=self.rounds,
            steps=self.rounds,
            sweeps=self.sweeps,
            seed=seed,
        )

    @torch.no_grad()
    def _error(self, patient: Patient, case: tuple[Any, Seen, Tensor], layers: Any) -> float:
        """Measure what must not rise: the distance from the dense outputs, or the labels' loss."""
        _, seen, target = case
        if not self.apart:
            return distance(patient.dense, patient.small, patient.batches)
        hidden, output = layers
        own, held = hidden.weight, _held(len(seen.inputs)).to(seen.inputs.device)
        middle = hidden(seen.inputs[held].to(own))
        radii = self._radii(seen)
        reach = torch.zeros_like(middle[0]) if radii is None else own.abs() @ radii.to(own)
        bounds = (middle - reach).relu(), (middle + reach).relu()
        return float(_worst(self.loss, output, bounds, target[held]))

    def _target(self, seen: Seen, pair: tuple[str, str]) -> Tensor:
        """Give dense answers, or labels."""
        rows, outputs = seen.answers.shape
        where = f"repair convex_refit, loss '{self.loss}', output layer '{pair[1]}'"
        if not LOSSES[self.loss].labelled:
            return seen.answers
        if outputs < _CLASSES:
            raise RepairError(
                f"loss '{self.loss}' needs one output per class, and '{pair[1]}' has {outputs}.",
                where=where,
                fix="use loss='squared', or an output layer with one output per class.",
            )
        if self.labels == "dense":
            return seen.answers.argmax(1)
        labels = seen.labels
        if (
            labels is not None
            and len(labels) == rows
            and 0 <= labels.min() <= labels.max() < outputs
        ):
            return labels
        fix = "pass batches of (inputs, labels), or set labels='dense' or loss='squared'."
        said = "the batches hold none"
        if labels is not None:
            said = f"there is not one for each of {rows} rows"
            if len(labels) == rows:
                said = f"they go from {int(labels.min())} to {int(labels.max())}"
                fix = f"pass labels from 0 to {outputs - 1}, one class number each."
        raise CalibrationError(
            f"loss '{self.loss}' needs one label per row, below {outputs}: {said}.",
            where=where,
            fix=fix,
        )


def _objection(patient: Patient, hidden: str, output: str) -> str:
    """Say why two layers are no rectified pair; empty where they are."""
    there = dict(patient.small.named_modules())
    for path in (hidden, output):
        if path not in there:
            return f"there is no '{path}'"
        if why := patient.unfit(path):
            return f"'{path}': {why}"
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
    kinds = {site.function for site in patient.graph.sites if site.producer == hidden}
    if other := sorted(kinds - {"relu"}):
        return f"what lies between them is a {other[0]} and no ReLU"
    first, last = tapped(patient.small, (hidden, output), patient.batches)
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


def _told(made: Refit, width: int, share: float, radii: Tensor | None) -> str:
    """Put what the program said into one line."""
    said = f"objective {made.before:.4g} to {made.objective:.4g}"
    if made.gap is not None:
        said += f", at most {max(made.gap, 0.0):.2g} above the best over {made.patterns} patterns"
    else:
        assert radii is not None
        low, middle, high = radii.quantile(radii.new_tensor([0.0, 0.5, 1.0])).tolist()
        said += f" in the worst case of radii {low:.2g} to {high:.2g}, median {middle:.2g}, "
        said += f"{made.stable:.1%} of units and rows stable"
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
