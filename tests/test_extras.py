"""Packages that are optional are imported when they are needed, and missed by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_otprune as otp
from torch_otprune.errors import OTPruneError
from torch_otprune.integrations.extras import EXTRAS, needed

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).parent.parent
PACKAGES = [(package, extra) for extra, brought in EXTRAS.items() for package in brought]


@pytest.mark.parametrize(("package", "extra"), PACKAGES)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OTPruneError) as raised:
        needed(package, extra)
    assert raised.value.problem == f"this needs {package}, which is not installed."
    assert raised.value.fix == f"run pip install 'torch-otprune[{extra}]'."


def test_a_missing_part_of_a_package_is_the_packages_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json.nothing", None)
    with pytest.raises(OTPruneError, match="this needs json, which is not installed"):
        needed("json.nothing", "onnx")


def test_a_package_that_fails_to_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OTPruneError, match=r"does not import: libfoo\.so is missing"):
        needed("broken_package", "onnx")


def test_what_is_installed_is_imported() -> None:
    assert needed("os.path", "hf") is __import__("os").path


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_the_extras_are_those_that_can_be_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = declared["optional-dependencies"]
    for extra, brought in EXTRAS.items():
        assert {wanted.split(">")[0] for wanted in declared[extra]} == set(brought)


def block(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every import of a package fail, also of what is loaded already."""
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)


def _export(place: Path, _: pytest.MonkeyPatch) -> None:
    otp.export(nn.Linear(2, 2), place / "net.onnx", torch.ones(2, 2))


def _trainer(_: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from torch_otprune.integrations import trainer

    monkeypatch.delitem(vars(trainer), "PruningCallback", raising=False)  # made on first use
    return trainer.PruningCallback


def _lightning(_: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from torch_otprune.integrations import lightning

    monkeypatch.delitem(vars(lightning), "PruningCallback", raising=False)
    return lightning.PruningCallback


def _accelerate(_: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from torch_otprune.integrations.accelerate import bare

    return bare(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


DOORS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "onnx": _export,
    "onnxscript": _export,
    "onnxruntime": _export,
    "transformers": _trainer,
    "lightning": _lightning,
    "accelerate": _accelerate,
}


def test_every_optional_package_has_a_door_here() -> None:
    assert set(DOORS) == {package for package, _ in PACKAGES}


@pytest.mark.parametrize("package", DOORS)
def test_a_door_without_its_package_names_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(package, monkeypatch)
    extra = next(extra for extra, brought in EXTRAS.items() if package in brought)
    with pytest.raises(OTPruneError) as raised:
        DOORS[package](tmp_path, monkeypatch)
    assert f"pip install 'torch-otprune[{extra}]'" in raised.value.fix
    assert not list(tmp_path.iterdir())


def test_export_for_torch_needs_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, _ in PACKAGES:
        block(package, monkeypatch)
    otp.export(nn.Linear(2, 2), tmp_path / "net.pt2", torch.ones(2, 2), to="torch_export")


def test_importing_the_library_imports_no_optional_package() -> None:
    names = ", ".join(repr(package) for package, _ in [*PACKAGES, ("peft", ""), ("torchao", "")])
    code = (
        "import sys\nfrom torch_otprune import *\nimport torch_otprune\n"
        "[getattr(torch_otprune, name) for name in torch_otprune.__all__]\n"
        f"print(sorted({{{names}}} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
