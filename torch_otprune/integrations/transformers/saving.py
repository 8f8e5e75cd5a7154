"""A pruned model written to a directory with its model card, complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from torch_otprune.errors import LoadError, PlanError
from torch_otprune.integrations.extras import needed
from torch_otprune.report import Report, count_params, environment
from torch_otprune.store.atomic import put
from torch_otprune.store.plans import known_of
from torch_otprune.surgery import unlike_config
from torch_otprune.surgery.carried import Hosted, carried

__all__ = ["card", "save_pretrained"]

_CARD = "README.md"
_THEIRS = "config.json"
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def save_pretrained(
    model: nn.Module, directory: str | Path, *, report: Report | None = None, **options: Any
) -> Path:
    """Write a Transformers model with a model card, complete or not at all.

    The weights are those of `model.save_pretrained`, which works by itself as well. Here they
    are written aside first and put in place together with the card.

    Args:
        model: a pruned Transformers model; left as it was.
        directory: new, empty, or an earlier save of a model, whose weights are replaced; other
            files, such as a tokenizer's, stay.
        report: of the last pruning, for the card.
        **options: passed on to `model.save_pretrained`.

    Returns:
        the directory.

    Raises:
        PlanError: if the model is none of Transformers, was not pruned, or its configuration does
            not say how; if the report is of another pruning.
        LoadError: if the directory is somebody else's or cannot be written.
    """
    if not isinstance(model, Hosted) or not _theirs(model):
        raise PlanError(
            f"a {type(model).__name__} is no Transformers model.",
            where="save_pretrained, model",
            fix="save it with otp.save(model, directory); merge adapters first, if it has any.",
        )
    target, text = Path(directory).resolve(), card(model, report)
    _check_target(target)

    def write(aside: Path) -> None:
        model.save_pretrained(str(aside), **options)
        (aside / _CARD).write_text(text, encoding="utf-8")
        if target.exists():
            _keep(target, aside)

    put(target, write)
    return target


def _theirs(model: nn.Module) -> bool:
    """Tell a model of Transformers from a wrapper, as PEFT's, that hands its calls on."""
    return isinstance(model, needed("transformers", "hf").PreTrainedModel)


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


def _keep(target: Path, aside: Path) -> None:
    """Take over what is no weight of the earlier save and was not written anew."""
    for path in target.iterdir():
        new = aside / path.name
        if new.exists() or _WEIGHTS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new, symlinks=True, copy_function=_linked)
        else:
            _linked(path, new)


def _linked(path: str | Path, new: str | Path) -> None:
    """Give a file a second name, which takes no room; copy it where the disk knows no such."""
    try:
        os.link(path, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, new, follow_symlinks=False)


def card(model: nn.Module, report: Report | None = None) -> str:
    """Write a model card: what was pruned how, what that did, and how to load the result.

    Args:
        model: the pruned model.
        report: of the last pruning; without it the card tells only what the configuration knows.

    Returns:
        Markdown, with the header that model hubs read.

    Raises:
        PlanError: if the model was not pruned, or `from_pretrained` could not load it; if the
            report is of another pruning.
    """
    said = carried(vars(model).get("config"))
    _check_loads(model, said)
    _check_pruned(model, report, said)
    lines = ["---", "library_name: transformers", "tags: [pruned, torch-otprune]", "---", ""]
    lines += [f"# {type(model).__name__}, pruned with torch_otprune", "", *_loading(model, said)]
    if report is not None:
        plan = report.plan
        lines += ["", "## What it cost", "", "```text", str(report), "```"]
        lines += ["", "## Policy", "", "```yaml", plan.policy.to_yaml().rstrip(), "```"]
    lines += ["", "## Hashes and versions", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in _facts(said, report)]
    return "\n".join([*lines, ""])


def _check_loads(model: nn.Module, said: dict[str, Any] | None) -> None:
    """Refuse a model whose configuration says neither its widths nor its plan."""
    if said is None and (apart := unlike_config(model)):
        raise PlanError(
            f"from_pretrained could not load this model: {apart[0].rstrip('.')}.",
            where=f"{type(model).__name__}.config, which holds no plan",
            fix="save it with otp.save(model, directory), or prune the plain model with "
            "serving='registered', then add and merge adapters.",
        )


def _check_pruned(model: nn.Module, report: Report | None, said: dict[str, Any] | None) -> None:
    """Refuse a model that nothing tells to be pruned, and a report of another pruning."""
    known = known_of(model)
    if report is None:
        if said is None and known is None:
            raise PlanError(
                f"no pruning is known for this {type(model).__name__}.",
                where="card, model",
                fix="pass the report of its pruning, or call model.save_pretrained, without card.",
            )
        return
    ours, own = report.plan, None if known is None else known[0]
    if said is not None:
        theirs, mine = f"plan {ours.hash}", f"plan {said['plans'][-1]['hash']}"
    elif own is not None and own.policy.schedule is None:
        theirs, mine = f"plan {ours.hash}", f"plan {own.hash}"
    else:  # the last of several rounds, or loaded: sizes are all there is to compare
        after = count_params(model) if own is None else own.params.after
        theirs, mine = f"{ours.params.after:,} parameters", f"{after:,} parameters"
    if theirs != mine:
        raise PlanError(
            "this report is of another pruning.",
            where=f"card, report: {theirs[:24]} there, {mine[:24]} of this model",
            fix="pass the report that the last pruning of this very model returned.",
        )


def _loading(model: nn.Module, said: dict[str, Any] | None) -> list[str]:
    kind = type(model)
    home = "transformers" if kind.__module__.startswith("transformers.") else kind.__module__
    if said is None:
        lines = ["It loads with `from_pretrained`; nothing else need be installed:"]
        lines += ["", "```python"]
    else:
        lines = ["Its layers differ in width, so the library that made it must be imported first:"]
        lines += ["", "```python", "import torch_otprune"]
    load = f'model = {kind.__name__}.from_pretrained("path/to/this/directory")'
    return [*lines, f"from {home} import {kind.__name__}", "", load, "```"]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _facts(said: dict[str, Any] | None, report: Report | None) -> list[tuple[str, str]]:
    plans = said["plans"] if said else []
    found = [(f"plan {i}", str(entry["hash"])) for i, entry in enumerate(plans, start=1)]
    if report is not None:
        if not found:
            found = [("plan", report.plan.hash)]
        found += [("dense model", report.plan.fingerprint)]
        found += [("calibration", report.plan.calibration)]
    versions = {name: _version(name) for name in ("torch-otprune", "transformers")}
    return found + sorted({**environment(), **versions}.items())
