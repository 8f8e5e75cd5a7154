"""A pruned model written to a directory with its model card, complete or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from torch_otprune.errors import LoadError, PlanError
from torch_otprune.report import Report, environment
from torch_otprune.store.atomic import put
from torch_otprune.surgery.carried import Hosted, carried

__all__ = ["card", "save_pretrained"]

_CARD = "README.md"
_THEIRS = "config.json"


def save_pretrained(
    model: nn.Module, directory: str | Path, *, report: Report | None = None, **options: Any
) -> Path:
    """Write a Transformers model with a model card, complete or not at all.

    The weights are those of `model.save_pretrained`, which works by itself as well. Here they
    are written aside first and put in place together with the card.

    Args:
        model: a Transformers model, pruned or not; left as it was.
        directory: new, empty, or an earlier save of a model, which is replaced.
        report: of the pruning, for the card.
        **options: passed on to `model.save_pretrained`.

    Returns:
        the directory.

    Raises:
        PlanError: if the model is none of Transformers, or its configuration has lost the plan.
        LoadError: if the directory is somebody else's or cannot be written.
    """
    if not isinstance(model, Hosted):
        raise PlanError(
            f"a {type(model).__name__} is no Transformers model.",
            where="save_pretrained, model",
            fix="save it with otp.save(model, directory).",
        )
    target = Path(directory).resolve()
    _check_target(target)

    def write(aside: Path) -> None:
        model.save_pretrained(str(aside), **options)
        (aside / _CARD).write_text(card(model, report), encoding="utf-8")

    put(target, write)
    return target


def _check_target(target: Path) -> None:
    """Refuse to replace anything but a model's directory."""
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / _THEIRS).is_file()):
        raise LoadError(
            "the model cannot be saved there: it is no directory of a Transformers model.",
            where=str(target),
            fix="name a new or empty directory, or one that save_pretrained wrote.",
        )


def card(model: nn.Module, report: Report | None = None) -> str:
    """Write a model card: what was pruned how, what that did, and how to load the result.

    Args:
        model: the pruned model.
        report: of the pruning; without it the card tells only what the configuration knows.

    Returns:
        Markdown, with the header that model hubs read.
    """
    said = carried(vars(model).get("config"))
    lines = ["---", "library_name: transformers", "tags: [pruned, torch-otprune]", "---", ""]
    lines += [f"# {type(model).__name__}, pruned with torch_otprune", "", *_loading(said)]
    if report is not None:
        plan = report.plan
        lines += ["", "## What it cost", "", "```text", str(report), "```"]
        lines += ["", "## Policy", "", "```yaml", plan.policy.to_yaml().rstrip(), "```"]
    lines += ["", "## Hashes and versions", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in _facts(said, report)]
    return "\n".join([*lines, ""])


def _loading(said: dict[str, Any] | None) -> list[str]:
    if said is None:
        return ["It loads with `from_pretrained`; nothing else need be installed."]
    return [
        "Its layers differ in width, so the library that made it must be imported first:",
        "",
        "```python",
        "import torch_otprune",
        "import transformers",
        "",
        'model = transformers.AutoModel.from_pretrained("path/to/this/directory")',
        "```",
    ]


def _facts(said: dict[str, Any] | None, report: Report | None) -> list[tuple[str, str]]:
    plans = said["plans"] if said else []
    found = [(f"plan {i}", str(entry["hash"])) for i, entry in enumerate(plans, start=1)]
    if report is not None:
        if not found:
            found = [("plan", report.plan.hash)]
        found += [("dense model", report.plan.fingerprint)]
        found += [("calibration", report.plan.calibration)]
    return found + sorted(environment().items())
