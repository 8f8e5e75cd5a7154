"""What a recurrent layer hands to its next step, where the example has just one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from torch_otprune.structure.coupling.ledger import Ledger

__all__ = ["tie_steps"]


def tie_steps(model: nn.Module, ledger: Ledger) -> None:
    """Join what recurrent layers read of the step before with what they write.

    On several steps that shows; a single one reads zeros, which follow anything.

    Args:
        model: any module.
        ledger: of its run.
    """
    for module in model.modules():
        for again, written in _steps(module):
            ends = [ledger.names.get(id(tensor)) for tensor in (again, written)]
            if ends[0] is None or ends[1] is None:
                continue
            read, made = ledger.labels(ends[0], 1), ledger.labels(ends[1], 0)
            if read is not None and made is not None:
                gates = made.reshape(-1, len(read))
                ledger.forest.union(read.expand(gates.shape), gates)


def _steps(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights that read the step before, each with the one that writes what they read."""
    if isinstance(module, nn.RNNCellBase):
        yield module.weight_hh, module.weight_hh
    elif isinstance(module, nn.RNNBase):
        for name in (n for n, _ in module.named_parameters() if n.startswith("weight_hh")):
            writes = name.replace("_hh", "_hr") if module.proj_size else name
            yield getattr(module, name), getattr(module, writes)
