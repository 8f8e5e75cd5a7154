"""The commands on a small model: what they print, write and answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import torch_otprune as otp
from torch_otprune.cli import app

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def loud():
    print("LOUD")
    return net()

def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(4)]

class Declared(nn.Sequential):
    pass

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))

def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), *(Block() for _ in range(4)), nn.Linear(6, 4))

def held():
    torch.manual_seed(2)
    return [torch.randn(9, 3, 8, 8)]

def rows():
    torch.manual_seed(1)
    return [torch.randn(32, 3) for _ in range(2)]
"""
DEEP = ("nets:deep", "-d", "nets:rows")
POLICY = "rules: channels\nbudget: {macs: 50%}\n"
Otprune = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of models and a policy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("policy.yaml").write_text(POLICY)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def otprune(place: Path) -> Otprune:
    """Call the command line."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def planned(otprune: Otprune) -> Path:
    """Write a plan."""
    done = otprune("plan", "nets:net", "-d", "nets:data", "-p", "policy.yaml", "-o", "plan.json")
    assert done.exit_code == 0, done.output
    return Path("plan.json")


def applied(otprune: Otprune, *more: str) -> Result:
    """Prune by a stored plan."""
    return otprune(
        "apply", "nets:net", "-d", "nets:data", "--plan", planned(otprune), "-o", "out", *more
    )


def test_the_plan_it_writes_is_the_plan_of_the_library(otprune: Otprune) -> None:
    path = planned(otprune)
    import nets  # type: ignore[import-not-found]

    policy = otp.Policy.from_yaml(POLICY)
    with otp.attach(nets.net(), policy) as attached:
        otp.observe(attached, nets.data())
    assert otp.Plan.from_json(path.read_text()) == attached.plan()


def test_the_plan_is_printed_with_every_cut_and_both_totals(otprune: Otprune) -> None:
    done = otprune("plan", "nets:net", "-d", "nets:data", "-p", "policy.yaml")
    assert "group" in done.stdout and "reason" in done.stdout
    assert "params: " in done.stdout and "macs: " in done.stdout


def test_json_is_all_there_is_on_standard_output(otprune: Otprune) -> None:
    done = otprune("plan", "nets:loud", "-d", "nets:data", "-p", "policy.yaml", "--json")
    assert otp.Plan.from_json(done.stdout).cuts
    assert "LOUD" in done.stderr


COMPARE = ("compare", "nets:net", "policy.yaml", "plain.yaml", "-d", "nets:data")


def test_policies_are_compared_as_by_the_library(otprune: Otprune) -> None:
    Path("plain.yaml").write_text(POLICY.replace("channels", "{kind: channels, repair: none}"))
    done = otprune(*COMPARE, "--held", "nets:held", "--json")
    assert done.exit_code == 0, done.output
    import nets

    policies = {n: otp.Policy.from_yaml(Path(f"{n}.yaml")) for n in ("policy", "plain")}
    own = otp.compare(nets.net(), policies, nets.data(), held=nets.held())
    read = otp.Comparison.model_validate_json(done.stdout)
    assert [s.output_error for s in read.standings] == [s.output_error for s in own.standings]
    assert read.samples == 9
    told = otprune(*COMPARE, "--held", "nets:held")
    assert "policy" in told.stdout and "9 samples judge" in told.stdout


def test_two_policies_of_one_name_are_refused(otprune: Otprune) -> None:
    Path("a").mkdir()
    Path("a/policy.yaml").write_text(POLICY)
    words = ("compare", "nets:net", "policy.yaml", "a/policy.yaml", "-d", "nets:data")
    done = otprune(*words, "--held", "nets:held")
    assert done.exit_code == 3
    assert "the same name" in done.output


def test_apply_writes_a_model_that_loads_and_a_report_that_reads(otprune: Otprune) -> None:
    done = applied(otprune)
    assert done.exit_code == 0, done.output
    import nets

    report = otp.Report.from_json(Path("out/report/report.json").read_text())
    model = otp.load("out/model", factory=nets.net)
    assert sum(p.numel() for p in model.parameters()) == report.params.after
    assert Path("out/report/report.html").exists()
    assert "within budget" in done.stdout


def test_apply_with_a_policy_does_what_plan_and_apply_do(otprune: Otprune) -> None:
    applied(otprune)
    done = otprune("apply", "nets:net", "-d", "nets:data", "-p", "policy.yaml", "-o", "again")
    assert done.exit_code == 0, done.output
    files = [Path(out, "model/model.safetensors").read_bytes() for out in ("out", "again")]
    assert files[0] == files[1]


def test_apply_replaces_what_it_wrote_before(otprune: Otprune) -> None:
    assert applied(otprune).exit_code == applied(otprune).exit_code == 0


def test_apply_prints_the_report_as_json(otprune: Otprune) -> None:
    report = otp.Report.from_json(applied(otprune, "--json").stdout)
    assert report.macs.ratio <= 0.5


def test_verify_accepts_both_the_directory_and_the_model_in_it(otprune: Otprune) -> None:
    applied(otprune)
    for path in ("out", "out/model"):
        done = otprune("verify", path, "-f", "nets:net", "--json")
        assert json.loads(done.stdout)["model"] == "out/model"


def test_verify_runs_the_model_and_compares_it_with_the_dense_one(otprune: Otprune) -> None:
    from safetensors.torch import save_file

    applied(otprune)
    import nets

    save_file(nets.net().state_dict(), "dense.safetensors")
    done = otprune(
        *("verify", "out", "-f", "nets:net", "-d", "nets:data", "-w", "dense.safetensors"), "--json"
    )
    facts = json.loads(done.stdout)
    plan = otp.Plan.from_json(Path("plan.json").read_text())
    assert (facts["plan"], facts["macs"]) == (plan.hash, plan.macs.after)
    assert 0 <= facts["agreement"] <= 1


def test_verify_notices_a_flipped_bit(otprune: Otprune) -> None:
    applied(otprune)
    path = Path("out/model/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = otprune("verify", "out", "-f", "nets:net")
    assert done.exit_code == 10
    assert "the hash differs" in done.stderr


def test_verify_notices_another_factory(otprune: Otprune) -> None:
    applied(otprune)
    Path("nets.py").write_text(NETS.replace("8, 3", "9, 3").replace("(8, 4)", "(9, 4)"))
    sys.modules.pop("nets")
    done = otprune("verify", "out", "-f", "nets:net")
    assert done.exit_code == 10


def test_the_weights_are_loaded_before_planning(otprune: Otprune) -> None:
    import nets
    from safetensors.torch import save_file

    dead = {n: torch.zeros_like(t) if n == "0.bias" else t for n, t in state(nets.net()).items()}
    dead["0.weight"][:4] = 0
    save_file(dead, "dead.safetensors")
    done = otprune(
        *("plan", "nets:net", "-d", "nets:data", "-p", "policy.yaml"),
        *("-w", "dead.safetensors", "--json"),
    )
    cuts = {cut.group: cut.keep for cut in otp.Plan.from_json(done.stdout).cuts}
    assert set(cuts["0"]) <= {4, 5, 6, 7}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_doctor_accounts_for_every_parameter(otprune: Otprune) -> None:
    done = otprune("doctor", "nets:net", "--example", "nets:data", "--json")
    found = json.loads(done.stdout)
    assert sum(found["totals"].values()) == found["params"] > 0


def test_the_doctor_prints_groups_and_what_stays(otprune: Otprune) -> None:
    done = otprune("doctor", "nets:net", "--example", "nets:data")
    assert done.exit_code == 0
    assert "prunable" in done.stdout and "6.bias" in done.stdout


def test_the_doctor_puts_layers_that_are_alike_in_one_row(otprune: Otprune) -> None:
    done = otprune("doctor", *DEEP)
    assert done.exit_code == 0, done.output
    assert "can go whole" in done.stdout and "4 in 1 run" in done.stdout
    assert "once 1 activation is linear" in done.stdout


def test_the_doctor_lists_every_layer_when_asked(otprune: Otprune) -> None:
    done = otprune("doctor", *DEEP, "--all")
    starts = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert {"1", "2", "3", "4"} <= set(starts)
    assert "4 in 1 run" not in done.stdout


def test_the_doctor_s_json_holds_blocks_activations_and_segments(otprune: Otprune) -> None:
    found = json.loads(otprune("doctor", *DEEP, "--json").stdout)
    assert [block["block"] for block in found["blocks"]] == ["1", "2", "3", "4"]
    assert [site["name"] for site in found["activations"]] == [f"{i}.act" for i in range(1, 5)]
    assert found["segments"][0]["layers"] == ["1.up", "1.down"]
    assert found["stuck"] == []


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_removed_layers_are_printed_with_what_stands_in(command: str, otprune: Otprune) -> None:
    Path("depth.yaml").write_text("rules: {kind: layers, drop: 2}\n")
    done = otprune(command, *DEEP, "-p", "depth.yaml", "-o", "out.json")
    assert done.exit_code == 0, done.output
    assert "removed layer" in done.stdout and "affine" in done.stdout
    kept = "layers: 4 -> 2 (50.0% kept)" if command == "plan" else "layers on offer"
    assert kept in done.stdout


def test_a_plan_without_cuts_has_no_table_of_groups(otprune: Otprune) -> None:
    Path("depth.yaml").write_text("rules: {kind: layers, drop: 2}\n")
    done = otprune("plan", *DEEP, "-p", "depth.yaml")
    assert "units" not in done.stdout
    assert "out of their lists, so that later layers move up: " in done.stdout


def test_the_schema_accepts_the_policy_of_the_examples(otprune: Otprune) -> None:
    import jsonschema

    schema = json.loads(otprune("schema").stdout)
    jsonschema.validate({"rules": "channels", "budget": {"macs": "50%"}}, schema)


def test_the_version_is_the_package_s(otprune: Otprune) -> None:
    assert otprune("--version").stdout.strip() == f"otprune {otp.__version__}"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Call the command line in a new process, and list the heavy packages it imported."""
    code = (
        "import sys\nfrom torch_otprune.cli import main\n"
        "try: main()\nfinally: sys.stderr.write('torch' * ('torch' in sys.modules))"
    )
    home = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=home, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    "words", [("--help",), ("plan", "--help"), ("--version",), ("plan",), ("nonsense",)]
)
def test_help_and_usage_do_not_import_torch(words: tuple[str, ...]) -> None:
    assert not run(*words).stderr.endswith("torch")


def test_a_command_imports_torch() -> None:
    assert run("schema").stderr.endswith("torch")


@pytest.mark.parametrize(
    "command", ["demo", "doctor", "plan", "compare", "apply", "verify", "export", "schema"]
)
def test_every_command_has_help(command: str, otprune: Otprune) -> None:
    done = otprune(command, "--help")
    assert done.exit_code == 0
    assert command in done.stdout
