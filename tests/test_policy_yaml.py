"""Policy files: YAML 1.2, strict, and errors that name line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torch_otprune.errors import BudgetError, OTPruneError, PolicyError
from torch_otprune.policy import Policy
from torch_otprune.policy.base import Declaration
from torch_otprune.policy.yaml_io import dump_yaml, load_yaml

GOOD = """\
rules:
  - kind: channels
    targets: [layer*, no]
    criterion: magnitude
    repair: []
    keep: 5e-1
budget: {macs: 50%}
"""


class Anything(Declaration):
    value: Any = None


def read(text: str) -> Any:
    return load_yaml(Anything, f"value: {text}\n").value


@pytest.fixture(autouse=True)
def _criteria() -> None:
    pytest.importorskip("torch_otprune.criteria")


def test_a_policy_is_read_from_text() -> None:
    policy = Policy.from_yaml(GOOD)
    assert policy.rules[0].targets == ("layer*", "no")
    assert policy.rules[0].keep is not None
    assert policy.rules[0].keep.value == 0.5


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_policy_is_read_from_a_file(tmp_path: Path, as_path: type) -> None:
    (tmp_path / "policy.yaml").write_text(GOOD)
    assert Policy.from_yaml(as_path(tmp_path / "policy.yaml")) == Policy.from_yaml(GOOD)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-1E+3", -1e3), ("1.", 1.0), (".5", 0.5), (".inf", float("inf")),
        ("12", 12), ("010", 10), ("0o17", 15), ("0x1f", 31), ("-7", -7), ("+7", 7),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("n", "n"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("none", "none"), ("50%", "50%"), ("1.2M", "1.2M"), ("1_000", "1_000"),
        ("12:30", "12:30"), ("2020-01-01", "2020-01-01"), ("'1e-3'", "1e-3"), ("1e", "1e"),
        ("0b1", "0b1"), ("{<<: {a: 1}}", {"<<": {"a": 1}}), ("[&a x, *a]", ["x", "x"]),
        ("!!str 12", "12"), ("!!float 12", 12.0),
    ],
)  # fmt: skip
def test_a_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    found = read(text)
    assert (found, type(found)) == (value, type(value))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_all_plain_data_round_trips(value: Any) -> None:
    assert load_yaml(Anything, dump_yaml({"value": value})).value == value


def test_the_keys_come_in_the_order_of_the_fields() -> None:
    written = Policy.from_yaml(GOOD).to_yaml()
    keys = [line.split(":")[0] for line in written.splitlines() if line[0].isalpha()]
    assert keys == list(Policy.model_fields)


REFUSED = [
    ("a: 1\na: 2\n", "the key 'a' appears twice", "YAML text, line 2, column 1"),
    ("a:\n  b: 1\n  'b': 2\n", "the key 'b' appears twice", "YAML text, line 3, column 3"),
    ("a: !mine x", "the tag '!mine' is not allowed", "YAML text, line 1, column 4"),
    (
        "a: !!python/object/apply:os.system [x]",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
        "YAML text, line 1, column 4",
    ),
    (
        "a: !!timestamp 2020-01-01",
        "the tag 'tag:yaml.org,2002:timestamp' is not allowed",
        "YAML text, line 1, column 4",
    ),
    ("a: [1\nb: 2", "expected ',' or ']', but got ':'", "YAML text, line 2, column 2"),
    ("a: 1\n---\nb: 1", "but found another document", "YAML text, line 2, column 1"),
    ("a: *b", "found undefined alias 'b'", "YAML text, line 1, column 4"),
    ("a:\n\tb: 1", "found character '\\t' that cannot start any token", "line 2, column 1"),
    ("a: b\nc: \x01", "character #x0001", "YAML text, line 2, column 4"),
    ("[a]: 1\n", "found unhashable key", "YAML text, line 1, column 1"),
    ("a: !!int x", "'x' is no int", "YAML text, line 1, column 4"),
    ("a: " + "[" * 3000, "nested too deeply", "YAML text"),
]


@pytest.mark.parametrize(("text", "problem", "where"), REFUSED)
def test_broken_yaml_is_refused_with_line_and_column(text: str, problem: str, where: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_yaml(Anything, text)
    assert caught.value.problem.startswith("this is no policy YAML: ")
    assert problem in caught.value.problem
    assert where in caught.value.where
    assert caught.value.fix == "correct the YAML at that place."


WRONG = [
    ("keep: 5e-1", "kepe: 5e-1", PolicyError, "line 6, column 5: Policy.rules[0].kepe"),
    ("keep: 5e-1", "keep: off", PolicyError, "line 6, column 5: Policy.rules[0].keep"),
    ("no]", "'re:(']", PolicyError, "line 3, column 23: Policy.rules[0].targets[1]"),
    ("magnitude", "{kind: magnitude, p: no}", PolicyError,
     "line 4, column 34: Policy.rules[0].criterion.p"),
    ("50%", "0%", BudgetError, "line 7, column 10: Policy.budget.macs"),
    ("budget:", "seed: x\nbudget:", PolicyError, "line 7, column 1: Policy.seed"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "kind", "where"), WRONG)
def test_a_wrong_value_is_refused_with_its_line_and_column(
    old: str, new: str, kind: type[OTPruneError], where: str
) -> None:
    with pytest.raises(kind) as caught:
        Policy.from_yaml(GOOD.replace(old, new))
    assert caught.value.where.startswith(f"YAML text, {where}")


def test_a_rule_that_is_not_in_a_list_is_still_found() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(
            "rules:\n  kind: channels\n  criterion: magnitude\n  repair: []\n  keep: 0\n"
        )
    assert caught.value.where == "YAML text, line 5, column 3: Policy.rules[0].keep"


@pytest.mark.parametrize(("text", "shown"), [("", "None"), ("[1, 2]", "[1, 2]"), ("a b", "'a b'")])
def test_what_is_no_mapping_is_refused(text: str, shown: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(text)
    assert str(caught.value) == (
        f"a policy is a mapping, this is {shown}.\n"
        "  where: YAML text, line 1, column 1\n"
        "  fix:   start with `rules:`."
    )


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read: No such file or directory") as caught:
        Policy.from_yaml(str(tmp_path / "missing.yaml"))
    assert caught.value.where == str(tmp_path / "missing.yaml")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read: it is not UTF-8"):
        Policy.from_yaml(tmp_path / "policy.yml")


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("rules: [chanels]\n")
    with pytest.raises(PolicyError, match=r"policy\.yaml, line 1, column 9: Policy\.rules\[0\]"):
        Policy.from_yaml(tmp_path / "policy.yaml")


def test_aliases_that_explode_are_refused_quickly() -> None:
    layers = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    text = "\n".join(["a0: &a0 [x]", *layers, "rules: *a39"])
    with pytest.raises(PolicyError, match="is no key of Policy"):
        Policy.from_yaml(text)
    with pytest.raises(PolicyError, match="is no rule"):
        Policy.from_yaml("rules:\n" + "\n".join(f"  - &{line.split('&')[1]}" for line in
                                                ["a0: &a0 [x]", *layers]))  # fmt: skip


def test_reading_yaml_leaves_pyyaml_alone() -> None:
    assert yaml.safe_load("a: no") == {"a": False}


@pytest.mark.parametrize("value", ["3", "true", "null", "0.5"])
def test_rules_that_are_no_rules_are_refused_plainly(value: str) -> None:
    with pytest.raises(PolicyError) as error:
        Policy.from_yaml(f"seed: 1\nrules: {value}\n")
    assert error.value.problem.endswith(" is no rule and no list of rules.")
    assert error.value.where == "YAML text, line 2, column 1: Policy.rules"
    assert error.value.fix == (
        "write a name such as channels, a table such as {kind: channels, keep: 50%}, or a list of "
        "these."
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rules: {kind: channels, targets: 3}", "a list"),
        ("rules: {kind: channels, repair: 3}", "a list"),
        ("rules: channels\nignore: 3", "a list"),
        ("rules: channels\ncalibration: 3", "a table of keys and values"),
        ("rules: channels\nbudget: 3", "a table of keys and values"),
        ("rules: channels\nseed: x", "a whole number"),
        ("rules: {kind: channels, min_keep: 1.5}", "a whole number"),
    ],
)
def test_wrong_types_are_told_in_the_words_of_yaml(text: str, wanted: str) -> None:
    with pytest.raises(OTPruneError) as error:
        Policy.from_yaml(text)
    assert error.value.problem.endswith(f"it should be {wanted}.")
    assert error.value.fix == f"make it {wanted}."


@pytest.mark.parametrize(("written", "read"), [("off", "off"), ("on", "on"), ("'off'", "off")])
def test_the_check_is_turned_off_by_a_bare_word(written: str, read: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(f"rules: [{{kind: channels, keep: 0.5}}]\nverify: {written}\n")
    assert Policy.from_yaml(file).verify == read
