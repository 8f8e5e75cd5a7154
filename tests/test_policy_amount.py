"""What is kept: how it may be written, and what it evaluates to."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_otprune.errors import PolicyError
from torch_otprune.policy import (
    Amount,
    Budget,
    Calibration,
    Channels,
    Experts,
    Heads,
    Policy,
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (0.5, 0.5), ("50%", 0.5), (" 33.3 % ", 0.333), ("0.5", 0.5), (".5", 0.5), ("1e-3", 1e-3),
        (1, 1.0), (1.0, 1.0), ("1", 1.0), ("1.0", 1.0), ("100%", 1.0), (2, 2), ("300k", 300_000),
        ("300K", 300_000), ("1.2M", 1_200_000), ("2G", 2 * 10**9), ("7B", 7 * 10**9),
        ("1T", 10**12), ("64", 64), ("1e6", 10**6), (np.int64(12), 12), (np.float64(0.25), 0.25),
    ],
)  # fmt: skip
def test_an_amount_reads_what_people_write(written: object, value: float) -> None:
    amount = Amount.read(written)
    assert (amount.value, type(amount.value)) == (value, type(value))


@pytest.mark.parametrize("written", [0, -0.0001, -0.5, -3, "0%", "0", "0k", "0.0%", 1e-400])
def test_keeping_nothing_is_refused(written: object) -> None:
    with pytest.raises(PolicyError) as caught:
        Amount.read(written, where="Budget.macs")
    assert str(caught.value) == (
        f"{written!r} keeps nothing.\n  where: Budget.macs\n  fix:   keep more than 0 %."
    )


@pytest.mark.parametrize("written", [1.5, "150%", "100.1%", "1.5e0%%", 1e6, float("inf")])
def test_keeping_more_than_everything_is_refused(written: object) -> None:
    with pytest.raises(PolicyError, match=r"more than 100 %|is no amount"):
        Amount.read(written)


@pytest.mark.parametrize(
    "written", [None, True, False, [], {}, "half", "", "%", "5 m", "1_000", "-5%", "1e999M", "١"]
)
def test_what_is_no_amount_is_refused_with_the_spellings(written: object) -> None:
    if written == "١":  # a digit to Python, and to Decimal
        assert Amount.read(written).value == 1.0
        return
    with pytest.raises(PolicyError) as caught:
        Amount.read(written)
    assert caught.value.problem == f"{written!r} is no amount."
    assert "'50%'" in caught.value.fix


def test_not_a_number_is_refused() -> None:
    with pytest.raises(PolicyError, match="nan is no amount"):
        Amount.read(float("nan"))


def test_a_count_that_is_not_whole_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"'1\.2345k' is no whole number"):
        Amount.read("1.2345k")


def test_a_suffixed_count_of_one_is_not_mistaken_for_everything() -> None:
    with pytest.raises(PolicyError, match="count of one"):
        Amount.read("0.001k")


def test_a_percentage_is_exact_where_binary_fractions_are_not() -> None:
    assert [Amount.read(f"{p}%").of(100) for p in range(1, 101)] == list(range(1, 101))


@given(st.integers(1, 10_000), st.integers(0, 10**12))
def test_a_percentage_keeps_the_exact_share_rounded_down(basis_points: int, dense: int) -> None:
    whole, part = divmod(basis_points, 100)
    expected = int(Fraction(basis_points, 10_000) * dense)
    assert Amount.read(f"{whole}.{part:02}%").of(dense) == expected


@given(st.integers(2, 10**15), st.integers(0, 10**15))
def test_a_count_keeps_itself_but_never_more_than_there_is(count: int, dense: int) -> None:
    assert Amount.read(count).of(dense) == min(count, dense)


@given(st.one_of(st.floats(0, 1, exclude_min=True), st.integers(2)))
def test_an_amount_reads_back_its_own_value(value: float) -> None:
    assert Amount.read(Amount.read(value).value) == Amount.read(value)


@given(st.integers(2, 10**6))
def test_a_suffix_multiplies(count: int) -> None:
    assert Amount.read(f"{count}k") == Amount.read(1000 * count)


def test_an_amount_prints_as_people_write_it() -> None:
    assert [str(Amount.read(x)) for x in ("33.3%", 1, "1.2M")] == ["33.3%", "100%", "1,200,000"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.29), 0.29),
        (np.float16(0.3), 0.3),
        (np.int64(5), 5),
        (np.int32(1), 1.0),
        (np.uint8(7), 7),
        (Fraction(1, 4), 0.25),
    ],
)
def test_a_number_of_another_library_is_the_number_it_shows(written: Any, value: float) -> None:
    amount = Amount.read(written)
    assert amount.value == value and type(amount.value) is type(value)


def test_counts_of_another_library_are_counts() -> None:
    rule = Channels(keep=np.float32(0.5), min_keep=np.int64(3), multiple_of=np.int32(2))
    assert (rule.min_keep, rule.multiple_of, rule.keep.value) == (3, 2, 0.5)
    assert Heads(keep=np.int64(1)).keep.value == Experts(keep=np.uint8(1)).keep.value == 1
    assert Calibration(samples=np.int64(8)).samples == 8
    assert Budget(macs=np.float64(0.5), layers=np.int64(3)) == Budget(macs=0.5, layers=3)
    policy = Policy(rules=rule, seed=np.int64(4))
    assert policy.seed == 4 and Policy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize("written", [np.bool_(True), np.array([2]), True])
def test_a_truth_value_is_no_number(written: Any) -> None:
    with pytest.raises(PolicyError, match="is no amount"):
        Amount.read(written)
    with pytest.raises(PolicyError, match="it should be a whole number"):
        Channels(min_keep=written)
