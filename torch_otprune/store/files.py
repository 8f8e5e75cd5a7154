"""What a saved model consists of: tensors, and one page that says what they are."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torch_otprune.errors import LoadError, OTPruneError
from torch_otprune.plan.model import Plan
from torch_otprune.store.parts import Parts

__all__ = [
    "INDEX",
    "PLAN",
    "UNDO",
    "WEIGHTS",
    "Mark",
    "Saved",
    "Stored",
    "Way",
    "check_target",
    "damaged",
    "digest",
    "format_of",
    "mine",
    "opened",
    "sealed",
]

WEIGHTS, PLAN, UNDO = "model.safetensors", "plan.json", "undo.json"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt)")
_PIECE = 1 << 20  # bytes


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Mark(_Frozen):
    """What tells a file from any other."""

    sha256: str
    bytes: int = Field(ge=0)


class Stored(_Frozen):
    """How the tensors of a directory belong to the modules of a model."""

    page: ClassVar[str]

    fingerprint: str = Field(description="hash of `tensors`")
    tensors: dict[str, str] = Field(description="name to shape and type of the whole state")
    aliases: dict[str, str] = Field(description="tied tensors: name to the name it is stored as")
    strides: dict[str, tuple[int, ...]] = Field(description="tensors that are not contiguous")
    transient: tuple[str, ...] = Field(description="stored buffers that no state_dict has")
    pairs: tuple[str, ...] = Field(default=(), description="complex numbers stored as pairs")
    extra: dict[str, str] = Field(
        default_factory=dict, description="states that are no tensors, as Python writes them"
    )
    frozen: tuple[str, ...] | None = Field(
        default=None, description="parameters without gradient; None where it is not known"
    )
    training: bool = Field(description="training flag of the model")
    exceptions: tuple[str, ...] = Field(description="modules whose flag differs from it")
    parts: Parts | None = Field(default=None, description="classes and plain attributes")
    files: dict[str, Mark] = Field(default_factory=dict, description="beside this page")
    versions: dict[str, str]
    seal: str = Field(default="", description="hash of everything else on this page")


class Saved(Stored):
    """What `plan.json` holds."""

    page: ClassVar[str] = PLAN

    format: Literal["torch_otprune"] = "torch_otprune"
    version: Literal[1, 2] = 2
    plan: Plan
    plan_hash: str
    seed: int = Field(description="of the policy")
    calibration: str = Field(description="hash of the statistics that decided, or `none`")
    dense: dict[str, str] = Field(description="`tensors` before; empty where it is not known")
    dense_parts: Parts | None = Field(default=None, description="`parts` before")
    weights: str = Field(default="", description="version 1: SHA-256 of the one weights file")


class Way(Stored):
    """What `undo.json` holds: the dense model, and which pruned one leads back to it."""

    page: ClassVar[str] = UNDO

    format: Literal["torch_otprune_undo"] = "torch_otprune_undo"
    version: Literal[1] = 1
    plan: Plan
    plan_hash: str
    pruned: dict[str, str] = Field(description="`tensors` of the pruned model")
    parameters: tuple[str, ...] = Field(description="which of the stored are parameters")
    configs: dict[str, dict[str, str]] = Field(
        description="module path to the fields of its configurations that the pruning changed, "
        "as Python writes them; empty for a field that was not there"
    )
    shared: dict[str, int] = Field(
        default_factory=dict, description="attribute to the number of its configuration"
    )
    before: Plan | None = Field(default=None, description="what an earlier pruning had done")
    before_dense: dict[str, str] = Field(default_factory=dict, description="`tensors` before that")
    before_parts: Parts | None = Field(default=None, description="`parts` before that")


_Page = TypeVar("_Page", Saved, Way)


def digest(path: Path) -> str:
    """Hash a file with SHA-256, a piece at a time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def format_of(path: Path) -> object:
    """Read which format a JSON file says it has; None if it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("format") if isinstance(content, dict) else None


def mine(name: str) -> bool:
    """Tell whether a file of this name is one that a save writes."""
    return name in {WEIGHTS, INDEX, PLAN, UNDO} or _SHARD.fullmatch(name) is not None


def sealed(stored: Stored) -> str:
    """Write a page, with the hash that tells whether it was edited."""
    content = stored.model_dump(mode="json")
    content["seal"] = _seal(content)
    return json.dumps(content, indent=1) + "\n"


def _seal(content: dict[str, Any]) -> str:
    return _hash({key: value for key, value in content.items() if key != "seal"})


def _hash(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def damaged(root: Path, reason: str, fix: str) -> LoadError:
    """Say that a directory holds no saved model."""
    return LoadError(f"this is no saved model: {reason}.", where=str(root), fix=fix)


def check_target(target: Path, page: type[Stored]) -> None:
    """Refuse to replace anything but an earlier save of the same kind.

    Args:
        target: where a save shall go.
        page: what is saved.

    Raises:
        LoadError: if something else is there.
    """
    try:
        reason = _occupied(target, page) if target.exists() else None
    except OSError as error:  # a directory that may not be looked into
        reason = f"it cannot be read: {error.strerror or error}"
    if reason is not None:
        raise LoadError(
            f"the model cannot be saved there: {reason}.",
            where=str(target),
            fix="name a new or empty directory, or one that was saved like this before.",
        )


def _occupied(target: Path, page: type[Stored]) -> str | None:
    if not target.is_dir():
        return "it is a file"
    inside = sorted(path.name for path in target.iterdir())
    foreign = [name for name in inside if not mine(name)]
    if foreign:
        return f"it holds {', '.join(foreign[:3])}"
    ours = format_of(target / page.page) == page.model_fields["format"].default
    return f"its {page.page} is not ours" if inside and not ours else None


def opened(root: Path, page: type[_Page]) -> _Page:
    """Read the page of a directory, and make sure that nobody edited it.

    Args:
        root: the directory.
        page: what it should hold.

    Returns:
        the page; every file that it names is there.

    Raises:
        LoadError: if something is missing, edited or not ours; never is a pickle read.
    """
    try:
        return _opened(root, page)
    except OSError as error:
        raise LoadError(
            f"this is no saved model: it cannot be read: {error.strerror or error}.",
            where=str(root),
            fix="pass a directory that you may read.",
        ) from error


def _opened(root: Path, page: type[_Page]) -> _Page:
    path = root / page.page
    if not path.is_file():
        raise _absent(root, page.page)
    if format_of(path) != page.model_fields["format"].default:
        raise damaged(root, f"its {page.page} is cut short or not ours", "save the model again.")
    content = json.loads(path.read_text(encoding="utf-8"))
    stored = _validated(root, page, content)
    # Hashed as written: a later library may add fields with defaults.
    if _hash(content["plan"]) != stored.plan_hash:
        raise damaged(root, "its plan was edited: the hash differs", "save the model again.")
    if isinstance(stored, Saved) and stored.version == 1:
        size = (root / WEIGHTS).stat().st_size if (root / WEIGHTS).is_file() else 0
        files = {WEIGHTS: Mark(sha256=stored.weights, bytes=size)}
        stored = stored.model_copy(update={"files": files})
    elif _seal(content) != stored.seal:
        raise damaged(root, f"its {page.page} was edited: the hash differs", "save it again.")
    for name in stored.files:
        if not mine(name) or not (root / name).is_file():
            raise _absent(root, name)
    return stored


def _validated(root: Path, page: type[_Page], content: dict[str, Any]) -> _Page:
    known = get_args(page.model_fields["version"].annotation)
    if content.get("version") not in known:
        reason = f"its version is {content.get('version')!r}, not {' or '.join(map(str, known))}"
    else:
        try:
            return page.model_validate(content)
        except (ValidationError, OTPruneError) as error:
            reason = str(error).splitlines()[0]
    fix = "load it with the library version it names, or save the model again."
    raise damaged(root, f"its {page.page} cannot be read: {reason}", fix)


def _absent(root: Path, name: str) -> LoadError:
    """Say that a file is missing, and whether what is there instead is a pickle."""
    if not root.is_dir():
        reason = "it is a file" if root.exists() else "the directory does not exist"
        return damaged(root, reason, "correct the path: it is that of a directory.")
    inside = sorted(path.name for path in root.iterdir())
    pickles = [other for other in inside if _PICKLE.fullmatch(other)]
    if pickles and name in {PLAN, UNDO, WEIGHTS}:
        reason = f"there is no {name}, and {pickles[0]} is a pickle, which is never opened"
        fix = "write the directory with otp.save: a pickle runs whatever code it holds."
        return damaged(root, reason, fix)
    fix = "copy the directory again, all its files together."
    if name in {PLAN, UNDO}:
        fix = "pass a directory that " + ("otp.save wrote." if name == PLAN else "save_undo wrote.")
    return damaged(root, f"there is no {name}", fix)
