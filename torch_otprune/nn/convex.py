"""Networks that are convex in their input: fully, or in one of two arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from torch_otprune.errors import StructureError

__all__ = [
    "FICNN",
    "PICNN",
    "InputConvex",
    "NonNegative",
    "check_activation",
    "check_sizes",
    "constrained",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "softplus": F.softplus,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "identity": lambda x: x,
}


def check_activation(name: str, where: str) -> str:
    """Refuse an activation that is not convex and non-decreasing.

    Args:
        name: what was asked for.
        where: the argument that asks, for the error.

    Returns:
        the name.

    Raises:
        StructureError: naming those that are.
    """
    if name not in ACTIVATIONS:
        raise StructureError(
            f"{name!r} is not known as convex and non-decreasing, so the net would not be convex.",
            where=where,
            fix=f"use one of {', '.join(ACTIVATIONS)}.",
        )
    return name


class NonNegative(nn.Linear):
    """A dense layer that is meant to have no negative weight; its bias is free.

    The weights are stored as they are used, and `InputConvex.project_` clamps them at zero after
    a step. So exact zeros exist, a file holds the weights themselves, and a part of them is again
    non-negative: no softplus or square has to be inverted when a unit goes or a refit is written.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        gain: what the mean weight sums to over the inputs at the start.

    Source: Amos et al. 2017, Proposition 1, for the condition; projection after each step is theirs
    as well.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, gain: float = 0.8
    ) -> None:
        self.gain = gain
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draw weights between zero and twice the gain over the number of inputs."""
        nn.init.uniform_(self.weight, 0.0, 2 * self.gain / max(self.in_features, 1))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class InputConvex(nn.Module):
    """The base of all nets here: it knows which of its tensors must not be negative."""

    gates: tuple[str, ...] = ()  # bare parameters that must not be negative

    def constrained(self) -> Iterator[tuple[str, Tensor]]:
        """List what must not be negative.

        Yields:
            path and tensor.
        """
        yield from constrained(self)

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp at zero what must not be negative; call it after every optimiser step."""
        for _, tensor in self.constrained():
            tensor.clamp_(min=0)

    def example(self) -> Any:
        """Make an input for one sample."""
        raise NotImplementedError


def constrained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List what must not be negative in the nets and layers of ours that a model contains.

    Args:
        model: any module.

    Yields:
        path and tensor.
    """
    for path, module in model.named_modules():
        names: tuple[str, ...] = ("weight",) if isinstance(module, NonNegative) else ()
        if isinstance(module, InputConvex):
            names = module.gates
        for name in names:
            yield f"{path}.{name}" if path else name, getattr(module, name)


class FICNN(InputConvex):
    """A net that is convex in its whole input.

    With weights W that are not negative and a convex non-decreasing g:
    `z_1 = g(A_0 y + b_0)`, `z_{i+1} = g(W_i z_i + A_i y + b_i)`, the last without g.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers, at least one.
        outputs: width of the output; each one is convex.
        activation: g; `relu`, `softplus`, `leaky_relu`, `elu`.

    Source: Amos et al. 2017, equation 2.

    Example:
        >>> net = FICNN(3, (8, 8))
        >>> net(torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation, "FICNN.activation")
        check_sizes("FICNN", inputs=inputs, outputs=outputs)
        widths = (*_widths(hidden, "FICNN.hidden"), outputs)
        self.first = nn.Linear(inputs, widths[0])
        pairs = list(pairwise(widths))
        self.z = nn.ModuleList(NonNegative(into, out, bias=False) for into, out in pairs)
        self.y = nn.ModuleList(nn.Linear(inputs, out) for _, out in pairs)

    def forward(self, y: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Compute the outputs."""
        g = ACTIVATIONS[self.activation]
        z = g(self.first(y))
        for i, (through, past) in enumerate(zip(self.z, self.y, strict=True)):
            z = through(z) + past(y)
            z = g(z) if i + 1 < len(self.z) else z
        return z

    def example(self) -> Tensor:
        """Make an input for one sample."""
        return _zeros(self, 1, self.first.in_features)


class PICNN(InputConvex):
    """A net that is convex in its first argument y for every value of its second, x.

    `u_{i+1} = g(V_i u_i + c_i)` runs on x alone, with `u_0 = x`; and
    `z_{i+1} = g(W_i (z_i * relu(P_i u_i + p_i)) + A_i (y * (Q_i u_i + q_i)) + B_i u_i + b_i)` with
    weights W that are not negative; the first has no z, the last no g.

    Args:
        inputs: width of y.
        context: width of x.
        hidden: widths of the hidden layers, of both paths.
        outputs: width of the output.
        activation: g.

    Source: Amos et al. 2017, equation 3.
    """

    def __init__(
        self,
        inputs: int,
        context: int,
        hidden: Sequence[int] = (64, 64),
        *,
        outputs: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation, "PICNN.activation")
        check_sizes("PICNN", inputs=inputs, context=context, outputs=outputs)
        hidden = _widths(hidden, "PICNN.hidden")
        self.u = nn.ModuleList(
            nn.Linear(into, out) for into, out in zip((context, *hidden), hidden, strict=False)
        )
        self.blocks = nn.ModuleList(
            _Partial(inputs, before, above, out)
            for before, above, out in zip(
                (0, *hidden), (context, *hidden), (*hidden, outputs), strict=True
            )
        )

    def forward(
        self, y: Float[Tensor, "batch inputs"], x: Float[Tensor, "batch context"]
    ) -> Float[Tensor, "batch outputs"]:
        """Compute the outputs."""
        g, z, u = ACTIVATIONS[self.activation], y, x
        for i, block in enumerate(self.blocks):
            z = block(z, y, u)
            if i + 1 < len(self.blocks):
                z, u = g(z), g(self.u[i](u))
        return z

    def example(self) -> tuple[Tensor, Tensor]:
        """Make an input for one sample."""
        past: nn.Linear = self.blocks[0].past  # type: ignore[assignment]
        above: nn.Linear = self.u[0]  # type: ignore[assignment]
        return _zeros(self, 1, past.in_features), _zeros(self, 1, above.in_features)


class _Partial(nn.Module):
    """One layer of a `PICNN`."""

    def __init__(self, inputs: int, before: int, above: int, out: int) -> None:
        super().__init__()
        self.past, self.pick = nn.Linear(inputs, out, bias=False), nn.Linear(above, inputs)
        self.shift = nn.Linear(above, out)
        self.through = NonNegative(before, out, bias=False) if before else None
        self.gate = nn.Linear(above, before) if before else None
        nn.init.ones_(self.pick.bias)
        if self.gate is not None:
            nn.init.ones_(self.gate.bias)

    def forward(self, z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        found: Tensor = self.past(y * self.pick(u)) + self.shift(u)
        if self.through is not None and self.gate is not None:
            found = found + self.through(z * F.relu(self.gate(u)))
        return found


def check_sizes(where: str, **sizes: int) -> None:
    """Refuse a net without inputs, units, layers or outputs.

    Args:
        where: the class, for the error.
        **sizes: by the name of their argument.

    Raises:
        StructureError: naming the argument.
    """
    for name, size in sizes.items():
        if not _counts(size):
            raise StructureError(
                f"{size!r} is no number of {name}.",
                where=f"{where}.{name}",
                fix="give a whole number, at least 1.",
            )


def _widths(hidden: Sequence[int], where: str) -> tuple[int, ...]:
    if not isinstance(hidden, Sequence) or not hidden or not all(map(_counts, hidden)):
        raise StructureError(
            f"{hidden} is no list of widths.",
            where=where,
            fix="give at least one positive width.",
        )
    return tuple(hidden)


def _counts(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


def _zeros(net: nn.Module, *shape: int) -> Tensor:
    like = next(net.parameters())
    return like.new_zeros(shape)
