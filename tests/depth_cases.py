"""Tiny networks with layers that can go, in several spellings."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp


class Mlp(nn.Module):
    """x + down(act(up(x))): the plainest of all residual blocks."""

    def __init__(self, width: int, hidden: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """A stem, blocks in a row, a head."""

    def __init__(self, blocks: int = 4, *, norm: bool = False, listed: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        made = [Mlp(6, 9, norm=norm) for _ in range(blocks)]
        self.blocks = nn.ModuleList(made) if listed else nn.Sequential(*made)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Named(nn.Module):
    """Blocks as attributes, called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.first, self.second, self.third = (Mlp(6, 9) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(self.stem(x)))))


class Conv(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        into = width // stride
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(into, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class Pictures(nn.Module):
    """Two stages of residual convolutions; the first of the second strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Conv(4), Conv(4), Conv(4))
        self.layer2 = nn.Sequential(Conv(8, 2), Conv(8), Conv(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


class Layer(nn.Module):
    """A pre-norm transformer layer with both halves."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln1(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), mask))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """Tokens in, one vector out."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.final, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x).mean(1))


class Tuples(nn.Module):
    """Layers that return more than their stream, as Transformers' do."""

    def __init__(self, *, extra: str = "none") -> None:
        super().__init__()
        self.stem, self.head, self.extra = nn.Linear(5, 6), nn.Linear(6, 3), extra
        self.layers = nn.ModuleList(Tupled(extra) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x, _ = layer(x, bias=bias)
        return self.head(x)


class Tupled(Mlp):
    """Returns (x, None), or (x, the input `bias`), or (x, something of its own)."""

    def __init__(self, extra: str) -> None:
        super().__init__(6, 9)
        self.extra = extra

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        y = super().forward(x)
        return y, {"none": None, "handed": bias, "own": y.square()}[self.extra]


BUILDS = {
    "list": lambda: Stack(),
    "sequential": lambda: Stack(listed=False),
    "pre_norm": lambda: Stack(norm=True),
    "named": Named,
    "pictures": Pictures,
    "transformer": Transformer,
    "tuples": Tuples,
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """Make a network in float64, its batch-norms settled."""
    torch.manual_seed(seed)
    model = BUILDS[name]().double()
    with torch.no_grad():
        for _ in range(3):
            model.train()(data(name, 32, seed=7))
    return model.eval()


def data(name: str, samples: int = 48, *, seed: int = 1) -> Tensor:
    """Draw inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    if name == "transformer":
        return torch.randint(0, 11, (samples, 5), generator=generator)
    shape = (3, 8, 8) if name == "pictures" else (5,)
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)


def pruned(name: str, *, seed: int = 0, **rule: object) -> tuple[nn.Module, nn.Module, otp.Report]:
    """Prune by one layer rule; return the dense network, the pruned one and the report."""
    dense = build(name, seed=seed)
    small = copy.deepcopy(dense)
    policy = otp.Policy(rules=[otp.Layers(**rule)])  # type: ignore[arg-type]
    return dense, small, otp.prune_(small, policy, list(data(name).split(16)), timing=0)
