"""Policies written down and read back, and the schema of what may be written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from torch_otprune.policy import (
    CRITERIA,
    REPAIRS,
    RULES,
    Budget,
    Calibration,
    Channels,
    Policy,
    Rule,
    Setting,
)  # fmt: skip
from torch_otprune.policy.targets import check_pattern


class Guess(Setting):
    kind: Literal["test_guess"] = "test_guess"
    p: float = Field(default=2.0, ge=1)
    label: str = "no"
    exact: bool = False
    sizes: tuple[int, ...] = ()
    inner: float | None = None


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


AWKWARD = ["no", "yes", "on", "off", "true", "null", "~", "1e-3", "010", "0x1f", "1_000", "12:30",
           "2020-01-01", "<<", "=", "- a", "# b", "a: b", "*a", "&a", "!a", "%", "@", "'", '"',
           "é", "\u2028", "\x85", "a\nb", " a ", "\\"]  # fmt: skip


def _usable(text: str) -> bool:
    try:
        check_pattern(text)
    except ValueError:
        return False
    return text != "auto"


patterns = st.lists(
    (st.sampled_from(AWKWARD) | st.text(min_size=1, max_size=12)).filter(_usable), max_size=3
).map(tuple)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
reals = st.floats(min_value=1, allow_nan=False)
criteria = st.builds(
    Guess,
    p=reals,
    label=st.sampled_from(AWKWARD) | st.text(max_size=8),
    exact=st.booleans(),
    sizes=st.lists(st.integers()).map(tuple),
    inner=st.none() | st.floats(allow_nan=False),
)
mends = st.lists(st.builds(Mend, ridge=st.floats(allow_nan=False)), max_size=2)
rules = st.builds(
    Channels,
    targets=patterns.map(lambda found: ("auto", *found)),
    ignore=patterns,
    keep=fractions,
    criterion=criteria,
    repair=mends,
    min_keep=st.integers(1, 10**6),
    multiple_of=st.integers(1, 10**6),
)
amounts = fractions | st.integers(2, 10**15)
budgets = st.builds(
    Budget,
    params=amounts,
    macs=st.none() | amounts,
    weighting=st.sampled_from(["output", "uniform", "none"]),
)
policies = st.builds(
    Policy,
    rules=st.lists(rules | st.builds(Layers, keep=st.integers(2, 99)), min_size=1, max_size=3),
    budget=st.none() | budgets,
    ignore=patterns,
    calibration=st.builds(Calibration, samples=st.integers(1, 2**40)),
    seed=st.integers(0, 2**63),
)


@given(policies)
def test_any_policy_round_trips_through_yaml(policy: Policy) -> None:
    assert Policy.from_yaml(policy.to_yaml()) == policy


@given(policies)
def test_any_policy_round_trips_through_json(policy: Policy) -> None:
    assert Policy.from_json(policy.to_json()) == policy


@given(policies)
def test_any_policy_round_trips_through_plain_python(policy: Policy) -> None:
    assert Policy(**policy.model_dump()) == policy
    assert Policy(**json.loads(json.dumps(policy.model_dump(mode="json")))) == policy


def test_what_is_written_names_every_setting() -> None:
    written = Policy(rules=channels(keep=0.5)).model_dump(mode="json")
    assert written["rules"][0]["criterion"] == {
        "kind": "test_guess", "p": 2.0, "label": "no", "exact": False, "sizes": [], "inner": None,
    }  # fmt: skip
    assert written["rules"][0]["repair"] == [{"kind": "test_mend", "ridge": 1e-3}]
    assert written["rules"][0]["keep"] == 0.5


def test_the_schema_is_json_and_knows_every_registered_kind() -> None:
    schema = json.loads(json.dumps(Policy.json_schema()))
    rule = schema["properties"]["rules"]["anyOf"][0]
    assert rule["oneOf"][0]["enum"] == list(RULES)
    assert rule["discriminator"]["propertyName"] == "kind"
    criterion = schema["$defs"]["Channels"]["properties"]["criterion"]
    assert criterion["oneOf"][0]["enum"] == list(CRITERIA)
    assert len(criterion["oneOf"]) == 1 + len(CRITERIA)
    assert schema["additionalProperties"] is False


def test_every_field_of_the_schema_is_described() -> None:
    for cls in (Policy, Channels, Budget, Calibration):
        undescribed = [n for n, field in cls.model_fields.items() if not field.description]
        assert undescribed in ([], ["kind"])


@given(policies)
def test_the_schema_accepts_what_a_policy_writes(policy: Policy) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    finite = json.loads(policy.to_json().replace('"Infinity"', "1.0").replace('"-Infinity"', "1.0"))
    jsonschema.Draft202012Validator(Policy.json_schema()).validate(finite)


@pytest.mark.parametrize(
    ("policy", "valid"),
    [
        ({"rules": "channels", "budget": {"macs": "50%"}}, True),
        ({"rules": plain(keep="50%"), "ignore": "fc"}, True),
        ({"rules": [plain(targets="layer*", repair=["test_mend"])], "budget": {"params": 2}}, True),
        ({"rules": [{"kind": "test_layers", "replace": "none"}], "budget": {"macs": "1.2M"}}, True),
        ({"rules": ["chanels"]}, False),
        ({"rules": [plain(kepe=1)]}, False),
        ({"rules": [{"targets": "layer*"}]}, False),
        ({"rules": [plain(criterion={"kind": "test_guess", "p": 0})]}, False),
        ({"rules": [plain()], "budget": {"macs": 0}}, False),
        ({"rules": [plain()], "budget": {"macs": "half"}}, False),
        ({}, False),
    ],
)
def test_the_schema_agrees_with_the_policy(policy: dict[str, Any], valid: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(Policy.json_schema())
    assert validator.is_valid(policy) is valid
