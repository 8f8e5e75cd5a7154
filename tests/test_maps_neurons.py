"""Hidden units as particles: what may not change, and what must fall."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from torch_otprune.errors import RepairError, TransportError
from torch_otprune.maps import flow_neurons

DOUBLE = torch.float64


def pair(hidden: int, *, seed: int = 0) -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(seed)
    first, second = nn.Linear(5, hidden).double(), nn.Linear(hidden, 3).double()
    return first, second, torch.randn(400, 5, dtype=DOUBLE)


def run(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    return second(torch.relu(first(x))).detach()


@pytest.mark.parametrize("energy", ["sinkhorn", "function"])
def test_all_units_stay_where_they_are(energy: str) -> None:
    first, second, x = pair(8)
    found = flow_neurons(first, torch.relu, second, inputs=x, width=8, energy=energy)  # type: ignore[arg-type]
    torch.testing.assert_close(found.first.weight, first.weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        run(found.first, found.second, x), run(first, second, x), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("energy", ["sinkhorn", "function", "none"])
def test_copies_of_units_go_without_an_error(energy: str) -> None:
    first, second, x = pair(12)
    with torch.no_grad():
        first.weight[6:] = first.weight[:6]
        first.bias[6:] = first.bias[:6]
    found = flow_neurons(first, torch.relu, second, inputs=x, width=6, energy=energy)  # type: ignore[arg-type]
    assert found.error_after < 1e-9
    assert (found.first.out_features, found.second.in_features) == (6, 6)
    torch.testing.assert_close(
        run(found.first, found.second, x), run(first, second, x), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("energy", ["sinkhorn", "function"])
def test_the_energy_of_the_units_falls_from_anchor_to_anchor(energy: str) -> None:
    first, second, x = pair(32)
    found = flow_neurons(first, torch.relu, second, inputs=x, width=8, anchors=4, energy=energy)  # type: ignore[arg-type]
    assert len(found.energies) > 1
    assert list(found.energies) == sorted(found.energies, reverse=True)


def test_moving_the_function_leaves_a_smaller_error_than_choosing_units() -> None:
    first, second, x = pair(32)
    found = flow_neurons(first, torch.relu, second, inputs=x, width=8, energy="function")
    assert found.error_after < 0.9 * found.error_before
    new = torch.randn(400, 5, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    wanted = run(first, second, new)
    off = (run(found.first, found.second, new) - wanted).square().sum()
    assert float(off / (wanted - wanted.mean(0)).square().sum()) < 2 * found.error_before


def test_the_layers_that_were_given_are_left_alone() -> None:
    first, second, x = pair(12)
    before = [p.clone() for p in (*first.parameters(), *second.parameters())]
    flow_neurons(first, torch.relu, second, inputs=x, width=4, anchors=1)
    after = (*first.parameters(), *second.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("width", "features", "problem"),
    [(13, 5, "width is 13 of 12 hidden units."), (4, 6, "inputs have 6 features.")],
)
def test_layers_that_do_not_fit_are_refused(width: int, features: int, problem: str) -> None:
    first, second, _ = pair(12)
    with pytest.raises(RepairError) as error:
        flow_neurons(first, torch.relu, second, inputs=torch.randn(40, features), width=width)
    assert error.value.problem == problem
    assert error.value.where == "flow_neurons, 5-12-3"


def test_too_few_inputs_are_refused() -> None:
    first, second, x = pair(12)
    with pytest.raises(TransportError) as error:
        flow_neurons(first, torch.relu, second, inputs=x[:4], width=6)
    assert error.value.problem == "4 inputs cannot tell 6 hidden units apart."


@pytest.mark.parametrize(
    ("setting", "problem"),
    [({"energy": "guess"}, "'guess' is no energy of units."), ({"step": 0.0}, "step is 0.0.")],
)
def test_settings_that_mean_nothing_are_refused(setting: dict[str, object], problem: str) -> None:
    first, second, x = pair(12)
    bare = inspect.unwrap(flow_neurons)  # without the tests' own check of types
    with pytest.raises(TransportError) as error:
        bare(first, torch.relu, second, inputs=x, width=4, **setting)  # type: ignore[arg-type]
    assert error.value.problem == problem


def test_a_layer_that_is_not_linear_is_refused() -> None:
    _, second, x = pair(12)
    with pytest.raises(RepairError) as error:
        inspect.unwrap(flow_neurons)(nn.Conv1d(5, 12, 1), torch.relu, second, inputs=x, width=4)  # type: ignore[arg-type]
    assert error.value.problem == "a Conv1d is no linear layer."
