"""The report as one HTML page that needs no network, and its files."""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from torch_otprune.errors import OTPruneError
from torch_otprune.report.pictures import draw
from torch_otprune.report.sparsity import ZERO_HEAD, zero_rows
from torch_otprune.report.table import depth_sections, layer_rows, total_rows
from torch_otprune.report.words import error

if TYPE_CHECKING:
    from torch_otprune.report.model import Report
    from torch_otprune.report.trainability import Trainability

__all__ = ["page", "write"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #30343b; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid #eceef2; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
                       white-space: nowrap; }
li { margin: 0.2rem 0; } code { font-size: 0.85rem; overflow-wrap: anywhere; }
"""


def write(report: Report, directory: Path) -> Path:
    """Write JSON, page and pictures, each aside and then in place.

    Args:
        report: what was measured.
        directory: made if it does not exist.

    Returns:
        the path of the page.

    Raises:
        OTPruneError: if the directory cannot be written.
    """
    pictures = draw(report)
    files = {f"{name}.png": data for name, data in pictures.items()}
    files["report.json"] = report.to_json().encode()
    files["report.html"] = page(report, pictures).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _replace(directory / name, data)
    except OSError as problem:
        raise OTPruneError(
            f"the report cannot be written: {problem.strerror}.",
            where=str(directory),
            fix="pass a directory that you may write to.",
        ) from problem
    return directory / "report.html"


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def page(report: Report, pictures: dict[str, bytes]) -> str:
    """Write the report as one page.

    Args:
        report: what was measured.
        pictures: name to PNG.

    Returns:
        HTML with everything inside.
    """
    parts = [
        "<h1>What the pruning did</h1>",
        _list(report.verdicts),
        _table(("", "dense", "pruned", "kept"), total_rows(report)),
        *(_picture(name, data) for name, data in pictures.items()),
        *_details(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Pruning report</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _details(report: Report) -> list[str]:
    plan, parts = report.plan, []
    if plan.cuts:
        rows = [
            (c.group, str(c.units), str(len(c.keep)), error(c.error), c.reason) for c in plan.cuts
        ]
        head = ("group", "units", "kept", "predicted error", "why")
        parts += ["<h2>Cuts</h2>", _table(head, rows, numbers=(1, 2, 3))]
    for title, columns, cells, right in depth_sections(plan):
        parts += [f"<h2>{title}</h2>", _table(columns, cells, numbers=right)]
    if plan.compacted:
        paths = ", ".join(f"<code>{escape(path)}</code>" for path in plan.compacted)
        parts.append(f"<p>Taken out of their lists, so that later layers move up: {paths}.</p>")
    if report.layers:
        head3 = ("layer", "error before repair", "after")
        parts += ["<h2>Layers</h2>", _table(head3, layer_rows(report.layers))]
    if report.repairs:
        parts += ["<h2>Repairs</h2>", _repairs(report)]
    if report.zeros:
        zeros = zero_rows(report.zeros)
        parts += ["<h2>Zeros</h2>", _table(ZERO_HEAD, zeros, numbers=(2, 3, 4, 5, 6))]
    if report.trainability is not None:
        parts += ["<h2>Trainability</h2>", *_learning(report.trainability)]
    if plan.refused:
        parts += ["<h2>Stays whole</h2>", _list(f"{r.group}: {r.reason}" for r in plan.refused)]
    if plan.notes:
        parts += ["<h2>Notes on the plan</h2>", _list(plan.notes)]
    return [*parts, "<h2>How this was made</h2>", _origin(report)]


def _repairs(report: Report) -> str:
    outcome = {True: "kept", False: "refused"}
    rows = [
        (n.site, n.kind, error(n.before), error(n.after), outcome[n.accepted], n.note)
        for n in report.repairs
    ]
    head = ("layer", "repair", "error before", "after", "", "note")
    return _table(head, rows, numbers=(2, 3))


def _learning(found: Trainability) -> list[str]:
    parts = [
        _list(found.verdicts),
        _table(("tangent kernel", "dense", "pruned"), found.rows()),
        f"<p>{escape(found.basis())}</p>",
    ]
    if found.curve is not None:
        both = enumerate(zip(found.curve.predicted, found.curve.real, strict=False))
        rows = [(str(step), f"{a:.4g}", f"{b:.4g}") for step, (a, b) in both]
        parts.append(_table(("step", "loss predicted", "real"), rows, numbers=(0, 1, 2)))
    shares = [(s.path, _share(s.before), _share(s.after)) for s in found.shares]
    return [*parts, _table(("layer's share of the kernel", "dense", "pruned"), shares)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _origin(report: Report) -> str:
    rows = [("plan", report.plan_hash), ("calibration samples", str(report.plan.samples))]
    rows += [(f"time for {stage}", f"{time:.2f} s") for stage, time in report.seconds.items()]
    rows += list(report.environment.items())
    return _table(("", ""), rows, numbers=())


def _picture(name: str, data: bytes) -> str:
    inline = base64.b64encode(data).decode()
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{inline}"></p>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in sentences) + "</ul>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] | None = None
) -> str:
    right = set(range(1, len(head)) if numbers is None else numbers)
    lines = [_row(row, "td", right) for row in rows]
    if any(head):
        lines.insert(0, _row(head, "th", right))
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(cells: Sequence[str], tag: str, right: set[int]) -> str:
    opened = (f'{tag} class="number"' if i in right else tag for i in range(len(cells)))
    inner = (f"<{o}>{escape(cell)}</{tag}>" for o, cell in zip(opened, cells, strict=True))
    return f"<tr>{''.join(inner)}</tr>"
