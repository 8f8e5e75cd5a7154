"""What writes each unit, as the network really applies it: batch-norms folded in."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.statistics.patches import full_weight
from torch_otprune.structure.graph import Graph, Group, Member
from torch_otprune.structure.layers import BatchNorm, Conv, channels, norm_behind, tensor

__all__ = ["Filters", "filters", "gain_and_shift", "module_at"]


@dataclass(frozen=True)
class Filters:
    """One producer's weights, times what the batch-norm behind it multiplies them by.

    Args:
        path: the producer.
        weight: by unit, channel of the unit, input channel and tap of the kernel.
        offset: what is added, by unit and channel of the unit.
        kernel: size of the kernel along each of its axes; empty where there is none.
    """

    path: str
    weight: Float[Tensor, "units width inputs taps"]
    offset: Float[Tensor, "units width"]
    kernel: tuple[int, ...]


def filters(
    model: nn.Module, graph: Graph, group: Group, *, ties: frozenset[str]
) -> tuple[Filters, ...]:
    """Lay out what writes the units of a group.

    Args:
        model: the dense model.
        graph: its analysis.
        group: the group.
        ties: modules that share tensors, as `layers.shared` lists them.

    Returns:
        one entry per producer that is a layer, in float64 on the CPU; bare parameters have none.
    """
    found = [(m, module_at(model, m.path)) for m in group.producers]
    return tuple(_filters(model, graph, m, ties, module) for m, module in found if module)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Find a member's module.

    Args:
        model: the model.
        path: of the member.

    Returns:
        the module; None for a bare parameter.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _filters(
    model: nn.Module, graph: Graph, member: Member, ties: frozenset[str], module: nn.Module
) -> Filters:
    full = full_weight(module).cpu()
    full = full.T if isinstance(module, nn.Embedding) else full
    kernel = tuple(module.kernel_size) if isinstance(module, Conv) else ()
    inputs = (channels(module, "in") or full.shape[1]) if kernel else full.shape[1]
    weight = full.reshape(len(full), inputs, -1)
    bias = getattr(module, "bias", None)
    offset = weight.new_zeros(len(weight)) if bias is None else bias.detach().double().cpu()
    name = norm_behind(model, graph, member.path, ties)
    if name is not None:
        gain, shift = gain_and_shift(model.get_submodule(name))
        weight, offset = weight * gain[:, None, None], offset * gain + shift
    return Filters(member.path, weight[member.index], offset[member.index], kernel)


def gain_and_shift(norm: nn.Module) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Write a batch-norm with running statistics as `gain * x + shift`.

    Args:
        norm: the batch-norm; its `eps` counts, so a channel without variance stays finite.

    Returns:
        gain and shift, in float64 on the CPU.
    """
    assert isinstance(norm, BatchNorm)
    mean, var = (tensor(norm, name).double().cpu() for name in ("running_mean", "running_var"))
    gain = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double().cpu()
    shift = -gain * mean
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double().cpu()
    return gain, shift
