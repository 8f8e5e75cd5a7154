"""Pruned equals masked: a cut must compute what the dense model does without the units."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.plan.model import Cut, Drop, Slice
from torch_otprune.structure.forward import evaluating, failing_line, first_line, flat_tensors, run
from torch_otprune.structure.layers import bare, is_token_norm
from torch_otprune.structure.mute import muted
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_, merged, places, set_
from torch_otprune.surgery.exchange import STAND_INS, exchange_
from torch_otprune.surgery.experts import is_mixture, routed
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
    for piece in pieces:
        for owner, name, axis in places(model, piece):
            weight = getattr(owner, name).detach()
            mask = torch.zeros(piece.size, device="cpu")
            mask[list(piece.keep)] = 1
            shape = [1] * weight.dim()
            shape[axis] = weight.shape[axis]
            # a filter of a grouped convolution reads the same place of every group
            yield owner, name, weight * mask[: weight.shape[axis]].to(weight).view(shape)


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

    Costs one copy of the model and two forward passes.

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

    Args:
        model: the dense model; left as it was.
        cuts: a plan's decisions.
        example: one batch.
        drops: blocks to take out as well.

    Returns:
        as `disagreement`, and one clause.
    """
    small = copied(model)
    cut_(small, cuts)
    exchange_(small, drops)
    far, said = _compared(model, cuts, small, example, drops)
    if far <= _EXACT and any(map(is_mixture, cuts)):
        far, said = _compared(model, cuts, small, example, drops, drawn=True)
        said += ", with logits that reach every expert"
    return far, said


def _compared(
    model: nn.Module,
    cuts: Sequence[Cut],
    small: nn.Module,
    example: Any,
    drops: Sequence[Drop],
    *,
    drawn: bool = False,
) -> tuple[float, str]:
    with evaluating(model), torch.no_grad():
        expected = _expected(model, cuts, small, example, drops, drawn=drawn)
        try:
            with evaluating(small), routed(small, cuts, cut=True, drawn=drawn):
                got = flat_tensors(run(small, example))
        except _FAILS as error:
            said = f"without it the model does not run: {_clause(small, error)}"
            return float("inf"), said
    if [t.shape for t in expected] != [t.shape for t in got]:
        few, many = len(got), len(expected)
        change = "tensors of other shapes" if few == many else f"{few} tensors instead of {many}"
        return float("inf"), f"without it the model returns {change}"
    far = gap(expected, got)
    if far > _EXACT:  # units may meet one another before any consumer
        with evaluating(model), torch.no_grad():
            silent = _expected(model, cuts, small, example, drops, drawn=drawn, sides=("in", "out"))
        far = min(far, gap(silent, got))
    return far, f"cut and masked outputs differ by {far:.1e} of the largest output"


_EXACT = 1e-6


def _expected(
    model: nn.Module,
    cuts: Sequence[Cut],
    small: nn.Module,
    example: Any,
    drops: Sequence[Drop],
    *,
    drawn: bool,
    sides: Collection[str] = ("in",),
) -> list[Tensor]:
    with (
        masked(model, cuts, small, sides=sides),
        muted(model, [drop.swaps[0] for drop in drops]),
        routed(model, cuts, cut=False, drawn=drawn),  # last: finds the weights that are masked
    ):
        return flat_tensors(run(model, example))


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
