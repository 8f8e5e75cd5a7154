"""The house rules that a machine can read: who imports whom, how long, how quiet."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torch_otprune"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

# Data flows down; a room imports only from rooms above it.
ROOMS = (
    "errors", "policy", "structure", "statistics", "transport", "nn", "certify", "criteria", "plan",
    "surgery", "decide", "fold", "doctor", "maps", "repair", "align", "training", "report",
    "verify", "store", "attach", "pipeline", "compare", "integrations", "demo", "cli",
)  # fmt: skip

# A package that comes in by one door only.
DOORS = {
    "geomloss": ("transport",),
    "pykeops": ("transport",),
    "scipy": ("transport", "plan"),
    "yaml": ("policy",),
    "pydantic_core": ("policy",),
    "rich": ("report", "cli"),
    "matplotlib": ("report", "cli"),
    "typer": ("cli",),
    "sklearn": ("demo",),
    "safetensors": ("store", "integrations", "demo", "cli"),
    "transformers": ("integrations",),
    "lightning": ("integrations",),
    "accelerate": ("integrations",),
    "onnx": ("integrations",),
    "onnxruntime": ("integrations",),
}
ANYWHERE = {"torch", "pydantic", "jaxtyping", "typing_extensions", "numpy"}

# Slow or loud to import, so the function that needs it imports it.
LAZY = {
    "geomloss", "pykeops", "scipy", "sklearn", "matplotlib", "rich",
    "transformers", "accelerate", "lightning", "onnx", "onnxruntime",
}  # fmt: skip


def room_of(name: str) -> str:
    """Name the room a file of the package is in; `__init__` for the front door."""
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported module with its line, relative ones refused elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch_otprune":
            yield from ((f"torch_otprune.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def eager(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield what importing the file imports: nothing in functions or for types only."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        pending.extend(ast.iter_child_nodes(node))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines from `def` to its end, docstring aside."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each file of the package in turn."""
    return str(request.param)


@pytest.fixture
def source(name: str) -> str:
    """The text of that file."""
    return (PACKAGE / name).read_text(encoding="utf-8")


@pytest.fixture
def tree(source: str) -> ast.Module:
    """The same, parsed."""
    return ast.parse(source)


def test_every_file_is_in_a_known_room(name: str) -> None:
    assert room_of(name) in {*ROOMS, "__init__", "__main__"}


def test_a_room_imports_only_from_rooms_above(name: str, tree: ast.Module) -> None:
    here = room_of(name)
    if here not in ROOMS:  # the front door sees every room
        return
    above = {*ROOMS[: ROOMS.index(here) + 1], "__version__"}
    inner = [(module.split("."), line) for module, line in imports(tree)]
    bad = [
        f"{name}:{line} imports {'.'.join(parts)}"
        for parts, line in inner
        if parts[0] == "torch_otprune" and len(parts) > 1 and parts[1] not in above
    ]
    assert not bad


def test_imports_are_absolute(name: str, tree: ast.Module) -> None:
    assert not [f"{name}:{line}" for module, line in imports(tree) if module.startswith(".")]


def test_a_third_party_package_comes_in_by_its_one_door(name: str, tree: ast.Module) -> None:
    outside = [(module.split(".")[0], line) for module, line in imports(tree)]
    bad = [
        f"{name}:{line} imports {package}"
        for package, line in outside
        if package not in {*sys.stdlib_module_names, *ANYWHERE, "torch_otprune"}
        and room_of(name) not in DOORS.get(package, ())
    ]
    assert not bad


def test_slow_and_loud_packages_are_imported_where_they_are_needed(
    name: str, tree: ast.Module
) -> None:
    assert not [
        f"{name}:{line} imports {module}"
        for module, line in eager(tree)
        if module.split(".")[0] in LAZY
    ]


def test_a_file_stays_under_400_lines(source: str) -> None:
    assert len(source.splitlines()) < 400


def test_a_function_stays_within_40_lines(name: str, tree: ast.Module) -> None:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert not [f"{name}:{f.lineno} {f.name}" for f in functions if body_lines(f) > 40]


def test_catching_everything_says_why(name: str, source: str, tree: ast.Module) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    wide = [h for h in handlers if h.type is None or ast.unparse(h.type).endswith("Exception")]
    assert not [f"{name}:{h.lineno}" for h in wide if h.lineno not in commented]


def test_only_the_command_line_prints(name: str, tree: ast.Module) -> None:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = [f"{name}:{c.lineno}" for c in calls if ast.unparse(c.func) == "print"]
    assert room_of(name) == "cli" or not printed


def test_annotations_are_postponed(tree: ast.Module) -> None:
    annotated = any(isinstance(node, ast.FunctionDef | ast.AnnAssign) for node in ast.walk(tree))
    lines = [ast.unparse(node) for node in tree.body]
    assert not annotated or "from __future__ import annotations" in lines


def run(code: str) -> str:
    """Run code in a fresh interpreter and return everything it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_the_package_prints_nothing() -> None:
    assert run("from torch_otprune import *") == ""


def test_importing_the_package_imports_no_slow_package() -> None:
    loaded = run(
        "import sys, torch; before = set(sys.modules); from torch_otprune import *;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert not LAZY & set(loaded)


def test_importing_the_package_takes_under_three_seconds_beyond_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); from torch_otprune import *;"
    assert float(run(code + "print(time.perf_counter() - t)")) < 3.0


def test_the_help_of_the_command_line_does_not_import_torch() -> None:
    printed = run(
        "import sys\nfrom torch_otprune.cli import main\nsys.argv = ['otprune', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    assert printed.split()[-1] == "False"
