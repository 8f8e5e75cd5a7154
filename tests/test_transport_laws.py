"""Claims that hold for every verb: units, odd inputs, precision, seeds, batches, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport.dispatch import TABLE

D = torch.float64
Verb = Callable[[Tensor, Tensor], Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, n: int) -> Tensor:
    w = torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.01
    return w / w.sum()


def pairwise(x: Tensor, y: Tensor) -> Tensor:
    return transport.pairwise_1d(torch.cat([x[:, :1], y[:, :1]], dim=1))[0, 1]


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    return transport.gaussian_points(x, y).distance


def worst(x: Tensor, y: Tensor) -> Tensor:
    return transport.max_sliced(x, y).distance


def features(x: Tensor, y: Tensor) -> Tensor:
    one, two = (transport.sliced_features(c, count=8, levels=8) for c in (x, y))
    return torch.linalg.vector_norm(one - two)


# Differentiable distances between two clouds of as many points.
LIVE: dict[str, Verb] = {
    "divergence": transport.divergence,
    "divergence blocks": lambda x, y: transport.divergence(x, y, solver="blocks"),
    "divergence geomloss": lambda x, y: transport.divergence(x, y, solver="geomloss"),
    "divergence p=1": lambda x, y: transport.divergence(x, y, p=1.0),
    "divergence stacked": lambda x, y: transport.divergence(x[None], y[None])[0],
    "gaussian": gaussian,
    "max_sliced": worst,
    "max_sliced p=1": lambda x, y: transport.max_sliced(x, y, p=1.0).distance,
    "paired_distance": transport.paired_distance,
    "pairwise_1d": pairwise,
    "sliced": transport.sliced,
    "sliced p=1": lambda x, y: transport.sliced(x, y, p=1.0),
    "sliced p=1.5": lambda x, y: transport.sliced(x, y, p=1.5),
    "wasserstein": transport.wasserstein,
    "wasserstein p=1": lambda x, y: transport.wasserstein(x, y, p=1.0),
    "wasserstein_1d": lambda x, y: transport.wasserstein_1d(x, y)[0],
    "wasserstein_1d p=3": lambda x, y: transport.wasserstein_1d(x, y, p=3.0)[0],
}
VERBS: dict[str, Verb] = LIVE | {
    "coupling_points": lambda x, y: torch.tensor(transport.coupling_points(x, y).cost ** 0.5),
    "flowtree": lambda x, y: torch.tensor(transport.flowtree(x, y).distance),
    "sliced_features": features,
}
SMALL = {"gaussian", "max_sliced", "sliced", "wasserstein", "wasserstein p=1"}


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_distance_is_in_the_unit_of_its_points(name: str) -> None:
    x, y = draw(0, 16, 3), draw(1, 16, 3) * 1.4 + 0.8
    one, two = (float(VERBS[name](s * x, s * y)) for s in (1.0, 1000.0))
    # A power of the distance would grow by 1e6 or 1e9.
    assert two == pytest.approx(1000 * one, rel=1e-4)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_a_shift_along_one_axis_is_its_own_length_for_every_order(p: float) -> None:
    x = draw(2, 20, 3)
    y = x + torch.tensor([0.7, 0.0, 0.0], dtype=D)
    assert float(transport.wasserstein(x, y, p=p)) == pytest.approx(0.7, rel=1e-9)
    assert transport.coupling_points(x, y, p=p).cost ** (1 / p) == pytest.approx(0.7, rel=1e-9)
    assert float(transport.wasserstein_1d(x, y, p=p)[0]) == pytest.approx(0.7, rel=1e-9)
    assert float(transport.sliced(x[:, :1], y[:, :1], p=p)) == pytest.approx(0.7, rel=1e-9)
    assert float(transport.max_sliced(x, y, p=p).distance) == pytest.approx(0.7, rel=1e-6)
    assert float(transport.divergence(x, y, p=p, eps=0.005)) == pytest.approx(0.7, rel=2e-2)


@given(seed=st.integers(0, 10_000))
def test_distances_are_symmetric_and_obey_the_triangle(seed: int) -> None:
    x, y, z = (draw(seed + i, 10, 2) + i for i in range(3))
    for verb in (transport.sliced, gaussian, features, pairwise):
        xy, yx, yz, xz = (float(verb(*pair)) for pair in ((x, y), (y, x), (y, z), (x, z)))
        assert xy == pytest.approx(yx, rel=1e-9)
        assert xz <= xy + yz + 1e-9


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(VERBS))
def test_half_precision_is_read_exactly_and_computed_in_single(
    name: str, kind: torch.dtype
) -> None:
    x, y = draw(3, 14, 10).to(kind), (draw(4, 14, 10) + 0.5).to(kind)
    got = VERBS[name](x, y)
    assert got.dtype in {torch.float32, D}
    assert float(got) == pytest.approx(float(VERBS[name](x.double(), y.double())), rel=1e-5)


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_common_offset_costs_no_more_digits_than_it_takes(name: str) -> None:
    x, y = draw(5, 30, 10), draw(6, 30, 10) + 0.5
    want = float(VERBS[name](x, y))
    # At 1000 a float32 resolves 6e-5, and the matmul shortcut without a centre only 0.1.
    assert float(VERBS[name]((x + 1000).float(), (y + 1000).float())) == pytest.approx(
        want, abs=2e-3
    )


def dead(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype)


ODD: dict[str, tuple[Tensor, Tensor, float | None]] = {
    "all points at zero": (torch.zeros(6, 3), torch.zeros(6, 3), 0.0),
    "dead channels": (dead(torch.arange(18.0).view(6, 3)), dead(torch.ones(6, 3)), None),
    "duplicated points": (torch.ones(6, 3), torch.tensor([[1.0, 2, 3]] * 6), None),
    "identical clouds": (torch.arange(18.0).view(6, 3), torch.arange(18.0).view(6, 3), 0.0),
    "single points": (torch.zeros(1, 3), torch.tensor([[3.0, 4.0, 0.0]]), None),
    "zero rows": (torch.eye(3).repeat(2, 1) * 0, torch.eye(3).repeat(2, 1), None),
}


@pytest.mark.parametrize("case", sorted(ODD))
@pytest.mark.parametrize("name", sorted(LIVE))
def test_odd_clouds_have_finite_distances_and_gradients(name: str, case: str) -> None:
    x, y, want = ODD[case]
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = LIVE[name](x, y)
    found.backward()
    assert math.isfinite(float(found.detach()))
    assert all(part.grad is None or bool(part.grad.isfinite().all()) for part in (x, y))
    if want is not None:
        assert float(found.detach()) == pytest.approx(want, abs=5e-3)


def test_points_of_no_weight_change_no_entropic_plan_of_the_others() -> None:
    x, y = draw(7, 8, 2), draw(8, 6, 2)
    a = torch.cat([torch.zeros(2, dtype=D), weights(9, 6)])
    mean = transport.sqdist(x, y).mean() / transport.sqdist(x[2:], y).mean()
    one = transport.coupling_points(x, y, a, eps=0.1, tol=1e-10).plan()
    two = transport.coupling_points(x[2:], y, a[2:], eps=0.1 * float(mean), tol=1e-10).plan()
    torch.testing.assert_close(one[2:], two, atol=1e-9, rtol=0)
    assert float(one[:2].abs().max()) == 0


def test_the_divergence_of_points_of_no_weight_is_finite_with_its_gradient() -> None:
    x, y = draw(10, 8, 2).requires_grad_(), draw(11, 6, 2)
    a = torch.cat([torch.zeros(2, dtype=D), weights(9, 6)])
    for solver in ("scaling", "blocks"):
        found = transport.divergence(x, y, a, solver=solver)
        (slope,) = torch.autograd.grad(found, x)
        assert bool(slope.isfinite().all())
        assert float(slope[:2].abs().max()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_hole_in_either_cloud_is_refused(name: str, bad: float) -> None:
    x, y = draw(12, 9, 3), draw(13, 9, 3)
    y[4, 0] = bad
    for pair in ((x, y), (y, x)):
        with pytest.raises(TransportError, match=r"entries of . are NaN or infinite"):
            VERBS[name](*pair)


@pytest.mark.parametrize("name", sorted(VERBS))
def test_the_same_question_has_the_same_answer_and_moves_no_seed(name: str) -> None:
    x, y = draw(14, 30, 4).float(), draw(15, 30, 4).float() + 0.5
    torch.manual_seed(1)
    one, state = VERBS[name](x, y), torch.get_rng_state()
    torch.manual_seed(2)
    two = VERBS[name](x, y)
    torch.manual_seed(1)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "verb",
    [
        transport.divergence,
        transport.sliced,
        worst,
        lambda x, y: transport.pairwise_1d(x),
        lambda x, y: torch.stack(
            [c.plan() for c in transport.couplings(transport.sqdist(x, y), eps=0.05)]
        ),
    ],
)
def test_the_order_of_stacked_layers_changes_no_answer(verb: Verb) -> None:
    x, y = draw(16, 6, 15, 3), draw(17, 6, 12, 3) + 1
    way = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(verb(x[way], y[way]), verb(x, y)[way], rtol=1e-12, atol=0)


def slope_and_difference(verb: Verb, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient in x, and the same by central differences."""
    live = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(verb(live, y), live)
    numeric, h = torch.zeros_like(x), 1e-4
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = h
        numeric.view(-1)[i] = float(verb(x + step, y) - verb(x - step, y)) / (2 * h)
    return slope, numeric


@pytest.mark.parametrize(
    "name", sorted(n for n in LIVE if not n.startswith(("divergence", "max_sliced")))
)
def test_gradients_match_finite_differences(name: str) -> None:
    slope, numeric = slope_and_difference(LIVE[name], draw(18, 9, 3), draw(19, 9, 3) + 1)
    assert float((slope - numeric).norm() / numeric.norm()) < 1e-5


@pytest.mark.parametrize("seed", [20, 50])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
def test_the_gradient_of_the_worst_direction_is_that_of_the_maximum(p: float, seed: int) -> None:
    # Danskin: where the direction is the best one, it need not be differentiated. For few points
    # and p > 1 it lies where matchings tie, and no single one of them has this gradient.
    y = draw(seed + 1, 14, 3) + torch.tensor([2.0, 0.5, 0.0], dtype=D)
    slope, numeric = slope_and_difference(
        lambda s, t: transport.max_sliced(s, t, p=p).distance, draw(seed, 14, 3), y
    )
    assert float((slope - numeric).norm() / numeric.norm()) < 0.02


@pytest.mark.parametrize("solver", ["scaling", "blocks", "geomloss"])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_every_solver_of_the_divergence_has_the_gradient_of_its_value(
    solver: str, p: float
) -> None:
    x, y = draw(22, 8, 2), draw(23, 7, 2) + 1
    heat = 0.1 * float(transport.ground_cost(x, y, p=p).mean())

    def value(s: Tensor, t: Tensor) -> Tensor:  # the temperature follows the data: hold it still
        mean = float(transport.coupling_points(s.detach(), t, p=p, eps=1.0).geometry.mean())
        return transport.divergence(s, t, p=p, eps=heat / mean, solver=solver)

    slope, numeric = slope_and_difference(value, x, y)
    # Potentials stop at a marginal error of 1e-4 to 1e-3; differences see that error divided by h.
    assert float((slope - numeric).norm() / numeric.norm()) < 0.05


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_gradients_on_the_line_hold_for_every_order(p: float, weighted: bool) -> None:
    x, y = draw(24, 7, 2).requires_grad_(), draw(25, 7, 2).requires_grad_()
    a = weights(26, 7) if weighted else None
    assert torch.autograd.gradcheck(lambda s, t: transport.wasserstein_1d(s, t, a, p=p), (x, y))


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 15),
    m=st.integers(2, 15),
    eps=st.sampled_from([1.0, 0.1, 0.02]),
)
def test_no_plan_hides_how_much_mass_it_misplaces(seed: int, n: int, m: int, eps: float) -> None:
    cost, a, b = transport.sqdist(draw(seed, n, 2), draw(seed + 1, m, 2)), None, weights(2, m)
    found = transport.coupling(cost, a, b, eps=eps, tol=9e-3)
    plan = found.plan()
    wrong = max(
        float((plan.sum(1) - found.a).abs().sum()), float((plan.sum(0) - found.b).abs().sum())
    )
    assert found.marginal_error <= 0.01
    assert wrong <= found.marginal_error + 1e-9


PLANS = [row.solver for row in TABLE if "plan" in row.purposes]


@pytest.mark.parametrize("solver", [name for name in PLANS if name != "keops"])
def test_every_line_of_the_table_can_be_forced_and_says_so(solver: str) -> None:
    x, y = draw(27, 30, 1), draw(28, 20, 1) + 1
    found = transport.coupling_points(x, y, solver=solver, explain=True)
    first, *rest = found.why.splitlines()
    assert (found.solver, first) == (solver, "forced by the caller")
    before = PLANS[: PLANS.index(solver)]
    assert [line.split()[1].rstrip(":") for line in rest] == before


def test_an_explained_choice_names_every_line_that_was_passed_over() -> None:
    found = transport.coupling_points(draw(29, 30, 2), draw(30, 20, 2), eps=0.1, explain=True)
    assert found.solver == "scaling"
    assert [line.split(":")[0].strip() for line in found.why.splitlines()[1:]] == [
        "not line",
        "not exact",
    ]
