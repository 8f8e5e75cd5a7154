"""A stirred-tank reactor with a second-order exothermic reaction: its equations and its data.

The equations and constants are the published ones; every trajectory is integrated here. States
are the concentration of A (kmol/m3) and the temperature (K), inputs the feed's concentration and
the heat, all as deviations from the unstable steady state that the controller holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LIMITS", "STEPS", "Data", "Scales", "advance", "energy", "make_data"]

FLOW, VOLUME, RATE, ACTIVATION, GAS = 5.0, 1.0, 8.46e6, 5.0e4, 8.314
FEED_T, HEAT, HEAT_CAPACITY, DENSITY = 300.0, -1.15e4, 0.231, 1000.0
FEED, CONCENTRATION, TEMPERATURE = 4.0, 1.9537, 401.8727
LYAPUNOV, LEVEL = np.array([[1060.0, 22.0], [22.0, 0.52]]), 372.0
LIMITS = np.array([3.5, 5e5])  # of the feed's concentration, kmol/m3, and of the heat, kJ/h
PERIOD, STEPS, INNER = 5e-3, 10, 5  # hours between decisions, outputs in between, per output


def _slope(state: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Give the time derivative of states, one row each, in units per hour."""
    a, t = state[..., 0] + CONCENTRATION, state[..., 1] + TEMPERATURE
    reaction = RATE * np.exp(-ACTIVATION / (GAS * t)) * a**2
    heat = -HEAT / (DENSITY * HEAT_CAPACITY) * reaction + u[..., 1] / (
        DENSITY * HEAT_CAPACITY * VOLUME
    )
    fed = FLOW / VOLUME * (u[..., 0] + FEED - a)
    return np.stack([fed - reaction, FLOW / VOLUME * (FEED_T - t) + heat], axis=-1)


def advance(state: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Integrate one decision's period by Runge-Kutta steps of fourth order.

    Args:
        state: rows of concentration and temperature.
        u: rows of feed and heat, held over the period.

    Returns:
        the states at ten times, rows x 10 x 2.
    """
    h, seen = PERIOD / (STEPS * INNER), []
    for count in range(STEPS * INNER):
        one = _slope(state, u)
        two = _slope(state + h / 2 * one, u)
        three = _slope(state + h / 2 * two, u)
        four = _slope(state + h * three, u)
        state = state + h / 6 * (one + 2 * two + 2 * three + four)
        if (count + 1) % INNER == 0:
            seen.append(state)
    return np.stack(seen, axis=-2)


def energy(state: np.ndarray) -> np.ndarray:
    """Measure the distance from the steady state by the published quadratic form."""
    found: np.ndarray = np.einsum("...i,ij,...j->...", state, LYAPUNOV, state)
    return found


@dataclass(frozen=True)
class Scales:
    """What brings inputs and outputs of the training set to [0, 1].

    Args:
        low: least input of each kind: concentration, temperature, feed, heat.
        span: largest minus least.
        out_low: least output.
        out_span: the same for the outputs.
    """

    low: np.ndarray
    span: np.ndarray
    out_low: np.ndarray
    out_span: np.ndarray

    def inputs(self, state: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Scale states and inputs to one row for the net."""
        both = np.concatenate([state, np.broadcast_to(u, (*state.shape[:-1], 2))], axis=-1)
        scaled: np.ndarray = (both - self.low) / self.span
        return scaled

    def state(self, out: np.ndarray) -> np.ndarray:
        """Read a net's outputs as states."""
        return out * self.out_span + self.out_low


@dataclass(frozen=True)
class Data:
    """Scaled trajectories.

    Args:
        x: rows x steps x 4 of the training set; the same at every step.
        y: its outputs, rows x steps x 2, without noise.
        x_test: the same of the test set.
        y_test: the same.
        scales: how they were scaled.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scales: Scales

    def noisy(self, sigma: float, seed: int) -> Tensor:
        """Add noise to the training outputs, in their scaled unit."""
        generator = torch.Generator().manual_seed(seed)
        return self.y + sigma * torch.randn(self.y.shape, generator=generator)


def make_data(grid: int = 100, seed: int = 0) -> Data:
    """Integrate from a grid of states in the stability region under 16 inputs.

    Args:
        grid: points along each axis.
        seed: of the split: 70 % train, 30 % test.

    Returns:
        the data.
    """
    c, t = np.meshgrid(
        np.linspace(0, 6, grid) - CONCENTRATION,
        np.linspace(300, 600, grid) - TEMPERATURE,
        indexing="ij",
    )
    states = np.stack([c.ravel(), t.ravel()], axis=-1)
    states = states[energy(states) < LEVEL]
    u = np.stack(
        np.meshgrid(*(np.linspace(-limit, limit, 4) for limit in LIMITS), indexing="ij"), axis=-1
    ).reshape(-1, 2)
    start, held = np.repeat(states, len(u), axis=0), np.tile(u, (len(states), 1))
    out, inputs = advance(start, held), np.concatenate([start, held], axis=-1)
    order = np.random.default_rng(seed).permutation(len(inputs))
    train, test = order[: int(0.7 * len(order))], order[int(0.7 * len(order)) :]
    low, high = inputs[train].min(0), inputs[train].max(0)
    out_low, out_high = out[train].min((0, 1)), out[train].max((0, 1))
    scales = Scales(low, high - low, out_low, out_high - out_low)

    def tensors(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy((inputs[rows] - low) / scales.span).float()
        y = torch.from_numpy((out[rows] - out_low) / scales.out_span).float()
        return x[:, None].repeat(1, STEPS, 1), y

    return Data(*tensors(train), *tensors(test), scales)
