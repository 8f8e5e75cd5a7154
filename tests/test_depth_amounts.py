"""How much goes in depth: one way to say it, one way to round it, plans that keep their word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_otprune as otp
from tests.test_depth_errors import build, data, refused
from torch_otprune.errors import BudgetError, PlanError, PolicyError
from torch_otprune.plan.linearize import amount
from torch_otprune.policy import Amount

RULES = pytest.mark.parametrize("rule", [otp.Layers, otp.Linearize])
SPELLINGS = pytest.mark.parametrize(
    ("written", "stay"),
    [
        (1, 1), ("1", 1), (" 1 ", 1), (3, 3), ("3", 3), (99, 12),
        (1.0, 12), ("1.0", 12), ("100%", 12), (0.5, 6), ("50%", 6), ("30%", 3),
    ],
)  # fmt: skip


def planned(*rules: Any, **more: Any) -> otp.Plan:
    with otp.attach(build(), otp.Policy(rules=rules, **more)) as attached:
        otp.observe(attached, data())
        return attached.plan()


# One way to say it


@RULES
@SPELLINGS
def test_a_whole_number_counts_what_stays_and_all_else_is_a_share(
    rule: Any, written: Any, stay: int
) -> None:
    assert rule(keep=written).dropped(12) == 12 - stay


@SPELLINGS
def test_a_budget_of_layers_reads_them_likewise(written: Any, stay: int) -> None:
    budget = otp.Budget(layers=written)
    assert budget.layers is not None
    assert budget.layers.of(12) == stay


@RULES
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (0, "0 keeps nothing."), (-1, "-1 keeps nothing."), (True, "True is no amount."),
        (1.5, "1.5 keeps more than 100 %."), ("1k", "'1k' is no number of units."),
        ("some", "'some' is no amount."), (float("nan"), "nan is no amount."),
    ],
)  # fmt: skip
def test_a_keep_that_is_no_number_of_layers_is_quoted(rule: Any, written: Any, said: str) -> None:
    with pytest.raises(PolicyError) as found:
        rule(keep=written)
    assert found.value.problem == said
    assert found.value.where == f"{rule.__name__}.keep" and found.value.fix


def test_one_channel_is_never_what_one_means() -> None:
    keep = otp.Channels(keep=1).keep
    assert keep is not None and keep.everything
    assert keep == otp.Channels(keep="100%").keep


def test_one_layer_and_all_layers_are_two_policies() -> None:
    one, every = otp.Layers(keep=1), otp.Layers(keep=1.0)
    assert one != every and one.asks and not every.asks
    assert Amount(1) != Amount(1.0)


@pytest.mark.parametrize("keep", [1, 1.0, 2, 0.5])
def test_what_stays_survives_yaml_and_json(keep: float) -> None:
    beside = otp.Layers(targets="a", drop=1)
    policy = otp.Policy(rules=[otp.Layers(keep=keep), beside], budget=otp.Budget(layers=keep))
    for read in (otp.Policy.from_yaml(policy.to_yaml()), otp.Policy.from_json(policy.to_json())):
        assert read == policy
        assert [type(x.value) for x in (read.rules[0].keep, read.budget.layers)] == [type(keep)] * 2  # type: ignore[union-attr]


def test_keeping_one_layer_leaves_one() -> None:
    assert planned(otp.Layers(keep=1)).layers.after == 1
    assert planned(otp.Layers(), budget=otp.Budget(layers=1)).layers.after == 1
    assert len(planned(otp.Linearize(keep=1, unfolded="allow")).lines) == 3


# One way to round it


@given(st.integers(1, 40), st.integers(1, 9999), st.sampled_from(["drop", "keep"]))
def test_layers_and_activations_round_shares_alike(count: int, points: int, field: str) -> None:
    share: Any = {field: f"{points / 100}%"}
    layers = otp.Layers(**share).dropped(count)
    policy = otp.Policy(rules=otp.Linearize(**share))
    try:
        found: int | None = amount(0, policy, range(count + 1))
    except BudgetError:  # less than one, which layers refuse with the same words
        found = 0
    assert found == layers


@pytest.mark.parametrize(
    ("rule", "goes"),
    [
        (otp.Linearize(drop="80%"), 4),  # 4.8 of 6: 4
        (otp.Linearize(drop="60%"), 2),  # 3.6: 3, which cannot go alone
        (otp.Linearize(drop="20%"), 2),  # 1.2: something goes
        (otp.Linearize(keep="60%"), 4),  # 3.6 stay: 3, and 2 where they go in pairs
        (otp.Linearize(keep="70%"), 2),  # 4.2 stay: 4
    ],
)
def test_a_share_of_pairs_is_rounded_in_its_own_direction(rule: otp.Linearize, goes: int) -> None:
    assert amount(0, otp.Policy(rules=rule), [0, 2, 4, 6]) == goes


@pytest.mark.parametrize(
    ("rule", "said", "where"),
    [
        (otp.Linearize(drop=3), "rule 0 drops 3 of 6 activations; 2, 4, 6 can go.", "drop"),
        (otp.Linearize(keep=3), "rule 0 keeps 3 of 6 activations; 0, 2, 4 can stay.", "keep"),
        (otp.Linearize(keep=1), "rule 0 keeps 1 of 6 activations; 0, 2, 4 can stay.", "keep"),
    ],
)
def test_a_number_of_activations_that_cannot_be_is_refused_in_the_words_of_its_field(
    rule: otp.Linearize, said: str, where: str
) -> None:
    with pytest.raises(BudgetError) as found:
        amount(0, otp.Policy(rules=rule), [0, 2, 4, 6])
    assert found.value.problem == said
    assert found.value.where == f"Policy.rules[0].{where}"
    assert found.value.fix.startswith("choose one of these numbers")


# Budgets that speak of layers


def test_a_budget_of_layers_beside_a_drop_names_the_layers_that_stay_and_the_field() -> None:
    said = refused(build(), otp.Layers(drop=1), error=BudgetError, budget=otp.Budget(layers="50%"))
    assert said.problem == (
        "a budget of 2 layers (50.0%) cannot be reached: the least is 3 (75.0%)."
    )
    assert said.where.startswith("Budget.layers; kept by rules of their own: layers.")
    assert said.fix == (
        "keep at least 75.0% of layers; or raise drop, or lower keep, of the rules about layers."
    )


def test_a_budget_of_macs_over_layers_says_which_layer_stays() -> None:
    said = refused(build(), otp.Layers(drop=1), error=BudgetError, budget=otp.Budget(macs="20%"))
    assert "(layer 'layers.0' stays)" in said.where
    assert said.fix == (
        "keep at least 77.5% of macs; or raise drop, or lower keep, of the rules about layers, "
        "or target more layers."
    )
    for word in ("width", "min_keep", "multiple_of", "group", "unit"):
        assert word not in str(said)


def test_a_budget_of_macs_over_layers_and_channels_names_both() -> None:
    rules = otp.Layers(targets="layers.0"), otp.Channels(targets="layers.1.up")
    said = refused(build(), *rules, error=BudgetError, budget=otp.Budget(macs="5%"))
    assert "target more layers, or lower min_keep, multiple_of or keep" in said.fix


def test_what_a_budget_leaves_unused_is_told_in_layers() -> None:
    (note,) = planned(otp.Layers(), budget=otp.Budget(macs="90%")).notes
    assert "because the smallest step left, keeping the layer 'layers." in note
    assert "units" not in note and "group" not in note


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        (
            otp.Layers(),
            "give a rule a `drop`, or the policy a budget such as Budget(layers='75%').",
        ),
        (
            otp.Linearize(),
            "give a rule a `drop`, such as drop=2: a budget chooses no activations.",
        ),
    ],
)
def test_a_policy_in_depth_that_removes_nothing_is_told_how_to(rule: Any, fix: str) -> None:
    with pytest.raises(PolicyError, match="no rule has a `drop` and no budget") as found:
        otp.Policy(rules=rule)
    assert found.value.fix == fix


# Plans that were edited


def applied(plan: otp.Plan, **update: Any) -> str:
    """Apply an edited plan; return the refusal."""
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError) as found:
        otp.apply_(model, plan.model_copy(update=update), data(), timing=0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "change the policy and plan again" in found.value.fix
    return f"{found.value.problem} {found.value.where}"


def test_a_plan_without_one_of_its_drops_is_refused() -> None:
    plan = planned(otp.Layers(drop=2))
    assert applied(plan, drops=plan.drops[1:]) == (
        "the plan records 2 layers that go, but names 1. Plan.drops"
    )


def test_a_plan_whose_record_was_edited_along_still_breaks_its_rule() -> None:
    plan = planned(otp.Layers(drop=2))
    layers = plan.layers.model_copy(update={"after": 3})
    assert applied(plan, drops=plan.drops[1:], layers=layers) == (
        "rule 0 of the plan drops 2 layers, but the plan names 1. Plan.drops"
    )


def test_a_plan_that_leaves_more_parameters_than_it_records_is_refused() -> None:
    plan = planned(otp.Layers(keep="50%"))
    layers = plan.layers.model_copy(update={"after": 3})
    said = applied(plan, drops=plan.drops[1:], layers=layers)
    assert said.startswith(f"the plan records {plan.params.after:,} parameters after, but its")
    assert said.endswith("Plan.params")


def test_a_plan_without_one_of_its_cuts_is_refused() -> None:
    plan = planned(otp.Channels(keep="50%"))
    assert "parameters after, but its decisions leave" in applied(plan, cuts=plan.cuts[1:])


def test_a_plan_without_one_of_its_lines_is_refused() -> None:
    plan = planned(otp.Linearize(drop=2, unfolded="allow"))
    assert applied(plan, lines=plan.lines[1:]) == (
        "rule 0 of the plan drops 2 activations, but the plan names 1. Plan.lines"
    )


def test_a_plan_that_folds_past_an_activation_it_keeps_is_refused() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    with otp.attach(model, otp.Policy(rules=otp.Linearize(keep="1%"))) as attached:
        otp.observe(attached, data())
        plan = attached.plan()
    edited = plan.model_copy(update={"lines": ()})
    with pytest.raises(PlanError, match="folds past '1', which it does not make linear"):
        otp.apply_(model, edited, data(), timing=0)


@pytest.mark.parametrize(
    "rules",
    [
        (otp.Layers(drop=2),),
        (otp.Layers(drop=1, replace="scale"), otp.Channels(keep="70%")),
        (otp.Layers(drop=1, replace={"kind": "low_rank", "rank": 2}),),
        (otp.Linearize(drop=2, unfolded="allow"), otp.Layers(drop=1)),
    ],
)
def test_a_plan_as_it_was_made_is_carried_out(rules: Any) -> None:
    model, plan = build(), planned(*rules)
    report = otp.apply_(model, plan, data(), timing=0)
    assert report.params == plan.params
