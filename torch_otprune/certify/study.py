"""Ask a model what it is as a function of one of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.certify.facts import Facts, all_of, constant, outside, seed
from torch_otprune.certify.interpret import Follower, Loss, Trail, following
from torch_otprune.certify.result import Certificate, Finding, Kind, Reason, Violation
from torch_otprune.certify.search import Search, violation
from torch_otprune.errors import StructureError
from torch_otprune.nn.convex import InputConvex
from torch_otprune.structure.forward import (
    Call,
    called,
    evaluating,
    flat_tensors,
    head,
    map_tensors,
)

__all__ = ["Study", "certify", "study"]

_FEW = 64  # inputs that are never too many
_LARGE = 1 << 28  # slopes, two for each input and number; above, one pair serves all inputs


@dataclass(frozen=True)
class Study:
    """What following one forward pass tells.

    Args:
        facts: of every output.
        trail: what was found on the way.
        shape: of the input asked about, for one sample.
        hull: whether slopes are bounds over all inputs at once.
    """

    facts: list[Facts]
    trail: Trail
    shape: tuple[int, ...]
    hull: bool

    def holds(self, kind: Kind) -> bool:
        """Tell whether a property is proved."""
        name = {"convex": "cvx", "monotone": "up", "lipschitz": "bounded"}[kind]
        return not self.trail.leaks and all_of(self.facts, name)

    @property
    def bound(self) -> float | None:
        """Bound the change of all outputs per change of the input, in Euclidean norm."""
        if self.hull or not self.holds("lipschitz"):
            return None
        sides = [f.slopes(self.trail.inputs) for f in self.facts]
        size = torch.cat(
            [torch.maximum(lo.abs(), hi.abs()).reshape(len(lo), -1) for lo, hi in sides], 1
        )
        return float(torch.linalg.matrix_norm(size, 2)) if size.numel() else 0.0

    def reasons(self, kind: Kind) -> tuple[Reason, ...]:
        """Say where a property was lost."""
        leaks = [
            Loss(path, kind, "forward reads values, so another input may take another way")
            for path in dict.fromkeys(self.trail.leaks)
        ]
        lost = [loss for loss in self.trail.losses if loss.what == kind]
        return tuple(Reason(module=loss.module, text=loss.text) for loss in leaks + lost)


def certify(
    model: nn.Module,
    example: Any = None,
    *,
    wrt: int | str = 0,
    pairs: int = 20_000,
    steps: int = 200,
    seed: int = 0,
) -> Certificate:
    """Say whether a model is convex, monotone and Lipschitz in an input, and how that is known.

    One forward pass is followed operation by operation. What the signs of the weights and the
    kinds of the activations prove holds for every input of the example's shape. For nets without
    negative weights behind rectifiers, the Lipschitz bound is the norm of the product of all
    matrices, with those that the input meets taken by absolute value, which is never more than the
    product of their norms. Where convexity or monotonicity is not proved, pairs of inputs are
    tried, and a violation refutes it. Weights are taken as they are: nothing is rounded to zero.

    Args:
        model: any module; read in evaluation mode and left as it was.
        example: inputs as for calibration; more than one sample tells the search where to look.
            Nets of `torch_otprune.nn` need none.
        wrt: the input that is asked about, by place or by name; others are taken as given.
        pairs: random pairs that are tried where a proof fails.
        steps: of gradient ascent from the worst pairs.
        seed: fixes the pairs.

    Returns:
        the certificate.

    Raises:
        StructureError: if there is no such input, or none at all; if the input or the weights are
            no numbers; if nothing comes out that could be asked about.

    Source: Amos et al. 2017 for the conditions, Grant, Boyd & Ye 2006 (disciplined convex
    programming) for following them; the bound from interval slopes and the rules for log-convex
    signals and for products of functions of one scalar are ours.

    Limits: sequences longer than the example's are not spoken for. Where slopes would take more
    than 2 GiB the bound is left out. A search that finds nothing proves nothing.

    Example:
        >>> from torch_otprune.nn import FICNN
        >>> certify(FICNN(2, (4,))).convex.how
        'structural'
    """
    if min(pairs, steps) < 0:
        raise StructureError(
            f"{pairs} pairs and {steps} steps cannot be tried.",
            where="certify(pairs=..., steps=...)",
            fix="give numbers from 0 on.",
        )
    batch = _example(model, example)
    found = study(model, batch, wrt=wrt)
    around = _runner(model, batch, wrt)
    search = Search(pairs, steps, seed)
    convex, monotone = (_finding(found, kind, around, search) for kind in _SEARCHED)
    bound = found.bound
    name = repr(wrt) if isinstance(wrt, str) else f"input {wrt}"
    shape = " x ".join(map(str, found.shape))
    return Certificate(
        input=f"{name} ({shape})",
        convex=convex,
        monotone=monotone,
        lipschitz=_steepest(found, bound),
        bound=bound,
    )


def _steepest(found: Study, bound: float | None) -> Finding:
    """Say what bounds the slopes, or why nothing does."""
    if bound is not None:
        text = f"at most {bound:.4g}, the norm of the slopes' bounds"
        return Finding(kind="lipschitz", how="structural", text=text)
    many = "too many inputs to keep a slope for each"
    text = many if found.hull else "nothing bounds the slopes"
    why = found.reasons("lipschitz")
    return Finding(kind="lipschitz", how="refused", text=text, reasons=why)


_SEARCHED: tuple[Kind, Kind] = ("convex", "monotone")


def study(model: nn.Module, batch: Any, *, wrt: int | str = 0) -> Study:
    """Follow one forward pass on one sample.

    Args:
        model: any module; in evaluation mode meanwhile.
        batch: as for calibration.
        wrt: the input that is asked about.

    Returns:
        what was found.

    Raises:
        StructureError: if there is no such input, or it or the weights are no numbers.
    """
    call = called(model, head(batch, 1))
    asked = _asked(call, wrt)
    if not asked.numel() or not bool(asked.isfinite().all()):
        raise StructureError(
            "the example is empty, or holds what is not a finite number.",
            where=f"certify(example), {tuple(asked.shape)}",
            fix="give at least one sample of finite numbers.",
        )
    if asked.numel() > _FEW:
        coarse, numbers = _followed(model, call, asked, hull=True)
        if 2 * numbers * asked.numel() > _LARGE:
            return coarse
    return _followed(model, call, asked, hull=False)[0]


def _followed(model: nn.Module, call: Call, asked: Tensor, *, hull: bool) -> tuple[Study, int]:
    """Follow the pass; count the numbers that slopes were kept for, too."""
    tensors = [*model.named_parameters(), *model.named_buffers(), *_loose(model)]
    _numbers(tensors)
    known = [(t, constant(t)) for _, t in tensors]
    known += [(t, outside(t)) for t in flat_tensors([call.args, call.kwargs]) if t is not asked]
    known.append((asked, seed(asked, hull=hull)))
    trail = Trail(1 if hull else asked.numel(), {id(t): name for name, t in tensors})
    follower = Follower(trail, known)
    with evaluating(model), torch.no_grad(), following(model, follower):
        out = model(*call.args, **call.kwargs)
    facts = [follower.facts(t) for t in flat_tensors(out) if t.is_floating_point()]
    if not facts:
        raise StructureError(
            f"the model returns a {type(out).__name__} without floating-point numbers.",
            where="certify(model)",
            fix="wrap it in a module that returns the tensor that is asked about.",
        )
    numbers = sum(t.numel() for t, f in follower.known.values() if f.lo is not None)
    return Study(facts, trail, tuple(asked.shape[1:]), hull), numbers


def _numbers(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse a net that cannot compute anything."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise StructureError(
                f"'{name}' has {int(tensor.isnan().sum())} entries that are not a number.",
                where=f"'{name}', {tuple(tensor.shape)}",
                fix="load or train the weights again: of such a net nothing can be said.",
            )


def _loose(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List tensors that modules hold without having registered them."""
    return [
        (f"{path}.{name}" if path else name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _example(model: nn.Module, example: Any) -> Any:
    if example is not None:
        return example
    if isinstance(model, InputConvex):
        return model.example()
    raise StructureError(
        f"a {type(model).__name__} does not say what it takes.",
        where="certify(model, example)",
        fix="give an example, such as one calibration batch.",
    )


def _asked(call: Call, wrt: int | str) -> Tensor:
    """Find the input that is asked about."""
    values = list(call.args) + list(call.kwargs.values())
    found = call.kwargs.get(wrt) if isinstance(wrt, str) else None
    if isinstance(wrt, int) and 0 <= wrt < len(values):
        found = values[wrt]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        names = ", ".join([*map(str, range(len(call.args))), *call.kwargs])
        raise StructureError(
            f"{wrt!r} is no input of floating-point numbers.",
            where=f"certify(wrt=...); inputs: {names}",
            fix="name one of these, one that is a tensor of floating-point numbers.",
        )
    return found


_Around = tuple[Callable[[Tensor], Tensor], Tensor]
"""What maps inputs to outputs, and inputs to look around."""


def _finding(found: Study, kind: Kind, around: _Around, search: Search) -> Finding:
    if found.holds(kind):
        words = {"convex": "every operation keeps convexity", "monotone": "no slope is negative"}
        return Finding(kind=kind, how="structural", text=words[kind])
    reasons = found.reasons(kind)
    worst, seen = violation(*around, kind, search)
    if worst is None:
        text = f"not proved, and no violation among {seen} pairs and {search.steps} steps of ascent"
        return Finding(kind=kind, how="empirical", text=text, reasons=reasons)
    return Finding(
        kind=kind, how="refused", text=_told(worst, kind), reasons=reasons, violation=worst
    )


def _told(worst: Violation, kind: Kind) -> str:
    share = f"{100 * worst.share:.2g} % of random pairs" if worst.share else "found by ascent"
    if kind == "convex":
        return (
            f"output {worst.output} is {worst.found:.4g} halfway between two inputs where it is "
            f"{worst.allowed:.4g} on average ({share})"
        )
    return (
        f"output {worst.output} falls from {worst.found:.4g} to {worst.allowed:.4g} where the "
        f"input rises ({share})"
    )


def _runner(model: nn.Module, batch: Any, wrt: int | str) -> _Around:
    """Prepare to run a copy in float64 on many inputs at once."""
    twin = copy.deepcopy(model).double().eval()
    call = called(model, batch)
    asked = _asked(call, wrt)
    one = called(model, head(batch, 1))
    place = next(
        i for i, t in enumerate(flat_tensors([one.args, one.kwargs])) if t is _asked(one, wrt)
    )

    def run(x: Tensor) -> Tensor:
        count = iter(range(10**6))

        def fill(t: Tensor) -> Tensor:
            if next(count) == place:
                return x
            t = t.double() if t.is_floating_point() else t
            return t.expand(len(x), *t.shape[1:]) if t.dim() and len(t) == 1 else t

        args, kwargs = map_tensors([one.args, one.kwargs], fill)
        out = [t for t in flat_tensors(twin(*args, **kwargs)) if t.is_floating_point()]
        if len(x) > 1 and not all(t.dim() and len(t) == len(x) for t in out):
            return alone(x)
        return torch.cat([t.reshape(len(x), -1) for t in out], 1)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([run(row) for row in x.split(1)])

    values = asked.detach().double()
    return (alone if _mixes(run, alone, values[:1]) else run), values.cpu()


_Run = Callable[[Tensor], Tensor]


@torch.no_grad()
def _mixes(run: _Run, alone: _Run, row: Tensor) -> bool:
    """Tell whether one sample changes what is said of another, as a mean over the batch does."""
    rows = torch.cat([row, 2 * row + 1, 1 - row])
    return not torch.allclose(run(rows), alone(rows), rtol=1e-7, atol=1e-12, equal_nan=True)
