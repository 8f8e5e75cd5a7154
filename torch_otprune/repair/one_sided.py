"""Refit a layer in front of a rectifier: below zero any target is as good as another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.repair.base import STEERED, Patient
from torch_otprune.repair.lockstep import Pause, Site
from torch_otprune.repair.solve import Normal
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.statistics.patches import output_rows
from torch_otprune.statistics.reduce import all_sum_

__all__ = ["OneSided", "Rows", "sums_behind"]


@dataclass(frozen=True)
class Rows:
    """Some rows at one site.

    Args:
        design: the layer's input; a one at the end where it has an intercept.
        target: what it should write.
        held: whether they are held out.
        behind: what the dense model hands to the rectifier, and what the rectifier sees of a step
            in the layer's output, per channel; None where there is no rectifier.
    """

    design: Float[Tensor, "rows columns"]
    target: Float[Tensor, "rows out"]
    held: bool
    behind: tuple[Float[Tensor, "rows out"], Float[Tensor, " out"]] | None = None


def sums_behind(
    patient: Patient, site: Site, dense: Pause, small: Pause, at: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Read what the dense model hands to the rectifier behind a site.

    Args:
        patient: both models.
        site: the layer; one of the `rectified`.
        dense: what the dense model shows there.
        small: what the cut model shows there.
        at: output positions.

    Returns:
        rows x out of it and what a step in the small layer's output does to it, per channel;
        None where it cannot be told.
    """
    scale = patient.scale(site.path)
    path, tail = site.aim or (site.path, site.tail)
    if scale is None or dense.output is None:
        return None
    if not tail.added:
        out = dense.output
        for name in tail.modules:
            out = patient.dense.get_submodule(name).forward(out)
    elif dense.stream is None or dense.written is None or small.stream is None:
        return None  # something else is added as well
    else:
        out = dense.stream.double() + dense.written.double()
    reached = output_rows(patient.dense.get_submodule(path), out, at).double()
    kept = patient.kept(site.path)
    reached = reached if kept is None else reached[:, kept.to(reached.device)]
    steps = scale * reached.new_ones(patient.width(site.path))
    # a channel that is all but switched off cannot be steered
    return reached, torch.where(steps.abs() > STEERED * steps.abs().max(), steps, 0.0)


@dataclass
class OneSided:
    """Iterate least squares with targets that follow the fit where the rectifier is off.

    What comes out behind the rectifier differs by `relu(s) - relu(d)`, with s what is handed to
    it and d what the dense model hands to it. Where d <= 0 the target becomes `min(s, 0)`, and
    the squared distance to it bounds that difference from above and touches it at s; so no round
    can increase the error behind the rectifier on the rows of the fit, but for the ridge. How
    many rounds are right is told by the rows held out.

    Limits: where the target does not make up for the stream's drift, the stream is taken to be
    the dense one, so s is off by the drift.

    Args:
        rows: gives all batches anew.
        fit: sums over the rows of the fit.
        held: sums over the rows held out.
        old: the weight that the ridge pulls to.
        parts: columns and outputs of each group of a grouped layer, and its ridge.
    """

    rows: Callable[[], Iterable[Rows]]
    fit: Normal
    held: Normal
    old: Float[Tensor, "columns out"]
    parts: Sequence[tuple[Tensor, Tensor, float]]

    def solve(self, rounds: int) -> Tensor | None:
        """Find the weight.

        Args:
            rounds: most rounds.

        Returns:
            columns x out, fitted on all rows; None where plain least squares does best on the
            rows held out.
        """
        every = self.fit.plus(self.held)
        part, whole = self._factors(self.fit), self._factors(every)
        weight, fitted = self._near(part, self.fit, self.fit.cross), list[Tensor]()
        errors = list[float]()
        for turn in range(rounds + 1):
            error, fit_cross, held_cross = self._look(weight)
            errors.append(error)
            if turn == rounds or error > min(errors):
                break
            weight = self._near(part, self.fit, fit_cross)
            fitted.append(self._near(whole, every, fit_cross + held_cross))
        best = min(range(len(errors)), key=errors.__getitem__)
        return fitted[best - 1] if best else None

    def _factors(self, sums: Normal) -> list[Tensor]:
        return [ridge_factor(sums.gram[c][:, c], ridge) for c, _, ridge in self.parts]

    def _near(self, factors: Sequence[Tensor], sums: Normal, cross: Tensor) -> Tensor:
        """Solve the normal equations with a ridge towards the old weight."""
        weight, off = self.old.clone(), cross - sums.gram @ self.old
        for factor, (c, o, _) in zip(factors, self.parts, strict=True):
            weight[c[:, None], o] += torch.cholesky_solve(off[c][:, o], factor)
        return weight

    def _look(self, weight: Tensor) -> tuple[float, Tensor, Tensor]:
        """Measure a weight behind the rectifier, and move the targets to where it lets them be."""
        error = torch.zeros(1, dtype=torch.float64, device=weight.device)
        moved = torch.zeros_like(self.fit.cross), torch.zeros_like(self.held.cross)
        for some in self.rows():
            assert some.behind is not None
            reached, scale = some.behind
            seen = reached + (some.design @ weight - some.target) * scale
            if some.held:
                error += (seen.relu() - reached.relu()).square().sum()
            gain = torch.where(scale != 0, 1 / scale, 0.0)
            lower = torch.where(reached <= 0, seen.clamp_max(0) - reached, 0.0) * gain
            moved[some.held].addmm_(some.design.T, lower)
        all_sum_([error, *moved])
        return float(error), self.fit.cross + moved[0], self.held.cross + moved[1]
