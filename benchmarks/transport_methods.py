"""What `transport.py` compares: our dispatch, and each peer the way its manual says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from torch_otprune import transport
from torch_otprune.transport.dispatch import Problem, choose

__all__ = ["METHODS", "Answer", "Method"]

EPS = 0.02  # of the mean cost, for everyone who needs a temperature


@dataclass(frozen=True)
class Answer:
    """What a method said.

    Args:
        value: W_2, in the unit of the points.
        marginal: share of mass in the wrong place; 0 where there is no plan.
        solver: who computed it.
    """

    value: float
    marginal: float = 0.0
    solver: str = ""


@dataclass(frozen=True)
class Method:
    """One competitor.

    Args:
        run: two clouds and a purpose in, an answer out.
        pairs: cost entries that fit in memory; infinite where it stores none.
        line: whether it stores none in one dimension.
        grows: whether its time surely grows with the dimension.
        purposes: what it can be asked for.
        only_line: whether it knows one dimension only.
    """

    run: Callable[[Tensor, Tensor, str], Answer]
    pairs: float = math.inf
    line: bool = False
    grows: bool = True
    purposes: tuple[str, ...] = ("value", "gradient", "plan")
    only_line: bool = False


def ours(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Ask for a distance or a coupling, and let the table choose."""
    if purpose == "plan":
        found = transport.coupling_points(x, y)
        if not found.exact:
            found.plan()
        return Answer(found.cost**0.5, found.marginal_error, found.solver)
    live = x.requires_grad_(purpose == "gradient")
    value = transport.wasserstein(live, y)
    if purpose == "gradient":
        value.backward()
    return Answer(float(value.detach()), 0.0, _named(*x.shape))


@cache
def _named(n: int, d: int) -> str:
    """Look the solver up outside what is timed."""
    return choose(Problem(n, n, d, purpose="value")).solver


def ours_entropic(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Force the temperature that geomloss is given."""
    found = transport.coupling_points(x, y, eps=EPS)
    found.plan()
    return Answer(found.cost**0.5, found.marginal_error, found.solver)


def ours_divergence(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Force the debiased entropic distance that takes over for large clouds."""
    live = x.requires_grad_(purpose == "gradient")
    value = transport.divergence(live, y, eps=EPS)
    if purpose == "gradient":
        value.backward()
    return Answer(float(value.detach()), 0.0, "divergence")


def ours_sliced(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Slice: not W_2 but near it, after scaling by sqrt(d)."""
    live = x.requires_grad_(purpose == "gradient")
    value = transport.sliced(live, y, count=64) * x.shape[1] ** 0.5
    if purpose == "gradient":
        value.backward()
    return Answer(float(value.detach()), 0.0, "sliced")


def ours_gaussian(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Compare first and second moments only."""
    return Answer(float(transport.gaussian_points(x, y).distance), 0.0, "gaussian")


def scipy_assignment(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Solve the assignment problem on a cost in float64."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(x.numpy(), y.numpy(), "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    if purpose == "gradient":
        2 * (x - y[torch.from_numpy(columns)]) / len(x)
    return Answer(float(cost[rows, columns].mean()) ** 0.5)


def pot_exact(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Run the network simplex of POT."""
    import ot

    a = np.full(len(x), 1 / len(x))
    if purpose == "gradient":
        live = x.requires_grad_()
        weights = torch.from_numpy(a).float()
        total = ot.emd2(weights, weights, ot.dist(live, y), numItermax=10**8)
        total.backward()
        return Answer(float(total.detach()) ** 0.5)
    cost = ot.dist(x.numpy().astype(np.float64), y.numpy().astype(np.float64))
    plan = ot.emd(a, a, cost, numItermax=10**8)
    return Answer(float((plan * cost).sum()) ** 0.5)


def pot_line(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Sort in POT, which knows the line."""
    import ot

    if purpose == "plan":
        a = np.full(len(x), 1 / len(x))
        left, right = x[:, 0].double().numpy(), y[:, 0].double().numpy()
        links = ot.emd_1d(left, right, a, a, dense=False)
        gap = left[links.row] - right[links.col]
        return Answer(float((links.data * gap**2).sum()) ** 0.5)
    live = x[:, 0].requires_grad_(purpose == "gradient")
    total = ot.wasserstein_1d(live, y[:, 0], p=2)
    if purpose == "gradient":
        total.backward()
    return Answer(float(total.detach()) ** 0.5)


def pot_sinkhorn(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Run kernel scaling in POT on torch tensors."""
    import ot

    live = x.requires_grad_(purpose == "gradient")
    cost = ot.dist(live, y)
    a = x.new_full((len(x),), 1 / len(x))
    reg = EPS * float(cost.detach().mean())
    plan = ot.sinkhorn(a, a, cost.detach(), reg, numItermax=2000, stopThr=1e-6, warn=False)
    total = (plan * cost).sum()
    if purpose == "gradient":
        total.backward()
    off = float((plan.sum(1) - a).abs().sum())
    return Answer(float(total.detach()) ** 0.5, off)


def pot_lazy(x: Tensor, y: Tensor, purpose: str) -> Answer:
    """Run POT without storing the cost."""
    import ot

    reg = EPS * float(x.square().sum(1).mean() + y.square().sum(1).mean())
    found = ot.solve_sample(x, y, reg=reg, lazy=True, max_iter=300, tol=1e-6, batch_size=512)
    return Answer(max(0.0, float(found.value_linear)) ** 0.5)


def geomloss(backend: str, scaling: float) -> Callable[[Tensor, Tensor, str], Answer]:
    """Run geomloss alone; plans are made from its potentials."""

    def run(x: Tensor, y: Tensor, purpose: str) -> Answer:
        from geomloss import SamplesLoss

        mean = float(x.var(0).sum() + y.var(0).sum() + (x.mean(0) - y.mean(0)).square().sum())
        blur = (EPS * mean / 2) ** 0.5
        plan = purpose == "plan"
        loss = SamplesLoss(
            "sinkhorn", p=2, blur=blur, scaling=scaling, backend=backend,
            potentials=plan, debias=not plan,
        )  # fmt: skip
        live = x.requires_grad_(purpose == "gradient")
        if not plan:
            value = loss(live, y)
            if purpose == "gradient":
                value.backward()
            return Answer(max(0.0, 2 * float(value.detach())) ** 0.5)
        f, g = loss(x, y)
        cost = torch.cdist(x, y).square_().div_(2)
        power = (f.view(-1, 1) + g.view(1, -1) - cost) / blur**2
        mass = power.exp_().div_(len(x) * len(y))
        off = float((mass.sum(1) - 1 / len(x)).abs().sum())
        return Answer(float(2 * (mass * cost).sum()) ** 0.5, off)

    return run


STORED = 2.0e8  # cost entries in float64 that fit in 2 GiB, with a copy
METHODS = {
    "ours": Method(ours, grows=False),
    "ours, eps 0.02": Method(ours_entropic, purposes=("plan",)),
    "ours, divergence": Method(ours_divergence, purposes=("value", "gradient")),
    "ours sliced": Method(ours_sliced, purposes=("value",)),
    "ours gaussian": Method(ours_gaussian, purposes=("value",)),
    "scipy assignment": Method(scipy_assignment, pairs=STORED, grows=False),
    "POT line": Method(pot_line, only_line=True),
    "POT exact": Method(pot_exact, pairs=STORED, grows=False),
    "POT Sinkhorn": Method(pot_sinkhorn, pairs=STORED),
    "POT lazy": Method(pot_lazy, purposes=("value",)),
    "geomloss tensorised": Method(geomloss("tensorized", 0.9), pairs=STORED),
    "geomloss tensorised, scaling .99": Method(geomloss("tensorized", 0.99), pairs=STORED),
    "geomloss online": Method(geomloss("online", 0.9), purposes=("value", "gradient")),
}
