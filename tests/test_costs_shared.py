"""Costs that samples share, that nobody can count, and budgets that cannot be met."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.criteria.base import settle
from torch_otprune.errors import BudgetError
from torch_otprune.plan.allocate import Choice, allocate
from torch_otprune.report import count_macs
from torch_otprune.structure import trace
from torch_otprune.structure.cost import CostModel, Dim, Term
from torch_otprune.structure.tally import tallied


class Positions(nn.Module):
    """A table of three positions passes a layer once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5))
        self.of_table, self.of_data = nn.Linear(5, 7), nn.Linear(4, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.of_data(x) + self.of_table(self.table)).relu())


def test_samples_share_what_is_multiplied_once_exactly() -> None:
    model, batch = Positions(), torch.randn(2, 3, 4)
    graph = trace(model, batch)
    (group,) = graph.groups
    cost = graph.costs["macs"]
    assert any(isinstance(term.scale, Fraction) for term in cost.terms)
    for kept in (7, 4):  # 15 numbers per unit for two samples: rounded once, not term by term
        assert cost.at({group.name: kept}) == kept * (12 + 6) + kept * 15 // 2
    assert cost.at(graph.full()) == count_macs(model, batch)


def test_a_report_agrees_where_samples_share_a_product() -> None:
    model, batch = Positions(), torch.randn(32, 3, 4)
    report = otp.prune_(model, otp.Policy(rules=otp.Channels(keep=4)), [batch], timing=0)
    assert report.macs == report.plan.macs
    assert report.macs.after == 4 * 18 + 4 * 15 // 2


def choices(*names: str) -> list[Choice]:
    return [Choice(name, torch.linspace(1, 0, 9), tuple(range(1, 9))) for name in names]


def test_a_budget_over_fractions_is_held_exactly() -> None:
    half = Term("a", Fraction(15, 2), (Dim(0, (("a", 1),)),))
    cost = CostModel("macs", (half, Term("b", Fraction(1, 3), (Dim(1, (("b", 2),)),))))
    assert cost.at({"a": 8, "b": 8}) == 65
    for limit in range(8, 66):
        kept = allocate(choices("a", "b"), costs={"macs": cost}, limits={"macs": limit}).keep
        assert cost.at(kept) <= limit
        for name in kept:
            wider = kept | {name: kept[name] + 1}
            assert kept[name] == 8 or cost.at(wider) > limit


def test_a_group_held_at_a_width_leaves_a_cost_of_the_others() -> None:
    term = Term("x", 2, (Dim(1, (("a", 3), ("b", 1))), Dim(0, (("a", 1),))))
    cost = CostModel("macs", (term,))
    for b in range(5):
        assert cost.held({"a": 4}).at({"b": b}) == cost.at({"a": 4, "b": b})


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.fft.fft(self.a(x), dim=1).real)


def test_what_multiplies_inside_of_an_op_is_named_by_plan_and_doctor() -> None:
    model, batch = Spectrum(), torch.randn(32, 5, 4)
    said = "MACs leave out the products inside of '_fft_r2c'"
    with otp.attach(model, otp.Policy(rules=otp.Channels(keep=0.5))) as attached:
        notes = otp.observe(attached, [batch]).plan().notes
    assert said in notes
    assert said in otp.doctor(model, batch).notes


def test_a_net_whose_products_all_count_says_nothing() -> None:
    model, batch = Positions(), torch.randn(32, 3, 4)
    assert not [note for note in otp.doctor(model, batch).notes if note.startswith("MACs")]


class Attentive(nn.Module):
    """Attention behind which an MLP is the only thing that a rule about channels reaches."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_an_unreachable_budget_says_how_much_no_rule_reaches_and_why() -> None:
    rules = otp.Policy(rules=otp.Channels(min_keep=1), budget=otp.Budget(macs=0.3))
    tokens = 16
    mlp, attention = 2 * tokens * 8 * 16, 2 * tokens**2 * 8
    whole = mlp + attention + 4 * tokens * 8 * 8
    with pytest.raises(BudgetError) as caught:
        otp.prune_(Attentive(), rules, [torch.randn(8, tokens, 8)], timing=0)
    said = str(caught.value)
    still, data = (whole - mlp) / whole, attention / whole
    assert f"no rule reaches {still:.1%} of all macs ({data:.1%} where data meets data" in said
    assert f"{(whole - mlp + mlp // 16) / whole:.1%}"[:4] in said  # what can be reached


@pytest.mark.parametrize("scale", [1e-290, 1e-45, 1e-3, 1.0, 1e39, 1e200, 1e300])
def test_costs_of_any_size_are_rounded_to_nine_digits(scale: float) -> None:
    values = torch.tensor([1.0, 0.123456789123, 0.0], dtype=torch.float64)
    settled = settle(values * scale)
    assert settled.isfinite().all()
    torch.testing.assert_close(settled / scale, values, rtol=1e-8, atol=1e-9)


def test_a_product_with_a_sparse_matrix_is_left_out_and_said() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            links = torch.eye(len(x)).to_sparse()
            return self.out(torch.sparse.mm(links, links @ self.up(x)))

    found = tallied(Neighbours(), torch.randn(5, 4))
    assert found.total == 4 * 6 + 6 * 2
    assert sorted(found.left_out) == ["_sparse_addmm", "aten.mm of a sparse matrix"]
