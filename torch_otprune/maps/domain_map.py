"""A map from a shifted domain back to the one that a network was trained on."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from torch_otprune.maps.affine import bures_map, least_squares_map
from torch_otprune.maps.base import AffineFit, FittedMap, TransportMap, register
from torch_otprune.maps.samples import Pairs, Samples, some_of, warn_of_few
from torch_otprune.policy.base import problem
from torch_otprune.transport import Coupling, coupling, sqdist
from torch_otprune.transport.checks import reals, refuse

__all__ = ["DomainMap", "class_coupling"]

_POINTS = 1024  # of each side that a coupling sees
_FLOOR = 1e-3  # of a point's mass: the slope of its square root at 0 is not finite
_OUTER = 10


@register
class DomainMap(TransportMap):
    """Move activations of a shifted domain onto the law of the home domain.

    `bures` matches means and covariances, `diagonal` means and variances channel by channel, which
    is what re-estimating a batch-norm does, and `coupled` regresses on the mean of the points that
    an entropic plan couples with. With the classes of the home domain's rows, the plan is
    discouraged from sending one point to several classes, and the method is `coupled`.

    Limits: the map is one for all points, and affine, so that it folds; classes that move in
    different directions are moved on average. Matched laws need not mean matched classes.

    Source: Courty, Flamary et al. 2017 for the class-regularised plan, with majorisation of its
    square root; masses here are relative to the point's own, and the weight to the mean cost.
    """

    kind: Literal["domain_map"] = "domain_map"
    method: Literal["auto", "bures", "diagonal", "coupled"] = Field(
        default="auto", description="`auto` is `coupled` with classes, else `bures`"
    )
    ridge: float = Field(
        default=1e-4, ge=0, description="share of the mean variance added on both sides"
    )
    strength: float = Field(
        default=1.0, ge=0, le=1, description="how far along the way to go; 0 stays"
    )
    eps: float = Field(default=0.05, gt=0, description="temperature of a plan, of the mean cost")
    classes: float = Field(
        default=0.1, ge=0, description="weight of the class regulariser, of the mean cost"
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.method in ("bures", "diagonal") and "classes" in self.model_fields_set:
            raise problem(
                f"the method {self.method!r} makes no plan that classes could change.",
                fix="leave `classes` out, or use the method 'coupled'.",
                key="classes",
            )
        return self

    def fit(
        self,
        source: Float[Tensor, "n d"],
        target: Float[Tensor, "m e"],
        pairs: Pairs = None,
        *,
        labels: Int[Tensor, " k"] | None = None,
    ) -> FittedMap:
        """Fit a map from the shifted domain to the home domain.

        Args:
            source: activations on shifted data.
            target: activations on data of the home domain.
            pairs: as in `TransportMap.fit`; they make it a regression.
            labels: class of every target row, where known; the source needs none.

        Returns:
            an affine map.
        """
        samples = Samples.read(source, target, pairs)
        self.fitting(samples)
        warn_of_few(samples)
        if labels is None:
            return self.fitted(samples)
        _fitting_labels(labels, samples, self.method)
        return self._coupled(samples, labels)

    def fitted(self, samples: Samples) -> FittedMap:
        """Fit without classes."""
        if samples.matched is not None:
            return self._regressed(samples, *samples.matched, "a regression of the pairs")
        if self.method == "coupled":
            return self._coupled(samples, None)
        (mean_x, cov_x), (mean_y, cov_y) = (self._law(p) for p in (samples.x, samples.y))
        if self.method == "diagonal":
            spread_x, spread_y = (c.diagonal().clamp(min=0).sqrt() for c in (cov_x, cov_y))
            still = spread_x > 1e-12
            scale = torch.where(still, spread_y / spread_x.clamp_min(1e-12), spread_x.new_ones(()))
            return self._partly(samples, torch.diag(scale), mean_y - scale * mean_x, "")
        matrix, shift = bures_map(mean_x, cov_x, mean_y, cov_y)
        return self._partly(samples, matrix, shift, "")

    def _law(self, points: Tensor) -> tuple[Tensor, Tensor]:
        mean = points.mean(0)
        cov = (points - mean).T @ (points - mean) / len(points)
        cov.diagonal().add_(self.ridge * float(cov.diagonal().mean()))
        return mean, cov

    def _coupled(self, samples: Samples, labels: Tensor | None) -> FittedMap:
        """Regress every point on the mean of what it is coupled with."""
        (x, _), (y, at) = some_of(samples.x, _POINTS, 0), some_of(samples.y, _POINTS, 1)
        own = None if labels is None else labels.to(y.device)[at]
        found = class_coupling(sqdist(x, y), own, weight=self.classes, eps=self.eps)
        wanted = found.barycentric_map(y)
        # An entropic plan averages; give the images the spread of the target back.
        _, cov_w = self._law(wanted)
        mean_y, cov_y = self._law(y)
        wider, shift = bures_map(wanted.mean(0), cov_w, mean_y, cov_y)
        text = f"plan at {found.eps:.3g}, marginal error {found.marginal_error:.2g}"
        return self._regressed(samples, x, wanted @ wider.T + shift, text)

    def _regressed(self, samples: Samples, x: Tensor, y: Tensor, text: str) -> FittedMap:
        mean_x, cov = x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
        cross = (x - mean_x).T @ (y - y.mean(0)) / len(x)
        matrix, shift = least_squares_map(
            mean_x, cov, y.mean(0), cross, ridge=max(self.ridge, 1e-9)
        )
        return self._partly(samples, matrix, shift, text)

    def _partly(self, samples: Samples, matrix: Tensor, shift: Tensor, text: str) -> FittedMap:
        """Go part of the way, along straight lines."""
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        notes = (text,) if text else ()
        return AffineFit(
            self.kind,
            samples,
            notes=notes,
            matrix=torch.lerp(eye, matrix, self.strength),
            shift=self.strength * shift,
        )


def class_coupling(
    cost: Float[Tensor, "n m"],
    labels: Int[Tensor, " m"] | None,
    *,
    weight: float = 0.1,
    eps: float = 0.05,
) -> Coupling:
    """Couple two clouds so that no source is spread over several classes of targets.

    Args:
        cost: ground cost, sources x targets.
        labels: class of every target; None couples without.
        weight: of the regulariser, relative to the mean cost; 0 is the plain plan.
        eps: temperature relative to the mean cost.

    Returns:
        the coupling, whose cost has the regulariser's last linear part in it.
    """
    found = coupling(cost, eps=eps)
    if labels is None or weight == 0:
        return found
    one = torch.nn.functional.one_hot(_numbered(labels)).to(cost)
    unit = weight * float(cost.abs().mean())
    for _ in range(_OUTER):
        plan = found.plan()
        share = (plan @ one) / plan.sum(1, keepdim=True).clamp_min(1e-300)
        slope = 0.5 * (share + _FLOOR).rsqrt()  # of the square root of what each class gets
        found = coupling(cost + unit * slope @ one.T, eps=eps)
    return found


def _numbered(labels: Tensor) -> Tensor:
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


def _fitting_labels(labels: Tensor, samples: Samples, method: str) -> None:
    reals(labels, "labels")
    wrong = labels.dim() != 1 or len(labels) != len(samples.y) or labels.is_floating_point()
    refuse(
        wrong,
        f"labels of shape {tuple(labels.shape)} name no class for {len(samples.y)} target rows.",
        where="DomainMap.fit, argument labels",
        fix="pass one whole number per row of the target.",
    )
    refuse(
        method in ("bures", "diagonal") or samples.matched is not None,
        f"classes cannot be used: the method is {method!r}"
        + (", and the rows are paired." if samples.matched is not None else "."),
        where="DomainMap.fit, argument labels",
        fix="use the method 'coupled' without pairs, or leave the labels out.",
    )
