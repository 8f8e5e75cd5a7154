"""The tiny models that every stage runs on, with what each of them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_otprune.plan import Cut
from torch_otprune.plan.slices import slices
from torch_otprune.structure import Graph, flat_tensors, run


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Args:
        build: makes the model, in float32 and with torch's own initialisation.
        shape: of one sample.
        wrap: from a tensor of samples to a batch as the model takes it.
        blocked: whether the model holds channels that cannot go, besides the output's.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    wrap: Callable[[Tensor], Any] = lambda x: x
    tokens: int = 0
    blocked: bool = False

    def model(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Build it in evaluation mode, alive: signals of size one, norms that do something."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            for module in model.modules():
                _stir(module)
            _estimate(model.to(torch.float64), self.batch(64, seed=2))
        return model.to(dtype).eval()

    def batch(self, samples: int = 8, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Any:
        """Draw a batch."""
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, *self.shape)
        if self.tokens:
            return self.wrap(torch.randint(0, self.tokens, shape, generator=generator))
        return self.wrap(torch.randn(shape, generator=generator, dtype=dtype))


@torch.no_grad()
def _stir(module: nn.Module) -> None:
    """Give layers gain, and move a norm away from the identity, as training does."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        module.weight.mul_(2)
    elif "Norm" in type(module).__name__:
        module.weight.copy_(torch.rand_like(module.weight) + 0.5)
        module.bias.copy_(torch.randn_like(module.bias) / 4)


@torch.no_grad()
def _estimate(model: nn.Module, batch: Any) -> None:
    """Let the batch-norms see data once."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
    run(model.train(), batch)
    for norm in norms:
        norm.momentum = 0.1


class Residual(nn.Module):
    """Two blocks, the second with a 1x1 shortcut."""

    def __init__(self, blocks: int = 2, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        strides = [2 if i == 1 else 1 for i in range(blocks)]
        widths = [width if i < 1 else width + 2 for i in range(blocks)]
        self.blocks = nn.Sequential(
            *(_Block(a, b, s) for a, b, s in zip([width, *widths], widths, strides, strict=False))
        )
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        plain = into == out and stride == 1
        self.short = (
            nn.Identity()
            if plain
            else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class OptionA(nn.Module):
    """A shortcut that strides and pads with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.head = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels gated by a function of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.conv2(x * gate)).mean((2, 3)))


class Branches(nn.Module):
    """Two branches are added and read by two consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.two = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.left(x) + self.right(x))
        return self.head(torch.cat([self.one(x), self.two(x)], 1).relu().mean((2, 3)))


class Gated(nn.Module):
    """One convolution makes value and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.out = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return self.head(F.relu(self.out(value * torch.sigmoid(gate))).mean((2, 3)))


class Attention(nn.Module):
    """Embedding, single-head attention with layers of its own, MLP, two layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm1(x)
        scores = self.q(y) @ self.k(y).transpose(-1, -2) / 8**0.5
        x = x + self.o(scores.softmax(-1) @ self.v(y))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x).mean(1)


class Tokens(nn.Module):
    """Embedding, learnt positions (more of them than channels) and a scale, all bare or tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.place = nn.Parameter(torch.randn(1, 7, 6))
        self.scale = nn.Parameter(torch.rand(6))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        x = x + self.scale * self.down(torch.tanh(self.up(x)))
        return self.head(x).mean(1)


class Named(nn.Module):
    """Takes and returns names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.fc1(features))
        return {"logits": self.fc3(F.relu(self.fc2(hidden))), "power": features.square().mean(1)}


class Pair(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 7), nn.Linear(6, 5)
        self.join, self.head = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(a)), torch.tanh(self.right(b))], dim=1)
        return self.head(F.relu(self.join(x)))


class Tied(nn.Module):
    """Reads and writes tokens by one matrix; only the hidden layer can go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(F.relu(self.up(x)))).mean(1)


class AutoEncoder(nn.Module):
    """Strided down, transposed up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up1 = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.up2 = nn.ConvTranspose2d(6, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down2(F.relu(self.down1(x))))
        return self.up2(F.relu(self.norm(self.up1(x))))


def frozen() -> nn.Module:
    """Freeze all but the head."""
    model = plain()
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(False)
    return model


def plain() -> nn.Module:
    """Convolutions, batch-norms, pooling, a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 8, 1),
        nn.Hardswish(),
        *_HEAD(8),
    )


def _HEAD(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.ReLU(),
        *_HEAD(6),
    )


def _group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.GroupNorm(6, 6),
        nn.ReLU(),
        *_HEAD(6),
    )


def _flatten() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 9, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


def _prelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.PReLU(6),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.PReLU(),
        *_HEAD(8),
    )


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, padding=2),
        nn.BatchNorm1d(6),
        nn.GELU(),
        nn.Conv1d(6, 8, 3, stride=2, dilation=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.Conv3d(6, 5, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def _bare() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.LeakyReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5, bias=False),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Tanh(),
        nn.Linear(10, 4),
    )  # fmt: skip


IMAGE = (3, 8, 8)

CASES: dict[str, Case] = {
    "plain": Case(plain, IMAGE),
    "mlp": Case(_mlp, (6,)),
    "residual": Case(Residual, IMAGE),
    "option_a": Case(OptionA, IMAGE, blocked=True),
    "concat": Case(Dense, IMAGE),
    "depthwise": Case(_depthwise, IMAGE),
    "grouped": Case(_grouped, IMAGE),
    "group_norm": Case(_group_norm, IMAGE, blocked=True),
    "squeeze_excite": Case(SqueezeExcite, IMAGE),
    "conv1d": Case(_conv1d, (3, 16)),
    "conv3d": Case(_conv3d, (2, 4, 4, 4)),
    "transposed": Case(AutoEncoder, IMAGE),
    "flatten": Case(_flatten, IMAGE),
    "branches": Case(Branches, IMAGE),
    "gated": Case(Gated, IMAGE),
    "attention": Case(Attention, (7,), tokens=11, blocked=True),
    "tokens": Case(Tokens, (7,), tokens=11),
    "named": Case(Named, (6,), wrap=lambda x: {"features": x, "labels": x[:, 0]}),
    "pair": Case(Pair, (6,), wrap=lambda x: (x, x.flip(0))),
    "tied": Case(Tied, (7,), tokens=11, blocked=True),
    "frozen": Case(frozen, IMAGE),
    "prelu": Case(_prelu, IMAGE),
    "bare": Case(_bare, IMAGE),
}


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run a model and list what it returns."""
    with torch.no_grad():
        return [t.clone() for t in flat_tensors(run(model, batch))]


def random_cuts(graph: Graph, *, seed: int = 0, hidden: bool = True) -> list[Cut]:
    """Cut a random set of units, never all and never none, from every group."""
    generator = torch.Generator().manual_seed(seed)
    groups = [g for g in graph.groups if hidden or g.kind != "hidden"]
    return [cut(graph, g.name, _some(g.units, generator)) for g in groups]


def _some(units: int, generator: torch.Generator) -> Tensor:
    size = int(torch.randint(1, units, (1,), generator=generator))
    return torch.randperm(units, generator=generator)[:size].sort().values


def cut(graph: Graph, name: str, keep: Tensor, *, rule: int = 0) -> Cut:
    """Spell out one cut."""
    group = graph.group(name)
    return Cut(
        group=name,
        rule=rule,
        units=group.units,
        keep=tuple(keep.tolist()),
        criterion="random",
        error=0.0,
        reason="chance",
        slices=slices(group, keep),
    )
