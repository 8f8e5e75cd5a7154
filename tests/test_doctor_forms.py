"""The forms of a diagnosis: tables, tree, picture; and how far it has come."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cases import CASES
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.doctor.text import HEADS, families, tables
from torch_otprune.report import draw_groups
from torch_otprune.report.words import short_names

plt = pytest.importorskip("matplotlib.image")


class Block(nn.Module):
    """Two layers beside a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stack() -> nn.Module:
    """Three blocks behind one another."""
    return nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(3)), nn.Linear(6, 2))


def batch() -> Tensor:
    """Five samples."""
    return torch.randn(5, 4)


@pytest.fixture(scope="module")
def found() -> otp.Diagnosis:
    """The diagnosis of the stack."""
    return otp.doctor(stack(), batch())


def test_the_table_of_groups_says_of_which_kind_they_are(found: otp.Diagnosis) -> None:
    rows = {row[0]: dict(zip(HEADS["groups"], row, strict=True)) for row in tables(found)["groups"]}
    assert (rows["0"]["kind"], rows["0"]["units"]) == ("hidden", "6")
    assert (rows["*.up"]["kind"], rows["*.up"]["count"]) == ("channels", "3")
    assert "group *.up (3 such): 8 units, channels" in str(found)


def test_families_count_every_group_once(found: otp.Diagnosis) -> None:
    assert [(name, count) for name, count, _ in families(found.groups)] == [("0", 1), ("*.up", 3)]
    assert [count for _, count, _ in families(found.groups, every=True)] == [1] * 4


def test_the_tree_holds_the_same_sums_as_the_findings(found: otp.Diagnosis) -> None:
    lines = found.tree().splitlines()
    assert lines[0] == f"Sequential: {found.params:,}, >99% prunable, <1% fixed"
    assert lines[1] == "├─ 0: 30, prunable: 0 (hidden)"
    assert lines[2] == "├─ 1 ... 3: 122, 3 such, prunable"
    assert lines[-1] == "   └─ bias: 2, fixed: they reach the model's output"


def test_the_full_tree_has_a_line_for_every_module_and_parameter(found: otp.Diagnosis) -> None:
    model = stack()
    lines = found.tree(every=True).splitlines()
    modules = [m for m in model.modules() if list(m.parameters())]
    assert len(lines) == len(modules) + len(list(model.parameters()))


@pytest.mark.parametrize("name", sorted(CASES))
def test_tree_and_picture_take_every_model(name: str) -> None:
    found = otp.doctor(CASES[name].model(), CASES[name].batch())
    assert found.tree().startswith(f"{found.model}: {found.params:,}")
    height, width = plt.imread(io.BytesIO(draw_groups(found))).shape[:2]
    assert height > 150 and width > 800


def test_alike_groups_share_a_lane_so_that_depth_does_not_make_the_picture_taller() -> None:
    def height(depth: int) -> int:
        model = nn.Sequential(*(Block() for _ in range(depth)), nn.Linear(6, 2))
        image = plt.imread(io.BytesIO(draw_groups(otp.doctor(model, torch.randn(2, 6)))))
        return int(image.shape[0])

    assert abs(height(9) - height(3)) < 20


def test_a_picture_is_the_same_every_time(found: otp.Diagnosis) -> None:
    assert draw_groups(found) == draw_groups(found)


def test_progress_only_grows_and_ends_at_its_total() -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    model = stack()
    otp.doctor(model, batch(), progress=lambda s, n, t: told.setdefault(s, []).append((n, t)))
    assert set(told) == {"analyse", "try without"}
    for steps in told.values():
        done = [n for n, _ in steps]
        assert done == sorted(done) and done[-1] == steps[-1][1]
        assert len({total for _, total in steps}) == 1
    assert len(told["analyse"]) > 20
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failed_analysis_leaves_no_hooks() -> None:
    model = stack()
    with pytest.raises(otp.OTPruneError):
        otp.doctor(model, torch.randn(2, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def shell(*words: str) -> tuple[int, str]:
    """Run the command."""
    from typer.testing import CliRunner

    from torch_otprune.cli import app

    done = CliRunner().invoke(
        app, ["doctor", f"{__name__}:stack", "-d", f"{__name__}:batch", *words]
    )
    return done.exit_code, done.output


def test_the_shell_prints_the_tree_in_place_of_the_tables() -> None:
    code, printed = shell("--tree")
    assert code == 0 and "1 ... 3: 122, 3 such" in printed
    assert "can go whole" not in printed and "prunable" in printed


def test_the_shell_writes_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "groups.png"
    code, printed = shell("--picture", str(path))
    assert code == 0 and "picture in" in printed
    assert plt.imread(path).shape[1] > 800


def test_a_picture_cannot_be_a_directory(tmp_path: Path) -> None:
    code, printed = shell("--picture", str(tmp_path))
    assert code == 1 and "the picture cannot be written: this is a directory." in printed
    assert f"--picture {tmp_path}" in printed


def test_bars_are_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    bars = import_module("torch_otprune.cli.screen").Bars
    monkeypatch.setattr(bars, "__call__", lambda self, stage, *_: drawn.append(stage))
    code, printed = shell()
    assert code == 0 and {"analyse", "try without"} <= set(drawn)
    assert "━" not in printed


@pytest.mark.parametrize(
    ("name", "said"),
    [("groups.svg", "this name has '.svg'."), ("groups", "this name has no ending.")],
)
def test_a_picture_is_a_png_and_says_so(tmp_path: Path, name: str, said: str) -> None:
    code, printed = shell("--picture", str(tmp_path / name))
    assert code == 1 and f"the picture is a PNG, and {said}" in printed
    assert "name it groups.png." in printed and not list(tmp_path.iterdir())


def test_a_tree_in_json_is_refused() -> None:
    code, printed = shell("--tree", "--json")
    assert code == 1 and "--tree and --json each say what is printed." in printed
    assert "give one of them" in printed


class Named(nn.Module):
    """Layers whose paths differ in the middle of very long names."""

    def __init__(self) -> None:
        super().__init__()
        parts = ("feed_forward_projection_in", "feed_forward_projection_out")
        stages = ("the_first_stage_of_the_encoder", "the_second_stage_of_the_encoder")
        self.backbone_of_the_network = nn.ModuleDict(
            {s: nn.ModuleDict({p: nn.Linear(6, 6) for p in parts}) for s in stages}
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.backbone_of_the_network.values():
            for layer in stage.values():
                x = layer(x).relu()
        return self.head(x)


def test_labels_of_long_names_stay_apart_and_inside_of_the_picture() -> None:
    found = otp.doctor(Named(), torch.randn(2, 6))
    paths = [path for path in dict(Named().named_modules()) if "feed" in path]
    short = short_names(paths)
    assert len(set(short)) == len(paths) == 4 and max(map(len, short)) <= 46
    image = plt.imread(io.BytesIO(draw_groups(found)))
    border = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
    assert all((edge[..., :3] == 1).all() for edge in border)  # nothing is cut off there


def test_a_reason_too_long_for_the_picture_leaves_room_for_the_map() -> None:
    found = otp.doctor(Named(), torch.randn(2, 6))
    long = found.ailments[0].model_copy(update={"reason": "x" * 400, "obstacles": ()})
    image = plt.imread(io.BytesIO(draw_groups(found.model_copy(update={"ailments": (long,)}))))
    blue = (abs(image[..., :3] - (0x2F / 255, 0x6D / 255, 0xB5 / 255)) < 0.01).all(-1)
    assert blue.any(0).sum() > 200  # columns with something of the groups, or of the bar
