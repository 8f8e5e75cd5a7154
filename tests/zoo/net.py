"""How the shelves of the zoo write small nets: parts by name and one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry

__all__ = ["Net", "Shelf", "conv", "tokens"]


class Net(nn.Module):
    """Parts, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def conv(into: int, out: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    """Make a convolution that keeps the size of a picture."""
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **settings)


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """Draw token numbers."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, vocabulary, shape, generator=generator)


class Shelf(dict[str, Entry]):
    """Entries by name, filled by a decorator.

    Args:
        family: of all entries.
    """

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family

    def __call__(
        self, *shape: int, refused: str = "", example: Callable[[], Any] | None = None
    ) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
        """Enrol a function that builds a model.

        Args:
            shape: of one sample, drawn from a normal distribution.
            refused: as in `Entry`.
            example: makes the batch instead.
        """

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(1)
            return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

        def enrol(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            self[build.__name__] = Entry(self.family, build, example or draw, refused)
            return build

        return enrol
