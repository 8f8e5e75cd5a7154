"""How much the network's output feels an error at a layer, by random probes of its Jacobian."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from torch_otprune.structure.forward import batch_size, evaluating, flat_tensors, map_tensors, run

__all__ = ["Sensitivity", "sense"]

_CHUNK = 16  # samples whose activations are alive at once


class Sensitivity:
    """What gradients say about each consumer, summed over samples in float64.

    Args:
        paths: the consumers.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = tuple(paths)
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.power = torch.zeros((), dtype=torch.float64)
        self.samples = 0


def sense(
    model: nn.Module, paths: Iterable[str], batches: Sequence[Any], *, draws: int, seed: int
) -> Sensitivity:
    """Probe the Jacobian from every consumer's output to the network's output.

    For random signs `v`, the gradient of `<v, f>` has the squared Jacobian as its second moment,
    so an error of mean square `m` in output channel `o` moves `f` by about
    `outputs[path][o] * m / samples` (Hutchinson's estimator, diagonal in channels).

    Args:
        model: the model; left as it was.
        paths: the consumers.
        batches: a few batches.
        draws: random sign vectors per sample.
        seed: chooses them.

    Returns:
        per consumer, the summed squared gradients at its output, one per channel, and the summed
        squares of input times gradient, one per input channel; and the output's summed square.

    Source: Hutchinson 1990 for the trace; ours for its use as a layer weight.
    """
    found = Sensitivity(paths)
    with evaluating(model), _gradients(model):
        for batch in batches:
            for piece in _chunks(batch):
                _probe(model, found, piece, draws=draws, seed=seed)
    return found


def _chunks(batch: Any) -> Iterator[Any]:
    size = batch_size(batch)
    for start in range(0, size, _CHUNK):
        stop = start + _CHUNK
        yield map_tensors(
            batch, lambda t, a=start, b=stop: t[a:b] if t.dim() and len(t) == size else t
        )


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients reach every layer; parameters keep their own `grad` and flag."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _probe(model: nn.Module, found: Sensitivity, piece: Any, *, draws: int, seed: int) -> None:
    taps = {path: _Tap() for path in found.paths}
    handles = [model.get_submodule(p).register_forward_hook(tap) for p, tap in taps.items()]
    try:
        outputs = [t for t in flat_tensors(run(model, piece)) if t.requires_grad]
    finally:
        for handle in handles:
            handle.remove()
    size = batch_size(piece)
    found.samples += size
    found.power += sum(t.detach().double().square().sum().cpu() for t in outputs)
    seen = {path: tap for path, tap in taps.items() if tap.calls}
    points = [point for tap in seen.values() for call in tap.calls for point in call]
    generator = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        signs = [_signs(t, generator) for t in outputs]
        gradients = torch.autograd.grad(
            outputs, points, signs, retain_graph=draw + 1 < draws, allow_unused=True
        )
        _collect(found, seen, gradients, draws)


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one sign per output element, the same for every sample, so that batches do not matter."""
    shape = output.shape[1:] if output.dim() else output.shape
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return signs.to(output).expand_as(output)


def _collect(found: Sensitivity, seen: dict[str, _Tap], gradients: Sequence[Tensor | None], draws: int) -> None:
    rest = iter(gradients)
    for path, tap in seen.items():
        for x, z in tap.calls:
            dx, dz = next(rest), next(rest)
            if dx is None or dz is None:
                continue
            axis = tap.axis
            _add(found.outputs, path, _per_channel(dz.double().square(), axis) / draws)
            products = (x.detach().double() * dx.double()).movedim(axis, -1)
            per_sample = products.reshape(len(x), -1, products.shape[-1]).sum(1)
            _add(found.inputs, path, per_sample.square().sum(0) / draws)


def _per_channel(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, -1).flatten(0, -2).sum(0)


def _add(table: dict[str, Tensor], path: str, value: Tensor) -> None:
    table[path] = table[path] + value if path in table else value


class _Tap:
    """Keep a layer's input and output of one forward pass, as points to differentiate at."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.axis = 1

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        self.axis = -1 if isinstance(module, nn.Linear) else 1
        self.calls.append((inputs[0], out))
        return out.view_as(out)  # an in-place op downstream must not rewrite the point
