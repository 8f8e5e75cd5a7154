"""Policies declared on classes, and which one a model obeys."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_otprune.criteria  # noqa: F401 (fills the table)
from torch_otprune.errors import BudgetError, PolicyError, TargetError
from torch_otprune.policy import Budget, Channels, owner, policy_of, prunable
from torch_otprune.policy.targets import module_classes


def channels(**fields: object) -> Channels:
    return Channels(**{"criterion": "magnitude", "repair": (), **fields})  # type: ignore[arg-type]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.extra = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(self.conv1(x).relu()).mean((2, 3))
        return y


@prunable(channels(keep="50%"))
class Declared(Plain):
    pass


class Heir(Declared):
    pass


@prunable(channels(keep="25%"), seed=3)
class Rebel(Declared):
    pass


@prunable(channels(keep="50%"), channels(targets="conv2", keep="25%"), ignore="extra")
class Split(Plain):
    pass


def test_the_policy_of_a_class_is_the_policy_of_its_instances() -> None:
    policy = policy_of(Declared())
    assert policy is not None
    assert policy.rules == (channels(keep="50%"),)


def test_a_model_that_declares_nothing_has_no_policy() -> None:
    assert policy_of(Plain()) is None


def test_a_subclass_inherits_until_it_declares_its_own() -> None:
    heir, rebel = policy_of(Heir()), policy_of(Rebel())
    assert heir == policy_of(Declared())
    assert rebel is not None
    assert (rebel.rules, rebel.seed) == ((channels(keep="25%"),), 3)


def test_a_budget_alone_declares_the_default_rule() -> None:
    pytest.importorskip("torch_otprune.repair")

    @prunable(budget=Budget(macs="50%"))
    class Net(Plain):
        pass

    policy = policy_of(Net())
    assert policy is not None
    assert policy.rules == (Channels(),)


def test_the_models_own_declaration_speaks_for_the_whole_tree() -> None:
    @prunable(channels(keep="75%"))
    class Outer(nn.Sequential):
        pass

    policy = policy_of(Outer(Declared(), Rebel()))
    assert policy is not None
    assert policy.rules == (channels(keep="75%"),)


def test_declarations_of_submodules_are_aimed_at_them() -> None:
    policy = policy_of(nn.Sequential(Declared(), nn.ReLU(), Heir()))
    assert policy is not None
    assert policy.rules == (channels(keep="50%", targets=("0", "2")),)


def test_rules_of_a_submodule_own_the_same_modules_inside_a_larger_model() -> None:
    model = nn.ModuleDict({"a": Split(), "b": nn.Sequential(Split())})
    policy = policy_of(model)
    assert policy is not None
    names = module_classes(model)
    owners = {p: owner(policy.rules, p, names, ignore=policy.ignore) for p in names}
    for prefix in ("a", "b.0"):
        assert owners[f"{prefix}.conv1"] == 0
        assert owners[f"{prefix}.conv2"] == 1
        assert owners[f"{prefix}.extra.0"] is None
    assert owners["b"] is None


def test_a_submodule_whose_name_begins_alike_is_not_mistaken_for_a_part() -> None:
    model = nn.ModuleDict({"net": Declared(), "net2": Rebel()})
    with pytest.raises(PolicyError, match="different seeds"):
        policy_of(model)


def test_different_budgets_are_refused_naming_both_classes() -> None:
    @prunable(channels(), budget=Budget(macs="50%"))
    class Half(Plain):
        pass

    with pytest.raises(PolicyError) as caught:
        policy_of(nn.Sequential(Declared(), Half()))
    assert "Declared and Half declare different budgets: None and Budget(" in str(caught.value)
    assert caught.value.where == "classes of '0' and '1'"
    assert caught.value.fix == "declare the budget on the model's own class, or pass a policy."


def test_a_target_that_a_submodule_lacks_is_refused_naming_its_class() -> None:
    @prunable(channels(targets="convv1", keep=0.5))
    class Typo(Plain):
        pass

    with pytest.raises(TargetError, match=r"Typo, Policy\.rules\[0\]\.targets; closest.*conv1"):
        policy_of(nn.Sequential(Typo()))


def test_a_wrong_declaration_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(BudgetError, match="keeps more than 100 %"):
        prunable(channels(), budget={"macs": "150%"})
    with pytest.raises(PolicyError, match="'sed' is no key of Policy"):
        prunable(channels(keep=0.5), sed=1)


def test_forgetting_the_parentheses_is_refused() -> None:
    with pytest.raises(PolicyError, match="prunable cannot decorate") as caught:
        prunable(Plain)  # type: ignore[arg-type]
    assert "with the parentheses" in caught.value.fix


def test_decorating_what_is_no_module_is_refused() -> None:
    with pytest.raises(PolicyError, match="prunable cannot decorate <class 'int'>"):
        prunable(channels(keep=0.5))(int)  # type: ignore[type-var]


def test_a_declaration_leaves_the_class_as_it_was() -> None:
    assert (Declared.__name__, Declared.__module__) == ("Declared", __name__)
    plain, declared = Plain(), Declared()
    assert list(declared.state_dict()) == list(plain.state_dict())
    assert set(vars(declared)) == set(vars(plain))


def test_a_declared_model_copies_and_pickles() -> None:
    model = Declared()
    x = torch.randn(1, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert policy_of(twin) == policy_of(model)


def test_a_declared_model_exports() -> None:
    model, x = Declared().eval(), torch.randn(1, 3, 8, 8)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
