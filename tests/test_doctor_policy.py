"""What a policy protects: every parameter that it keeps, named after its words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.doctor.text import tables
from torch_otprune.errors import TargetError
from torch_otprune.structure.doctor import FATES, Finding


class Layer(nn.Module):
    """Attention and a hidden layer, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (f(y).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.down(self.up(self.second(x)).relu())


def model() -> nn.Module:
    """Two layers between an embedding and a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), Layer(), Layer(), nn.LayerNorm(8), nn.Linear(8, 3))


def example() -> Tensor:
    """Two texts."""
    return torch.arange(12).view(2, 6) % 9


def diagnosed(*rules: object, **fields: object) -> dict[str, Finding]:
    """Hold a policy against the model."""
    policy = otp.Policy(rules=rules, budget=otp.Budget(macs="50%"), **fields)
    return {f.parameter: f for f in otp.doctor(model(), example(), policy=policy).findings}


def test_without_a_policy_nothing_is_protected() -> None:
    found = otp.doctor(model(), example())
    assert found.elements("protected") == 0 and "protected" not in str(found)
    assert {group.kind for group in found.groups} == {"channels", "heads", "hidden"}


@pytest.mark.parametrize(
    "rules",
    [
        [otp.Channels()],
        [otp.Heads(), otp.Channels(ignore=["1"])],
        [otp.Hidden(), otp.Layers()],
        [otp.Channels(targets=["1"]), otp.Channels(targets=["2"], keep=0.5)],
    ],
)
def test_with_a_policy_the_four_fates_are_all_parameters(rules: list[object]) -> None:
    policy = otp.Policy(rules=rules, budget=otp.Budget(macs="50%"))
    found = otp.doctor(model(), example(), policy=policy)
    assert sum(found.elements(fate) for fate in FATES) == found.params
    assert sum(found.share(fate) for fate in FATES) == pytest.approx(1)
    for finding in found.findings:
        assert bool(finding.reason) == bool(finding.fix) == (finding.fate != "prunable")


def test_a_group_that_a_rule_reaches_says_which_rule_and_the_others_say_why_not() -> None:
    policy = otp.Policy(rules=[otp.Layers(), otp.Channels()], budget=otp.Budget(macs="50%"))
    groups = {g.group: g for g in otp.doctor(model(), example(), policy=policy).groups}
    assert (groups["1.up"].rule, groups["1.up"].protected) == (1, "")
    assert (groups["1.q"].rule, groups["1.q"].protected) == (
        None,
        "no rule otp.Heads in Policy.rules",
    )
    assert groups["1.q"].fix == "add a rule otp.Heads."


@pytest.mark.parametrize(
    ("rule", "fields", "reason", "fix"),
    [
        (otp.Heads(), {}, "no rule otp.Channels in Policy.rules", "add a rule otp.Channels."),
        (
            otp.Channels(targets=["2"]),
            {},
            "no target of Policy.rules[0] reaches '1.up'",
            "target '1.up' as well.",
        ),
        (
            otp.Channels(ignore=["1.up"]),
            {},
            "Policy.rules[0].ignore = '1.up' spares '1.up'",
            "take '1.up' out of Policy.rules[0].ignore.",
        ),
        (
            otp.Channels(),
            {"ignore": "re:1.*"},
            "Policy.ignore = 're:1.*' spares '1.up'",
            "take 're:1.*' out of Policy.ignore.",
        ),
        (
            otp.Channels(keep="100%"),
            {},
            "Policy.rules[0].keep is all of them",
            "keep less, or drop the rule.",
        ),
    ],
)
def test_a_protected_parameter_names_the_words_that_protect_it(
    rule: object, fields: dict[str, object], reason: str, fix: str
) -> None:
    finding = diagnosed(rule, otp.Linearize(targets=["2"]), **fields)["1.up.bias"]
    assert (finding.fate, finding.reason, finding.fix) == ("protected", reason, fix)


def test_a_weight_is_prunable_as_long_as_one_of_its_axes_is() -> None:
    found = diagnosed(otp.Hidden())
    assert found["1.up.weight"].fate == "prunable"  # what it reads is the stream
    assert found["1.up.bias"].fate == "protected"


def test_what_is_inside_of_a_block_that_may_go_is_prunable_by_depth() -> None:
    found = diagnosed(otp.Layers(targets=["2"]))
    assert found["2.up.bias"].fate == "prunable" and "2" in found["2.up.bias"].blocks
    assert found["1.up.bias"].fate == "protected"


def test_the_plan_cuts_no_group_that_the_doctor_calls_protected() -> None:
    policy = otp.Policy(rules=[otp.Channels(targets=["2"], keep=0.5, criterion="magnitude")])
    groups = otp.doctor(model(), example(), policy=policy).groups
    with otp.attach(net := model().eval(), policy) as attached:
        net(example())
        cut = {c.group for c in attached.plan().cuts}
    assert cut == {g.group for g in groups if g.rule == 0} == {"2.up"}


def test_a_target_of_the_policy_that_matches_nothing_is_refused() -> None:
    policy = otp.Policy(rules=otp.Channels(targets=["nope"], keep=0.5))
    with pytest.raises(TargetError, match="'nope' matches no module of this model"):
        otp.doctor(model(), example(), policy=policy)


def test_tables_tree_and_json_tell_protected_groups() -> None:
    policy = otp.Policy(rules=otp.Channels(targets=["2"], keep=0.5))
    found = otp.doctor(model(), example(), policy=policy)
    assert {row[2] for row in tables(found)["groups"]} == {
        "channels",
        "channels, protected",
        "heads, protected",
        "hidden, protected",
    }
    assert "protected: no target of Policy.rules[0] reaches '1.up'" in found.tree(every=True)
    assert "weight: 96, prunable: 2.up (channels)" in found.tree()  # and not of the stream
    content = json.loads(found.to_json())
    assert content["totals"]["protected"] == found.elements("protected") > 0
    assert content["rules"] == ["channels"]


def test_a_policy_file_does_the_same_from_the_shell(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from torch_otprune.cli import app

    policy = tmp_path / "policy.yaml"
    policy.write_text("rules: {kind: channels, keep: 50%, ignore: ['2']}\n")
    names = [f"{__name__}:model", "--example", f"{__name__}:example"]
    done = CliRunner().invoke(app, ["doctor", *names, "--policy", str(policy), "--json"])
    assert done.exit_code == 0, done.output
    rule = {g["group"]: g["rule"] for g in json.loads(done.stdout)["groups"]}
    assert (rule["1.up"], rule["2.up"]) == (0, None)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            otp.Experts(keep=2),
            "(experts, targets: auto) removes nothing: there are no experts to cut; this model has "
            "channels, heads and a stream that norms take as one: use otp.Channels, otp.Heads or "
            "otp.Hidden",
        ),
        (
            otp.Channels(targets=["1.q"], keep=0.5),
            "(channels, targets: 1.q) removes nothing: there are no channels among its targets; "
            "target '1.up', '2.up', or leave targets at auto",
        ),
        (
            otp.Heads(targets=["1.q"], keep=1),
            "(heads, targets: 1.q) removes nothing: '1.q' is tied to '1.k', '1.v', which it leaves "
            "out; target '1.k', '1.v' as well",
        ),
        (
            otp.Channels(targets=["4"], keep=0.5),
            "(channels, targets: 4) removes nothing: '4': they reach the model's output; target "
            "'1.up', '2.up', or leave targets at auto",
        ),
        (
            otp.Layers(targets=["1.q"], drop=1),
            "(layers, targets: 1.q) removes nothing: no layer that can go is among its targets; "
            "'1', '1.down', '1.o' and 3 more can",
        ),
        (
            otp.Linearize(targets=["4"], drop=1),
            "(linearize, targets: 4) removes nothing: the model has no activation that can become "
            "linear",
        ),
    ],
)
def test_a_rule_that_reaches_nothing_is_named_with_what_would_match(
    rule: object, said: str
) -> None:
    first = otp.Heads(keep=0.5) if rule.kind == "channels" else otp.Channels(keep=0.5)
    policy = otp.Policy(rules=[first, rule])
    found = otp.doctor(model(), example(), policy=policy)
    (note,) = (n for n in found.notes if "removes nothing" in n)
    assert note == f"Policy.rules[1] {said}"
    assert f"note: {note}" in str(found)


def test_rules_that_reach_something_or_keep_all_are_not_named() -> None:
    policy = otp.Policy(rules=[otp.Channels(keep=0.5), otp.Heads(keep="100%"), otp.Layers(drop=1)])
    assert not otp.doctor(model(), example(), policy=policy).notes
