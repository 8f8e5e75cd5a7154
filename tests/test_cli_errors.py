"""What a hostile new user gets: three lines, a stable code, and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from torch_otprune import errors
from torch_otprune.cli import app
from torch_otprune.cli.screen import CODES

NETS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

def resnet(width): return net()
def boom(): return 1 / 0
def mapping(): return {"a": 1}
def flat(): return nn.Linear(3, 4)
def relu(): return nn.ReLU()
def nothing(): return None
def text(): return "hello"
def data(): return [torch.randn(16, 3) for _ in range(4)]
def empty(): return []
def nan(): return [torch.full((2, 3), float("nan"))]
def wrong(): return [torch.randn(2, 5)]
def late():
    yield torch.randn(2, 3)
    raise OSError("disk gone")
number = 3
"""
FILES = {
    "nets.py": NETS,
    "needs.py": "import no_such_package",
    "syntax.py": "def f(:",
    "exits.py": "import sys; sys.exit('usage')",
    "policy.yaml": "rules: channels\nbudget: {macs: 50%}\n",
    "low.yaml": "rules: channels\nbudget: {macs: 2}\n",
    "all.yaml": "rules: channels\nbudget: {macs: 100%}\n",
    "typo.yaml": "rules: [{kind: chanels}]\n",
    "target.yaml": "rules: {kind: channels, targets: nope}\nbudget: {macs: 50%}\n",
    "afile": "x",
    "full/model/x": "x",
    "other.json": "{}",
}
Otprune = Callable[[str], Result]


@pytest.fixture
def otprune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Otprune]:
    """Call the command line with words in one string."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    yield lambda words: CliRunner().invoke(app, words.split())
    for name in ("nets", "needs", "syntax", "exits"):
        sys.modules.pop(name, None)


def complaint(done: Result, code: int = 1) -> str:
    """Check that there are three lines, no traceback and nothing else."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    lines = done.stderr.rstrip("\n").split("\n")
    assert len(lines) == 3, done.stderr
    assert lines[1].startswith("  where: ") and lines[2].startswith("  fix:   ")
    return done.stderr


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("nets:nett", "'nets' has no 'nett'.|closest names: net"),
        ("nest:net", "there is no module 'nest'.|nets"),
        ("torch.optm:SGD", "there is no module 'torch.optm'.|torch.optim"),
        ("nets", "'nets' is not of the form package.module:name.|such as 'nets:factory'"),
        ("nets.net", "such as 'nets:net'"),
        ("./nets.py:net", "such as 'nets:net'"),
        ("nets:", "is not of the form"),
        ("nets:net()", "is not of the form"),
        ("nets:resnet", "calling 'nets:resnet' fails: TypeError|'width'"),
        ("nets:boom", "ZeroDivisionError: division by zero.|nets.py:9"),
        ("nets:mapping", "gives a dict, which is no nn.Module."),
        ("nets:nothing", "gives a NoneType"),
        ("nets:number", "is an int, which cannot be called."),
        ("needs:f", "importing 'needs' fails: ModuleNotFoundError|'no_such_package'|needs.py:1"),
        ("syntax:f", "importing 'syntax' fails: SyntaxError|syntax.py:1"),
        ("exits:f", "importing 'exits' fails: SystemExit: usage."),
    ],
)
def test_a_wrong_model_is_named_with_what_is_missing(
    model: str, expected: str, otprune: Otprune
) -> None:
    said = complaint(otprune(f"doctor {model} --example nets:data"))
    assert all(part in said for part in expected.split("|"))


@pytest.mark.parametrize(
    ("data", "code", "expected"),
    [
        ("nets:dta", 1, "closest names: data"),
        ("nets:mapping", 1, "gives a dict, which does not yield batches."),
        ("nets:text", 1, "gives a str"),
        ("nets:nothing", 1, "gives a NoneType"),
        ("nets:late", 1, "reading the data fails: OSError: disk gone."),
        ("nets:empty", 6, "yielded no batch"),
        ("nets:nan", 6, "NaN"),
        ("nets:wrong", 5, "does not run on the example"),
    ],
)
def test_wrong_data_is_an_error_of_its_kind(
    data: str, code: int, expected: str, otprune: Otprune
) -> None:
    words = f"plan nets:net -d {data} -p policy.yaml -o plan.json"
    assert expected in complaint(otprune(words), code)
    assert not Path("plan.json").exists()


@pytest.mark.parametrize(
    ("policy", "code", "expected"),
    [
        ("nope.yaml", 3, "No such file"),
        ("full", 3, "Is a directory"),
        ("typo.yaml", 3, "closest: channels"),
        ("all.yaml", 3, "nothing would be pruned"),
        ("target.yaml", 3, "'nope' matches no module"),
        ("low.yaml", 4, "cannot be reached"),
    ],
)
def test_a_wrong_policy_is_an_error_of_its_kind(
    policy: str, code: int, expected: str, otprune: Otprune
) -> None:
    words = f"plan nets:net -d nets:data -p {policy} -o plan.json"
    assert expected in complaint(otprune(words), code)
    assert not Path("plan.json").exists()


def test_a_missing_policy_names_the_option(otprune: Otprune) -> None:
    assert "where: --policy" in complaint(otprune("plan nets:net -d nets:data"), 3)


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("full", "this is a directory|full/plan.json"),
        ("afile/plan.json", "afile is a file"),
        ("/proc/none/plan.json", "nothing can be written there"),
    ],
)
def test_a_plan_that_cannot_be_written_says_where(
    out: str, expected: str, otprune: Otprune
) -> None:
    said = complaint(otprune(f"plan nets:net -d nets:data -p policy.yaml -o {out}"))
    assert all(part in said for part in expected.split("|"))


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("full", "it holds something else than a saved model"),
        ("afile", "it is a file"),
        ("afile/out", "afile is a file"),
    ],
)
def test_a_directory_that_is_someone_else_s_is_refused_before_the_work(
    out: str, expected: str, otprune: Otprune
) -> None:
    done = otprune(f"apply no:model -d no:data -p policy.yaml -o {out}")
    assert expected in complaint(done)


@pytest.mark.parametrize(
    ("plan", "code", "expected"),
    [
        ("nope.json", 1, "No such file"),
        ("full", 1, "Is a directory"),
        ("other.json", 7, "this is no plan"),
        ("policy.yaml", 7, "this is no plan"),
    ],
)
def test_a_wrong_plan_is_an_error_of_its_kind(
    plan: str, code: int, expected: str, otprune: Otprune
) -> None:
    done = otprune(f"apply nets:net -d nets:data --plan {plan} -o out")
    assert expected in complaint(done, code)
    assert not Path("out").exists()


def test_a_plan_for_another_model_is_refused(otprune: Otprune) -> None:
    otprune("plan nets:net -d nets:data -p policy.yaml -o plan.json")
    done = otprune("apply nets:flat -d nets:data --plan plan.json -o out")
    complaint(done, 7)
    assert not Path("out").exists()


def test_a_plan_and_a_policy_contradict_each_other(otprune: Otprune) -> None:
    done = otprune("apply nets:net -d nets:data --plan other.json -p policy.yaml -o out")
    assert "a plan and a policy were given" in complaint(done)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"0.weigth": "0.weight"}, "the file has no '0.weight'.|closest names"),
        ({"extra": None}, "the model has no 'extra'."),
        ({"0.weight": None}, "'0.weight' is (8, 3) in the model, (1,) in the file."),
    ],
)
def test_weights_that_do_not_fit_name_the_first_tensor(
    change: dict[str, str | None], expected: str, otprune: Otprune
) -> None:
    state = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).state_dict()
    for name, old in change.items():
        state[name] = torch.zeros(1) if old is None else state.pop(old)
    save_file(dict(state), "w.safetensors")
    said = complaint(otprune("plan nets:net -d nets:data -p policy.yaml -w w.safetensors"))
    assert all(part in said for part in expected.split("|"))


@pytest.mark.parametrize("weights", ["nope.safetensors", "nets.py", "full"])
def test_weights_that_cannot_be_read_say_so(weights: str, otprune: Otprune) -> None:
    done = otprune(f"plan nets:net -d nets:data -p policy.yaml -w {weights}")
    assert "the weights cannot be read" in complaint(done)


def test_the_doctor_answers_and_fails_where_nothing_can_be_cut(otprune: Otprune) -> None:
    done = otprune("doctor nets:flat --example nets:data")
    assert done.exit_code == 5
    assert "fixed" in done.stdout
    assert "nothing could be pruned" in done.stderr


def test_a_model_without_parameters_is_refused(otprune: Otprune) -> None:
    done = otprune("doctor nets:relu --example nets:data")
    assert "no parameters" in complaint(done, 5)


@pytest.mark.parametrize("directory", ["nope", "full", "afile"])
def test_verify_refuses_what_is_no_saved_model(directory: str, otprune: Otprune) -> None:
    complaint(otprune(f"verify {directory} -f nets:net"), 10)


def test_verify_needs_data_to_compare_on(otprune: Otprune) -> None:
    done = otprune("verify out -f nets:net -w w.safetensors")
    assert "--data" in complaint(done)


def test_verify_names_batches_of_the_wrong_shape(otprune: Otprune) -> None:
    otprune("apply nets:net -d nets:data -p policy.yaml -o out")
    done = otprune("verify out -f nets:net -d nets:wrong")
    assert "the model does not run" in complaint(done, 9)


@pytest.mark.parametrize("words", ["plan", "plan nets:net", "apply nets:net -d nets:data", "x"])
def test_wrong_usage_is_2(words: str, otprune: Otprune) -> None:
    assert otprune(words).exit_code == 2


def test_every_kind_of_error_has_its_own_code_and_none_is_that_of_wrong_usage() -> None:
    kinds = {getattr(errors, name) for name in errors.__all__ if name.endswith("Error")}
    assert set(CODES) == kinds - {errors.TargetError}  # whose code is its parent's
    assert len({*CODES.values(), 0, 2}) == len(CODES) + 2


def test_the_codes_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"| {code} | `{kind.__name__}`" in page for kind, code in CODES.items())
