"""The hidden units of a two-layer map as particles: fewer of them flow to where all were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import RepairError
from torch_otprune.statistics.moments import ridge_factor
from torch_otprune.transport import divergence, facility_location, sqdist
from torch_otprune.transport.checks import at_least_one, cloud, positive, refuse

__all__ = ["NeuronFlow", "flow_neurons"]

_SHOWN = 512  # inputs that a signature consists of
_RIDGE = 1e-6
_FALL = 1e-4  # of the energy: an anchor that takes less off is not worth its time

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class NeuronFlow:
    """A narrower two-layer map.

    Args:
        first: from the inputs to the hidden units.
        second: from there to the outputs, refitted.
        energies: at every anchor, the first included; never rising.
        error_before: relative squared error of the outputs with the units that were started from.
        error_after: the same at the end.
    """

    first: nn.Linear
    second: nn.Linear
    energies: tuple[float, ...]
    error_before: float
    error_after: float


def flow_neurons(
    first: nn.Linear,
    activation: Activation,
    second: nn.Linear,
    *,
    inputs: Float[Tensor, "n d"],
    width: int,
    energy: Literal["sinkhorn", "function", "none"] = "sinkhorn",
    step: float = 1.0,
    anchors: int = 10,
    inner: int = 15,
    rate: float = 0.01,
    eps: float = 0.02,
) -> NeuronFlow:
    """Replace the hidden units of a two-layer map by fewer ones.

    A unit is a particle: its weights, its bias, and as its place what it answers to the inputs,
    weighed by how much the outputs hear of it. The start is the set of units nearest to all
    others. Implicit (JKO) steps then move weights and biases, so that every particle stays a unit
    that exists: each lowers the energy plus a squared way from the last anchor, and is taken
    only if the energy falls. Last, the second layer is fitted to the old outputs.

    Args:
        first: layer in front of the activation.
        activation: pointwise.
        second: layer behind it.
        inputs: of the first layer, unlabelled.
        width: hidden units that stay.
        energy: `sinkhorn` is the debiased distance between the laws of places, `function` the
            squared error of the outputs with the second layer eliminated, `none` leaves the start.
        step: a, of the squared way over 2a.
        anchors: implicit steps, at most.
        inner: gradient steps per implicit one.
        rate: of Adam, in shares of the spread of the weights.
        eps: temperature of `sinkhorn`.

    Returns:
        the pair, in the dtype of the layers given, which are left alone.

    Raises:
        RepairError: if the layers do not follow one another, or the width is no smaller number.

    Limits: `sinkhorn` treats units one by one and cannot use that two cancel; where labels or
    back-propagation are at hand, training does more.

    Source: Fan et al. 2022 for the scheme; neurons as particles after Chizat & Bach 2018; places
    by responses, the start and the refit are ours.
    """
    _fitting(first, second, inputs, width)
    for name, value in (("step", step), ("rate", rate), ("eps", eps)):
        positive(value, name)
    flow = _Flow.of(first, activation, second, inputs)
    z = flow.start(width)
    before = flow.refit(z)[2]
    known = {"sinkhorn": flow.sinkhorn, "function": flow.function, "none": None}
    refuse(
        energy not in known,
        f"{energy!r} is no energy of units.",
        where="flow_neurons, argument energy",
        fix="use 'sinkhorn', 'function' or 'none'.",
    )
    measure = known[energy]
    energies: list[float] = []
    if measure is not None:
        z, energies = _walk(z, measure, flow, (step, anchors, inner, rate, eps))
    weight, bias, after = flow.refit(z)
    made = [_layer(first, z[:, :-1], z[:, -1]), _layer(second, weight, bias)]
    return NeuronFlow(made[0], made[1], tuple(energies), before, after)


def _fitting(first: nn.Linear, second: nn.Linear, inputs: Tensor, width: int) -> None:
    at_least_one(width, "width")
    for layer in (first, second):
        if not isinstance(layer, nn.Linear):
            raise RepairError(
                f"a {type(layer).__name__} is no linear layer.",
                where="flow_neurons, arguments first and second",
                fix="pass two `nn.Linear`.",
            )
    cloud(inputs, "inputs")
    hidden = first.out_features
    for wrong, said in (
        (second.in_features != hidden, f"{hidden} hidden units do not fit {second.in_features}."),
        (inputs.shape[-1] != first.in_features, f"inputs have {inputs.shape[-1]} features."),
        (width > hidden, f"width is {width} of {hidden} hidden units."),
    ):
        if wrong:
            raise RepairError(
                said,
                where=f"flow_neurons, {first.in_features}-{hidden}-{second.out_features}",
                fix="pass two layers that follow one another, their inputs, and a smaller width.",
            )
    refuse(
        len(inputs) <= width,
        f"{len(inputs)} inputs cannot tell {width} hidden units apart.",
        where="flow_neurons, argument inputs",
        fix="pass several inputs per hidden unit.",
    )


Measure = Callable[[Tensor, float], Tensor]


def _walk(
    z: Tensor, measure: Measure, flow: _Flow, setting: tuple[float, int, int, float, float]
) -> tuple[Tensor, list[float]]:
    """Take implicit steps as long as the energy falls."""
    step, anchors, inner, rate, eps = setting
    with torch.no_grad():
        energies = [float(measure(z, eps))]
    for _ in range(anchors):
        at, anchor = z.clone().requires_grad_(), flow.place(z).detach()
        adam = torch.optim.Adam([at], lr=rate * float(z.std()))
        for _ in range(inner):
            adam.zero_grad()
            with torch.enable_grad():
                way = (flow.place(at) - anchor).square().sum(1).mean() / (2 * step)
                (measure(at, eps) + way).backward()
            adam.step()
        with torch.no_grad():
            now = float(measure(at.detach(), eps))
        if now >= energies[-1] * (1 - _FALL) or energies[-1] < 1e-12:
            break
        z, energies = at.detach(), [*energies, now]
    return z, energies


@dataclass
class _Flow:
    """The dense map on its inputs, and what is asked of a narrower one."""

    inputs: Tensor
    activation: Activation
    units: Tensor
    weights: Tensor
    outputs: Tensor
    scale: float

    @classmethod
    def of(cls, first: nn.Linear, activation: Activation, second: nn.Linear, x: Tensor) -> _Flow:
        x = x.detach().double()
        bias = (
            x.new_zeros(first.out_features) if first.bias is None else first.bias.detach().double()
        )
        units = torch.cat([first.weight.detach().double(), bias[:, None]], dim=1)
        with torch.no_grad():
            hidden = activation(x @ units[:, :-1].T + units[:, -1])
            heard = second.weight.detach().double().norm(dim=0) * hidden.square().mean(0).sqrt()
            outputs = hidden @ second.weight.detach().double().T
        if second.bias is not None:
            outputs = outputs + second.bias.detach().double()
        scale = float(hidden.square().mean().sqrt().clamp_min(1e-12))
        weights = heard / heard.sum().clamp_min(1e-300)
        return cls(x, activation, units, weights, outputs, scale)

    def place(self, z: Tensor) -> Tensor:
        """Tell what units answer to some of the inputs: one row each."""
        few = self.inputs[:: max(1, len(self.inputs) // _SHOWN)]
        seen = self.activation(few @ z[:, :-1].T + z[:, -1])
        place: Tensor = seen.T / (self.scale * float(len(few)) ** 0.5)
        return place

    def start(self, width: int) -> Tensor:
        """Choose the units that are nearest to all others."""
        with torch.no_grad():
            costs = sqdist(self.place(self.units)) * self.weights[:, None]
        chosen = facility_location(costs, sizes=width).order[:width]
        return self.units[chosen.sort().values].clone()

    def masses(self, z: Tensor) -> Tensor:
        """Give every particle the mass of the units that are nearest to it."""
        with torch.no_grad():
            near = sqdist(self.place(self.units), self.place(z)).argmin(1)
        mass = torch.zeros(len(z), dtype=z.dtype, device=z.device).index_add(0, near, self.weights)
        return mass + 1e-6 / len(z)

    def sinkhorn(self, z: Tensor, eps: float) -> Tensor:
        """Half the squared distance between the particles and all units."""
        far = divergence(
            self.place(z), self.place(self.units), self.masses(z), self.weights, eps=eps
        )
        return far.square() / 2

    def function(self, z: Tensor, eps: float) -> Tensor:
        """Half the relative squared error of the outputs, with the best second layer."""
        design, solved = self._solved(z)
        left = self.outputs - design @ solved
        return left.square().sum() / self._power() / 2

    def refit(self, z: Tensor) -> tuple[Tensor, Tensor, float]:
        """Fit the second layer; return its weight, its bias and the relative squared error."""
        with torch.no_grad():
            design, solved = self._solved(z)
            error = float((self.outputs - design @ solved).square().sum()) / self._power()
        return solved[:-1].T, solved[-1], error

    def _solved(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.activation(self.inputs @ z[:, :-1].T + z[:, -1])
        design = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
        gram = design.T @ design / len(design)
        # The solution is held still: its derivative is worth nothing where it is the best.
        factor = ridge_factor(gram.detach(), _RIDGE)
        solved = torch.cholesky_solve(design.detach().T @ self.outputs / len(design), factor)
        return design, solved

    def _power(self) -> float:
        around = self.outputs - self.outputs.mean(0)
        return float(around.square().sum().clamp_min(1e-300))


def _layer(like: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    out, width = weight.shape
    with torch.random.fork_rng(devices=[]):
        made = nn.Linear(width, out, device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made
