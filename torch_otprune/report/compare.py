"""How far a pruned model is from the dense one: at its output, and layer by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import VerificationError
from torch_otprune.report.model import Agreement, LayerError
from torch_otprune.structure.forward import evaluating, flat_tensors, run

__all__ = ["agreement", "layer_errors", "output_error", "per_layer_error", "sample_errors"]

Pair = tuple[Tensor, Tensor]


def output_error(dense: Any, pruned: Any) -> float:
    """Measure how far an output moved: the RMS of the change over the RMS of the dense output.

    Args:
        dense: tensor, tuple, mapping, Transformers output, or a list of one per batch.
        pruned: the same nesting.

    Returns:
        0 for equal outputs, 1 for silence, infinity where a finite number became none.

    Raises:
        VerificationError: if the two have no floating tensor of one shape in common.
    """
    ratio = _Ratio()
    for pair in _pairs(dense, pruned):
        ratio.add(*pair)
    return ratio.value


def sample_errors(dense: Any, pruned: Any, *, samples: int) -> tuple[Tensor, Tensor]:
    """Square how far an output moved, sample by sample.

    Args:
        dense: of one batch: tensor, tuple, mapping, Transformers output.
        pruned: the same nesting.
        samples: in the batch.

    Returns:
        squared change and squared size per sample, summed over all tensors, in float64 on the
        CPU; one entry for the whole batch where samples do not come first.

    Raises:
        VerificationError: if the two have no floating tensor of one shape in common.
    """
    pairs = list(_pairs(dense, pruned))
    rows = samples if all(a.dim() and len(a) == samples for a, _ in pairs) else 1
    change = torch.zeros(rows, dtype=torch.float64, device="cpu")
    size = change.clone()
    for pair in pairs:
        before, after = (_wide(t).reshape(rows, -1) for t in pair)
        finite = before.isfinite()  # masks of -inf are the dense net's own business
        before, after = (torch.where(finite, t, 0.0) for t in (before, after))
        size += before.square().sum(1).cpu()
        change += (after - before).square().sum(1).nan_to_num(nan=torch.inf, posinf=torch.inf).cpu()
    return change, size


def agreement(dense: Any, pruned: Any) -> Agreement:
    """Measure how often both models give the same answer.

    Logits are a mapping's `logits`, or the only tensor if it is samples x classes; they are
    compared by their largest entry. Anything else is compared by the mean cosine over samples.

    Args:
        dense: tensor, tuple, mapping, Transformers output, or a list of one per batch.
        pruned: the same nesting.

    Returns:
        the agreement, and what chance would give.

    Raises:
        VerificationError: if the two have no floating tensor of one shape in common.
    """
    first, second = _logits(dense), _logits(pruned)
    if first is not None and second is not None and first.shape == second.shape:
        return _top1(first, second)
    return _cosine(list(_pairs(dense, pruned)))


def per_layer_error(
    dense: nn.Module, pruned: nn.Module, batches: Iterable[Any], paths: Sequence[str]
) -> dict[str, float]:
    """Measure how far the output of each layer moved.

    Args:
        dense: the model before; it is left as it was.
        pruned: the model after; it is left as it was.
        batches: calibration batches.
        paths: module paths to look at, in both models.

    Returns:
        path to RMS of the change over RMS of the dense output, for the layers whose outputs
        have the same shape in both models.
    """
    kept = _Keep()
    ratios: dict[str, _Ratio] = defaultdict(_Ratio)
    with _hooked(dense, kept, paths), _hooked(pruned, _Compare(kept, ratios), paths):
        for batch in batches:
            kept.outputs.clear()
            for model in (dense, pruned):
                with evaluating(model), torch.no_grad():
                    run(model, batch)
    return {path: ratios[path].value for path in paths if path in ratios}


def layer_errors(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[LayerError, ...]:
    """Pair the layer errors before and after repair.

    Args:
        before: path to error before repair.
        after: path to error after it.

    Returns:
        the layers that are in both, in the order of `before`.
    """
    return tuple(
        LayerError(path=path, before_repair=before[path], after_repair=after[path])
        for path in before
        if path in after
    )


class _Ratio:
    """A relative RMS, summed in float64 over as many tensors as come."""

    def __init__(self) -> None:
        self.change = self.size = 0.0

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        dense, pruned = _wide(dense), _wide(pruned)
        finite = dense.isfinite()  # masks of -inf are the dense net's own business
        dense, pruned = dense[finite], pruned[finite]
        self.size += dense.square().sum().item()
        change = (pruned - dense).square().sum().item()
        self.change += torch.inf if math.isnan(change) else change

    @property
    def value(self) -> float:
        if self.size == 0:
            return 0.0 if self.change == 0 else torch.inf
        return float((self.change / self.size) ** 0.5)


class _Keep:
    """The hook that keeps what the dense layers said on one batch."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)

    def see(self, path: str, out: Tensor) -> None:
        # An in-place activation behind the layer would overwrite what is not copied.
        self.outputs[path].append(out.clone())


class _Compare:
    """The hook that holds the pruned layers against it, call by call."""

    def __init__(self, kept: _Keep, ratios: dict[str, _Ratio]) -> None:
        self.kept, self.ratios = kept, ratios

    def see(self, path: str, out: Tensor) -> None:
        calls = self.kept.outputs.get(path)
        if calls and (dense := calls.pop(0)).shape == out.shape:
            self.ratios[path].add(dense, out)


class _Hook:
    """One layer's line to a listener."""

    def __init__(self, listener: _Keep | _Compare, path: str) -> None:
        self.listener, self.path = listener, path

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point():
            self.listener.see(self.path, out)


@contextmanager
def _hooked(model: nn.Module, listener: _Keep | _Compare, paths: Sequence[str]) -> Iterator[None]:
    handles = []
    try:
        for path in paths:
            hook = _Hook(listener, path)
            handles.append(model.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.to("cpu", torch.float64) if real.device.type == "mps" else real.double()


def _pairs(dense: Any, pruned: Any) -> Iterator[Pair]:
    """Match the floating tensors of two outputs by position; cut caches differ in shape."""
    found = False
    for a, b in zip(flat_tensors(dense), flat_tensors(pruned), strict=False):
        if a.shape == b.shape and (a.is_floating_point() or a.is_complex()):
            found = True
            yield a, b
    if not found:
        raise VerificationError(
            "the two outputs have no floating tensor of one shape in common.",
            where=f"dense output {_shapes(dense)}, pruned output {_shapes(pruned)}",
            fix="let forward return a tensor, or a tuple or mapping of tensors.",
        )


def _shapes(output: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in flat_tensors(output)]
    return ", ".join(shapes) or f"of type {type(output).__name__}"


def _logits(output: Any) -> Tensor | None:
    """Find samples x classes, one row per answer; None if the output is something else."""
    if isinstance(output, Mapping):
        named = output.get("logits")
        if isinstance(named, Tensor) and named.dim() > 1:
            return _rows(named.flatten(0, -2))
        return None
    if isinstance(output, (list, tuple)) and output:
        parts = [part for item in output if (part := _logits(item)) is not None]
        same = len(parts) == len(output) and len({part.shape[1] for part in parts}) == 1
        # A tuple of several tensors is several answers; a list is one answer per batch.
        return torch.cat(parts) if same and (isinstance(output, list) or len(parts) == 1) else None
    return _rows(output) if isinstance(output, Tensor) else None


def _rows(tensor: Tensor) -> Tensor | None:
    answers = tensor.dim() == 2 and tensor.shape[1] > 1 and len(tensor) > 0
    return tensor if answers and tensor.is_floating_point() else None


def _top1(dense: Tensor, pruned: Tensor) -> Agreement:
    classes, samples = dense.shape[1], len(dense)
    first, second = dense.argmax(dim=1), pruned.argmax(dim=1)
    shares = [torch.bincount(x, minlength=classes).double() / samples for x in (first, second)]
    return Agreement(
        kind="top1",
        value=(first == second).double().mean().item(),
        chance=min(1.0, (shares[0] * shares[1]).sum().item()),
        samples=samples,
    )


def _cosine(pairs: Sequence[Pair]) -> Agreement:
    """Average the cosine over samples; over whole tensors where a sample is one number."""
    total, samples = 0.0, 0
    for a, b in pairs:
        rows = len(a) if a.dim() > 1 and a[0].numel() > 1 else 1
        dense, other = (_wide(x).nan_to_num(0.0, 0.0, 0.0).reshape(rows, -1) for x in (a, b))
        cosine = torch.cosine_similarity(dense, other, dim=1)
        total += cosine.where((dense != other).any(dim=1), 1.0).sum().item()  # 0 and 0 agree
        samples += rows
    return Agreement(kind="cosine", value=total / samples, chance=0.0, samples=samples)
