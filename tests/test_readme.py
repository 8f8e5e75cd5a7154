"""Every Python block of the README and the documentation runs, page by page."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import torch_otprune
from torch_otprune.policy.registry import (
    CRITERIA,
    LAYER_CRITERIA,
    PENALTIES,
    REPAIRS,
    REPLACEMENTS,
)

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- skip: [^\n]+ -->\s*)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """List the page's blocks in one language with their lines, but for skipped ones."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(3)), match[3])
        for match in BLOCK.finditer(text)
        if match[2] == language and not match[1]
    ]


def pages(language: str) -> list[str]:
    """List the pages that have such blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p.relative_to(ROOT).as_posix() for p in found if p.exists() and blocks(p, language)]


@pytest.mark.parametrize("page", pages("python"))
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = (CRITERIA, LAYER_CRITERIA, PENALTIES, REPAIRS, REPLACEMENTS)
    before = {table: set(table) for table in tables}
    namespace: dict[str, object] = {"__name__": "page"}
    try:
        for line, code in blocks(ROOT / page, "python"):
            # Blank lines in front, so that a traceback names the line of the page.
            compiled = compile("\n" * line + code, page, "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compiled, namespace)
    finally:
        for table, kinds in before.items():
            for kind in set(table) - kinds:
                table.remove(kind)


@pytest.mark.parametrize("page", pages("yaml"))
def test_the_policies_of_a_page_can_be_read(page: str) -> None:
    for _, text in blocks(ROOT / page, "yaml"):
        assert torch_otprune.Policy.from_yaml(text).rules


def test_a_block_can_be_left_out_with_its_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- skip: needs a GPU -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert [code for _, code in blocks(page, "python")] == ["x = 1\n"]
