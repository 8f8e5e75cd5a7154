"""From a saved model to a file that other programs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch_otprune.cli import names
from torch_otprune.cli.reload import reload, saved_in
from torch_otprune.cli.screen import Screen
from torch_otprune.integrations.asked import FORMATS, settled
from torch_otprune.integrations.export import export
from torch_otprune.statistics import collect
from torch_otprune.structure.forward import batch_size

__all__ = ["deliver"]

_SAMPLES = 64  # read of --data: the first batch is traced, the others are compared on
_COMPARED = 3  # batches of --data


def deliver(
    show: Screen,
    directory: Path,
    factory: str,
    *,
    data: str,
    to: str | None,
    out: Path | None,
    strict: bool,
    options: dict[str, Any],
) -> None:
    """Load a saved model, write it for other programs, and compare the two.

    Args:
        show: where to print.
        directory: what `apply` or `otp.save` wrote.
        factory: name of what builds the dense model.
        data: name of batches as the model takes them.
        to: the format; None to go by the ending of the file, and for ONNX where none is named.
        out: the file; by default beside the saved model.
        strict: as for `otp.load`.
        options: more arguments of `otp.export`.
    """
    root = saved_in(directory)
    whole = root.resolve()
    where = f"--to {to}" if to else f"--out {out}"
    kind = settled(out or Path("model"), to or ("onnx" if out is None else None), where=where)
    path = whole.with_name(f"{whole.name}{FORMATS[kind]}") if out is None else out
    net = reload(root, factory, strict=strict)
    batches = collect(net, names.data(data), _SAMPLES)
    more = batches[1:_COMPARED]
    if not options["dynamic_batch"]:  # the last one may be shorter
        more = [batch for batch in more if batch_size(batch) == batch_size(batches[0])]
    made = export(net, path, batches[0], to=kind, check=more, **options)
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
