"""The layers that can be cut: which axes of which tensors carry their channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from math import prod

from torch import Tensor, nn

from torch_otprune.structure.graph import Graph, Side

__all__ = [
    "NORMS",
    "TokenNorm",
    "axes",
    "axis_of",
    "bare",
    "bare_axis",
    "channels",
    "holder",
    "is_dense",
    "lies_across",
    "is_depthwise",
    "is_linear",
    "is_token_norm",
    "kernel",
    "leaf_of",
    "norm_behind",
    "norms_behind",
    "shared",
    "tensor",
    "widths_of",
]


Conv = nn.modules.conv._ConvNd
BatchNorm = nn.modules.batchnorm._BatchNorm
InstanceNorm = nn.modules.instancenorm._InstanceNorm
NORMS = (BatchNorm, InstanceNorm, nn.GroupNorm)
TokenNorm = (nn.LayerNorm, nn.RMSNorm)


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a convolution carries its channels one to one, or one to several."""
    return (
        isinstance(module, Conv)
        and module.groups == module.in_channels
        and module.in_channels > 1
        and (module.out_channels == module.in_channels or not module.transposed)
    )


def is_dense(module: nn.Module) -> bool:
    """Tell whether a module is a dense layer: torch's, or GPT-2's, whose weight lies across."""
    return isinstance(module, nn.Linear) or lies_across(module)


def lies_across(module: nn.Module) -> bool:
    """Tell whether a dense layer's weight is inputs by outputs: Transformers' `Conv1D`."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module mixes channels linearly: a dense layer or a convolution."""
    return (isinstance(module, Conv) or is_dense(module)) and not is_depthwise(module)


def is_token_norm(module: nn.Module) -> bool:
    """Tell a layer-norm over one axis, also one without parameters that torch does not know."""
    shape = getattr(module, "normalized_shape", None)
    own = isinstance(module, TokenNorm) or not (module._parameters or module._modules)
    return own and isinstance(shape, tuple) and len(shape) == 1


def channels(module: nn.Module, side: Side) -> int | None:
    """Count the channels along one side; None where the module has no such side."""
    if isinstance(module, Conv):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if lies_across(module):
        return tensor(module, "weight").shape[0 if side == "in" else 1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "out" else None
    return _through(module)


def _through(module: nn.Module) -> int | None:
    """Count the channels that a module carries one to one."""
    if isinstance(module, (BatchNorm, InstanceNorm)):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    if is_token_norm(module):
        return int(module.normalized_shape[0])  # type: ignore[index]
    return None


def axes(module: nn.Module, side: Side) -> tuple[tuple[str, int], ...]:
    """List the tensors, and the axis of each, that a side's channels run along.

    Args:
        module: a layer that `channels` knows.
        side: which of its sides.

    Returns:
        pairs of tensor name and axis; absent tensors (no bias) are left out.
    """
    found: tuple[tuple[str, int], ...]
    if isinstance(module, Conv):
        out, into = (1, 0) if module.transposed else (0, 1)
        found = (("weight", into),) if side == "in" else (("weight", out), ("bias", 0))
        if side == "through" and is_depthwise(module):
            found = (("weight", 0), ("bias", 0))
    elif isinstance(module, nn.Linear):
        found = (("weight", 1),) if side == "in" else (("weight", 0), ("bias", 0))
    elif lies_across(module):
        found = (("weight", 0),) if side == "in" else (("weight", 1), ("bias", 0))
    elif isinstance(module, nn.Embedding):
        found = (("weight", 1),)
    else:
        found = tuple((n, 0) for n in ("weight", "bias", "running_mean", "running_var"))
    return tuple((n, a) for n, a in found if getattr(module, n, None) is not None)


def bare_axis(shape: Sequence[int]) -> int:
    """Find the axis of a bare parameter that carries channels: the last with several entries."""
    return max(axis for axis, size in enumerate(shape) if size > 1)


def bare(path: str) -> tuple[str, int | None]:
    """Read the name of a bare parameter and the axis behind it.

    Args:
        path: `module.parameter` or `module.parameter:axis`.

    Returns:
        the name, and the axis; None where none is named.
    """
    name, colon, axis = path.rpartition(":")
    return (name, int(axis)) if colon else (path, None)


def holder(path: str, modules: Container[str]) -> str:
    """Name the module that a member of a group belongs to.

    Args:
        path: a module's, or a bare parameter's.
        modules: paths of all modules.

    Returns:
        the module itself, or the one that holds the parameter.
    """
    return path if path in modules else bare(path)[0].rpartition(".")[0]


def axis_of(path: str, shape: Sequence[int]) -> int:
    """Find the axis that a bare parameter's path means.

    Args:
        path: as for `bare`.
        shape: of the parameter.

    Returns:
        the axis.
    """
    axis = bare(path)[1]
    return bare_axis(shape) if axis is None else axis


def widths_of(module: nn.Module, side: Side) -> tuple[str, ...]:
    """Name the integer attributes that must follow when a side is cut."""
    if isinstance(module, Conv):
        if side == "through":
            return ("in_channels", "out_channels", "groups")
        return ("in_channels",) if side == "in" else ("out_channels",)
    if isinstance(module, nn.Linear):
        return ("in_features",) if side == "in" else ("out_features",)
    if lies_across(module):
        return ("nx",) if side == "in" else ("nf",)
    if isinstance(module, nn.Embedding):
        return ("embedding_dim",)
    if isinstance(module, nn.GroupNorm):
        return ("num_channels",)
    if is_token_norm(module):
        return ("normalized_shape",)
    return ("num_parameters",) if isinstance(module, nn.PReLU) else ("num_features",)


def tensor(module: nn.Module, name: str) -> Tensor:
    """Read a parameter or buffer that is known to be there, off the autograd graph."""
    value = getattr(module, name)
    assert isinstance(value, Tensor), f"{type(module).__name__}.{name} is no tensor"
    return value.detach()


def leaf_of(model: nn.Module, path: str) -> Tensor:
    """Find a bare parameter or buffer, as the model holds it.

    Args:
        model: the model.
        path: as for `bare`.

    Returns:
        the parameter itself.
    """
    owner, _, name = bare(path)[0].rpartition(".")
    value = getattr(model.get_submodule(owner), name)
    assert isinstance(value, Tensor), f"'{path}' is no tensor"
    return value


def kernel(module: nn.Module) -> int:
    """Count the taps of one input channel: the kernel's size, 1 for a dense layer."""
    return prod(module.kernel_size) if isinstance(module, Conv) else 1


def shared(model: nn.Module) -> frozenset[str]:
    """List the modules that hold a tensor of another one: whoever writes it unties them.

    Args:
        model: any module.

    Returns:
        their paths.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    return frozenset(name for names in owners.values() if len(names) > 1 for name in names)


def norms_behind(model: nn.Module, graph: Graph, path: str) -> tuple[str, ...]:
    """List the batch-norms that a linear layer's output passes before anything else uses it.

    Args:
        model: the dense model or the cut one.
        graph: the dense model's analysis.
        path: the layer.

    Returns:
        their paths, in order.
    """
    tail = graph.tails.get(path)
    names = tail.modules if tail is not None else ()
    return tuple(n for n in names if isinstance(model.get_submodule(n), BatchNorm))


def norm_behind(model: nn.Module, graph: Graph, path: str, ties: frozenset[str]) -> str | None:
    """Find the batch-norm whose running mean can take up a shift of a layer's output.

    Args:
        model: the dense model or the cut one.
        graph: the dense model's analysis.
        path: the layer.
        ties: what `shared` says of the model.

    Returns:
        the first one behind the layer; None where there is none, or it has no running mean or
        serves other layers as well.
    """
    first = next(iter(norms_behind(model, graph, path)), None)
    if first is None or first in graph.repeated or first in ties:
        return None
    return first if getattr(model.get_submodule(first), "running_mean", None) is not None else None
