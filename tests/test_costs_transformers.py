"""Transformers: heads count in what attention multiplies, and predictions are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_otprune as otp
from tests.zoo import ENTRIES
from tests.zoo.oracle import alive, doubled, random_cut
from torch_otprune.report import count_macs, count_params
from torch_otprune.structure import batch_size, trace
from torch_otprune.structure.forward import evaluating, run
from torch_otprune.structure.products import plain
from torch_otprune.surgery import compared, copied, cut_

pytest.importorskip("transformers", reason="Transformers is not installed")

COMMON = ("bert", "gpt2", "llama-grouped", "t5", "mixtral", "swinv2")
UNTOLD = ("bilinear", "deberta", "deberta-v2")  # torch counts another op, or cannot run there
RANDOM = (
    "dbrx",
    "experts_by_index",
)  # cut, the tokens go to other experts of a list


def built(name: str) -> tuple[nn.Module, Any]:
    entry = ENTRIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return alive(entry.build().double().eval()), doubled(entry.example())


def oracle(model: nn.Module, batch: Any) -> float:
    """Halve the operations that torch counts, of the plain ops."""
    model.requires_grad_(False)  # its tracker stumbles over views of parameters
    with (
        nn.utils.parametrize.cached(),
        evaluating(model),
        torch.no_grad(),
        plain(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        run(model, batch)
    return counter.get_total_flops() / 2 / batch_size(batch)


def hold(name: str) -> set[str]:
    """Hold predicted costs against measured ones, group by group and all at once.

    Returns:
        the kinds of groups that were cut.
    """
    model, batch = built(name)
    graph = trace(model, batch)
    macs, params = graph.costs["macs"], graph.costs["params"]
    assert macs.at(graph.full()) == count_macs(model, batch)
    if name not in UNTOLD:
        assert macs.at(graph.full()) == int(oracle(model, batch))
    generator, good = torch.Generator().manual_seed(1), []
    for group in graph.groups:
        cut = random_cut(group, 0.5, generator)
        if len(cut.keep) >= group.least and compared(model, [cut], batch)[0] < 1e-5:
            good.append(cut)
    for cuts in [*([cut] for cut in good), good]:
        small = copied(model)
        cut_(small, cuts)
        keep = graph.full() | {cut.group: len(cut.keep) for cut in cuts}
        assert params.at(keep) == count_params(small)
        if name not in RANDOM:
            assert macs.at(keep) == count_macs(small, batch), [cut.group for cut in cuts]
    return {graph.group(cut.group).kind for cut in good}


@pytest.mark.parametrize("name", COMMON)
def test_predicted_costs_of_a_transformer_are_measured(name: str) -> None:
    kinds = hold(name)
    assert {"channels", "heads"} <= kinds
    assert ("experts" in kinds) == (name == "mixtral")


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in COMMON])
def test_predicted_costs_of_every_net_are_measured(name: str) -> None:
    hold(name)


def test_a_head_takes_its_share_of_the_scores_and_means() -> None:
    model, batch = built("llama-grouped")
    tokens = batch["input_ids"].shape[1]
    config, graph = model.config, trace(model, batch)
    each = config.hidden_size // config.num_attention_heads
    group = next(g for g in graph.groups if g.kind == "heads")
    assert group.units == config.num_key_value_heads  # key-value heads, with their queries
    own = [t for t in graph.costs["macs"].terms if t.data and group.name in str(t.dims)]
    less = graph.full() | {group.name: group.units - 1}
    queries = config.num_attention_heads // config.num_key_value_heads
    freed = sum(t.at(graph.full()) - t.at(less) for t in own)
    assert freed == 2 * tokens**2 * each * queries


def test_experts_that_go_leave_their_tokens_to_the_others() -> None:
    model, batch = built("mixtral")
    graph = trace(model, batch)
    group = next(g for g in graph.groups if g.kind == "experts")
    cost, full = graph.costs["macs"], graph.full()
    freed = cost.at(full) - cost.at(full | {group.name: group.units - 1})
    tokens = batch["input_ids"].shape[1]
    assert freed == tokens * model.config.hidden_size  # the router's row, nothing else


def test_a_budget_of_macs_knows_what_attention_costs() -> None:
    model, batch = built("bert")
    rules = [otp.Channels(), otp.Heads()]
    with otp.attach(model, otp.Policy(rules=rules, budget=otp.Budget(macs=0.7))) as attached:
        plan = otp.observe(attached, [batch]).plan()
    report = otp.apply_(model, plan, [batch], timing=0)
    assert report.macs == plan.macs
    assert plan.macs.before == int(oracle(built("bert")[0], batch))
    assert plan.macs.after == int(oracle(model, batch)) <= 0.7 * plan.macs.before
