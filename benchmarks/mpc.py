"""Control a reactor by nets that are convex, dense and pruned: how accurate, how certain, how fast?

Question: can a certified convex recurrent net lose two thirds, or nine tenths, of its parameters
and still predict, keep its certificate, and make the controller faster?
Expected before the run: an input-convex RNN of 38.5 k parameters at 13 k or less with a test error
of 1.5e-4 or less under noise 0.4, the certificate unchanged, control steps at least twice as fast.

The plant is that of `mpc_plant.py`. Nets predict ten states over one period from the state and the
inputs, all scaled to [0, 1]; they are trained on outputs with noise and tested without. Pruning
sees inputs of the training set only, and no training follows. The controller plans ten periods by
SLSQP with central differences. Pricing all of its plans is one traced graph in float64, net,
scales and costs, so that little is timed that is not the net; time is the processor's, on one
thread. Nets are kept, and `--time` puts them in control once more without training them again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
NETS_AT = Path(__file__).resolve().parents[1] / "build" / "mpc"
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


class Rollout(nn.Module):
    """Prices plans by the net: scaled states' squares over all periods, and effort.

    Args:
        net: the model of the plant, in float64.
        data: its scales.
        horizon: periods.
    """

    def __init__(self, net: nn.Module, data: Data, horizon: int) -> None:
        super().__init__()
        self.net, self.horizon, scales = net, horizon, data.scales
        self.low, self.span = map(torch.from_numpy, (scales.low, scales.span))
        self.out_low, self.out_span = map(torch.from_numpy, (scales.out_low, scales.out_span))
        self.target = -self.out_low / self.out_span
        self.limits, self.weights = torch.from_numpy(LIMITS), torch.from_numpy(WEIGHTS)

    def forward(self, state: Tensor, plans: Tensor) -> Tensor:
        """Price rows of inputs in [-1, 1], period by period."""
        x, found = state.expand(plans.shape[0], -1), EFFORT * plans.square().sum(1)
        for u in plans.split(2, 1):
            row = (torch.cat([x, u * self.limits], 1) - self.low) / self.span
            out = self.net(row[:, None].expand(-1, STEPS, -1))
            found = found + ((out - self.target).square() * self.weights).sum((1, 2))
            x = out[:, -1] * self.out_span + self.out_low
        return found


class Controller:
    """Plans inputs over several periods by SLSQP, with the net as the plant.

    Args:
        net: the model of the plant.
        data: its scales.
        horizon: periods.
    """

    def __init__(self, net: nn.Module, data: Data, horizon: int) -> None:
        rollout = Rollout(copy.deepcopy(net).double(), data, horizon).eval()
        self.target, self.calls = rollout.target.numpy(), 0
        plans = torch.zeros(4 * horizon + 1, 2 * horizon, dtype=torch.float64)
        with torch.no_grad():
            traced = torch.jit.trace(rollout, (plans[:1, :2], plans))
            self.rollout = torch.jit.freeze(traced)
        for _ in range(3):  # the first runs of a traced net compile it
            self.costs(np.zeros(2), plans.numpy())

    def costs(self, state: np.ndarray, plans: np.ndarray) -> np.ndarray:
        """Price plans."""
        self.calls += 1
        with torch.inference_mode():
            found: np.ndarray = self.rollout(
                torch.from_numpy(state[None]), torch.from_numpy(plans)
            ).numpy()
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
    controller = Controller(net, data, size.horizon)
    for start in STARTS[: size.starts]:
        state, guess = start, np.zeros(2 * size.horizon)
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


def judged(net: nn.Module, data: Data, size: Size) -> dict[str, Any]:
    """Measure size, error and certificate."""
    certificate = otp.certify(net, data.x[:256], pairs=size.pairs, steps=min(200, size.steps))
    violated = certificate.convex.violation
    return {
        "params": count_params(net),
        "test_mse": error(net, data),
        "convex": certificate.convex.how,
        "convex_text": certificate.convex.text,
        "violations": violated.share if violated else 0.0,
        "lipschitz": certificate.bound,
    }


@dataclass(frozen=True)
class Job:
    """One row.

    Args:
        net: which of `NETS`.
        noise: standard deviation of what is added to the outputs, in their scaled unit.
        seed: of weights, noise and order.
        kept: share of the parameters.
    """

    net: str
    noise: float
    seed: int
    kept: float


def made(job: Job, data: Data, size: Size, *, nets: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a net and what it cost, or train it, or prune the dense one."""
    folder = nets / "-".join(map(str, (*asdict(job).values(), size.hidden))).replace(" ", "")
    if spent := read_json(folder / "spent.json"):  # written last
        return _loaded(job, size, folder), spent
    if job.kept == 1.0:
        torch.manual_seed(job.seed)
        net, start = NETS[job.net](size.hidden), time.perf_counter()
        noisy = data.noisy(job.noise, job.seed + 1)
        train(net, data, noisy, epochs=size.epochs, seed=job.seed)
        spent = {"train_seconds": time.perf_counter() - start, "prune_seconds": 0.0}
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), folder / "dense.pt")
    else:
        dense, spent = made(replace(job, kept=1.0), data, size, nets=nets)
        net, seconds = pruned(dense, data, job.kept, size)
        spent = spent | {"prune_seconds": seconds}
        otp.save(net, folder)
    write_json(folder / "spent.json", spent)
    return net.eval(), spent


def _loaded(job: Job, size: Size, folder: Path) -> nn.Module:
    def build() -> nn.Module:
        return NETS[job.net](size.hidden)

    if job.kept < 1.0:
        return otp.load(folder, factory=build).eval()
    net = build()
    net.load_state_dict(torch.load(folder / "dense.pt"))
    return net.eval()


def main(words: list[str] | None = None) -> None:
    """Run all nets and seeds; rows that are written already are not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--nets", type=Path, default=NETS_AT, help="where trained nets are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--time", action="store_true", help="put all nets in control once more")
    parser.add_argument("--quick", action="store_true", help="tiny nets, seconds instead of hours")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    size = QUICK if args.quick else Size()
    payload = read_json(args.json) or {"environment": environment(), "rows": []}
    rows = {Job(r["net"], r["noise"], r["seed"], r["kept"]): r for r in payload["rows"]}
    data = make_data(size.grid)
    for seed, name, kept in product(args.seeds, NETS, (1.0, *SHARES)):
        job = Job(name, args.noise, seed, kept)
        if job in rows and not args.time:
            continue
        net, spent = made(job, data, size, nets=args.nets)
        known = rows.get(job) or asdict(job) | spent | judged(net, data, size)
        rows[job] = known | control(net, data, size)
        write_json(args.json, payload | {"rows": list(rows.values())})
        print(f"seed {seed}: {name}, {kept:g}", flush=True)


if __name__ == "__main__":
    main()
