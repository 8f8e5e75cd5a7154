"""Fill the documentation from the package, so that neither can drift from the other.

A page asks with a comment: `<!-- generated: fields Policy -->`. The quoted line behind it tells
readers of the bare file where to look; the answer takes its place.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_otprune"
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DISPLAY = {"div": "block", "span": "inline"}
REQUEST = re.compile(r"<!-- generated: (\w+) ?(\S*) -->(?:\n> .*)?")


class Examples(Extension):
    """Show doctests as code: griffe knows the section only in the plural."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)


def modules() -> list[str]:
    """List every public module of the package, dotted, rooms in the order of their names."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.stat().st_size]
    dotted = (".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names)
    return sorted(name for name in dotted if "._" not in name)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the transport pages and the reference to the navigation."""
    docs = Path(config.docs_dir)
    transport = [path.name for path in sorted(docs.glob("transport*.md"))]
    rooms: dict[str, list[dict[str, str]]] = {}
    for name in modules():
        short = name.removeprefix("torch_otprune.")
        rooms.setdefault(short.split(".")[0], []).append({short: f"reference/{name}.md"})
    reference = [pages[0] if len(pages) == 1 else {room: pages} for room, pages in rooms.items()]
    assert config.nav is not None
    if transport:
        config.nav.insert(4, {"Transport": transport})
    config.nav.append({"Reference": reference})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make one reference page per module."""
    for name in modules():
        page = f"# `{name}`\n\n::: {name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Answer what the page asks for."""
    return REQUEST.sub(lambda match: ANSWERS[match[1]](match[2]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers read without a script."""
    return MATH.sub(lambda m: convert(unescape(m[2]), display=DISPLAY[m[1]]), html)


def fields(name: str) -> str:
    """Tabulate the fields of a policy model, or of one in a room, such as `criteria.DTP`."""
    home, _, own = f"torch_otprune.{name}".rpartition(".")
    model = getattr(importlib.import_module(home), own)
    rows = []
    for key, field in model.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else f"`{_plain(field.get_default(call_default_factory=True))}`"
        )
        rows.append(f"| `{key}` | {default} | {field.description or ''} |")
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])


def _plain(value: Any) -> str:
    if hasattr(value, "model_dump"):
        return str(value.model_dump(exclude_defaults=True) or "{}")
    return repr(value)


NEEDS = {
    "moments": "second moments",
    "sensitivity": "gradients of the output",
    "signals": "some rows of what consumers read",
    "tangents": "gradients by all parameters",
    "points": "the stream around every block",
    "writers": "what layers in front of it read",
    "feel": "gradients of the output",
    "trial": "a run without the block",
    "sites": "what activations read and write",
}


def table(name: str) -> str:
    """Tabulate what is registered at an extension point: kind, summary, needs, settings."""
    entries = getattr(importlib.import_module("torch_otprune.policy.registry"), name)
    kinds = {kind: entries[kind] for kind in entries}
    extra = [column for column in COLUMNS if any(hasattr(c, column) for c in kinds.values())]
    heads = ["name", "what it does", *(COLUMNS[column][0] for column in extra), "settings"]
    rows = [heads, ["---"] * len(heads)]
    for kind, cls in kinds.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        entry = cls()  # what it needs may depend on its settings
        told = [COLUMNS[column][1](getattr(entry, column, None)) for column in extra]
        link = f"[`{kind}`][{cls.__module__}.{cls.__qualname__}]"
        rows.append([link, summary, *told, ", ".join(_settings(cls))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _settings(cls: type) -> Iterator[str]:
    for key, field in cls.model_fields.items():
        if key != "kind":
            yield f"`{key}={field.get_default()!r}`"


def _needs(needs: Any) -> str:
    return ", ".join(text for text in dict.fromkeys(NEEDS[n] for n in NEEDS if n in needs)) or "–"


# What a class says of itself beside its settings: head of the column, and how it is told.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "needs": ("needs", _needs),
    "priced": ("shares a budget with channels", lambda yes: "yes" if yes else "no"),
    "site": ("ranks activations", lambda site: "yes" if site else "no"),
}


def command(name: str) -> str:
    """Show the help of `otprune` or of one of its commands."""
    code = "import sys; from torch_otprune.cli import main; sys.argv[0] = 'otprune'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *filter(None, [name]), "--help"],
        env={**os.environ, "COLUMNS": "76", "NO_COLOR": "1", "TERM": "dumb"},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    return f"```text\n{done.stdout.strip()}\n```"


def errors(_: str) -> str:
    """Collect every error the source raises, by class: what it says, where, what to do."""
    lines: list[str] = []
    found = sorted(set(_raised()))
    for kind in sorted({kind for kind, *_rest in found}):
        doc = importlib.import_module("torch_otprune.errors").__dict__[kind].__doc__
        lines += [f"## {kind}", "", (doc or "").splitlines()[0], ""]
        for _kind, problem, where, fix, origin in (row for row in found if row[0] == kind):
            lines += ["```text", problem, f"  where: {where}", f"  fix:   {fix}", "```", ""]
            lines += [f"From [`{origin}`](reference/{origin}.md).", ""]
    return "\n".join(lines)


def _raised() -> Iterator[tuple[str, str, str, str, str]]:
    for name in modules():
        path = ROOT / (name.replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__init__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                kind = node.func.id
                given = {keyword.arg: _text(keyword.value) for keyword in node.keywords}
                if kind == "problem":  # a validator's: pydantic knows where
                    kind, given = "PolicyError", {"where": "<path of the field>", **given}
                if kind.endswith("Error") and {"where", "fix"} <= set(given):
                    yield kind, _text(node.args[0]), given["where"], given["fix"], name


def _text(node: ast.expr) -> str:
    """Spell a message as it stands in the source, with <names> for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"<{ast.unparse(node.value)}>"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return f"<{ast.unparse(node)}>"


def results(name: str) -> str:
    """Copy a table that a benchmark's script made from its JSON."""
    return (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()


def names(_: str) -> str:
    """Tabulate what `torch_otprune` exports: name, summary, and where its reference stands."""
    package = importlib.import_module("torch_otprune")
    rows = ["| name | what it is |", "|---|---|"]
    for name in sorted(package.__all__, key=str.lower):
        value = getattr(package, name)
        link = f"[`otp.{name}`][{value.__module__}.{value.__qualname__}]"
        rows.append(f"| {link} | {(value.__doc__ or '').strip().splitlines()[0]} |")
    return "\n".join(rows)


ANSWERS = {
    "names": names,
    "results": results,
    "fields": fields,
    "table": table,
    "command": command,
    "errors": errors,
}
