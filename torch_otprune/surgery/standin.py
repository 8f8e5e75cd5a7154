"""Put something simpler where a module was, so that every path stays what it is."""

from __future__ import annotations

from torch import nn

from torch_otprune.errors import PlanError
from torch_otprune.surgery.compact_index import NUMBERS
from torch_otprune.surgery.layout import PLAIN

__all__ = ["stand_in_"]


def stand_in_(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module in another's place.

    The new one takes over what the old one says about itself in plain attributes, because
    models ask: ModernBERT chooses the mask by its layer's `attention_type`. Its number in the
    stack it does not take over, since it uses no cache.

    Args:
        model: written in place.
        path: of the module that goes.
        module: the one that comes.

    Returns:
        the module that went.

    Raises:
        PlanError: if the model has no such module.
    """
    owner, _, name = path.rpartition(".")
    try:
        table = model.get_submodule(owner)._modules
        old = table[name]
    except (AttributeError, KeyError):
        old = None
    if old is None:
        raise PlanError(
            f"the model has no module '{path}'.",
            where=type(model).__name__,
            fix="apply the plan to the dense model it was made for.",
        )
    table[name] = module
    taken = {*vars(module), *module._parameters, *module._buffers, *module._modules, *NUMBERS}
    for key, value in vars(old).items():
        if isinstance(value, PLAIN) and not key.startswith("_") and key not in taken:
            vars(module)[key] = value
    return old
