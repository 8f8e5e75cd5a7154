"""What a certificate is asked with: the model, the example, the input that counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.nn.convex import InputConvex
from torch_otprune.structure.forward import Call, first_line, shapes

__all__ = ["asked", "check_numbers", "counts", "example_of", "ran"]


def counts(**sizes: Any) -> dict[str, int]:
    """Refuse what is no count.

    Args:
        **sizes: by the name of their argument.

    Returns:
        the same.

    Raises:
        StructureError: naming the argument.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise StructureError(
                f"{size!r} is no seed." if name == "seed" else f"{size!r} is no number of {name}.",
                where=f"certify({name}=...)",
                fix="give a whole number from 0 on.",
            )
    return sizes


def example_of(model: nn.Module, example: Any) -> Any:
    """Give the example, or the one that a net of ours makes.

    Args:
        model: any module.
        example: what the user gave, or None.

    Returns:
        the example.

    Raises:
        StructureError: if the model is no module, or an example is needed.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise StructureError(
            f"the model is of type {kind}.", where="certify(model)", fix="pass a torch.nn.Module."
        )
    if example is not None:
        return example
    if isinstance(model, InputConvex):
        return model.example()
    raise StructureError(
        f"a {type(model).__name__} does not say what it takes.",
        where="certify(model, example)",
        fix="give an example, such as one calibration batch.",
    )


def asked(call: Call, wrt: int | str) -> Tensor:
    """Find the input that is asked about.

    Args:
        call: the arguments of the forward pass.
        wrt: its place or its name.

    Returns:
        the tensor.

    Raises:
        StructureError: if there is none of floating-point numbers.
    """
    values = list(call.args) + list(call.kwargs.values())
    found = call.kwargs.get(wrt) if isinstance(wrt, str) else None
    if isinstance(wrt, int) and 0 <= wrt < len(values):
        found = values[wrt]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        names = ", ".join([*map(str, range(len(call.args))), *call.kwargs])
        raise StructureError(
            f"{wrt!r} is no input of floating-point numbers.",
            where=f"certify(wrt=...); inputs: {names}",
            fix="name one of these, one that is a tensor of floating-point numbers.",
        )
    return found


def check_numbers(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse a net that cannot compute anything.

    Args:
        tensors: its weights by name.

    Raises:
        StructureError: naming the weight that has no values, or one that is not a number.
    """
    for name, tensor in tensors:
        if tensor.is_meta:
            raise StructureError(
                f"'{name}' is on the meta device: it has no values.",
                where=f"'{name}', {tuple(tensor.shape)}",
                fix="load the weights first: signs and slopes are read from them.",
            )
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise StructureError(
                f"'{name}' has {int(tensor.isnan().sum())} entries that are not a number.",
                where=f"'{name}', {tuple(tensor.shape)}",
                fix="load or train the weights again: of such a net nothing can be said.",
            )


def ran(model: nn.Module, call: Call, what: str = "the example") -> Any:
    """Call a model, and name what it does not take.

    Args:
        model: any module.
        call: the arguments.
        what: what they are, for the error.

    Returns:
        what the model returns.

    Raises:
        StructureError: if the model does not run on them.
        OTPruneError: as a net of ours raised it.
    """
    try:
        return model(*call.args, **call.kwargs)
    except OTPruneError:  # a net of ours has said it better
        raise
    except Exception as error:  # forward is the user's: it may raise anything
        raise StructureError(
            f"the model does not run on {what}: {first_line(error)}.",
            where=f"{type(model).__name__}, given {shapes(call)}",
            fix="give an example that the model's forward takes.",
        ) from error
