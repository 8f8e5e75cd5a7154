"""From a saved model to a file that other programs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch_otprune.cli import names
from torch_otprune.cli.screen import Screen
from torch_otprune.errors import OTPruneError
from torch_otprune.integrations.export import FORMATS, export
from torch_otprune.statistics import collect
from torch_otprune.store import load
from torch_otprune.store.files import PLAN

__all__ = ["deliver"]

_SAMPLES = 64  # read of --data: the first batch is traced, the others are compared on
_COMPARED = 3  # batches of --data


def deliver(
    show: Screen,
    directory: Path,
    factory: str,
    *,
    data: str,
    to: str,
    out: Path | None,
    options: dict[str, Any],
) -> None:
    """Load a saved model, write it for other programs, and compare the two.

    Args:
        show: where to print.
        directory: what `apply` or `otp.save` wrote.
        factory: name of what builds the dense model.
        data: name of batches as the model takes them.
        to: the format.
        out: the file; by default beside the saved model.
        options: more arguments of `otp.export`.

    Raises:
        OTPruneError: if the format is unknown.
    """
    if to not in FORMATS:
        raise OTPruneError(
            f"'{to}' is no format.", where=f"--to {to}", fix=f"say one of {', '.join(FORMATS)}."
        )
    root = directory / "model" if (directory / "model" / PLAN).is_file() else directory
    net = load(root, factory=lambda: names.model(factory))
    batches = collect(net, names.data(data), _SAMPLES)
    whole = root.resolve()
    path = whole.with_name(f"{whole.name}{FORMATS[to]}") if out is None else out
    made = export(net, path, batches[0], to=to, check=batches[1:_COMPARED], **options)  # type: ignore[arg-type]
    facts = {
        "file": str(made.path),
        "format": made.to,
        "inputs": list(made.inputs),
        "outputs": list(made.outputs),
        "dynamic": list(made.dynamic),
        "checked": list(made.checked),
        "by": made.by,
        "error": made.error,
    }
    show.data(json.dumps(facts, indent=2))
    show.table(("exported", ""), [(name, _spell(value)) for name, value in facts.items()])


def _spell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
