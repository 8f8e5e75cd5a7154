"""What a saved model consists of: two files, and what the second says about the first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from torch_otprune.plan.model import Plan

__all__ = ["PLAN", "WEIGHTS", "Saved", "digest", "format_of", "transient"]

WEIGHTS, PLAN = "model.safetensors", "plan.json"
_PIECE = 1 << 20  # bytes


class Saved(BaseModel):
    """What `plan.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["torch_otprune"] = "torch_otprune"
    version: Literal[1] = 1
    plan: Plan
    plan_hash: str
    seed: int = Field(description="of the policy")
    calibration: str = Field(description="hash of the statistics that decided, or `none`")
    fingerprint: str = Field(description="hash of `tensors`")
    tensors: dict[str, str] = Field(description="name to shape and type, after pruning")
    dense: dict[str, str] = Field(description="the same before; empty where it is not known")
    aliases: dict[str, str] = Field(description="tied tensors: name to the name it is stored as")
    strides: dict[str, tuple[int, ...]] = Field(description="tensors that are not contiguous")
    transient: tuple[str, ...] = Field(description="stored buffers that no state_dict has")
    weights: str = Field(description="SHA-256 of the weights file")
    training: bool = Field(description="training flag of the model")
    exceptions: tuple[str, ...] = Field(description="modules whose flag differs from it")
    versions: dict[str, str]


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


def transient(model: nn.Module) -> dict[str, Tensor]:
    """List the buffers outside the state_dict: a factory may fill them at random."""
    state = model.state_dict()
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name not in state}
