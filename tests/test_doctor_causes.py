"""The cause that is named is the true one, and what can be cut after all is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.structure.lines import blamed
from torch_otprune.structure.remedies import advice, obstacles, remedy
from torch_otprune.surgery import gap
from torch_otprune.surgery.oracle import masked


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(12, 6), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t(), self.bias)


class Packed(nn.Module):
    """Texts of several lengths, end to end."""

    def __init__(self, kind: type[nn.RNNBase], *, sort: bool) -> None:
        super().__init__()
        self.front, self.rnn = nn.Linear(4, 8), kind(8, 6, batch_first=True)
        self.head, self.sort = nn.Linear(6, 3), sort

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.front(x).relu(), lengths.cpu(), batch_first=True, enforce_sorted=self.sort
        )
        out, _ = self.rnn(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0])


class Einsum(nn.Module):
    """Heads as an axis of bare parameters."""

    def __init__(self, width: int = 12, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, w) for w in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.head(x + torch.einsum("bhtk,hkd->btd", mixed, self.o))


class Listed(nn.Module):
    """A layer of its own for every head."""

    def __init__(self, width: int = 12, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.q, self.k, self.v = (
            nn.ModuleList(nn.Linear(width, size) for _ in range(heads)) for _ in range(3)
        )
        self.o = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        x, heads = self.embed(x), []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            heads.append((q(x) @ k(x).transpose(-1, -2) / 2).softmax(-1) @ v(x))
        return self.head(x + self.o(torch.cat(heads, -1)))


class Inline(nn.Module):
    """A norm of the stream that forward writes out."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.scale, self.norm = nn.Linear(5, 12), nn.Parameter(torch.rand(12)), norm
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.down(self.up(x).relu()), self.scale))


class Mixture(nn.Module):
    """Experts that are called with no rows where no token asks for them."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.front, self.router, self.head = nn.Linear(4, 8), nn.Linear(8, experts), nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        weight, chosen = self.router(x).softmax(-1).topk(1, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return self.head(x + out)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the same weights every time, in float64."""
    torch.manual_seed(0)
    return make().double().eval()


def batch(*shape: int) -> Tensor:
    """Draw an example."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stuck(found: otp.Diagnosis, parameter: str) -> tuple[str, str, str]:
    """Read fate, reason and fix of a parameter."""
    finding = next(f for f in found.findings if f.parameter == parameter)
    return finding.fate, finding.reason, finding.fix


def units(found: otp.Diagnosis) -> dict[str, tuple[str, int]]:
    """Read kind and units of every group."""
    return {group.group: (group.kind, group.units) for group in found.groups}


def off(make: Callable[[], nn.Module], example: Any, rule: Any) -> float:
    """Prune, and measure how far the cut model is from the masked one."""
    args = example if isinstance(example, tuple) else (example,)
    dense, small = built(make), built(make)
    report = otp.prune_(small, otp.Policy(rules=[rule]), [example], timing=0)
    assert report.plan.cuts
    with torch.no_grad(), masked(dense, report.plan.cuts, small):
        return gap([dense(*args)], [small(*args)])


def test_a_decoder_that_is_the_encoder_transposed_is_named_as_the_tie() -> None:
    fate, reason, fix = stuck(otp.doctor(built(Tied), batch(3, 12)), "encoder.bias")
    assert fate == "blocked"
    assert reason == "'encoder.weight' writes them and, transposed, is tied to read them"
    assert fix == "untie the weights: give the layer that reads them one of its own."


@pytest.mark.parametrize(("kind", "sort"), [(nn.LSTM, True), (nn.GRU, False), (nn.RNN, False)])
def test_a_layer_in_front_of_packed_texts_is_cut_exactly(
    kind: type[nn.RNNBase], sort: bool
) -> None:
    lengths = torch.tensor([5, 3, 2] if sort else [3, 5, 2])
    example = batch(3, 5, 4), lengths
    found = otp.doctor(built(lambda: Packed(kind, sort=sort)), example)
    assert units(found)["front"] == ("channels", 8)
    rule = otp.Channels(keep=0.5, criterion="magnitude", repair="none")
    assert off(lambda: Packed(kind, sort=sort), example, rule) < 1e-9


def test_heads_that_are_an_axis_of_bare_parameters_are_cut_exactly() -> None:
    assert ("heads", 3) in units(otp.doctor(built(Einsum), batch(2, 5, 5))).values()
    rule = otp.Heads(keep=1, criterion="magnitude", repair="none")
    assert off(Einsum, batch(2, 5, 5), rule) < 1e-9


def test_queries_and_keys_of_a_head_of_its_own_say_that_they_only_meet_one_another() -> None:
    found = otp.doctor(built(Listed), batch(2, 5, 5))
    assert units(found)["v.0"] == ("channels", 4)
    fate, reason, fix = stuck(found, "q.1.bias")
    assert fate == "blocked" and reason == "they only meet in a product of two activations"
    assert fix.startswith("leave them; if these are queries and keys of one head, let one linear")


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, w: F.layer_norm(x, (x.shape[-1],), w),
    "rms_norm": lambda x, w: F.rms_norm(x, (x.shape[-1],), w),
    "mean": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w,
}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_norm_that_forward_writes_out_is_named_with_its_line_and_what_to_use(name: str) -> None:
    found = otp.doctor(built(lambda: Inline(NORMS[name])), batch(2, 7, 5))
    fate, reason, fix = stuck(found, "embed.weight")
    line = NORMS[name].__code__.co_firstlineno
    assert fate == "blocked" and f"(at test_doctor_causes.py:{line})" in reason
    assert fix == (
        f"test_doctor_causes.py:{line} norms channels by hand: use nn.LayerNorm or nn.RMSNorm "
        "there, or move the norm to a module of its own."
    )


def test_experts_that_no_token_asks_for_are_analysed_as_those_that_are() -> None:
    found = units(otp.doctor(built(Mixture), batch(1, 4)))
    assert found["front"] == ("channels", 8) and found["experts"] == ("experts", 6)
    assert all(found[f"experts.{n}.0"] == ("channels", 10) for n in range(6))


def test_an_op_that_no_row_reaches_asks_for_a_larger_example() -> None:
    (found,) = obstacles("no row of the example reaches this op (op odd at net.py:3)")
    assert found.fix == "pass a larger example, so that every expert and branch gets a row."


def test_a_report_is_not_asked_for_where_the_cause_is_known() -> None:
    missed = "cut and masked outputs differ by 1.0e-01 of the largest output"
    assert "report the model" in remedy([missed])
    assert remedy([missed, "they are sorted (op sort at net.py:3)"]) == (
        "put a linear layer between these channels and the op, or leave them."
    )
    assert advice(["a.", "b.", "a."]) == "a. b."


HELPER = ("/env/lib/python3.11/site-packages/odd/layers.py", "rearrange", 7)
THEIRS = ("/env/lib/python3.11/site-packages/zoo/net.py", "forward", 9)
USER = ("/home/me/net.py", "forward", 12)


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        ([USER], "net.py:12"),
        ([HELPER, USER], "net.py:12"),
        ([HELPER, THEIRS, USER], "layers.py:7"),
        ([THEIRS, USER], "net.py:9"),
        ([HELPER], "layers.py:7"),
        ([], ""),
    ],
)
def test_the_user_is_sent_to_a_line_of_their_own_unless_a_package_wrote_the_forward(
    frames: list[tuple[str, str, int]], line: str
) -> None:
    assert blamed(frames) == line


class Talkative(nn.Module):
    """Returns its stream beside its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stream = self.enter(x)
        return {"logits": self.leave(stream), "stream": stream}


def test_a_stream_that_is_returned_by_name_is_told_by_it() -> None:
    found = {f.parameter: f for f in otp.doctor(Talkative(), torch.randn(2, 4)).findings}
    assert found["enter.weight"].reason == "they are its 'stream'; they reach the model's output"
    assert found["enter.weight"].fix.startswith("where that is not needed, wrap the model")
    assert found["leave.bias"].fix == "nothing: these channels are the model's answer."
