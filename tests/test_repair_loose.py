"""Least squares refits consumers that are no modules, and says which it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_statistics_loose import WAYS, Own, Table, attention, drawn, recurrent
from tests.zoo.net import Net


def pruned(model: nn.Module, rule: Any, batches: list[Tensor]) -> otp.Report:
    policy = otp.Policy(rules=[rule], calibration=otp.Calibration(samples=256))
    return otp.prune_(model, policy, batches, timing=0)


class Line(Own):
    """The same without a bend: what goes can be made up for exactly."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.up(x), self.down)


@pytest.mark.parametrize("way", ["matmul", "linear", "einsum", "column by column"])
def test_a_parameter_takes_over_what_redundant_units_wrote(way: str) -> None:
    torch.manual_seed(0)
    model = Line(WAYS[way]).double().eval()
    mix = drawn(2, 5, seed=7)
    with torch.no_grad():
        model.up.weight[5:] = mix @ model.up.weight[:5]
        model.up.bias[5:] = mix @ model.up.bias[:5]
    x = drawn(64, 3, 5)
    report = pruned(model, otp.Channels(keep=5), [x])
    (note,) = [note for note in report.repairs if note.site == "down"]
    assert note.accepted
    assert note.after < 1e-3 * note.before
    assert report.output_error.after_repair < 0.05 * report.output_error.before_repair


def test_experts_in_a_table_are_refitted_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Table("routed").double().eval(), drawn(64, 6, 5)
    report = pruned(model, otp.Channels(keep=4), [x])
    (note,) = [note for note in report.repairs if note.site == "down"]
    assert note.accepted
    assert report.output_error.after_repair < report.output_error.before_repair


def test_the_projection_behind_heads_is_refitted() -> None:
    model, x = attention(same=True), drawn(64, 5, 3)
    report = pruned(model, otp.Heads(keep=1), [x])
    (note,) = [note for note in report.repairs if note.site == "a.out_proj.weight"]
    assert note.accepted
    assert note.after < note.before
    assert report.output_error.after_repair < report.output_error.before_repair


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_hidden_units_are_refitted_or_left_and_every_consumer_is_named(
    kind: type[nn.RNNBase],
) -> None:
    model, x = recurrent(kind, batch_first=True, num_layers=2), drawn(64, 6, 3)
    report = pruned(model, otp.Channels(keep=3), [x])
    named = {note.site for note in report.repairs}
    assert named >= {"r.weight_hh_l0", "r.weight_ih_l1", "r.weight_hh_l1", "head"}
    assert report.output_error.after_repair <= report.output_error.before_repair


def test_what_nobody_is_seen_to_multiply_with_is_named() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(m.a(x).tanh(), m.b(x).tanh()),
        a=nn.Linear(5, 4), b=nn.Linear(5, 6), c=nn.Bilinear(4, 6, 3),
    ).double()  # fmt: skip
    report = pruned(net, otp.Channels(keep=3), [drawn(64, 5)])
    notes = [note for note in report.repairs if note.site == "c.weight"]
    assert notes
    assert all("nobody was seen" in note.note and not note.accepted for note in notes)
