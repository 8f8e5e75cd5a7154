"""Pictures, sound and points: the families of nets, each in a few layers of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.net import Net, Shelf, conv

ENTRIES = Shelf("vision")


def unit(into: int, out: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    """Convolution, batch-norm, activation."""
    return nn.Sequential(
        conv(into, out, kernel, bias=False, **settings), nn.BatchNorm2d(out), nn.ReLU()
    )


def plain(into: int, out: int, kernel: int = 3, **settings: Any) -> nn.Sequential:
    """Convolution and batch-norm."""
    return unit(into, out, kernel, **settings)[:2]


def head(width: int) -> nn.Sequential:
    """Pool and classify."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def residual(body: nn.Module, short: nn.Module | None = None) -> nn.Module:
    """A branch added to its input."""
    return Net(lambda m, x: F.relu(m.body(x) + m.short(x)), body=body, short=short or nn.Identity())


@ENTRIES(3, 12, 10)
def vgg() -> nn.Module:
    return nn.Sequential(
        unit(3, 9), nn.MaxPool2d(2), unit(9, 11), unit(11, 10), nn.AdaptiveAvgPool2d((2, 3)),
        nn.Flatten(), nn.Linear(60, 13), nn.ReLU(), nn.Dropout(), nn.Linear(13, 5),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def resnet() -> nn.Module:
    return nn.Sequential(
        unit(3, 9), residual(nn.Sequential(unit(9, 7), plain(7, 9))),
        residual(nn.Sequential(unit(9, 12, stride=2), plain(12, 11)), plain(9, 11, 1, stride=2)),
        residual(nn.Sequential(unit(11, 8), plain(8, 11))), head(11),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def resnet_bottleneck() -> nn.Module:
    body = nn.Sequential(unit(9, 6, 1), unit(6, 7), plain(7, 13, 1))
    return nn.Sequential(unit(3, 9), residual(body, plain(9, 13, 1)), head(13))


@ENTRIES(3, 12, 10)
def resnet_preactivated() -> nn.Module:
    def block(width: int, inner: int) -> nn.Module:
        body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), conv(width, inner), nn.BatchNorm2d(inner), nn.ReLU(),
            conv(inner, width),
        )  # fmt: skip
        return Net(lambda m, x: x + m.body(x), body=body)

    return nn.Sequential(
        conv(3, 9), block(9, 7), block(9, 8), nn.BatchNorm2d(9), nn.ReLU(), head(9)
    )


@ENTRIES(3, 12, 10)
def resnext() -> nn.Module:
    body = nn.Sequential(unit(9, 12, 1), unit(12, 12, groups=4), plain(12, 9, 1))
    return nn.Sequential(unit(3, 9), residual(body), head(9))


@ENTRIES(3, 12, 10)
def densenet() -> nn.Module:
    def layer(width: int, growth: int) -> nn.Module:
        body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), conv(width, 7, 1), nn.BatchNorm2d(7), nn.ReLU(),
            conv(7, growth),
        )  # fmt: skip
        return Net(lambda m, x: torch.cat([x, m.body(x)], 1), body=body)

    change = nn.Sequential(nn.BatchNorm2d(15), nn.ReLU(), conv(15, 8, 1), nn.AvgPool2d(2))
    return nn.Sequential(
        conv(3, 6), layer(6, 5), layer(11, 4), change, layer(8, 5), nn.BatchNorm2d(13), head(13)
    )


@ENTRIES(3, 12, 10)
def mobilenet_v1() -> nn.Module:
    return nn.Sequential(
        unit(3, 9), unit(9, 9, groups=9), unit(9, 11, 1), unit(11, 11, groups=11, stride=2),
        unit(11, 13, 1), head(13),
    )  # fmt: skip


def inverted(width: int, inner: int, out: int, *, squeeze: bool = False) -> nn.Module:
    """An inverted residual, with squeeze and excitation if asked for."""
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 4, 1), nn.SiLU(), nn.Conv2d(4, inner, 1),
        nn.Sigmoid(),
    )  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.deep(m.up(x))
        y = m.down(y * m.gate(y) if squeeze else y)
        return x + y if width == out else y

    return Net(
        forward, up=unit(width, inner, 1), deep=unit(inner, inner, groups=inner),
        down=plain(inner, out, 1), gate=gate if squeeze else nn.Identity(),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def mobilenet_v2() -> nn.Module:
    return nn.Sequential(unit(3, 8), inverted(8, 15, 8), inverted(8, 17, 10), head(10))


@ENTRIES(3, 12, 10)
def efficientnet() -> nn.Module:
    return nn.Sequential(
        unit(3, 8), inverted(8, 15, 8, squeeze=True), inverted(8, 17, 10, squeeze=True), head(10)
    )


@ENTRIES(3, 12, 10)
def shufflenet_v2() -> nn.Module:
    def block(width: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            y = torch.cat([first, m.branch(second)], 1)
            return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

        half = width // 2
        branch = nn.Sequential(
            unit(half, half, 1), plain(half, half, groups=half), unit(half, half, 1)
        )
        return Net(forward, branch=branch)

    return nn.Sequential(unit(3, 12), block(12), block(12), unit(12, 9, 1), head(9))


@ENTRIES(3, 12, 10)
def ghostnet() -> nn.Module:
    def ghost(into: int, out: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.first(x)
            return torch.cat([y, m.cheap(y)], 1)

        half = out // 2
        return Net(forward, first=unit(into, half, 1), cheap=unit(half, half, groups=half))

    return nn.Sequential(unit(3, 7), ghost(7, 12), ghost(12, 10), head(10))


@ENTRIES(3, 12, 10)
def squeezenet() -> nn.Module:
    def fire(into: int, squeezed: int, one: int, three: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = F.relu(m.s(x))
            return torch.cat([F.relu(m.one(y)), F.relu(m.three(y))], 1)

        return Net(
            forward, s=conv(into, squeezed, 1), one=conv(squeezed, one, 1),
            three=conv(squeezed, three),
        )  # fmt: skip

    return nn.Sequential(unit(3, 9), fire(9, 4, 6, 7), fire(13, 5, 8, 6), conv(14, 5, 1), head(5))


@ENTRIES(3, 12, 10)
def inception() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        pool = m.d(F.max_pool2d(y, 3, 1, 1))
        return m.head(torch.cat([m.a(y), m.b(y), m.c(y), pool], 1))

    return Net(
        forward, stem=unit(3, 8), a=unit(8, 4, 1), b=nn.Sequential(unit(8, 5, 1), unit(5, 7)),
        c=nn.Sequential(unit(8, 3, 1), unit(3, 6), unit(6, 5)), d=unit(8, 3, 1), head=head(19),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def csp_darknet() -> nn.Module:
    def csp(into: int, inner: int, out: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.a(x)
            y = y + m.c(m.b(y))
            return m.e(torch.cat([y, m.d(x)], 1))

        return Net(
            forward, a=unit(into, inner, 1), b=unit(inner, 5, 1), c=unit(5, inner),
            d=unit(into, inner, 1), e=unit(2 * inner, out, 1),
        )  # fmt: skip

    def pooled(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        parts = [y, *(F.max_pool2d(y, k, 1, k // 2) for k in (3, 5))]
        return m.b(torch.cat(parts, 1))

    sppf = Net(pooled, a=unit(11, 6, 1), b=unit(18, 9, 1))
    return nn.Sequential(unit(3, 8), csp(8, 7, 11), sppf, head(9))


@ENTRIES(3, 16, 24)
def unet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        b = m.b(F.max_pool2d(a, 2))
        c = m.c(F.max_pool2d(b, 2))
        b = m.d(torch.cat([m.up(c), b], 1))
        wide = F.interpolate(b, scale_factor=2, mode="nearest")
        return m.f(m.e(torch.cat([wide, a], 1)))

    return Net(
        forward, a=unit(3, 7), b=unit(7, 9), c=unit(9, 13), up=nn.ConvTranspose2d(13, 8, 2, 2),
        d=unit(17, 10), e=unit(17, 6), f=conv(6, 2, 1),
    )  # fmt: skip


@ENTRIES(3, 16, 24)
def detector() -> nn.Module:
    def forward(m: Any, x: Tensor) -> dict[str, list[Tensor]]:
        c2 = m.c2(m.stem(x))
        c3 = m.c3(c2)
        p3 = m.l3(c3)
        p2 = m.l2(c2) + F.interpolate(p3, scale_factor=2)
        levels = [m.s2(p2), m.s3(p3)]
        towers = [m.tower(level) for level in levels]
        return {"classes": [m.cls(t) for t in towers], "boxes": [m.box(t).exp() for t in towers]}

    return Net(
        forward, stem=unit(3, 7), c2=unit(7, 9, stride=2), c3=unit(9, 12, stride=2),
        l2=conv(9, 8, 1), l3=conv(12, 8, 1), s2=conv(8, 8), s3=conv(8, 8),
        tower=nn.Sequential(conv(8, 10), nn.GroupNorm(5, 10), nn.ReLU()), cls=conv(10, 3),
        box=conv(10, 4),
    )  # fmt: skip


@ENTRIES(3, 16, 24)
def segmentation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.trunk(x)
        whole = F.interpolate(m.pool(y), size=y.shape[2:], mode="bilinear")
        wide = torch.cat([m.one(y), m.two(y), m.four(y), whole], 1)
        size = x.shape[2:]
        return F.interpolate(m.out(m.join(wide)), size), F.interpolate(m.aux(y), size)

    def atrous(rate: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(11, 6, 3, padding=rate, dilation=rate), nn.ReLU())

    return Net(
        forward, trunk=nn.Sequential(unit(3, 8, stride=2), unit(8, 11)), one=unit(11, 5, 1),
        two=atrous(2), four=atrous(4), pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(11, 4, 1)),
        join=unit(21, 9, 1), out=conv(9, 2, 1), aux=conv(11, 2, 1),
    )  # fmt: skip


@ENTRIES(3, 16, 24)
def convnext() -> nn.Module:
    def block(width: int, inner: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.n(m.deep(x).permute(0, 2, 3, 1))
            y = m.gamma * m.down(F.gelu(m.up(y)))
            return x + y.permute(0, 3, 1, 2)

        return Net(
            forward, deep=conv(width, width, 5, groups=width), n=nn.LayerNorm(width),
            up=nn.Linear(width, inner), down=nn.Linear(inner, width),
            gamma=nn.Parameter(torch.rand(width)),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 10, 4, 4), nn.GroupNorm(1, 10), block(10, 17), block(10, 19), head(10)
    )


@ENTRIES(3, 12, 8)
def mlp_mixer() -> nn.Module:
    def block(tokens: int, width: int) -> nn.Module:
        def mlp(size: int, inner: int) -> nn.Module:
            return nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))

        def forward(m: Any, x: Tensor) -> Tensor:
            x = x + m.tokens(m.n(x).transpose(1, 2)).transpose(1, 2)
            return x + m.channels(m.k(x))

        return Net(
            forward, n=nn.LayerNorm(width), tokens=mlp(tokens, 11), k=nn.LayerNorm(width),
            channels=mlp(width, 17),
        )  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.patch(x).flatten(2).transpose(1, 2)
        return m.head(m.n(m.blocks(y)).mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 10, 4, 4), blocks=nn.Sequential(block(6, 10), block(6, 10)),
        n=nn.LayerNorm(10), head=nn.Linear(10, 5),
    )  # fmt: skip


@ENTRIES(7, 10)
def gmlp() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        value, gate = F.gelu(m.up(m.n(x))).chunk(2, -1)
        gate = m.spatial(m.k(gate).transpose(1, 2)).transpose(1, 2)
        return m.head((x + m.down(value * gate)).mean(1))

    return Net(
        forward, n=nn.LayerNorm(10), up=nn.Linear(10, 18), k=nn.LayerNorm(9),
        spatial=nn.Linear(7, 7), down=nn.Linear(9, 10), head=nn.Linear(10, 5),
    )  # fmt: skip


def windows(x: Tensor, size: int) -> Tensor:
    """Cut a picture, channels last, into square windows of tokens."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c).transpose(2, 3)
    return x.reshape(-1, size * size, c)


def unwindow(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """Put windows together again."""
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1]).transpose(2, 3)
    return x.reshape(len(x), h, w, -1)


@ENTRIES(3, 16, 24)
def swin() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.patch(x).permute(0, 2, 3, 1)
        z = windows(torch.roll(m.n(y), (-1, -1), (1, 2)), 2)
        q, k, v = m.qkv(z).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        places = torch.arange(4)
        bias = m.bias[(places[:, None] - places[None] + 3).flatten()].view(4, 4, -1)
        weights = (q @ k.transpose(-2, -1) / 2 + bias.permute(2, 0, 1)).softmax(-1)
        z = m.o((weights @ v).transpose(1, 2).flatten(2))
        y = y + torch.roll(unwindow(z, 2, 4, 6), (1, 1), (1, 2))
        y = y + m.down(F.gelu(m.up(m.k(y))))
        parts = [y[:, ::2, ::2], y[:, 1::2, ::2], y[:, ::2, 1::2], y[:, 1::2, 1::2]]
        return m.head(m.merge(m.j(torch.cat(parts, -1))).mean((1, 2)))

    return Net(
        forward, patch=nn.Conv2d(3, 10, 4, 4), n=nn.LayerNorm(10), qkv=nn.Linear(10, 36),
        bias=nn.Parameter(torch.randn(7, 3)), o=nn.Linear(12, 10), k=nn.LayerNorm(10),
        up=nn.Linear(10, 17), down=nn.Linear(17, 10), j=nn.LayerNorm(40),
        merge=nn.Linear(40, 13, bias=False), head=nn.Linear(13, 5),
    )  # fmt: skip


@ENTRIES(3, 12, 8)
def vision_transformer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([m.token.expand(len(y), -1, -1), y], 1) + m.places
        return m.head(m.n(m.encoder(y))[:, 0])

    layer = nn.TransformerEncoderLayer(12, 3, 17, batch_first=True, norm_first=True)
    return Net(
        forward, patch=nn.Conv2d(3, 12, 4, 4), token=nn.Parameter(torch.randn(1, 1, 12)),
        places=nn.Parameter(torch.randn(1, 7, 12)), n=nn.LayerNorm(12), head=nn.Linear(12, 5),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )  # fmt: skip


@ENTRIES(3, 6, 10)
def super_resolution() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y + m.b(y)
        z = F.pixel_shuffle(F.relu(m.up(z)), 2)
        return m.out(z) + F.interpolate(x, scale_factor=2, mode="bicubic")

    return Net(
        forward, a=conv(3, 9), b=nn.Sequential(conv(9, 11), nn.PReLU(), conv(11, 9)),
        up=conv(9, 28), out=conv(7, 3),
    )  # fmt: skip


@ENTRIES(11)
def generator() -> nn.Module:
    def forward(m: Any, z: Tensor) -> Tensor:
        return m.net(F.relu(m.start(z)).unflatten(1, (-1, 3, 4)))

    net = nn.Sequential(
        nn.ConvTranspose2d(9, 8, 4, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(8, 7, 4, 2, 1), nn.InstanceNorm2d(7), nn.LeakyReLU(0.2),
        nn.ReflectionPad2d(1), nn.Conv2d(7, 3, 3), nn.Tanh(),
    )  # fmt: skip
    return Net(forward, start=nn.Linear(11, 108), net=net)


@ENTRIES(3, 12, 8)
def autoencoder() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.encode(x)
        mean, spread = m.mean(y.flatten(1)), m.spread(y.flatten(1))
        z = mean + torch.exp(spread / 2) * 0.3
        return m.decode(F.relu(m.start(z)).view(len(z), -1, 3, 2)), mean, spread

    return Net(
        forward, encode=nn.Sequential(unit(3, 7, stride=2), unit(7, 9, stride=2)),
        mean=nn.Linear(54, 5), spread=nn.Linear(54, 5), start=nn.Linear(5, 48),
        decode=nn.Sequential(
            nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1)
        ),
    )  # fmt: skip


@ENTRIES(4, 21)
def temporal_convolutions() -> nn.Module:
    def block(into: int, out: int, rate: int) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = F.relu(m.a(x)[..., : x.shape[-1]])
            return F.relu(m.s(x) + F.relu(m.b(y)[..., : x.shape[-1]]))

        rest = {"padding": 2 * rate, "dilation": rate}
        return Net(
            forward, a=nn.Conv1d(into, 11, 3, **rest), b=nn.Conv1d(11, out, 3, **rest),
            s=nn.Conv1d(into, out, 1),
        )  # fmt: skip

    return Net(
        lambda m, x: m.c(m.b(m.a(x))[..., -1]), a=block(4, 9, 1), b=block(9, 10, 2),
        c=nn.Linear(10, 5),
    )  # fmt: skip


@ENTRIES(4, 21)
def wavenet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, total = m.start(x), 0
        for gate, skip, on in zip(m.gates, m.skips, m.ons, strict=True):
            rate = gate.dilation[0]
            value, valve = gate(F.pad(y, (rate, 0))).chunk(2, 1)
            z = torch.tanh(value) * torch.sigmoid(valve)
            total, y = total + skip(z), y + on(z)
        return m.out(F.relu(m.mid(F.relu(total))))

    rates = (1, 2, 4)
    return Net(
        forward, start=nn.Conv1d(4, 8, 1),
        gates=nn.ModuleList(nn.Conv1d(8, 14, 2, dilation=r) for r in rates),
        skips=nn.ModuleList(nn.Conv1d(7, 9, 1) for _ in rates),
        ons=nn.ModuleList(nn.Conv1d(7, 8, 1) for _ in rates),
        mid=nn.Conv1d(9, 10, 1), out=nn.Conv1d(10, 4, 1),
    )  # fmt: skip


@ENTRIES(3, 19)
def pointnet() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        turn = m.turn(F.relu(m.look(x)).amax(2)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        points = F.relu(m.n(m.a(turn @ x)))
        whole = F.relu(m.b(points)).amax(2, keepdim=True).expand(-1, -1, x.shape[2])
        return m.d(F.relu(m.c(torch.cat([points, whole], 1))))

    return Net(
        forward, look=nn.Conv1d(3, 11, 1), turn=nn.Linear(11, 9), a=nn.Conv1d(3, 8, 1),
        n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 13, 1), c=nn.Conv1d(21, 10, 1), d=nn.Conv1d(10, 4, 1),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def nonlocal_block() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        q, k, v = (p(y).flatten(2) for p in (m.q, m.k, m.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        z = (v @ weights.transpose(1, 2)).unflatten(2, y.shape[2:])
        return m.head(y + m.scale * m.o(z))

    return Net(
        forward, stem=unit(3, 9), q=conv(9, 4, 1), k=conv(9, 4, 1), v=conv(9, 7, 1),
        o=conv(7, 9, 1), scale=nn.Parameter(torch.rand(1)), head=head(9),
    )  # fmt: skip


@ENTRIES(3, 12, 10)
def selective_kernels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        both = torch.stack([m.a(y), m.b(y)], 1)
        gate = m.up(F.relu(m.down(both.sum(1).mean((2, 3)))))
        weights = gate.view(len(x), 2, -1).softmax(1)
        return m.head((both * weights[..., None, None]).sum(1))

    return Net(
        forward, stem=unit(3, 8), a=unit(8, 9), b=unit(8, 9, 5), down=nn.Linear(9, 4),
        up=nn.Linear(4, 18), head=head(9),
    )  # fmt: skip
