"""What is in the way, said with op and line, and the smallest change that frees it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import StructureError
from torch_otprune.structure import coupling
from torch_otprune.structure.remedies import Obstacle, counted, obstacles, remedy

Between = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """An op between two layers."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def constant(x: Tensor) -> Tensor:
    """Add numbers that differ from channel to channel and belong to no layer."""
    return x + torch.arange(6.0)


def padded(x: Tensor) -> Tensor:
    """Add what is filled up with zeros."""
    return x + nn.functional.pad(x[..., :3], (0, 3))


def looked_up(x: Tensor) -> Tensor:
    """Take channels by numbers that come with the data."""
    return x.gather(-1, x.argsort(-1))


OPS: dict[str, tuple[Between, str, str]] = {
    "add": (constant, "they meet a tensor that does not follow", "make the other operand"),
    "add of zeros": (padded, "they meet numbers that stay", "replace what is filled up"),
    "softmax": (lambda x: x.softmax(-1), "they compete in a softmax", "put a linear layer between"),
    "sort": (lambda x: x.sort(-1).values, "they are sorted", "put a linear layer between"),
    "cumsum": (lambda x: x.cumsum(-1), "they are added up", "put a linear layer between"),
    "fft_r2c": (
        lambda x: torch.fft.fft(x, dim=-1).real,
        "they are mixed by a Fourier transform",
        "put a linear layer between",
    ),
}


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_blocked_parameter_names_the_op_the_line_and_the_fix(name: str) -> None:
    between, said, fix = OPS[name]
    found = {f.parameter: f for f in otp.doctor(Net(between), torch.randn(5, 4)).findings}
    finding = found["up.bias"]
    assert finding.fate == "blocked"
    obstacle = next(o for o in finding.obstacles if o.said == said)
    assert obstacle.op == name.split(maxsplit=1)[0] and obstacle.fix.startswith(fix)
    assert obstacle.fix in finding.fix and str(obstacle) in finding.reason
    lines, first = inspect.getsourcelines(between)
    file, _, line = obstacle.line.partition(":")
    assert file == Path(__file__).name and first <= int(line) < first + len(lines)


def test_an_op_that_is_not_known_may_mix_and_says_so() -> None:
    between: Between = lambda x: torch.linalg.qr(x.unsqueeze(-1)).Q.squeeze(-1)
    found = {f.parameter: f for f in otp.doctor(Net(between), torch.randn(7, 4)).findings}
    (obstacle,) = found["up.bias"].obstacles
    assert (obstacle.said, obstacle.op) == ("this op may mix channels", "linalg_qr")
    assert obstacle.fix.startswith("write the op out in plain torch functions")


class Tied(nn.Module):
    """One tensor writes a hidden layer, and lies across in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 3)
        self.last = nn.Linear(4, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.mid(self.first(x).relu())), self.last(x)


def test_a_tied_tensor_of_which_one_use_is_the_answer_cannot_go() -> None:
    found = {f.parameter: f for f in otp.doctor(Tied(), torch.randn(2, 4)).findings}
    assert found["first.weight"].fate == "fixed"
    assert "they reach the model's output" in found["first.weight"].reason


SAID = re.compile(
    r'"(?:output|fixed|shape|mix|unknown)",\s*(?:f?"|\n\s*f?")([^"]+)"|_STIFF = "([^"]+)"'
)


def test_every_objection_of_the_analysis_has_a_remedy_of_its_own() -> None:
    files = Path(inspect.getfile(coupling)).parent.glob("*.py")
    found = [a or b for file in files for a, b in SAID.findall(file.read_text(encoding="utf-8"))]
    assert len(found) > 12
    other = remedy(["something new"])
    assert not [said for said in found if said and remedy([said]) == other]


@pytest.mark.parametrize(
    ("reasons", "fix"),
    [
        (["'a' and 'b' are one tensor"], "untie the weights."),
        (
            ["'a' (Linear) did not run on the example"],
            "pass an example that reaches it, or remove it from the model.",
        ),
        (["all channels are tied into one unit"], "nothing: removing it removes the layer."),
        (
            ["they are sorted (op sort at a.py:1)", "they reach the model's output"],
            "nothing, if the output's width is the task's; otherwise add a head.",
        ),
        (
            ["they are sorted (op sort at a.py:1)", "they are added up (op cumsum at a.py:2)"],
            "put a linear layer between these channels and the op, or leave them.",
        ),
    ],
)
def test_one_thing_that_cannot_be_changed_makes_all_other_changes_pointless(
    reasons: list[str], fix: str
) -> None:
    assert remedy(reasons) == fix


def test_clauses_become_obstacles_in_words_that_people_write() -> None:
    reason = "they are one (op native_layer_norm at a.py:3); they reach the model's output"
    first, second = obstacles(reason)
    assert (first.op, first.line, str(first)) == (
        "layer_norm",
        "a.py:3",
        "they are one (layer_norm, a.py:3)",
    )
    assert (second.op, second.line, str(second)) == ("", "", "they reach the model's output")
    assert isinstance(first, Obstacle) and first.fix


def test_what_ends_in_the_answer_is_fixed_whatever_else_is_in_the_way() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.up(x)
            return self.down(y.sort(-1).values), y

    found = {f.parameter: f for f in otp.doctor(Both(constant), torch.randn(2, 4)).findings}
    assert found["up.bias"].fate == "fixed"
    assert {o.said for o in found["up.bias"].obstacles} == {
        "they are sorted",
        "they reach the model's output",
    }


class Counts(nn.Module):
    """Counts the channels of one layer by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(4, 7), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.up(x).view(-1, 7).relu()).relu())


def test_a_group_that_cannot_be_cut_for_a_number_in_forward_is_blocked_at_that_line() -> None:
    model = Counts()
    found = otp.doctor(model, torch.randn(5, 4))
    assert [group.group for group in found.groups] == ["mid"]
    said = next(f for f in found.findings if f.parameter == "up.bias")
    lines, first = inspect.getsourcelines(Counts.forward)
    assert said.fate == "blocked"
    assert said.reason.startswith("once they are cut the model does not run: shape '[-1, 7]' is")
    assert f"{Path(__file__).name}:{first + len(lines) - 1}" in said.reason
    assert said.fix.endswith("write -1 or x.shape[..] instead of the number 7.")
    assert [p.shape for p in model.parameters()] == [p.shape for p in Counts().parameters()]


def test_groups_alike_share_the_verdict_of_the_first() -> None:
    class Row(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + self[1](self[0](x).view(-1, 5).relu())

    model = nn.Sequential(
        *(Row(nn.Linear(4, 5), nn.Linear(5, 4)) for _ in range(6)), nn.Linear(4, 2)
    )
    found = otp.doctor(model, torch.randn(3, 4))
    assert found.groups == ()
    assert {a.name for a in found.ailments if "does not run" in a.reason} == {
        f"{i}.0" for i in range(6)
    }


class Noisy(Counts):
    """Answers differently every time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.up(x).relu()).relu()) + torch.randn(3)


def test_a_random_output_proves_nothing_against_the_groups() -> None:
    found = otp.doctor(Noisy(), torch.randn(5, 4))
    assert [group.group for group in found.groups] == ["up", "mid"]


class Numbered(nn.Module):
    """Attention that counts its heads by a number, or its width when it puts them together."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.head, self.line = nn.Linear(12, 2), line

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        heads = 3 if self.line == "heads" else -1
        q, k, v = (f(x).view(b, t, heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y.reshape(b, t, 12) if self.line == "width" else y.flatten(2)
        return self.head(self.o(y))


@pytest.mark.parametrize(("line", "number"), [("heads", 3), ("width", 12)])
def test_a_number_in_a_view_is_named_with_its_line_and_what_to_write(
    line: str, number: int
) -> None:
    model, x = Numbered(line).eval(), torch.randn(2, 5, 12)
    (ailment,) = (a for a in otp.doctor(model, x).ailments if a.name == "q")
    assert "the model does not run" in ailment.reason
    fix = rf"write -1 or x\.shape\[\.\.\] instead of the number {number}\."
    assert re.fullmatch(rf"at test_doctor_reasons\.py:\d+, {fix}", ailment.fix)
    with pytest.raises(StructureError) as error:
        otp.prune_(model, otp.Policy(rules=otp.Heads(keep=0.5)), [torch.randn(16, 5, 12)])
    assert error.value.fix == ailment.fix


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_width_in_another_op_than_a_view_is_to_be_read_off_a_tensor(kind: Any) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = h = x.new_zeros(len(x), 8)
            for step in x.unbind(1):
                if kind is nn.LSTMCell:
                    h, state = self.cell(step, (h, state))
                else:
                    h = self.cell(step, h)
            return self.head(h)

    found = otp.doctor(Cell(), torch.randn(2, 4, 3))
    (ailment,) = (a for a in found.ailments if "cell" in a.name)
    assert ailment.fix.endswith(
        "or in front of it, read the width off a tensor, as x.shape[..], instead of writing the "
        "number 8."
    )


def test_a_kernel_that_wants_whole_vectors_is_met_by_a_multiple() -> None:
    said = "without it the model does not run: strides should be multiple of 16 bytes (at moe.py:3)"
    assert (
        counted(said, (32,)) == "give the rule a multiple_of: 4 in float32, 8 in a type of 16 bits."
    )


def test_the_path_of_a_module_is_no_width_that_was_written() -> None:
    said = "without it the model does not run: shapes do not match, in 'blocks.32.mix'"
    assert counted(said, (32,)).endswith("instead of writing a number.")
    assert counted(said.replace("do not", "of 32 do not"), (32,)).endswith("the number 32.")
