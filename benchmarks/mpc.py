"""Control a reactor by nets that are convex, dense and pruned: how accurate, how certain, how fast?

Question: can a certified convex recurrent net lose two thirds, or nine tenths, of its parameters
and still predict, keep its certificate, and make the controller faster?
Expected before the run: an input-convex RNN of 38.5 k parameters at 13 k or less with a test error
of 1.5e-4 or less under noise 0.4, the certificate unchanged, control steps at least twice as fast.

The plant is that of `mpc_plant.py`. Nets predict ten states over one period from the state and the
inputs, all scaled to [0, 1]; they are trained on outputs with noise and tested without. Pruning
sees inputs of the training set only, and no training follows. The controller plans ten periods by
SLSQP with central differences, all of them one batch of the traced net in float64; its time is
the processor's, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks.common import count_params, environment, read_json, write_json
from benchmarks.mpc_plant import LIMITS, STEPS, Data, advance, energy, make_data
from torch_otprune.nn import ICLRNN, ICLSTM, ICRNN, InputConvex

RESULTS = Path(__file__).resolve().parent / "results" / "mpc.json"
SHARES = (0.33, 0.1)
STARTS = np.array([[-0.7, 45.0], [0.9, -50.0], [-0.3, 30.0]])
WEIGHTS = np.array([9.35, 0.41])  # of the scaled states' squares
EFFORT = 0.01  # of the scaled inputs' squares


class LSTM(nn.Module):
    """PyTorch's own, with an output layer."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(inputs, hidden, 2, batch_first=True)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Compute an output for every step."""
        found: Tensor = self.out(self.cells(x)[0])
        return found


NETS: dict[str, Callable[[int], nn.Module]] = {
    "LSTM": lambda hidden: LSTM(4, hidden, 2),
    "ICRNN": lambda hidden: ICRNN(4, hidden, 2),
    "ICLRNN": lambda hidden: ICLRNN(4, hidden, 2),
    "IC-LSTM": lambda hidden: ICLSTM(4, hidden, 2),
    "IC-LSTM, log-convex gates": lambda hidden: ICLSTM(4, hidden, 2, gates="exp"),
}


@dataclass(frozen=True)
class Size:
    """How much work to do.

    Args:
        grid: points along each axis of the data's initial states.
        hidden: units of each layer.
        epochs: of training.
        horizon: periods that the controller plans.
        moves: decisions per start.
        starts: how many starts.
        pairs: of inputs that a certificate's search tries.
        calibration: samples that pruning sees.
        steps: of reconstruction.
    """

    grid: int = 100
    hidden: int = 64
    epochs: int = 60
    horizon: int = 10
    moves: int = 8
    starts: int = 3
    pairs: int = 100_000
    calibration: int = 2048
    steps: int = 400


QUICK = Size(
    grid=24, hidden=24, epochs=2, horizon=2, moves=1, starts=1, pairs=256, calibration=64, steps=3
)


def train(net: nn.Module, data: Data, noisy: Tensor, *, epochs: int, seed: int) -> None:
    """Fit a net by Adam with one cycle of the step size; project after every step."""
    generator = torch.Generator().manual_seed(seed)
    count = max(len(noisy) // 256, 1)
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 3e-3, total_steps=epochs * count, pct_start=0.1
    )
    for _ in range(epochs):
        order = torch.randperm(len(noisy), generator=generator)
        for at in order.chunk(count):
            loss = (net(data.x[at]) - noisy[at]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if isinstance(net, InputConvex):
                net.project_()


@torch.no_grad()
def error(net: nn.Module, data: Data) -> float:
    """Measure the mean squared error on the clean test set, in scaled units."""
    return float((net(data.x_test) - data.y_test).square().mean())


def pruned(net: nn.Module, data: Data, share: float, size: Size) -> tuple[nn.Module, float]:
    """Prune a copy to a share of the parameters, without labels; return it and the seconds."""
    small, start = copy.deepcopy(net), time.perf_counter()
    convex = isinstance(net, InputConvex)
    first: Any = "recurrent" if convex else "least_squares"
    last = {"kind": "reconstruct", "least_squares": None, "steps": size.steps}
    policy = otp.Policy(
        rules=otp.Channels(criterion="transport", repair=[first, last]),
        budget=otp.Budget(params=share),
        calibration=otp.Calibration(samples=size.calibration),
        preserve=["convex"] if proved(net, data) else [],
    )
    otp.prune_(small, policy, data.x[: size.calibration].split(256), timing=0.0)
    return small, time.perf_counter() - start


def proved(net: nn.Module, data: Data) -> bool:
    """Tell whether a net is proved to be convex."""
    return otp.certify(net, data.x[:2], pairs=64, steps=0).convex.how == "structural"


class Controller:
    """Plans inputs over several periods by SLSQP, with the net as the plant.

    Args:
        net: the model of the plant.
        data: its scales.
        horizon: periods.
    """

    def __init__(self, net: nn.Module, data: Data, horizon: int) -> None:
        self.scales, self.horizon = data.scales, horizon
        twin = copy.deepcopy(net).double().eval()
        rows = torch.rand(4 * horizon + 1, STEPS, 4, dtype=torch.float64)
        with torch.no_grad():
            self.net = torch.jit.freeze(torch.jit.trace(twin, rows))
        self.target = -data.scales.out_low / data.scales.out_span
        self.calls = 0

    def costs(self, state: np.ndarray, plans: np.ndarray) -> np.ndarray:
        """Price plans: rows of inputs in [-1, 1], period by period."""
        self.calls += 1
        found, x = np.zeros(len(plans)), np.repeat(state[None], len(plans), 0)
        for period in range(self.horizon):
            u = plans[:, 2 * period : 2 * period + 2]
            row = torch.from_numpy(self.scales.inputs(x, u * LIMITS))
            with torch.inference_mode():
                out = self.net(row[:, None].expand(-1, STEPS, -1)).numpy()
            found += ((out - self.target) ** 2 * WEIGHTS).sum((1, 2)) + EFFORT * (u**2).sum(1)
            x = self.scales.state(out[:, -1])
        return found

    def priced(self, plan: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        """Price one plan and its slope, by central differences in one batch."""
        step = 1e-5
        shifts = np.eye(len(plan)) * step
        found = self.costs(state, np.concatenate([plan[None], plan + shifts, plan - shifts]))
        half = len(plan)
        return float(found[0]), (found[1 : half + 1] - found[half + 1 :]) / (2 * step)

    def plan(self, state: np.ndarray, guess: np.ndarray) -> Any:
        """Solve for the best plan."""
        from scipy.optimize import minimize

        bounds = [(-1.0, 1.0)] * len(guess)
        return minimize(
            self.priced, guess, (state,), "SLSQP", jac=True, bounds=bounds,
            options={"maxiter": 50, "ftol": 1e-6},
        )  # fmt: skip


def control(net: nn.Module, data: Data, size: Size) -> dict[str, float]:
    """Hold the true plant at its steady state from several starts."""
    seconds, rounds, calls, cost, ends = [], [], [], 0.0, []
    for start in STARTS[: size.starts]:
        controller = Controller(net, data, size.horizon)
        state, guess = start, np.zeros(2 * size.horizon)
        for _ in range(3):  # the first runs of a traced net compile it
            controller.priced(guess, state)
        for _ in range(size.moves):
            before, controller.calls = time.process_time(), 0
            found = controller.plan(state, guess)
            seconds.append(time.process_time() - before)
            rounds.append(int(found.nit))
            calls.append(controller.calls)
            seen = advance(state[None], (found.x[:2] * LIMITS)[None])[0]
            scaled = (seen - data.scales.out_low) / data.scales.out_span
            cost += float((((scaled - controller.target) ** 2) * WEIGHTS).sum())
            state, guess = seen[-1], np.concatenate([found.x[2:], found.x[-2:]])
        ends.append(float(energy(state)))
    return {
        "seconds_per_step": statistics.median(seconds),
        "milliseconds_per_call": 1e3 * sum(seconds) / sum(calls),
        "iterations": statistics.mean(rounds),
        "closed_loop_cost": cost,
        "worst_end_energy": max(ends),
    }


def row(net: nn.Module, data: Data, size: Size) -> dict[str, Any]:
    """Measure one net."""
    certificate = otp.certify(net, data.x[:256], pairs=size.pairs, steps=min(200, size.steps))
    violated = certificate.convex.violation
    return {
        "params": count_params(net),
        "test_mse": error(net, data),
        "convex": certificate.convex.how,
        "convex_text": certificate.convex.text,
        "violations": violated.share if violated else 0.0,
        "lipschitz": certificate.bound,
        **control(net, data, size),
    }


def rows(name: str, data: Data, size: Size, sigma: float, *, seed: int) -> list[dict[str, Any]]:
    """Train a net, prune it, and measure all."""
    torch.manual_seed(seed)
    net, start = NETS[name](size.hidden), time.perf_counter()
    train(net, data, data.noisy(sigma, seed + 1), epochs=size.epochs, seed=seed)
    net.eval()
    spent = {"net": name, "noise": sigma, "seed": seed}
    spent["train_seconds"] = time.perf_counter() - start
    found = [spent | {"kept": 1.0, "prune_seconds": 0.0} | row(net, data, size)]
    for share in SHARES:
        small, seconds = pruned(net, data, share, size)
        found.append(spent | {"kept": share, "prune_seconds": seconds} | row(small, data, size))
    return found


def main(words: list[str] | None = None) -> None:
    """Run all nets and seeds; what is written already is not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--quick", action="store_true", help="tiny nets, seconds instead of hours")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    size = QUICK if args.quick else Size()
    payload = read_json(args.json) or {"environment": environment(), "rows": []}
    done = {(r["net"], r["noise"], r["seed"]) for r in payload["rows"]}
    data = make_data(size.grid)
    for seed, name in product(range(args.seeds), NETS):
        if (name, args.noise, seed) not in done:
            payload["rows"] += rows(name, data, size, args.noise, seed=seed)
            write_json(args.json, payload)
            print(f"seed {seed}: {name}", flush=True)


if __name__ == "__main__":
    main()
