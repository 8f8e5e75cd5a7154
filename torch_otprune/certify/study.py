"""Ask a model what it is as a function of one of its inputs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.certify.facts import Facts, all_of, constant, outside, seed
from torch_otprune.certify.inputs import asked, check_numbers, counts, example_of, ran
from torch_otprune.certify.interpret import Follower, Loss, Trail, following
from torch_otprune.certify.result import Certificate, Finding, Kind, Reason, Violation
from torch_otprune.certify.search import Looked, Search, looked
from torch_otprune.errors import StructureError
from torch_otprune.structure.forward import (
    Call,
    called,
    evaluating,
    flat_tensors,
    head,
    map_tensors,
    outside_inference,
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
        leaks = [Loss(path, kind, text) for path, text in self.trail.leaks.items()]
        lost = [loss for loss in self.trail.losses if loss.what == kind]
        if not (leaks or lost or self.holds(kind)):
            lost = [Loss("", kind, "what comes out of compiled or foreign code is not followed")]
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
        StructureError: if it is no module or does not run on the example; if there is no such
            input, or none at all; if the input or the weights are no numbers; if nothing comes out
            that could be asked about; if the search has no such length.

    Source: Amos et al. 2017 for the conditions, Grant, Boyd & Ye 2006 (disciplined convex
    programming) for following them; the bound from interval slopes and the rules for log-convex
    signals and for products of functions of one scalar are ours.

    Limits: sequences longer than the example's are not spoken for, nor is rounding. Where slopes
    would take more than 2 GiB the bound is left out. A search that finds nothing proves nothing.
    An error that forward raises and catches itself is not seen as another way that it takes.

    Example:
        >>> from torch_otprune.nn import FICNN
        >>> certify(FICNN(2, (4,))).convex.how
        'structural'
    """
    search = Search(**counts(pairs=pairs, steps=steps, seed=seed))
    batch = example_of(model, example)
    found = study(model, batch, wrt=wrt)
    open_ = [kind for kind in _SEARCHED if not found.holds(kind)]
    seen = looked(model, batch, wrt, kinds=open_, search=search)
    convex, monotone = (_finding(found, kind, seen.get(kind, ""), steps) for kind in _SEARCHED)
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
        StructureError: if there is no such input, if it or the weights are no numbers, or if the
            model does not run on it.
    """
    call = called(model, head(batch, 1))
    value = asked(call, wrt)
    if not value.numel() or value.is_meta or not bool(value.isfinite().all()):
        raise StructureError(
            "the example is empty, has no values, or holds what is not a finite number.",
            where=f"certify(example), {tuple(value.shape)}",
            fix="give at least one sample of finite numbers.",
        )
    if value.numel() > _FEW:
        coarse, numbers = _followed(model, call, wrt, hull=True)
        if 2 * numbers * value.numel() > _LARGE:
            return coarse
    return _followed(model, call, wrt, hull=False)[0]


def _followed(model: nn.Module, call: Call, wrt: int | str, *, hull: bool) -> tuple[Study, int]:
    """Follow the pass; count the numbers that slopes were kept for, too."""
    tensors = [*model.named_parameters(), *model.named_buffers(), *_loose(model)]
    check_numbers(tensors)
    with evaluating(model), outside_inference(), torch.no_grad():
        own = map_tensors(call, torch.clone)  # each its own memory, which forward may write
        value = asked(own, wrt)
        known = [(t, constant(t)) for _, t in tensors]
        known += [(t, outside(t)) for t in flat_tensors([own.args, own.kwargs]) if t is not value]
        known.append((value, seed(value, hull=hull)))
        trail = Trail(1 if hull else value.numel(), {id(t): name for name, t in tensors})
        follower = Follower(trail, known)
        state = random.getstate()
        with following(model, follower):
            out = ran(model, own)
        facts = [follower.facts(t) for t in flat_tensors(out) if t.is_floating_point()]
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in flat_tensors(out)):
            trail.leaks[""] = "what comes out for the example is not a number"
        elif random.getstate() != state or not _again(model, call, out):
            trail.leaks[""] = "another call on the same input may give another output"
    if not facts:
        raise StructureError(
            f"the model returns a {type(out).__name__} without floating-point numbers.",
            where="certify(model)",
            fix="wrap it in a module that returns the tensor that is asked about.",
        )
    numbers = sum(t.numel() for t, f, _ in follower.known.values() if f.lo is not None)
    return Study(facts, trail, tuple(value.shape[1:]), hull), numbers


def _again(model: nn.Module, call: Call, out: Any) -> bool:
    """Tell whether the same input gives the same numbers again, but for rounding."""
    first, second = flat_tensors(out), flat_tensors(ran(model, map_tensors(call, torch.clone)))
    return len(first) == len(second) and all(map(_alike, first, second))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    near = 64 * torch.finfo(a.dtype).eps
    return torch.allclose(a.double(), b.double(), rtol=near, atol=near)


def _loose(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List tensors that modules hold without having registered them."""
    return [
        (f"{path}.{name}" if path else name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def _finding(found: Study, kind: Kind, looked: Looked, steps: int) -> Finding:
    if found.holds(kind):
        words = {"convex": "every operation keeps convexity", "monotone": "no slope is negative"}
        return Finding(kind=kind, how="structural", text=words[kind])
    reasons = found.reasons(kind)
    if isinstance(looked, str):
        text = f"not proved, and not tried: {looked}"
        return Finding(kind=kind, how="empirical", text=text, reasons=reasons)
    worst, seen = looked
    if worst is None:
        text = f"not proved, and no violation among {seen} pairs and {steps} steps of ascent"
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
