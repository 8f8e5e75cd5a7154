"""Give every batch-norm the statistics of what really arrives."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_otprune.repair.base import Note, Patient, Repair, register
from torch_otprune.repair.lockstep import distance
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.forward import Call, evaluating, flat_tensors, run
from torch_otprune.structure.layers import BatchNorm, tensor
from torch_otprune.surgery.cut import put_

__all__ = ["Norm"]


@register
class Norm(Repair):
    """Re-estimate the running mean and variance of every batch-norm, all in one pass.

    Each batch-norm normalises with the batch while the pass runs, as in training; means and
    second moments are pooled over all batches, so that a small last batch counts what it should.
    A batch that brings a batch-norm a single row passes it with the running statistics.

    Limits: nothing to do without batch-norms; after a least-squares repair it rarely helps, and
    is then refused because the output's error would rise.

    Source: common practice; Yamada & Otani 2022 and the REFLOW report describe its effect.
    """

    kind: Literal["norm"] = "norm"

    def apply_(self, patient: Patient) -> tuple[Note, ...]:
        """Pool the statistics, then keep them only if the output comes closer."""
        names = [
            n
            for n, m in patient.small.named_modules()
            if isinstance(m, BatchNorm) and m.running_mean is not None
        ]
        if not names:
            return (
                Note(self.kind, "model", None, None, accepted=False, text="there is no batch-norm"),
            )
        before = distance(patient.dense, patient.small, patient.batches)
        old = {n: _statistics(patient.small.get_submodule(n)) for n in names}
        for name, new in _pooled(patient, names).items():
            _write_(patient.small.get_submodule(name), new)
        after = distance(patient.dense, patient.small, patient.batches)
        if after <= before:
            return (Note(self.kind, "model", before, after, accepted=True),)
        for name, values in old.items():
            _write_(patient.small.get_submodule(name), values)
        return (
            Note(
                self.kind,
                "model",
                before,
                before,
                accepted=False,
                text=f"the error would rise to {after:.3f}",
            ),
        )


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return tensor(norm, "running_mean").clone(), tensor(norm, "running_var").clone()


def _write_(norm: nn.Module, values: tuple[Tensor, Tensor]) -> None:
    put_(norm, "running_mean", values[0])
    put_(norm, "running_var", values[1])


def _pooled(patient: Patient, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a copy with batch statistics and pool what arrives at every batch-norm."""
    twin = copy.deepcopy(patient.small)
    pools = {name: _Pool(tensor(twin.get_submodule(name), "running_mean")) for name in names}
    with evaluating(twin), torch.no_grad():
        for name, pool in pools.items():
            norm = twin.get_submodule(name)
            norm.train()
            norm.register_forward_pre_hook(pool, with_kwargs=True)
        for batch in patient.batches:
            run(twin, batch)
    found = {name: pool.finish() for name, pool in pools.items()}
    return {name: values for name, values in found.items() if values is not None}


class _Pool:
    """Sums of a batch-norm's input per channel."""

    def __init__(self, like: Tensor) -> None:
        self.sums = like.new_zeros((3, len(like)), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = flat_tensors(Call(args, kwargs))[0].detach().double()
        x = x.movedim(1, -1).flatten(0, -2)
        module.train(len(x) > 1)  # one row has no variance: it meets the running statistics
        count = torch.full_like(x[0], len(x))
        self.sums = self.sums + torch.stack([x.sum(0), x.square().sum(0), count])

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """Pool over all ranks; None where nothing ever arrived."""
        all_sum_([self.sums])
        total, square, count = self.sums
        if not float(count.max()):
            return None
        mean = total / count
        unbiased = count / (count - 1).clamp_min(1)
        return mean, (square / count - mean.square()).clamp_min(0) * unbiased
