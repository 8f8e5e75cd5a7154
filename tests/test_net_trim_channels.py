"""Net-Trim for channels: what a refit leaves, exactly; the convex program, by its gap and KKT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_otprune.criteria.net_trim import NetTrim, _Program, _Reader, refit_errors
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.evidence import Consumer, Evidence


def consumer(seed: int = 0, *, units: int = 6, taps: int = 2, out: int = 4) -> Consumer:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(60, units * taps, generator=generator, dtype=torch.float64)
    second = (mix.T @ mix / 60).reshape(units, taps, units, taps)
    weight = torch.randn(out, units, taps, generator=generator, dtype=torch.float64)
    return Consumer("reader", weight, second, absorbs=False, feel=torch.ones(out).double())


def evidence(*consumers: Consumer) -> Evidence:
    units = consumers[0].weight.shape[1]
    return Evidence("group", units, torch.ones(units, 1).double(), None, consumers, None, 0)


def test_prices_of_all_sizes_are_what_least_squares_leaves() -> None:
    c = consumer()
    assert c.second is not None
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = refit_errors(c.weight, c.second, order, 1e-12)
    flat, whole = c.weight.flatten(1), c.second.reshape(12, 12)
    for size in range(7):
        keep = (order[:size, None] * 2 + torch.arange(2)).flatten()
        new = torch.zeros_like(flat)
        if size:
            new[:, keep] = torch.linalg.solve(whole[keep][:, keep], (flat @ whole)[:, keep].T).T
        gap = flat - new
        torch.testing.assert_close(found[size], ((gap @ whole) * gap).sum(), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("readers", [1, 2])
def test_the_program_meets_its_conditions_of_kkt(readers: int) -> None:
    program = _Program([_Reader(consumer(seed), 1e-3) for seed in range(readers)])
    zeros = [torch.zeros_like(r.aim) for r in program.readers]
    pulls = program._norms([r.aim @ r.second for r in program.readers]).sqrt()
    penalty = 0.75 * float(pulls.max())
    whole = sum(float((r.aim @ r.second * r.aim).sum()) for r in program.readers) / 2
    weights = zeros
    for _ in range(40):
        weights, gap = program._solve(weights, penalty, 500, whole=whole * 1e-8)
    slopes = [(r.aim - w) @ r.second for r, w in zip(program.readers, weights, strict=True)]
    norm, pull = program._norms(weights).sqrt(), program._norms(slopes).sqrt()
    inside = norm > 0
    assert bool(inside.any()) and not bool(inside.all())
    torch.testing.assert_close(
        pull[inside], torch.full_like(pull[inside], penalty), atol=1e-4, rtol=1e-4
    )
    assert float(pull[~inside].max()) <= penalty * (1 + 1e-6)
    assert gap * whole * 1e-8 < 1e-3 * whole


def test_the_gap_bounds_what_is_left_to_gain() -> None:
    program = _Program([_Reader(consumer(), 1e-3)])
    (reader,) = program.readers
    penalty = 0.3 * float(program._norms([reader.aim @ reader.second]).sqrt().max())

    def cost(weights: list[Tensor]) -> float:
        rest = reader.aim - weights[0]
        fit = float(((rest @ reader.second) * rest).sum()) / 2
        return fit + penalty * float(program._norms(weights).sqrt().sum())

    rough, _ = program._solve([torch.zeros_like(reader.aim)], penalty, 3, whole=1.0)
    exact, _ = program._solve(rough, penalty, 5000, whole=1e-9)
    assert 0 <= cost(rough) - cost(exact) <= program._gap(rough, penalty) + 1e-9
    assert program._gap(exact, penalty) < 1e-3 * cost(exact)


def test_a_unit_that_nobody_reads_goes_first_and_one_that_carries_all_stays() -> None:
    c = consumer(taps=1)
    c.weight[:, 2] = 0
    c.weight[:, 4] *= 100
    order = NetTrim().rank(evidence(c)).order
    assert int(order[0]) == 4 and int(order[-1]) == 2


def test_the_certificate_names_every_reader_and_what_it_is_off_by() -> None:
    c = consumer()
    assert c.second is not None
    keep = torch.tensor([1, 2, 5])
    said = NetTrim().certify(evidence(c), keep)
    order = torch.tensor([1, 2, 5, 0, 3, 4])
    left = float(refit_errors(c.weight, c.second, order, 1e-3)[3]) ** 0.5
    assert said == f"refitted, this cut alone moves W2 at most: 'reader' by {left:.3g}"


def test_a_program_that_is_cut_short_says_so() -> None:
    said = NetTrim(rounds=1, penalties=2).rank(evidence(consumer(units=12))).note
    assert "the convex program stopped" in said and "from its optimum" in said


def test_without_data_it_says_what_to_do() -> None:
    c = consumer()
    blind = Consumer("reader", c.weight, None, absorbs=False, feel=c.feel)
    with pytest.raises(CalibrationError, match="no activations were gathered") as error:
        NetTrim().rank(evidence(blind))
    assert "net_trim" in error.value.where
