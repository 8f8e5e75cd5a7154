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

from torch_otprune.certify.context import SHAPES, Context, parts_of, tensors_of
from torch_otprune.certify.facts import Facts, all_of, constant, outside, unknown
from torch_otprune.certify.rules import RULES
from torch_otprune.structure.forward import Call, flat_tensors

__all__ = ["Loss", "Trail", "following"]

# What may be asked of a tensor without reading its values.
_ABOUT = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_complex",
    "is_contiguous", "get", "len", "element_size", "data_ptr", "get_device", "is_tensor",
    "has_names", "type", "storage_offset", "is_same_size", "result_type", "is_nonzero_static",
    "hash", "requires_grad_", "is_grad_enabled", "is_inference_mode_enabled",
    "set", "delete", "has_torch_function", "is_storage", "_has_compatible_shallow_copy_type",
    "_is_view",
})  # fmt: skip

# What has a size, or raises an error, by the values that it is given.
_TELLING = frozenset({
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "inverse",
    "cholesky", "svd", "qr", "lu", "lu_solve", "cholesky_solve",
})  # fmt: skip

# What takes sizes that may be tensors, beside what only moves elements.
_SIZED = frozenset({"arange", "eye", "linspace", "logspace", "ones", "zeros", "full"})

# What differs from call to call, whatever it is given.
_RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
    "normal", "uniform", "multinomial", "poisson", "exponential", "empty", "empty_like",
    "new_empty",
})  # fmt: skip

# What makes a tensor like another, or overwrites it, with other values.
_FRESH = frozenset({
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero",
})  # fmt: skip

_READ = "forward reads values, so another input may take another way"


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
        leaks: modules that do what cannot be followed, and what that is.
    """

    inputs: int
    names: dict[int, str]
    losses: list[Loss] = field(default_factory=list)
    signs: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {"convex": {}, "monotone": {}}
    )
    leaks: dict[str, str] = field(default_factory=dict)


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
        self.known = {id(t): (t, f, _stamp(t)) for t, f in known}

    def facts(self, value: Tensor) -> Facts:
        """Give what is known of a tensor; of unknown origin, or written unseen, it is unknown."""
        found = self.known.get(id(value))
        if found is None or found[2] != _stamp(value):
            return self._learnt(value, unknown(value, self.trail.inputs))
        return found[1]

    def _learnt(self, value: Tensor, facts: Facts) -> Facts:
        self.known[id(value)] = (value, facts, _stamp(value))
        return facts

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = plain_name(function)
        given = tensors_of(args, kwargs)
        facts = [self.facts(t) for t in given]  # before the call, which may write in place
        before = dict(zip(map(id, given), facts, strict=True))

        def told(t: Tensor) -> Facts:
            return before[id(t)] if id(t) in before else self.facts(t)

        context = Context(told, self.trail.inputs, function, self.trail.names)
        if _tells(name, args, [t for t, f in zip(given, facts, strict=True) if not f.fixed]):
            self.trail.leaks[self.at[-1]] = _READ
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
            found = [unknown(t, self.trail.inputs) for t in made]
        else:
            plain = _plain(name, facts) if moved else name
            found = self._found(plain, context, Call(args, kwargs), made, facts)
        for tensor in [*wrote, *made] if moved else []:
            self._overwritten(tensor)
        for tensor, fact in zip(made, found, strict=True):
            self._learnt(tensor, fact)
        self._noted(name, context, out, before=facts, after=found)
        return iter(out) if name == "iter" else out

    def _noted(
        self, name: str, context: Context, out: Any, *,
        before: Sequence[Facts], after: Sequence[Facts],
    ) -> None:  # fmt: skip
        """Note the signs that a call needs, and what it read or lost."""
        for kind, masks in context.signs.items():
            _join_(self.trail.signs[kind], masks)
        if not after:
            self._leaked(name, out, before)
        elif before and not all(f.fixed for f in before):
            self._lost(name, context, before, after)

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
        # arguments that a rule does not know, or that are not batched
        with suppress(TypeError, RuntimeError, ValueError, IndexError):
            if name in SHAPES and "out" not in call.kwargs:
                found = context.reshaped(call.args, call.kwargs)
            elif name in RULES and "out" not in call.kwargs:
                one = RULES[name](context, *call.args, **call.kwargs)
                found = None if one is None else [one]
        fits = found is not None and [f.cvx.shape for f in found] == [t.shape for t in made]
        if found is not None and fits and all(map(_fine, made)):
            return found
        if all(bool(f.flat.all()) for f in facts):  # of other inputs only, whatever was done
            return [outside(t) for t in made]
        return [unknown(t, self.trail.inputs) for t in made]

    def _value(self, tensor: Tensor) -> Facts:
        """Describe what is the same in every call; what is not a number is nothing to build on."""
        broken = tensor.is_floating_point() and bool(tensor.isnan().any())
        return unknown(tensor, self.trail.inputs) if broken else constant(tensor)

    def _overwritten(self, target: Tensor) -> None:
        """Forget what was known of memory that was written, whichever view shows it."""
        place = target.untyped_storage().data_ptr()
        for tensor, *_ in list(self.known.values()):
            if tensor is target or tensor.untyped_storage().data_ptr() == place:
                self._learnt(tensor, unknown(tensor, self.trail.inputs))

    def _leaked(self, name: str, out: Any, facts: Sequence[Facts]) -> None:
        values = out is not None and name not in _ABOUT and not all(f.fixed for f in facts)
        if values and (name == "is_nonzero" or not name.startswith("is_")):
            self.trail.leaks[self.at[-1]] = _READ

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


def _fine(tensor: Tensor) -> bool:
    """Tell whether numbers are kept up to rounding; of eight bits too few are left."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _tells(name: str, args: Any, loose: Sequence[Tensor]) -> bool:
    """Tell whether a call turns values that are not the same in every call into a size."""
    if not loose:
        return False
    plain = name.rstrip("_")
    if plain in _TELLING or name.startswith("linalg_") or (name == "where" and len(args) == 1):
        return True
    whole = [t for t in loose if not t.is_floating_point()]
    if name == "getitem":  # a mask, or the end of a slice
        cuts = parts_of(args[1])
        return any(any(t is cut for cut in cuts) or t.dtype in _MASKS for t in whole)
    if plain == "repeat_interleave":
        return bool(whole)
    return (plain in _SIZED or plain in SHAPES) and any(t.dim() == 0 for t in whole)


_MASKS = (torch.bool, torch.uint8)


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Number what a tensor holds: writes are counted, and its memory can be exchanged."""
    return _version(tensor), tensor.data_ptr() if tensor.layout == torch.strided else 0


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
