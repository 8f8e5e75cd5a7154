"""How much the network's output feels an error at a layer, by random probes of its Jacobian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_otprune.errors import CalibrationError
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    first_line,
    first_tensor,
    flat_tensors,
    map_tensors,
    outside_inference,
    run,
)
from torch_otprune.structure.layers import Conv, axis_of, leaf_of
from torch_otprune.structure.mute import exchanged
from torch_otprune.structure.wiring import first_of

__all__ = [
    "Sensitivity",
    "chunks",
    "generators_of",
    "gradients",
    "own_signs",
    "sense",
    "signs",
    "slopes_of",
]

_CHUNK = 16  # samples whose activations are alive at once


class Sensitivity:
    """What gradients say about each consumer, summed over samples in float64.

    Args:
        paths: the consumers.
        draws: random sign vectors that every sum runs over.
    """

    def __init__(self, paths: Iterable[str], draws: int = 1) -> None:
        self.paths = tuple(paths)
        self.felt: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.power = torch.zeros((), dtype=torch.float64, device="cpu")
        self.samples = 0
        self.draws = draws

    @property
    def mean_power(self) -> float:
        """Average the output's squared norm over samples."""
        return float(self.power) / max(self.samples, 1)

    def feel(self, path: str) -> Float[Tensor, " out"] | None:
        """Tell how much the squared output grows with a squared error in each output channel.

        Args:
            path: a consumer.

        Returns:
            change of the output's squared norm per sample, for a mean squared error of one; None
            where the consumer did not run.
        """
        if path not in self.felt:
            return None
        return self.felt[path] / self.spread[path].clamp_min(1e-30)

    def slope(self, path: str) -> Float[Tensor, " outs"] | None:
        """Tell how much the squared output changes with what a bare parameter's outputs carry.

        Args:
            path: a consumer that is no module.

        Returns:
            squared change of the output per sample, for each output at its full size; None where
            it was not measured, or no gradient came by.
        """
        if path not in self.slopes or not bool(self.slopes[path].any()):
            return None
        return self.slopes[path].cpu() / max(self.samples * self.draws, 1)

    def tables(self) -> tuple[dict[str, Tensor], ...]:
        """List all that adds up over ranks, by consumer."""
        return self.felt, self.spread, self.inputs, self.slopes


def sense(
    model: nn.Module,
    centres: Mapping[str, Tensor | None],
    batches: Sequence[Any],
    *,
    draws: int,
    seed: int,
    loose: Sequence[str] = (),
) -> Sensitivity:
    """Probe how the network's output moves when a consumer's output is perturbed.

    The perturbation of an output channel is its own deviation from its mean, all positions
    together: an error that a cut leaves behind looks like the signal it was made of, and whether
    errors at neighbouring positions add up or cancel decides what pooling makes of them. With
    random signs `v`, `<grad <v, f>, deviation>^2` is the squared change of f in expectation
    (Hutchinson's estimator; output channels are taken as independent).

    Args:
        model: the model; left as it was.
        centres: mean output of every consumer; None where it is not known, then zero.
        batches: a few batches.
        draws: random sign vectors.
        seed: chooses them.
        loose: consumers that are no modules, by path; each sample is run once more for these.

    Returns:
        the sums.

    Source: Hutchinson 1990 for the estimator; ours for its use as a layer weight.
    """
    found = Sensitivity(centres, draws)
    with outside_inference(), evaluating(model), gradients(model):
        for batch in batches:
            for piece in chunks(batch):
                _probe(model, found, piece, centres, draws=draws, seed=seed)
            for piece in chunks(batch, 1) if loose else ():
                _probe_loose(model, found, piece, loose, draws=draws, seed=seed)
    return found


def chunks(batch: Any, most: int = _CHUNK) -> Iterator[Any]:
    """Cut a batch into pieces so small that gradients through the whole network fit.

    Args:
        batch: as for `run`.
        most: samples in a piece.

    Yields:
        batches of at most so many samples.
    """
    size = batch_size(batch)
    for start in range(0, size, most):
        stop = start + most
        yield map_tensors(
            batch, lambda t, a=start, b=stop: t[a:b] if t.dim() and len(t) == size else t
        )


@contextmanager
def gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients reach every layer; parameters keep their own `grad` and flag.

    Args:
        model: any module.

    Yields:
        nothing.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _probe(
    model: nn.Module,
    found: Sensitivity,
    piece: Any,
    centres: Mapping[str, Tensor | None],
    *,
    draws: int,
    seed: int,
) -> None:
    taps = {path: _Tap() for path in found.paths}
    handles = [handle for p, tap in taps.items() for handle in tap.hooks(model.get_submodule(p))]
    try:
        outputs = [t for t in flat_tensors(run(model, piece)) if t.requires_grad]
    finally:
        for handle in handles:
            handle.remove()
    found.samples += batch_size(piece)
    found.power += sum(t.detach().double().square().sum().cpu() for t in outputs)
    calls = [(path, tap.axis, x, z) for path, tap in taps.items() for x, z in tap.calls]
    points = [point for _, _, x, z in calls for point in (x, z)]
    if not points or not outputs:  # nothing to cut, or nothing differentiable comes out
        return
    generators = generators_of(piece, seed)
    for draw in range(draws):
        drawn = [own_signs(t, generators) for t in outputs]
        slopes = slopes_of(outputs, points, drawn, more=draw + 1 < draws)
        for (path, axis, x, z), dx, dz in zip(calls, slopes[::2], slopes[1::2], strict=True):
            if dx is not None and dz is not None:
                rows = [_rows(t, axis) for t in (x, z, dx, dz)]
                _collect(found, path, rows, centres[path])


def _probe_loose(
    model: nn.Module,
    found: Sensitivity,
    piece: Any,
    paths: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> None:
    """Probe parameters that somebody else multiplies with, on one sample.

    What an output of the parameter carries, times what the network feels of it, summed over
    positions, is the parameter's row times its gradient; and its column times its gradient the
    same of what it reads.
    """
    leaves = [leaf_of(model, path) for path in paths]
    outputs = [t for t in flat_tensors(run(model, piece)) if t.requires_grad]
    generators = generators_of(piece, seed)
    for draw in range(draws if outputs else 0):
        drawn = [own_signs(t, generators) for t in outputs]
        slopes = slopes_of(outputs, leaves, drawn, more=draw + 1 < draws)
        for path, leaf, slope in zip(paths, leaves, slopes, strict=True):
            if slope is not None:
                each = (leaf.detach().double() * slope.double()).movedim(
                    axis_of(path, leaf.shape), 0
                )
                _add(found.slopes, path, each.sum(0).flatten().square())
                _add(found.inputs, path, each.flatten(1).sum(1).square())


def slopes_of(
    outputs: Sequence[Tensor], points: Sequence[Tensor], drawn: Sequence[Tensor], *, more: bool
) -> tuple[Tensor | None, ...]:
    """Differentiate the network's output at points inside.

    Args:
        outputs: of one run.
        points: tensors that they were computed from.
        drawn: a direction for each output.
        more: whether the run is differentiated again.

    Returns:
        one gradient per point; None where no output depends on it.

    Raises:
        CalibrationError: if the run cannot be differentiated, as under re-entrant checkpointing,
            or where something overwrites what the gradient needs.
    """
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            outputs, points, drawn, retain_graph=more, allow_unused=True
        )
    except RuntimeError as error:
        inplace = "inplace operation" in str(error)
        raise CalibrationError(
            f"the output cannot be differentiated: {first_line(error)}",
            where="the sensitivity of the output, on the calibration data",
            fix="write `x = x + f(x)` for `x += f(x)`: the gradient needs what f was given."
            if inplace
            else "call checkpoint with use_reentrant=False, or switch checkpointing off meanwhile.",
        ) from error
    return found


def generators_of(piece: Any, seed: int) -> list[torch.Generator]:
    """Give every sample a generator of its own, by what it holds: no batch and no rank changes it.

    Args:
        piece: of a batch.
        seed: of all draws.

    Returns:
        one generator per sample.
    """
    return [torch.Generator("cpu").manual_seed(_own(one, seed)) for one in chunks(piece, 1)]


def own_signs(output: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one sign per output element and sample: what draws get wrong cancels between samples.

    Args:
        output: samples first.
        generators: one per sample; advanced.

    Returns:
        signs of the output's shape and type.
    """
    if not output.dim() or len(output) != len(generators):  # samples are somewhere else, or mixed
        return signs(output, generators[0])
    drawn = [torch.randint(0, 2, output.shape[1:], generator=g, device="cpu") for g in generators]
    return (torch.stack(drawn) * 2 - 1).to(output)


def _own(sample: Any, seed: int) -> int:
    """Number a sample by its content: the same in any batch and on any rank."""
    for t in flat_tensors(sample):
        held = t.detach().cpu().clone(memory_format=torch.contiguous_format)
        seed = crc32(held.flatten().view(torch.uint8).numpy().tobytes(), seed)
    return seed


def signs(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one sign per output element, the same for every sample: batches must not matter.

    Args:
        output: samples first.
        generator: of the draw.

    Returns:
        signs of the output's shape and type.
    """
    shape = output.shape[1:] if output.dim() else output.shape
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1
    return signs.to(output).expand_as(output)


def _collect(found: Sensitivity, path: str, rows: Sequence[Tensor], centre: Tensor | None) -> None:
    """Add one call's sums: what input and output channels do to the network's output."""
    x, z, dx, dz = rows
    deviation = z if centre is None else z - centre.to(z)
    _add(found.felt, path, (deviation * dz).sum(1).square().sum(0))
    _add(found.spread, path, deviation.square().mean(1).sum(0))
    _add(found.inputs, path, (x * dx).sum(1).square().sum(0))


def _rows(tensor: Tensor, axis: int) -> Float[Tensor, "samples positions channels"]:
    tensor = tensor.detach().double().movedim(axis, -1)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _add(table: dict[str, Tensor], path: str, value: Tensor) -> None:
    table[path] = table[path] + value if path in table else value


class _Tap:
    """Keep a layer's input and output of one forward pass, as points to differentiate at.

    Each layer gets a point of its own: where several read one tensor, the gradient at the tensor
    itself would be that of all of them together.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.axis = 1

    def hooks(self, module: nn.Module) -> list[RemovableHandle]:
        """Watch one layer."""
        return [
            module.register_forward_pre_hook(_enter, with_kwargs=True),
            module.register_forward_hook(self, with_kwargs=True),
        ]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        self.axis = 1 if isinstance(module, Conv) else -1
        x, z = first_tensor(args, kwargs), first_of(out)
        if x is None or z is None or not (x.requires_grad and z.requires_grad):
            return out  # as under the user's no_grad
        if not (x.numel() and z.numel()):
            return out  # no rows were sent here: no evidence
        self.calls.append((x, z))
        # an in-place op downstream must not rewrite the point, nor its value
        return exchanged(out, z, z.clone())


def _enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    shared = first_tensor(args, kwargs)

    def own(t: Tensor) -> Tensor:
        return t.view_as(t) if t is shared else t

    return map_tensors(args, own), map_tensors(kwargs, own)
