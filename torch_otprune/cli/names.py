"""From `package.module:name` to what the user meant, or three lines on what is missing."""

from __future__ import annotations

import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.errors import OTPruneError

__all__ = ["data", "model", "resolve"]


def model(name: str, weights: Path | None = None) -> nn.Module:
    """Build the model that a name stands for.

    Args:
        name: `package.module:factory`; calling it without arguments gives the model.
        weights: safetensors file to load into it.

    Returns:
        the model.

    Raises:
        OTPruneError: if there is no such factory, it fails, or the weights do not fit.
    """
    found = resolve(name, "MODEL")
    built = found if isinstance(found, nn.Module) else _call(found, name)
    if not isinstance(built, nn.Module):
        raise OTPruneError(
            f"'{name}' gives {_a(built)}, which is no nn.Module.",
            where=f"MODEL {name}",
            fix="name a function or class that returns the model when called.",
        )
    if weights is not None:
        _load_(built, weights, name)
    return built


def data(name: str, option: str = "--data") -> Iterable[Any]:
    """Build the batches that a name stands for.

    Args:
        name: `package.module:loader`, an iterable or what returns one.
        option: where the name was given.

    Returns:
        batches.

    Raises:
        OTPruneError: if there is no such loader, it fails, or is not iterable.
    """
    found = resolve(name, option)
    batches = found if _is_batches(found) else _call(found, name)
    if isinstance(batches, Tensor):
        return [batches]
    if not _is_batches(batches):
        raise OTPruneError(
            f"'{name}' gives {_a(batches)}, which does not yield batches.",
            where=f"{option} {name}",
            fix="return a list of batches, or a torch.utils.data.DataLoader.",
        )
    return _Batches(batches, f"{option} {name}")


class _Batches:
    """The user's batches, whose failures are told in three lines."""

    def __init__(self, source: Iterable[Any], where: str) -> None:
        self.source, self.where = source, where

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.source
        except Exception as error:  # the user's loader may raise anything
            raise _failed("reading the data", self.where, error) from error


def _is_batches(value: object) -> bool:
    """Tell batches from one batch: a mapping yields its keys, a text its letters."""
    once = isinstance(value, (str, bytes, Mapping, type))
    return isinstance(value, Iterable) and not once


def resolve(name: str, role: str) -> Any:
    """Import what a name stands for. The working directory is searched first.

    Args:
        name: `package.module:name`, the latter maybe dotted.
        role: the argument it was given for.

    Returns:
        the object.

    Raises:
        OTPruneError: if the name is malformed, or there is no such module or object.
    """
    place, colon, path = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (place + "." + path).split(".")):
        raise OTPruneError(
            f"'{name}' is not of the form package.module:name.",
            where=role,
            fix=f"write a module as in `import`, a colon, and a name in it{_guess(name)}.",
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = _import(place, f"{role} {name}")
    for step in path.split("."):
        found = _member(found, step, f"{role} {name}")
    return found


def _guess(name: str) -> str:
    """Spell a path to a file, or a dotted name, as it should have been."""
    place, _, path = name.replace("\\", "/").partition(":")
    module = place.removeprefix("./").removesuffix(".py").strip("/").replace("/", ".")
    if not path and "." in module:
        module, _, path = module.rpartition(".")
    guess = f"{module}:{path or 'factory'}"
    return f", such as '{guess}'" if module and guess != name else ""


def _import(place: str, where: str) -> ModuleType:
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise _no_module(error.name, where) from None
        raise _failed(f"importing '{place}'", where, error) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise _failed(f"importing '{place}'", where, error) from error


def _no_module(missing: str, where: str) -> OTPruneError:
    parent, _, leaf = missing.rpartition(".")
    paths = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else sys.path
    names = [module.name for module in pkgutil.iter_modules(paths)]
    return OTPruneError(
        f"there is no module '{missing}'.",
        where=f"{where}, run in {os.getcwd()}{_closest(leaf, names, parent)}",
        fix="correct the name, run this where the module lies, or install its package.",
    )


def _member(owner: Any, step: str, where: str) -> Any:
    if hasattr(owner, step):
        return getattr(owner, step)
    names = [name for name in dir(owner) if not name.startswith("_")]
    title = getattr(owner, "__name__", type(owner).__name__)
    file = getattr(owner, "__file__", None)
    raise OTPruneError(
        f"'{title}' has no '{step}'.",
        where=f"{where}{f', {file}' if file else ''}{_closest(step, names)}",
        fix="name something that the module defines at its top level.",
    )


def _closest(word: str, names: Iterable[str], parent: str = "") -> str:
    close = get_close_matches(word, list(names), cutoff=0.5)
    prefix = f"{parent}." if parent else ""
    return f"; closest names: {', '.join(prefix + n for n in close)}" if close else ""


def _call(function: Any, name: str) -> Any:
    if not callable(function):
        raise OTPruneError(
            f"'{name}' is {_a(function)}, which cannot be called.",
            where=name,
            fix="name a function or class that can be called without arguments.",
        )
    maker: Callable[[], Any] = function
    try:
        return maker()
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise _failed(f"calling '{name}'", name, error) from error


def _failed(deed: str, where: str, error: BaseException) -> OTPruneError:
    """Say what the user's code raised and on which line, without our own frames."""
    if isinstance(error, OTPruneError):
        return error
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else _line(error)
    text = next(iter(str(error).splitlines()), "")
    return OTPruneError(
        f"{deed} fails: {type(error).__name__}{': ' if text else ''}{text.rstrip('.')}.",
        where=f"{where}, {place}" if place else where,
        fix="correct it; it must work in a fresh process, without arguments.",
    )


def _line(error: BaseException) -> str:
    """Find the line of the user's that failed: the last below the working directory, if any."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<")]
    own = [f for f in frames if Path(f.filename).is_relative_to(os.getcwd())]
    return next((f"{f.filename}:{f.lineno}" for f in reversed(own or frames)), "")


def _load_(built: nn.Module, weights: Path, name: str) -> None:
    """Fill a model from a safetensors file; every tensor must fit."""
    found, wanted = _read(weights), built.state_dict()
    where = f"--weights {weights}, MODEL {name}"
    fix = "pass the weights of this very architecture."
    for key in sorted(wanted.keys() - found.keys()):
        known = _closest(key, found)
        raise OTPruneError(f"the file has no '{key}'.", where=where + known, fix=fix)
    for key in sorted(found.keys() - wanted.keys()):
        known = _closest(key, wanted)
        raise OTPruneError(f"the model has no '{key}'.", where=where + known, fix=fix)
    for key, value in wanted.items():
        if value.shape != found[key].shape:
            raise OTPruneError(
                f"'{key}' is {tuple(value.shape)} in the model, {tuple(found[key].shape)} in the "
                "file.",
                where=where,
                fix=fix,
            )
    built.load_state_dict(found)


def _read(weights: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        known = [path.name for path in weights.parent.glob("*.safetensors")]
        raise OTPruneError(
            f"the weights cannot be read: {str(error).splitlines()[0].rstrip('.')}.",
            where=f"--weights {weights}{_closest(weights.name, known)}",
            fix="pass a safetensors file, as safetensors.torch.save_file writes it.",
        ) from error


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
