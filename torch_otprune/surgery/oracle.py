"""Pruned equals masked: a cut must compute what the dense model does without the units."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.plan.model import Cut, Drop, Slice
from torch_otprune.structure.forward import evaluating, failing_line, first_line, flat_tensors, run
from torch_otprune.structure.layers import bare, is_token_norm
from torch_otprune.structure.mute import muted
from torch_otprune.surgery.check import tolerance
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_, merged, places, set_
from torch_otprune.surgery.exchange import STAND_INS, exchange_
from torch_otprune.surgery.experts import is_mixture, routed
from torch_otprune.surgery.locate import Compared, Recorded, inside, watched
from torch_otprune.surgery.parametrised import held

__all__ = ["compared", "disagreement", "gap", "masked", "stumbled"]

_FAILS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_CALL = "torch/nn/modules/module.py"  # where torch calls a forward


@contextmanager
def masked(
    model: nn.Module,
    cuts: Sequence[Cut],
    small: nn.Module | None = None,
    *,
    sides: Collection[str] = ("in",),
) -> Iterator[None]:
    """Silence, at every consumer, the channels that the cuts would remove.

    A consumer's weights on what goes are zero meanwhile. A norm over channels of which some go is
    one over those that stay: it is taken from the cut model and runs on them alone.

    Args:
        model: the dense model.
        cuts: a plan's decisions.
        small: the cut model; needed where a norm loses some of the channels it takes together.
        sides: where: `in` at consumers, `out` at producers, as units that meet in an inner
            product need it.

    Yields:
        nothing; weights are back and hooks are gone afterwards.
    """
    pieces, handles = merged(cuts), []
    old: list[tuple[nn.Module, str, Tensor | nn.Module]] = []
    try:
        for owner, name, value in _silenced(model, [p for p in pieces if p.side in sides]):
            old.append((owner, name, held(owner, name)))
            set_(owner, name, value)
        for path, piece in _norms(model, pieces).items():
            assert small is not None, f"'{path}' can only be masked with the cut model at hand"
            hook = _NormOfKept(small.get_submodule(path), piece)
            norm = model.get_submodule(path)
            handles.append(norm.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for owner, name, before in reversed(old):
            set_(owner, name, before)
        for handle in handles:
            handle.remove()


def _silenced(model: nn.Module, pieces: Sequence[Slice]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Make one masked tensor of each that is cut, however many cuts it has."""
    made: dict[tuple[nn.Module, str], Tensor] = {}
    for piece in pieces:
        for owner, name, axis in places(model, piece):
            weight = getattr(owner, name).detach()
            mask = torch.zeros(piece.size, device="cpu")
            mask[list(piece.keep)] = 1
            shape = [1] * weight.dim()
            shape[axis] = weight.shape[axis]
            # a filter of a grouped convolution reads the same place of every group
            mask = mask[: weight.shape[axis]].to(weight).view(shape)
            done = made.get((owner, name))
            made[owner, name] = weight * mask if done is None else done.mul_(mask)
    yield from ((owner, name, value) for (owner, name), value in made.items())


def _norms(model: nn.Module, pieces: Sequence[Slice]) -> dict[str, Slice]:
    """Find the norms that lose some of the numbers they take together, and what each keeps."""
    found: dict[str, Slice] = {}
    modules, mixed = dict(model.named_modules()), set()
    for piece in pieces:
        path = piece.path if piece.path in modules else bare(piece.path)[0].rpartition(".")[0]
        if piece.side == "through" and _takes_together(modules[path], whole=path == piece.path):
            found[path] = piece
        elif piece.side != "through":
            mixed.add(path)
    return {path: piece for path, piece in found.items() if path not in mixed}


def _takes_together(module: nn.Module, *, whole: bool) -> bool:
    """Recognise a norm over channels; a home-made one is a leaf that only carries channels."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    return is_token_norm(module) or not (whole or list(module.children()))


class _NormOfKept:
    """A hook that takes a norm over the channels that stay."""

    def __init__(self, norm: nn.Module, piece: Slice) -> None:
        self.norm, self.size = norm, piece.size
        self.keep = torch.tensor(piece.keep, device="cpu")
        first = isinstance(norm, nn.GroupNorm)
        self.first = first or getattr(norm, "data_format", "") == "channels_first"

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        if not isinstance(out, Tensor):
            return out
        order = (1, out.dim() - 1) if self.first else (out.dim() - 1, 1)
        for axis in (a for a in order if a < out.dim() and out.shape[a] == self.size):
            made = self._made(axis, args, kwargs, out)
            if made is not None:
                return made
        return out

    def _made(
        self, axis: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """Norm what stays along an axis; None where the norm does not fit there."""
        keep = self.keep.to(out.device)

        def kept(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.dim() == out.dim()
            cut = fits and value.shape[axis] == self.size
            return value.index_select(axis, keep) if cut else value

        try:
            made = self.norm(*map(kept, args), **{name: kept(v) for name, v in kwargs.items()})
        except RuntimeError:
            return None
        return torch.zeros_like(out).index_copy(axis, keep, made)


def disagreement(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> float:
    """Cut a copy and compare it with the masked original on an example.

    Costs two forward passes, and what `trial.need` says beside the model.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        the largest difference relative to the largest output; infinity where the cut model
        does not run or its output has another shape.
    """
    return compared(model, cuts, example, drops=drops)[0]


def compared(
    model: nn.Module, cuts: Sequence[Cut], example: Any, *, drops: Sequence[Drop] = ()
) -> tuple[float, str]:
    """Measure the disagreement, and say what it is.

    Where a single decision disagrees, the first op that does is named: two passes more, and the
    activations of one of them.

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        as `disagreement`, and one clause.
    """
    small = copied(model, shared=True)
    cut_(small, cuts)
    exchange_(small, drops)
    pair = _Pair(model, small, cuts, drops, example)
    far, said = pair.compared()
    if far <= _EXACT and any(map(is_mixture, cuts)):
        pair = _Pair(model, small, cuts, drops, example, drawn=True)
        far, said = pair.compared()
        said += ", with logits that reach every expert"
    return far, said


_EXACT = 1e-6
_SIDES: tuple[tuple[str, ...], ...] = ("in",), ("in", "out")


@dataclass(frozen=True)
class _Pair:
    """A dense model, what was cut of it, and an example for both."""

    model: nn.Module
    small: nn.Module
    cuts: Sequence[Cut]
    drops: Sequence[Drop]
    example: Any
    drawn: bool = False

    def compared(self) -> tuple[float, str]:
        expected = self._expected()
        try:
            got = self._got()
        except _FAILS as error:
            said = f"without it the model does not run: {_clause(self.small, error)}"
            return float("inf"), said if failing_line(error) else said + self._failing()
        if [t.shape for t in expected] != [t.shape for t in got]:
            return float("inf"), f"without it the model returns {_change(expected, got)}"
        far, sides = gap(expected, got), _SIDES[0]
        if far > _EXACT:  # units may meet one another before any consumer
            silent = gap(self._expected(_SIDES[1]), got)
            far, sides = (silent, _SIDES[1]) if silent < far else (far, sides)
        said = f"cut and masked outputs differ by {far:.1e} of the largest output"
        where = self._first(sides) if self._single() and far > tolerance(self.model) else ""
        return far, ", ".join(filter(None, (said, where)))

    def _expected(
        self,
        sides: Collection[str] = _SIDES[0],
        watch: AbstractContextManager[Any] | None = None,
    ) -> list[Tensor]:
        with (
            evaluating(self.model),
            torch.no_grad(),
            masked(self.model, self.cuts, self.small, sides=sides),
            muted(self.model, [drop.swaps[0] for drop in self.drops]),
            # behind the masks, as it looks for the weights that are masked
            routed(self.model, self.cuts, cut=False, drawn=self.drawn),
            watch or nullcontext(),
        ):
            return flat_tensors(run(self.model, self.example))

    def _got(self, watch: AbstractContextManager[Any] | None = None) -> list[Tensor]:
        with (
            evaluating(self.small),
            torch.no_grad(),
            routed(self.small, self.cuts, cut=True, drawn=self.drawn),
            watch or nullcontext(),
        ):
            for tensor in flat_tensors(self.example)[:1]:
                torch.rand(1, device=tensor.device)  # a random output must not agree by its seed
            return flat_tensors(run(self.small, self.example))

    def _single(self) -> bool:
        return len(self.cuts) + len(self.drops) == 1

    def _first(self, sides: Collection[str]) -> str:
        """Name the first op that differs; what only masks or mutes is no op of the model."""
        norms = _norms(self.model, merged(self.cuts))
        swaps = (swap.path for drop in self.drops for swap in drop.swaps)
        skip, seen = {*norms, *swaps}, Recorded()
        self._got(watched(self.small, seen, skip=skip))
        found = Compared(seen, self.cuts, tolerance(self.model))
        self._expected(sides, watched(self.model, found, skip=skip))
        return found.first()

    def _failing(self) -> str:
        """Name the module that was running when the cut model failed; for want of a line."""
        if not self._single():
            return ""
        with inside(self.small) as running:
            try:
                self._got()
            except _FAILS:
                return f", in '{running[-1]}'" if running[-1] else ""
        return ""  # it fails on a shortcut that hooks close


def _change(expected: Sequence[Tensor], got: Sequence[Tensor]) -> str:
    few, many = len(got), len(expected)
    if few != many:
        return f"{few} tensors instead of {many}"
    old, new = next((a, b) for a, b in zip(expected, got, strict=True) if a.shape != b.shape)
    return f"tensors of other shapes, such as {tuple(new.shape)} instead of {tuple(old.shape)}"


def stumbled(model: nn.Module, error: BaseException) -> str:
    """Say how the user's own forward failed in a smaller model.

    Args:
        model: the smaller model.
        error: what was raised.

    Returns:
        one clause with the line; empty for an error that the model's forward did not raise.
    """
    frames = traceback.extract_tb(error.__traceback__)
    called = any(f.filename.replace("\\", "/").endswith(_CALL) for f in frames)
    theirs = called and isinstance(error, _FAILS) and failing_line(error)
    return _clause(model, error) if theirs else ""


def _clause(model: nn.Module, error: BaseException) -> str:
    """Word an error; what a stand-in lacks is what the model reads of the module before it."""
    said, place = first_line(error), failing_line(error)
    gone = error.obj if isinstance(error, AttributeError) else None
    if isinstance(gone, STAND_INS) and isinstance(error, AttributeError):
        path = next((path for path, module in model.named_modules() if module is gone), "")
        whose = f"'{path}'" if path else "a module"
        said = f"it reads '.{error.name}' of {whose}, which is taken out"
    return f"{said} (at {place})" if place else said


def gap(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Measure the largest difference between two lists of outputs.

    Args:
        expected: the reference.
        got: as many tensors of the same shapes.

    Returns:
        relative to the reference's largest entry; infinity where shapes differ.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    pairs = [
        (a, b)
        for a, b in zip(expected, got, strict=True)
        if (a.is_floating_point() or a.is_complex()) and a.numel() and not a.is_meta  # no values
    ]
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    worst = max((float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs), default=0.0)
    return worst / scale if scale else worst
