"""What a rectifier does to a normal input, in closed form."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["cdf", "rectified", "relu6", "share_off"]


def cdf(t: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
    """Take the normal distribution function, accurate in the lower tail too."""
    tail: Tensor = torch.special.erfc(-t / math.sqrt(2))
    return tail / 2


def share_off(
    mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]
) -> Float[Tensor, " channels"]:
    """Tell how often a normal input is not above zero.

    Args:
        mean: of the input.
        std: not below zero; where it is zero, the input is its mean.

    Returns:
        probabilities.
    """
    spread = torch.where(std > 0, std, 1.0)
    return torch.where(std > 0, cdf(-mean / spread), (mean <= 0).to(mean))


def rectified(
    mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Take the moments of a ReLU of a normal input.

    Args:
        mean: of the input.
        std: of the input, above zero.

    Returns:
        the mean slope, the mean and the mean square of the output.

    Source: partial moments of the normal law; the mean slope is the best one by Stein's lemma.
    """
    t = mean / std
    on, density = cdf(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    first = mean * on + std * density
    second = (mean.square() + std.square()) * on + mean * std * density
    return on, first, second


def relu6(
    mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Take the same moments of a ReLU6, the difference of two ReLUs.

    Args:
        mean: of the input.
        std: of the input, above zero.

    Returns:
        the mean slope, the mean and the mean square of the output.
    """
    on, first, second = rectified(mean, std)
    cap, over, squared = rectified(mean - 6, std)
    return on - cap, first - over, second - squared - 12 * over
