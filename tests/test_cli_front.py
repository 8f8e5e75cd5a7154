"""The package's front door: light to import, and yet all there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_otprune as otp

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """Run code in a new process."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_torch() -> None:
    assert run("import sys, torch_otprune; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", otp.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(otp, name).__name__ == name
    assert name in dir(otp)


def test_a_checker_sees_the_names_that_are_there() -> None:
    tree = ast.parse((ROOT / "torch_otprune" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert seen == set(otp.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'torch_otprune' has no attribute 'Polcy'"):
        otp.Polcy  # type: ignore[attr-defined]  # noqa: B018


def test_the_first_use_fills_the_tables() -> None:
    code = "import torch_otprune as otp; print(otp.Channels().criterion.kind)"
    assert run(code) == "transport"


@pytest.mark.parametrize(
    "first",
    ["import torch_otprune.attach", "from torch_otprune.attach import Attached", "otp.load"],
)
def test_a_submodule_does_not_hide_the_function_of_its_name(first: str) -> None:
    code = f"import torch_otprune as otp\n{first}\nimport torch_otprune.attach\nprint(otp.attach)"
    assert run(code).startswith("<function attach")
