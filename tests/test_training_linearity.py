"""How far an activation is from a line per channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_otprune.training import Linearity, Memory

# Unexplained share of a ReLU's variance at mean t and deviation 1, by Monte Carlo (Stein's lemma).
GAUSSIAN = {0.0: 0.267, 1.0: 0.058, -1.0: 0.631, 2.0: 0.0055}


def value(z: Tensor, f: Tensor, axis: str = "auto") -> Tensor:
    return Linearity(axis=axis).value(z, f, Memory(seed=0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("mean", "share"), GAUSSIAN.items())
def test_a_gaussian_input_gives_steins_share(mean: float, share: float) -> None:
    z = torch.randn(400_000, 1, dtype=torch.float64) + mean
    assert float(value(z, z.relu())) == pytest.approx(share, rel=0.02)


def test_channels_that_never_switch_cost_nothing() -> None:
    z = torch.randn(30, 4, 5, 5, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(1, 4, 1, 1)
    z = signs * (z.abs() + 0.1)
    assert float(value(z, z.relu())) == pytest.approx(0.0, abs=1e-15)


def test_it_is_the_residual_of_least_squares_per_channel() -> None:
    z = torch.randn(50, 3, 4, dtype=torch.float64) + torch.tensor([0.0, 1.0, -2.0]).view(1, 3, 1)
    f = F.gelu(z)
    left, total = 0.0, 0.0
    for c in range(3):
        design = torch.stack([z[:, c].flatten(), torch.ones(200)], dim=1)
        target = f[:, c].flatten()
        fitted = design @ torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
        left += float((target - fitted).square().sum())
        total += float((target - target.mean()).square().sum())
    assert float(value(z, f, axis="second")) == pytest.approx(left / total, rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
def test_auto_takes_the_last_axis_of_tokens_and_the_second_elsewhere(
    shape: tuple[int, ...],
) -> None:
    z = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(value(z, z.relu()), value(z, z.relu(), axis="last"))
    maps = z[..., None, None] if len(shape) == 2 else z.movedim(-1, 1)[..., None]
    torch.testing.assert_close(value(maps, maps.relu()), value(z, z.relu()))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_shrinking_the_features_gains_nothing(factor: float) -> None:
    z = torch.randn(64, 5, dtype=torch.float64)
    small = (factor * z).requires_grad_()
    share = value(small, small.relu())
    torch.testing.assert_close(share, value(z, z.relu()))
    share.backward()
    assert float((small.grad * small.detach()).sum()) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_agrees_with_finite_differences() -> None:
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: value(a, F.gelu(a)), (z,))


def test_constant_and_dead_channels_have_finite_gradients() -> None:
    z = torch.tensor([[2.0, -1.0], [2.0, -3.0]], requires_grad=True)
    share = value(z, z.relu())
    share.backward()
    assert share == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_descending_the_penalty_makes_the_activation_linear() -> None:
    shift = torch.zeros(4, requires_grad=True)
    z, descent = torch.randn(256, 4), torch.optim.SGD([shift], lr=1.0)
    before = float(value(z, z.relu()))
    for _ in range(60):
        descent.zero_grad()
        value(z + shift, (z + shift).relu()).backward()
        descent.step()
    shifted = z + shift.detach()
    assert float(value(shifted, shifted.relu())) < before / 4
