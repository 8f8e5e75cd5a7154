"""Follow a forward pass and note what every tensor is as a function of the input.

The pass is the real one. Each torch function that it calls is looked up among rules for convexity,
sign and slope; what has no rule is unknown from there on, so nothing is ever taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.certify.context import SHAPES, Context
from torch_otprune.certify.facts import Facts, all_of, constant, outside, unknown
from torch_otprune.certify.rules import RULES
from torch_otprune.structure.forward import Call, flat_tensors

__all__ = ["Loss", "Trail", "following"]

# What may be asked of a tensor without reading its values.
_ABOUT = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex",
    "is_contiguous", "get", "len", "element_size", "data_ptr", "get_device", "is_tensor",
    "has_names", "type", "storage_offset", "is_same_size", "result_type", "is_nonzero_static",
    "hash", "untyped_storage", "requires_grad_", "is_grad_enabled", "is_inference_mode_enabled",
    "set", "delete", "has_torch_function", "is_storage", "repr", "format",
    "_has_compatible_shallow_copy_type", "_is_view",
})  # fmt: skip


# What differs from call to call, whatever it is given.
_RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
    "normal", "uniform", "multinomial", "poisson", "exponential", "empty", "empty_like",
    "new_empty",
})  # fmt: skip

# What makes a tensor like another, of other values.
_FRESH = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})


@dataclass(frozen=True)
class Loss:
    """Where a property was lost.

    Args:
        module: path of the module whose forward pass did it; empty for the model itself.
        what: `convex`, `monotone` or `lipschitz`.
        text: why.
    """

    module: str
    what: str
    text: str


@dataclass
class Trail:
    """What was found out on the way.

    Args:
        inputs: number of inputs that slopes are kept for.
        names: path of each parameter and buffer, by identity.
        losses: where properties were lost.
        signs: entries of weights that must not be negative, by property and by name.
        leaks: modules that read values.
    """

    inputs: int
    names: dict[int, str]
    losses: list[Loss] = field(default_factory=list)
    signs: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {"convex": {}, "monotone": {}}
    )
    leaks: list[str] = field(default_factory=list)


class Follower(TorchFunctionMode):
    """Interprets every torch function of a forward pass.

    Args:
        trail: filled in.
        known: facts of the inputs, the parameters and the buffers.
    """

    def __init__(self, trail: Trail, known: Sequence[tuple[Tensor, Facts]]) -> None:
        super().__init__()
        self.trail = trail
        self.at: list[str] = [""]
        # tensors are held, or another could take the place of one that is gone
        self.known = {id(t): (t, f) for t, f in known}

    def facts(self, value: Tensor) -> Facts:
        """Give what is known of a tensor; one of unknown origin is unknown."""
        found = self.known.get(id(value))
        if found is None:
            found = (value, unknown(value, self.trail.inputs))
            self.known[id(value)] = found
        return found[1]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = plain_name(function)
        given = flat_tensors([args, list(kwargs.values())])
        facts = [self.facts(t) for t in given]  # before the call, which may write in place
        context = Context(self.facts, self.trail.inputs, function, self.trail.names)
        state, versions = _noise(given), [_version(t) for t in given]
        out = function(*args, **kwargs)
        drew = not all(map(torch.equal, state, _noise(given)))
        if name == "iter":
            out = list(out)
        made = [args[0]] if name == "setitem" else flat_tensors(out)
        wrote = [t for t, v in zip(given, versions, strict=True) if _written(t, v, made)]
        if name == "set" and isinstance(args[0], Tensor):  # such as `x.data = y`
            wrote.append(args[0])
        moved = name.endswith("_") or name == "setitem" or "out" in kwargs or bool(wrote)
        if drew or name.rstrip("_") in _RANDOM:
            found = self._random(name, made, facts)
        else:
            plain = _plain(name, facts) if moved else name
            found = self._found(plain, context, Call(args, kwargs), made, facts)
        for tensor in [*wrote, *made] if moved else []:
            self._overwritten(tensor)
        for tensor, fact in zip(made, found, strict=True):
            self.known[id(tensor)] = (tensor, fact)
        for kind, masks in context.signs.items():
            _join_(self.trail.signs[kind], masks)
        if not made:
            self._leaked(name, out, facts)
        elif facts and not all(f.fixed for f in facts):
            self._lost(name, context, facts, found)
        return iter(out) if name == "iter" else out

    def _found(
        self,
        name: str,
        context: Context,
        call: Call,
        made: Sequence[Tensor],
        facts: Sequence[Facts],
    ) -> list[Facts]:
        fresh = name in _FRESH and bool(call.args)  # but for what it is filled with
        if all(f.fixed for f in facts[fresh:]):
            return [self._value(t) for t in made]
        found: list[Facts] | None = None
        if name in SHAPES and "out" not in call.kwargs:
            found = context.reshaped(call.args, call.kwargs)
        elif name in RULES and "out" not in call.kwargs:
            with suppress(TypeError, RuntimeError):  # arguments that the rule does not know
                one = RULES[name](context, *call.args, **call.kwargs)
                found = None if one is None else [one]
        fits = found is not None and [f.cvx.shape for f in found] == [t.shape for t in made]
        if found is not None and fits and all(t.is_floating_point() for t in made):
            return found
        if all(bool(f.flat.all()) for f in facts):  # of other inputs only, whatever was done
            return [outside(t) for t in made]
        return [unknown(t, self.trail.inputs) for t in made]

    def _value(self, tensor: Tensor) -> Facts:
        """Describe what is the same in every call; what is not a number is nothing to build on."""
        broken = tensor.is_floating_point() and bool(tensor.isnan().any())
        return unknown(tensor, self.trail.inputs) if broken else constant(tensor)

    def _random(self, name: str, made: Sequence[Tensor], facts: Sequence[Facts]) -> list[Facts]:
        """Describe what was drawn: of what its distribution depends on, nothing is known."""
        shaped = name.endswith(("_", "_like")) or name.startswith("new_")
        if all(bool(f.flat.all()) for f in facts[shaped:]):
            return [outside(t) for t in made]
        return [unknown(t, self.trail.inputs) for t in made]

    def _overwritten(self, target: Tensor) -> None:
        """Forget what was known of memory that was written, whichever view shows it."""
        place = target.untyped_storage().data_ptr()
        for key, (tensor, _) in list(self.known.items()):
            if tensor is target or tensor.untyped_storage().data_ptr() == place:
                self.known[key] = (tensor, unknown(tensor, self.trail.inputs))

    def _leaked(self, name: str, out: Any, facts: Sequence[Facts]) -> None:
        values = out is not None and name not in _ABOUT and not all(f.fixed for f in facts)
        if values and (name == "is_nonzero" or not name.startswith("is_")):
            self.trail.leaks.append(self.at[-1])

    def _lost(
        self, name: str, context: Context, facts: Sequence[Facts], found: Sequence[Facts]
    ) -> None:
        for prop, what in (("cvx", "convex"), ("up", "monotone"), ("bounded", "lipschitz")):
            if all_of(facts, prop) and not all_of(found, prop):
                text = context.why.get(what) or f"`{name}` does not keep it"
                loss = Loss(self.at[-1], what, text)
                if loss not in self.trail.losses:
                    self.trail.losses.append(loss)


def plain_name(function: Any) -> str:
    """Name a torch function without the marks of operators: `__radd__` is `radd`.

    Args:
        function: as a function mode is handed it.

    Returns:
        its name; that of a function that writes in place ends with an underscore.
    """
    name: str = getattr(function, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        operators = ("iadd", "isub", "imul", "itruediv")
        return name[1:] + "_" if name in operators else name
    return name


def _plain(name: str, facts: Sequence[Facts]) -> str:
    """Name the rule of a call that wrote; empty where the rule would misread what is left."""
    plain = name.rstrip("_")
    # a product that overwrites its known factor leaves no value to read
    blind = bool(facts) and facts[0].fixed and name not in ("add_", "sub_")
    return "" if blind or plain in SHAPES else plain


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _written(tensor: Tensor, version: int, made: Sequence[Tensor]) -> bool:
    """Tell whether a call wrote to what it was given, whatever its name says."""
    if version < 0:  # not counted: what is handed back may have been written
        return any(t is tensor for t in made)
    return _version(tensor) != version


def _noise(given: Sequence[Tensor]) -> list[Tensor]:
    """Read the states of the random generators that a call may use."""
    devices = {t.device for t in given if t.is_cuda}
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, sorted(devices, key=str))]


def _join_(known: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, mask in new.items():
        known[name] = known[name] | mask if name in known else mask


@contextmanager
def following(model: nn.Module, follower: Follower) -> Iterator[None]:
    """Tell a follower which module is running."""
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: follower.at.append(path)

    def leave(*_: Any) -> None:
        follower.at.pop()

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave))
        with follower:
            yield
    finally:
        for handle in handles:
            handle.remove()
