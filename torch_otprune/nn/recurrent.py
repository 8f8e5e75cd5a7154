"""Recurrent nets that are convex in a whole input sequence, and one that is not."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from torch_otprune.errors import StructureError
from torch_otprune.nn.convex import (
    ACTIVATIONS,
    InputConvex,
    NonNegative,
    check_activation,
    check_sizes,
)

__all__ = ["ICLRNN", "ICLSTM", "ICRNN"]


class _Sequence(InputConvex):
    """What the recurrent nets share: doubled inputs, layers over time, an output layer."""

    cells: nn.ModuleList
    out: NonNegative
    doubled: bool
    activation: str

    def example(self, steps: int = 3) -> Tensor:
        """Make an input of so many steps for one sample."""
        return next(self.parameters()).new_zeros(1, steps, self.inputs)

    def forward(self, x: Float[Tensor, "batch steps inputs"]) -> Float[Tensor, "batch steps out"]:
        """Compute an output for every step.

        Args:
            x: sequences of at least one step.

        Returns:
            the outputs.

        Raises:
            StructureError: if the input has another shape.
        """
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.inputs:
            raise StructureError(
                f"{tuple(x.shape)} is no batch of sequences with {self.inputs} inputs a step.",
                where=type(self).__name__,
                fix=f"give (batch, steps, {self.inputs}), with at least one step.",
            )
        seen = torch.cat([x, -x], dim=-1) if self.doubled else x
        said = list(seen.unbind(1))
        for cell in self.cells:
            said = cell(said)
        return ACTIVATIONS[self.activation](self.out(torch.stack(said, 1)))

    def _build(
        self, cell: type[nn.Module], *, sizes: dict[str, int], activation: str, doubled: bool,
        skip: bool = False,
    ) -> None:  # fmt: skip
        """Make the layers; with a skip all are as wide as the input."""
        where = type(self).__name__
        check_sizes(where, **sizes)
        if not isinstance(doubled, bool):
            raise StructureError(
                f"{doubled!r} is neither True nor False.",
                where=f"{where}.doubled",
                fix="say whether -x is read as well.",
            )
        self.inputs, hidden, layers = sizes["inputs"], sizes["hidden"], sizes["layers"]
        self.doubled, self.activation = doubled, check_activation(activation, f"{where}.activation")
        first = self.inputs * (1 + doubled)
        later = first if skip else hidden
        self.cells = nn.ModuleList(cell(into, hidden) for into in [first] + [later] * (layers - 1))
        self.out = NonNegative(later, sizes["outputs"])


class ICRNN(_Sequence):
    """A recurrent net that is convex in its whole input sequence.

    Every layer computes `h_t = relu(U x_t + W h_{t-1} + D2 x_{t-1})` and
    `y_t = relu(V h_t + D1 h_{t-1} + D3 x_t)`, all weights not negative. The first layer reads
    `[x, -x]`, which brings both signs of a weight back.

    Args:
        inputs: width of the input at every step.
        hidden: units of each layer.
        outputs: width of the output at every step.
        layers: how many.
        doubled: whether -x is read as well; without it the net is also non-decreasing.
        activation: of the output; convex and non-decreasing.

    Source: Amos et al. 2017, section 3.3, as Wang et al. 2024 build it.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int = 64,
        outputs: int = 1,
        *,
        layers: int = 2,
        doubled: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "hidden": hidden, "outputs": outputs, "layers": layers}
        self._build(_PlainCell, sizes=sizes, activation=activation, doubled=doubled)


class _PlainCell(nn.Module):
    """One layer of an `ICRNN` over all steps."""

    def __init__(self, into: int, hidden: int) -> None:
        super().__init__()
        self.u = NonNegative(into, hidden, bias=False, gain=0.3)
        self.w = NonNegative(hidden, hidden, bias=False, gain=0.3)
        self.d2 = NonNegative(into, hidden, bias=False, gain=0.3)
        self.v = NonNegative(hidden, hidden, bias=False, gain=0.3)
        self.d1 = NonNegative(hidden, hidden, bias=False, gain=0.3)
        self.d3 = NonNegative(into, hidden, bias=False, gain=0.3)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        said: list[Tensor] = []
        h = before = None
        for x in xs:
            a, b = self.u(x), self.d3(x)
            if h is not None:
                a, b = a + self.w(h) + self.d2(before), b + self.d1(h)
            h, before = F.relu(a), x
            said.append(F.relu(self.v(h) + b))
        return said


class ICLRNN(_Sequence):
    """A convex recurrent net whose matrices have spectral norm one at most.

    Every layer computes `h_t = relu(U x_t + W h_{t-1} + b)`, weights not negative. `project_` caps
    the norms and never raises them. That bounds one step, not a sequence: `certify` bounds that.

    Args:
        inputs: width of the input at every step.
        hidden: units of each layer.
        outputs: width of the output at every step.
        layers: how many.
        doubled: whether -x is read as well.
        activation: of the output; convex and non-decreasing.

    Source: Wang, Pravin & Wu 2024 (Input Convex Lipschitz RNN); they rescale every matrix to norm
    one, also those that are smaller.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int = 64,
        outputs: int = 1,
        *,
        layers: int = 2,
        doubled: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "hidden": hidden, "outputs": outputs, "layers": layers}
        self._build(_ShortCell, sizes=sizes, activation=activation, doubled=doubled)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp at zero, then scale down what has a spectral norm above one."""
        super().project_()
        for _, weight in self.constrained():
            norm = torch.linalg.matrix_norm(weight.double(), 2)
            weight.div_(norm.clamp_min(1).to(weight))


class _ShortCell(nn.Module):
    """One layer of an `ICLRNN` over all steps."""

    def __init__(self, into: int, hidden: int) -> None:
        super().__init__()
        self.u = NonNegative(into, hidden)
        self.w = NonNegative(hidden, hidden, bias=False, gain=0.5)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        said: list[Tensor] = []
        for x in xs:
            a = self.u(x)
            said.append(F.relu(a + self.w(said[-1]) if said else a))
        return said


class ICLSTM(_Sequence):
    """A long short-term memory whose gates share their weights, none of them negative.

    With `a_t = W h_{t-1} + U x_t` and gates `f, i, o, c~ = g(d * a_t + b)`, one vector d and b per
    gate: `c_t = f c_{t-1} + i c~`, `h_t = o g(c_t)`. A layer hands on `relu(V h_t + v) + x_t`.

    `gates="relu"` is the published cell. It is convex over one step only: two gates of different
    steps multiply functions of different inputs. `gates="exp"` is convex over any number of
    steps, since products and sums of log-convex functions are log-convex. It is computed on
    logarithms, `log c_t = logaddexp(f + log c_{t-1}, i + c~)` with gates `d * a_t + b`, and reads
    and hands on `h_t = softplus(o + log c_t)`, which grows like a sum and not like a tower.

    Args:
        inputs: width of the input at every step.
        hidden: units of each layer.
        outputs: width of the output at every step.
        layers: how many.
        gates: `relu` as published, `exp` to be convex over several steps.
        doubled: whether -x is read as well.
        activation: of the output; convex and non-decreasing.

    Source: Wang, Yu & Wu 2025 (IC-LSTM), with its skip over each layer; `gates="exp"` is ours.

    Limits: the width of the input, which the skip needs, is never cut.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int = 64,
        outputs: int = 1,
        *,
        layers: int = 2,
        gates: Literal["relu", "exp"] = "relu",
        doubled: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if gates not in ("relu", "exp"):
            raise StructureError(
                f"{gates!r} is no kind of gate that keeps a net convex over a step.",
                where="ICLSTM.gates",
                fix="use 'relu' as published, or 'exp' to be convex over several steps.",
            )
        self.kind = gates
        cell = _GatedCell if gates == "relu" else _LogCell
        sizes = {"inputs": inputs, "hidden": hidden, "outputs": outputs, "layers": layers}
        self._build(cell, sizes=sizes, activation=activation, doubled=doubled, skip=True)


class _GatedCell(InputConvex):
    """One layer of the published `ICLSTM` over all steps."""

    gates = ("df", "di", "do", "dc")

    def __init__(self, into: int, hidden: int) -> None:
        super().__init__()
        self.u = NonNegative(into, hidden, bias=False)
        self.w = NonNegative(hidden, hidden, bias=False, gain=0.1)
        self.v = NonNegative(hidden, into)
        for name in ("f", "i", "o", "c"):
            self.register_parameter(f"d{name}", nn.Parameter(torch.rand(hidden)))
            self.register_parameter(f"b{name}", nn.Parameter(torch.zeros(hidden)))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        said: list[Tensor] = []
        h = c = None
        for x in xs:
            a = self.u(x) if h is None else self.u(x) + self.w(h)
            fresh = F.relu(self.di * a + self.bi) * F.relu(self.dc * a + self.bc)
            c = fresh if c is None else F.relu(self.df * a + self.bf) * c + fresh
            h = F.relu(self.do * a + self.bo) * F.relu(c)
            said.append(F.relu(self.v(h)) + x)
        return said


class _LogCell(InputConvex):
    """One layer of the `ICLSTM` that is convex over all steps."""

    gates = ("df", "di", "do", "dc")

    def __init__(self, into: int, hidden: int) -> None:
        super().__init__()
        self.u = NonNegative(into, hidden, bias=False)
        self.w = NonNegative(hidden, hidden, bias=False, gain=0.1)
        self.v = NonNegative(hidden, into)
        for name in ("f", "i", "o", "c"):
            self.register_parameter(f"d{name}", nn.Parameter(torch.rand(hidden) * 0.5))
            self.register_parameter(f"b{name}", nn.Parameter(torch.full((hidden,), -0.5)))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        said: list[Tensor] = []
        h = c = None
        for x in xs:
            a = self.u(x) if h is None else self.u(x) + self.w(h)
            fresh = (self.di * a + self.bi) + (self.dc * a + self.bc)
            c = fresh if c is None else torch.logaddexp(self.df * a + self.bf + c, fresh)
            h = F.softplus(self.do * a + self.bo + c)
            said.append(F.relu(self.v(h)) + x)
        return said
