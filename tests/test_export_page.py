"""The page on export runs whole, with the blocks that need an extra."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "export.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDED = ("transformers", "onnxruntime", "onnxscript", "torchao")


def test_every_block_runs_where_the_extras_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDED:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    text, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "page"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        code = compile("\n" * line + match[1], PAGE.name, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, namespace)
    assert {path.name for path in Path("served").iterdir()} == {"net.pt2", "net.onnx", "bert.onnx"}
