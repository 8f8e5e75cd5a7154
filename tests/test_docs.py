"""The documentation names what the package exports, and its bare files can be read."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import torch_otprune as otp

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REQUEST = re.compile(r"<!-- generated: (\w+) ?(\S*) -->(?:\n(.*))?")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """Load what fills the pages."""
    for package in ("griffe", "latex2mathml", "mkdocs"):
        pytest.importorskip(package, reason="the documentation's tools are not installed")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(otp.__all__))
def test_every_public_name_has_a_reference_and_is_listed(hooks: ModuleType, name: str) -> None:
    value = getattr(otp, name)
    home = importlib.import_module(value.__module__)
    assert value.__module__ in hooks.modules()  # one reference page each
    assert name in home.__all__ and (value.__doc__ or "").strip()
    link = f"[`otp.{name}`][{value.__module__}.{value.__qualname__}]"
    (row,) = (line for line in hooks.names("").splitlines() if link in line)
    assert row.endswith(f"| {value.__doc__.strip().splitlines()[0]} |")


def test_the_list_of_public_names_is_on_a_page_and_nothing_else_is_on_the_list(
    hooks: ModuleType,
) -> None:
    assert "<!-- generated: names -->" in (DOCS / "names.md").read_text(encoding="utf-8")
    assert len(hooks.names("").splitlines()) == len(otp.__all__) + 2


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(DOCS)) for p in PAGES])
def test_a_bare_page_says_what_stands_where_something_is_filled_in(page: Path) -> None:
    for kind, name, line in REQUEST.findall(page.read_text(encoding="utf-8")):
        assert line.startswith("> This "), f"{kind} {name}"
        assert "is filled in when the site is built" in line
        targets = re.findall(r"\]\(([^)]+)\)", line)
        assert targets and all((page.parent / target).exists() for target in targets)


def test_what_is_filled_in_takes_the_place_of_the_line_for_bare_readers(
    hooks: ModuleType,
) -> None:
    page = "a\n\n<!-- generated: fields Budget -->\n> This table is [elsewhere](x.md).\n\nb\n"
    made = hooks.on_page_markdown(page)
    assert "elsewhere" not in made and "| `macs` |" in made
    assert made.startswith("a\n\n| field |") and made.endswith("|\n\nb\n")
