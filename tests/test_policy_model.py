"""Policies: what they accept, what they refuse and how they say so, and that they round-trip."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from torch_otprune.errors import BudgetError, OTPruneError, PolicyError
from torch_otprune.policy import (
    CRITERIA,
    REPAIRS,
    RULES,
    Amount,
    Budget,
    Channels,
    Policy,
    Rule,
    Setting,
)  # fmt: skip


class Guess(Setting):
    kind: Literal["test_guess"] = "test_guess"
    p: float = Field(default=2.0, ge=1)


class Mend(Setting):
    kind: Literal["test_mend"] = "test_mend"
    ridge: float = 1e-3


class Layers(Rule):
    kind: Literal["test_layers"] = "test_layers"
    replace: Literal["affine", "none"] = "affine"


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    CRITERIA.register(Guess)
    REPAIRS.register(Mend)
    RULES.register(Layers)
    yield
    CRITERIA.remove("test_guess")
    REPAIRS.remove("test_mend")
    RULES.remove("test_layers")


def channels(**fields: Any) -> Channels:
    return Channels(**{"criterion": "test_guess", "repair": "test_mend"} | fields)


def plain(**fields: Any) -> dict[str, Any]:
    return {"kind": "channels", "criterion": "test_guess", "repair": "test_mend"} | fields


def test_bare_words_are_lists_of_one() -> None:
    rule = channels(targets="layer*", ignore="fc")
    assert (rule.targets, rule.ignore, rule.repair) == (("layer*",), ("fc",), (Mend(),))


def test_a_single_rule_may_be_passed_bare() -> None:
    budget = Budget(macs=0.5)
    bare, listed = (
        Policy(rules=channels(), budget=budget),
        Policy(rules=[channels()], budget=budget),
    )
    assert bare == listed == Policy(rules=plain(), budget={"macs": "50%"})


def test_a_criterion_is_a_name_a_table_or_an_instance() -> None:
    written = ["test_guess", {"kind": "test_guess"}, Guess()]
    assert {channels(criterion=value).criterion for value in written} == {Guess()}


def test_the_default_criterion_and_repair_are_registered() -> None:
    importlib.import_module("torch_otprune.criteria")
    importlib.import_module("torch_otprune.repair")
    rule = Channels()
    assert (rule.criterion.kind, [r.kind for r in rule.repair]) == ("transport", ["least_squares"])


def test_a_later_kind_of_rule_slots_in_without_touching_policy() -> None:
    policy = Policy(rules=[{"kind": "test_layers", "keep": "50%"}, channels(keep=8)])
    assert [type(rule) for rule in policy.rules] == [Layers, Channels]
    assert Policy.from_yaml(policy.to_yaml()) == policy


def test_equal_policies_are_equal_and_hash_alike() -> None:
    one, other = Policy(rules=channels(keep=0.5)), Policy(rules=plain(keep="50%"))
    assert one == other
    assert hash(one) == hash(other)


def test_a_policy_survives_pickle_and_deepcopy() -> None:
    policy = Policy(rules=channels(keep=0.5), budget=Budget(params="1.2M"))
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy


def test_a_policy_cannot_be_changed() -> None:
    policy = Policy(rules=channels(keep=0.5))
    with pytest.raises(ValidationError, match="frozen"):
        policy.seed = 1


def test_a_budget_lists_what_it_limits() -> None:
    assert Budget(macs="50%", params="1.2M").limits == {
        "params": Amount(1_200_000), "macs": Amount(0.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "units", "widths"),
    [
        ({}, 4, (1, 2, 3, 4)),
        ({"min_keep": 3}, 5, (3, 4, 5)),
        ({"multiple_of": 8}, 30, (8, 16, 24, 30)),
        ({"multiple_of": 8, "min_keep": 9}, 32, (16, 24, 32)),
        ({"multiple_of": 8}, 5, (5,)),
        ({"min_keep": 9}, 5, (5,)),
        ({"keep": "50%"}, 7, (3,)),
        ({"keep": "1%"}, 7, (1,)),
        ({"keep": 64}, 7, (7,)),
        ({"keep": "50%", "multiple_of": 8}, 24, (8,)),
        ({"keep": 1}, 7, (7,)),
    ],
)
def test_widths_obey_every_setting(
    fields: dict[str, Any], units: int, widths: tuple[int, ...]
) -> None:
    assert channels(**fields).widths(units) == widths


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.none() | st.floats(0.01, 1))
def test_widths_are_ascending_never_empty_and_within_the_group(
    units: int, min_keep: int, multiple_of: int, keep: float | None
) -> None:
    widths = channels(min_keep=min_keep, multiple_of=multiple_of, keep=keep).widths(units)
    assert list(widths) == sorted(set(widths))
    assert min(min_keep, units) <= widths[0] <= widths[-1] <= units
    assert all(width % multiple_of == 0 for width in widths if width != units)
    assert len(widths) == 1 if keep else widths[-1] == units


REFUSED: list[tuple[Any, type[OTPruneError], str]] = [
    (
        lambda: Policy(rules=[plain(kepe=0.5)]), PolicyError,
        "'kepe' is no key of Channels.\n"
        "  where: Policy.rules[0].kepe; closest: keep, min_keep; known keys: kind, targets, "
        "ignore, keep, repair, criterion, min_keep, multiple_of\n"
        "  fix:   correct the key or remove it.",
    ),
    (
        lambda: Policy(rules=[channels(), plain(keep=-1)]), PolicyError,
        "-1 keeps nothing.\n"
        "  where: Policy.rules[1].keep\n"
        "  fix:   keep more than 0 %.",
    ),
    (
        lambda: Policy(rules=[plain(keep=0.5, repair=["test_mend", {"kind": "test_mnd"}])]),
        PolicyError,
        "'test_mnd' is no known repair.\n"
        "  where: Policy.rules[0].repair[1]; closest: test_mend",
    ),
    (
        lambda: Policy(rules=[plain(criterion={"kind": "test_guess", "p": 0})]), PolicyError,
        "0 is no valid p: it should be greater than or equal to 1.\n"
        "  where: Policy.rules[0].criterion.p\n"
        "  fix:   make it greater than or equal to 1.",
    ),
    (
        lambda: Policy(rules=[{"kind": "chanels"}]), PolicyError,
        "'chanels' is no known rule.\n  where: Policy.rules[0]; closest: channels",
    ),
    (
        lambda: channels(criterion="test_gues"), PolicyError,
        "'test_gues' is no known criterion.\n  where: Channels.criterion; closest: test_guess",
    ),
    (
        lambda: channels(criterion=Mend()), PolicyError,
        "'test_mend' is no known criterion.\n  where: Channels.criterion",
    ),
    (
        lambda: Policy(rules=channels(), budget={"macs": 0.5, "weighting": "outptu"}), BudgetError,
        "'outptu' is no valid weighting: it should be 'output', 'uniform' or 'none'.\n"
        "  where: Policy.budget.weighting\n"
        "  fix:   write 'output'.",
    ),
    (
        lambda: Budget(macs=0), BudgetError,
        "0 keeps nothing.\n  where: Budget.macs\n  fix:   keep more than 0 %.",
    ),
    (
        lambda: Budget(params="150%"), BudgetError,
        "'150%' keeps more than 100 %.\n  where: Budget.params\n  fix:   write a fraction",
    ),
    (
        lambda: Budget(params=-0.5), BudgetError,
        "-0.5 keeps nothing.\n  where: Budget.params\n",
    ),
    (
        lambda: Budget(macs=float("nan")), BudgetError,
        "nan is no amount.\n  where: Budget.macs\n",
    ),
    (
        lambda: Budget(), BudgetError,
        "this budget limits nothing.\n  where: Budget\n  fix:   give `macs`, `params` or `layers`.",
    ),
    (
        lambda: Budget(latency="8ms"), BudgetError,  # type: ignore[call-arg]
        "'latency' is no key of Budget.\n  where: Budget.latency; known keys: params, macs",
    ),
    (
        lambda: channels(min_keep=0), PolicyError,
        "0 is no valid min_keep: it should be greater than or equal to 1.\n"
        "  where: Channels.min_keep",
    ),
    (
        lambda: channels(multiple_of=True), PolicyError,
        "True is no valid multiple_of: it should be a whole number.\n"
        "  where: Channels.multiple_of",
    ),
    (
        lambda: channels(keep="300k"), PolicyError,
        "'300k' is no number of units.\n  where: Channels.keep\n",
    ),
    (
        lambda: channels(keep=4, min_keep=8), PolicyError,
        "keep is 4 units, but min_keep is 8.\n"
        "  where: Channels.keep\n"
        "  fix:   lower min_keep or raise keep.",
    ),
    (
        lambda: channels(keep=12, multiple_of=16), PolicyError,
        "keep is 12 units, which is no multiple of multiple_of = 16.\n"
        "  where: Channels.keep\n",
    ),
    (
        lambda: channels(targets=[]), PolicyError,
        "targets is empty.\n  where: Channels.targets\n  fix:   give at least one.",
    ),
    (
        lambda: channels(targets=["a", " "]), PolicyError,
        "' ' is an empty pattern.\n  where: Channels.targets[1]\n",
    ),
    (
        lambda: channels(targets="re:(a"), PolicyError,
        "'re:(a' is no valid pattern: missing ), unterminated subpattern at position 0.\n"
        "  where: Channels.targets[0]\n",
    ),
    (
        lambda: channels(targets=["a", "b"], ignore=["b", "a", "c"]), PolicyError,
        "every target of this 'channels' rule is ignored.\n  where: Channels.ignore\n",
    ),
    (
        lambda: Policy(rules=[]), PolicyError,
        "rules is empty.\n  where: Policy.rules\n  fix:   give at least one.",
    ),
    (
        lambda: Policy(budget=Budget(macs=0.5)), PolicyError,  # type: ignore[call-arg]
        "rules is missing.\n  where: Policy.rules\n  fix:   give rules.",
    ),
    (
        lambda: Policy(rules=channels()), PolicyError,
        "nothing would be pruned: no rule has a `keep` and no budget asks for less.\n"
        "  where: Policy.budget\n"
        "  fix:   give a rule a `keep`, or the policy a budget such as Budget(macs='50%').",
    ),
    (
        lambda: Policy(rules=channels(), budget=Budget(macs="100%", params=1)), PolicyError,
        "nothing would be pruned: no rule has a `keep` and no budget asks for less.\n",
    ),
    (
        lambda: Policy(rules=[channels(keep=1), channels(keep="100%")], budget=Budget(macs=0.5)),
        PolicyError,
        "nothing would be pruned: every rule keeps 100 %.\n  where: Policy.rules\n",
    ),
    (
        lambda: Policy(rules=channels(keep=0.5), seed=-1), PolicyError,
        "-1 is no valid seed: it should be greater than or equal to 0.\n  where: Policy.seed\n",
    ),
    (
        lambda: Policy(rules=channels(keep=0.5), calibration={"samples": 0}), PolicyError,
        "0 is no valid samples: it should be greater than or equal to 1.\n"
        "  where: Policy.calibration.samples\n",
    ),
    (
        lambda: Policy.model_validate({"rules": "channels", "sed": 1}), PolicyError,
        "'sed' is no key of Policy.\n  where: Policy.sed; closest: seed, schedule; known keys: ",
    ),
    (
        lambda: Policy.from_json("{"), PolicyError,
        "this is no JSON: EOF while parsing an object at line 1 column 1.\n  where: Policy\n",
    ),
    (
        lambda: Policy.from_json('{"rules": [{"kind": "channels", "keep": 0}]}'), PolicyError,
        "0 keeps nothing.\n  where: Policy.rules[0].keep",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "kind", "message"), REFUSED)
def test_a_wrong_declaration_is_refused_in_three_lines(
    build: Any, kind: type[OTPruneError], message: str
) -> None:
    with pytest.raises(OTPruneError) as caught:
        build()
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert str(caught.value).count("\n") == 2


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(PolicyError, match=r"where: Policy\.rules\[0\]\.keep \(and 2 more\)"):
        Policy(rules=[plain(keep=0, min_keep=0)], seed=-1)


def test_a_model_of_somebody_else_that_holds_a_policy_sees_pydantics_own_error() -> None:
    class Holder(BaseModel):
        policy: Policy

    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"policy": {"rules": [plain(keep=0)]}})
    assert caught.value.errors()[0]["loc"] == ("policy", "rules", 0, "keep")
