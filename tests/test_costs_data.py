"""MACs that depend on the data: the plan says what it counted, and what other samples cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_no_rows import Kinds, Mixture, points
from torch_otprune.plan import Plan

SAID = "MACs depend on the data here: "


def planned(model: nn.Module, batch: object) -> Plan:
    policy = otp.Policy(rules=[otp.Channels(repair="none")], budget=otp.Budget(macs=0.7))
    with otp.attach(model.double().eval(), policy) as attached:
        return otp.observe(attached, [batch]).plan()


def said(plan: Plan) -> list[str]:
    return [note.removeprefix(SAID) for note in plan.notes if note.startswith(SAID)]


class Packed(nn.Module):
    """A recurrent layer over texts of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.f = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.f(self.r(packed)[1][-1])


def texts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(len(lengths), 7, 6, dtype=torch.float64), torch.tensor(lengths)


def test_lengths_that_differ_are_told_with_both_counts() -> None:
    plan = planned(Packed(), texts([7, 7] + [1] * 30))
    step = 3 * 8 * (6 + 8)
    first, mean = 7 * step + 24, (2 * 7 + 30) * step // 32 + 24
    assert plan.macs.before == first
    assert said(plan) == [
        f"{first:,} per sample on the first samples, which the plan counts; {mean:,} per sample on "
        "32 that calibration kept; a MAC budget holds for the former"
    ]


def test_lengths_that_agree_are_no_news() -> None:
    assert said(planned(Packed(), texts([7] * 32))) == []


def test_tokens_that_go_elsewhere_are_told_though_they_cost_as_much() -> None:
    torch.manual_seed(0)
    (note,) = said(planned(Mixture(), points(256)))
    assert note.startswith("1,040 per sample on the first samples, which the plan counts; ")
    assert "% of them in other layers on 64 that calibration kept" in note


def test_kinds_in_the_same_shares_are_no_news() -> None:
    assert said(planned(Kinds(), (points(), torch.tensor([0, 1] * 32)))) == []


def test_a_model_whose_shapes_are_the_same_for_all_data_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr("torch_otprune.structure.costs.tallied", never)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    assert said(planned(model, points())) == []
    with pytest.raises(AssertionError, match="counted again"):
        planned(Kinds(), (points(), torch.tensor([0, 1] * 32)))


def test_the_report_repeats_it() -> None:
    torch.manual_seed(0)
    policy = otp.Policy(rules=[otp.Channels()], budget=otp.Budget(macs=0.7))
    report = otp.prune_(Packed().double(), policy, [texts([7, 7] + [1] * 30)], timing=0)
    printed = str(report)
    assert SAID in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100
