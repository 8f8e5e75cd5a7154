"""Depth asked for where it cannot be had: three lines with the fix, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_otprune as otp
from torch_otprune.errors import (
    BudgetError,
    CalibrationError,
    OTPruneError,
    PolicyError,
    StructureError,
    TargetError,
)
from torch_otprune.policy import Layers


class Block(nn.Module):
    """A residual block."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 8), act(), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.act(self.up(x)))


class Auxiliary(Block):
    """One that hands out a loss of its own."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.act(self.up(x))
        return x + self.down(hidden), hidden.square().mean()


class Net(nn.Module):
    """A stem, four blocks, a head."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Losses(Net):
    """Adds up the losses of its blocks."""

    def forward(self, x: Tensor) -> Any:
        x, total = self.stem(x), torch.zeros(())
        for layer in self.layers:
            x, loss = layer(x)
            total = total + loss
        return self.head(x), total


class States(Net):
    """Returns every hidden state."""

    def forward(self, x: Tensor) -> Any:
        states = [self.stem(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(states[-1]), states


class Repeated(Net):
    """Runs one block three times."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for _ in range(3):
            x = self.layers[0](x)
        return self.head(x)


class Peeking(Net):
    """Reads a weight inside of a block."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.layers[2].up.weight.sum()


class Checkpointed(Net):
    """Computes its blocks again on the way back."""

    reentrant = False

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    """The older way, which autograd.grad does not get through."""

    reentrant = True


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, generator=generator) for _ in range(2)]


def build(kind: Callable[..., Net] = Net, *args: Any, **settings: Any) -> Net:
    torch.manual_seed(0)
    return kind(*args, **settings).eval()


def prune(model: nn.Module, rules: Any, batches: Any, **more: Any) -> otp.Report:
    policy = otp.Policy(rules=list(rules), **more)
    return otp.prune_(model, policy, batches, timing=0)


def hooks(model: nn.Module) -> list[Any]:
    """List every hook: some models bring their own."""
    tables = ([*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules())
    return [hook for table in tables for hook in table]


def refused(
    model: nn.Module, *rules: Any, error: type[OTPruneError], batches: Any = None, **more: Any
) -> OTPruneError:
    """Prune, expect a refusal in three lines, and check that the model is as it was."""
    modules, watched = dict(model.named_modules()), hooks(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as found:
        prune(model, rules, data() if batches is None else batches, **more)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert hooks(model) == watched
    assert [line[:9] for line in str(found.value).splitlines()[1:]] == ["  where: ", "  fix:   "]
    return found.value


# More than can go


def test_dropping_more_layers_than_there_are_says_how_many_can_go() -> None:
    said = refused(build(), otp.Layers(drop=5), error=BudgetError)
    assert said.problem == "rule 0 drops 5 layers, and 4 can go."
    assert said.fix == "drop at most 4, or target more layers."


def test_dropping_more_than_can_go_names_the_layer_that_stays_and_why() -> None:
    said = refused(build(Peeking), otp.Layers(drop=4), error=BudgetError)
    assert said.problem == "rule 0 drops 4 layers, and 3 can go."
    assert "layers.2: without it the model does not run" in said.where


def test_a_share_of_less_than_one_layer_says_what_would_be_one() -> None:
    said = refused(build(), otp.Layers(drop="10%"), error=BudgetError)
    assert said.problem == "rule 0 drops 0.1 of 4 layers, which is less than one."
    assert said.fix == "drop a whole number, or at least 25 %."


# What a block is tied to


def test_a_block_with_a_loss_of_its_own_is_refused_with_the_fix() -> None:
    said = refused(build(Losses, Auxiliary), otp.Layers(drop=1), error=StructureError)
    assert "layers.0: it returns more than its stream: a side output" in said.problem
    assert said.fix == "return the stream alone, or turn the side output off."


def test_hidden_states_that_the_model_returns_stay_as_many() -> None:
    model = build(States)
    report = otp.prune_(model, otp.Policy(rules=otp.Layers(drop=2)), data(), timing=0)
    assert len(report.plan.drops) == 2 and report.plan.compacted == ()
    assert len(model(data()[0])[1]) == 5


def test_a_model_that_collects_hidden_states_by_class_is_refused_with_the_counts() -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    model = transformers.BertModel(tiny(transformers.BertConfig, output_hidden_states=True)).eval()
    model(**tokens()[0])  # it puts up hooks of its own on first use
    said = refused(model, otp.Layers(drop=1), error=StructureError, batches=tokens())
    assert "encoder.layer.0: without it the model returns 5 tensors instead of 6" in said.problem
    assert "return nothing of it but its stream" in said.fix


def test_a_block_that_runs_three_times_is_refused() -> None:
    said = refused(build(Repeated, depth=1), otp.Layers(drop=1), error=StructureError)
    assert "layers.0: it runs 3 times per forward pass, with one set of weights" in said.problem
    assert said.fix.startswith("give every repetition a module of its own")


def test_the_shared_layer_of_albert_is_refused() -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    model = transformers.AlbertModel(tiny(transformers.AlbertConfig, embedding_size=12)).eval()
    said = refused(model, otp.Layers(drop=1), error=StructureError, batches=tokens())
    assert "it runs 3 times per forward pass, with one set of weights" in said.problem


def tiny(config: Any, **settings: Any) -> Any:
    return config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
        **settings,
    )


def tokens() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (16, 7))}]


def test_a_block_whose_weight_another_one_shares_stays_and_the_rest_may_go() -> None:
    model = build()
    model.layers[1].up.weight = model.layers[0].up.weight
    said = refused(model, otp.Layers(drop=3), error=BudgetError)
    assert said.problem == "rule 0 drops 3 layers, and 2 can go."
    report = otp.prune_(model, otp.Policy(rules=otp.Layers(drop=2)), data(), timing=0)
    assert {d.block for d in report.plan.drops} == {"layers.2", "layers.3"}
    assert {r.reason for r in report.plan.refused} == {
        "'layers.0.up' shares a tensor with another layer",
        "'layers.1.up' shares a tensor with another layer",
    }


def test_a_block_whose_weight_the_model_reads_is_refused_by_the_real_model() -> None:
    only = otp.Layers(targets="layers.2", drop=1)
    said = refused(build(Peeking), only, error=StructureError)
    assert "layers.2: without it the model does not run: " in said.problem
    assert "it reads '.up' of 'layers.2', which is taken out" in said.problem
    assert said.fix.startswith("`ignore` it, or let the model use")


def test_the_blocks_beside_one_that_is_read_still_go() -> None:
    model = build(Peeking)
    report = otp.prune_(model, otp.Policy(rules=otp.Layers(drop=3)), data(), timing=0)
    assert {d.block for d in report.plan.drops} == {"layers.0", "layers.1", "layers.3"}
    assert [r.group for r in report.plan.refused] == ["layers.2"]
    assert model(data()[0]).isfinite().all()


# Regions


def wrapped(model: Net) -> None:
    model.layers[1] = torch.compile(model.layers[1], backend="eager")  # type: ignore[assignment]


def in_place(model: Net) -> None:
    model.layers[1].compile(backend="eager")


def its_forward(model: Net) -> None:
    block = model.layers[1]
    block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]


@pytest.mark.parametrize("compiled", [wrapped, in_place, its_forward])
def test_a_block_inside_a_compiled_region_is_refused(compiled: Callable[[Net], None]) -> None:
    model = build()
    compiled(model)
    said = refused(model, otp.Layers(drop=1), error=StructureError)
    assert str(said).startswith("'layers.1' is compiled.")
    assert said.fix == "prune the eager model, then compile it."


def test_a_class_whose_forward_is_compiled_is_refused() -> None:
    class Decorated(Block):
        forward = torch.compile(Block.forward, backend="eager")

    said = refused(build(Net, Decorated), otp.Layers(drop=1), error=StructureError)
    assert said.problem == "'layers.0' is compiled."


@pytest.mark.parametrize("training", [False, True])
def test_checkpointed_blocks_go_like_any_others(training: bool) -> None:
    plain, again = build().train(training), build(Checkpointed).train(training)
    policy = otp.Policy(rules=otp.Layers(drop=2))
    reports = [otp.prune_(model, policy, data(), timing=0) for model in (plain, again)]
    gone = [[drop.block for drop in report.plan.drops] for report in reports]
    assert gone[0] == gone[1] and len(gone[0]) == 2
    torch.testing.assert_close(plain(data()[0]), again(data()[0]))


def test_reentrant_checkpointing_is_refused_with_the_setting_that_works() -> None:
    said = refused(build(Reentrant), otp.Layers(drop=1), error=CalibrationError)
    assert said.problem.startswith("the output cannot be differentiated: ")
    assert "use_reentrant=False" in said.fix


# What the policy says


def test_targets_that_reach_no_block_are_quoted() -> None:
    said = refused(build(), otp.Layers(targets="head", drop=1), error=StructureError)
    assert said.problem == ("rule 0 reaches no layer that can go (no residual block among them).")
    assert said.where == "Policy.rules[0].targets = head"
    assert "otprune doctor" in said.fix


def test_targets_that_match_nothing_name_the_closest() -> None:
    said = refused(build(), otp.Layers(targets="lyers.1", drop=1), error=TargetError)
    assert "'lyers.1' matches no module" in said.problem
    assert "layers.1" in said.where


def test_layers_without_a_price_cannot_share_a_budget_with_channels() -> None:
    rules = otp.Layers(criterion="block_influence"), otp.Channels()
    said = refused(build(), *rules, error=PolicyError, budget=otp.Budget(macs="50%"))
    assert "'block_influence' ranks layers, but does not price them" in said.problem
    assert "'transport' or 'loss_delta'" in said.fix


def test_a_budget_of_layers_needs_a_rule_that_removes_some() -> None:
    budget = otp.Budget(layers="50%")
    said = refused(build(), otp.Channels(), error=PolicyError, budget=budget)
    assert said.problem == "the budget limits layers, and no rule may remove any."
    assert "Layers()" in said.fix


@pytest.mark.parametrize("rule", [otp.Layers, otp.Linearize])
def test_drop_and_keep_say_the_same_thing_twice(rule: Any) -> None:
    with pytest.raises(PolicyError, match="drop and keep say the same thing twice") as found:
        rule(drop=1, keep="50%")
    assert found.value.fix == "give one of them."


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (0, "0 removes nothing."),
        (-2, "-2 removes nothing."),
        ("0%", "'0%' removes nothing."),
        (0.0, "0.0 removes nothing."),
        (1.0, "1.0 removes every layer."),
        ("100%", "'100%' removes every layer."),
        (1.5, "1.5 is neither a share below 100 % nor whole."),
        ("300%", "'300%' is neither a share below 100 % nor whole."),
        ("2.5", "'2.5' is neither a share below 100 % nor whole."),
        ("some", "'some' is no number of layers."),
        ("1k", "'1k' is no number of layers."),
        (True, "True is no number of layers."),
        (float("nan"), "nan is no number of layers."),
        ([1], "[1] is no number of layers."),
    ],
)
def test_a_drop_that_is_no_number_of_layers_is_quoted(drop: Any, expected: str) -> None:
    with pytest.raises(PolicyError) as found:
        otp.Layers(drop=drop)
    assert found.value.problem == expected
    assert found.value.where == "Layers.drop" and found.value.fix


@pytest.mark.parametrize(
    ("drop", "of_twelve"), [(3, 3), ("3", 3), (1, 1), (0.25, 3), ("25%", 3), ("12.5 %", 1)]
)
def test_a_drop_is_a_count_or_a_share(drop: Any, of_twelve: int) -> None:
    assert otp.Layers(drop=drop).dropped(12) == of_twelve


@given(st.one_of(st.integers(), st.floats(), st.text(max_size=6), st.booleans()))
def test_every_drop_is_a_count_a_proper_share_or_an_error_in_our_words(drop: Any) -> None:
    try:
        rule = Layers(drop=drop)
    except PolicyError as error:
        said = error
    else:
        assert isinstance(rule.drop, (int, float))
        assert rule.drop >= 1 if isinstance(rule.drop, int) else 0 < rule.drop < 1
        assert Layers.model_validate_json(rule.model_dump_json()) == rule
        return
    assert said.where == "Layers.drop" and said.fix


# Activations


def test_an_activation_with_a_state_of_its_own_is_no_candidate_for_a_line() -> None:
    found = otp.doctor(build(Net, lambda: Block(nn.PReLU)), data()[0])
    sites = {site.name: site for site in found.activations}
    assert sites["layers.0.act"].reason == "PReLU has a state of its own"
    assert sites["layers.0.act"].fix.startswith("replace it by an activation without parameters")


def test_making_activations_with_a_state_linear_is_refused_with_the_reason() -> None:
    model = build(Net, lambda: Block(nn.PReLU))
    said = refused(model, otp.Linearize(drop=1), error=StructureError)
    assert "layers.0.act: PReLU has a state of its own" in said.problem
    assert said.fix.startswith("replace it by an activation without parameters")


def test_making_more_activations_linear_than_there_are_says_how_many_can_be() -> None:
    said = refused(build(), otp.Linearize(drop=9), error=BudgetError)
    assert said.problem.startswith("rule 0 drops 9 of 4 activations")


def test_targets_that_reach_no_activation_are_quoted() -> None:
    said = refused(build(), otp.Linearize(targets="head", drop=1), error=StructureError)
    assert "reaches no activation that can become linear" in said.problem
    assert said.where == "Policy.rules[0].targets = head"
