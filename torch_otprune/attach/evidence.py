"""What the rules of a policy ask to be looked at, gathered from a model that was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torch_otprune.attach.ahead import ahead
from torch_otprune.attach.needs import needs_of, reached, wide_of
from torch_otprune.attach.paths import folded
from torch_otprune.plan import owned_blocks, owned_sites
from torch_otprune.plan.weights import thinning_quote
from torch_otprune.policy import Layers, Policy
from torch_otprune.statistics import (
    ChainEvidence,
    Observation,
    Reservoir,
    SiteEvidence,
    hear,
    listen,
    signals_quote,
    streams_quote,
    tangents,
    tangents_quote,
)
from torch_otprune.statistics.loose import loose, slots
from torch_otprune.statistics.observation import DRAWS
from torch_otprune.statistics.reduce import all_objects, ranks, ranks_where
from torch_otprune.statistics.signals import WIDE_ROWS
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import Graph, batch_size
from torch_otprune.structure.costs import beside
from torch_otprune.structure.graph import Block, Group

__all__ = ["chains", "counted", "fineness", "lines", "mixtures", "rows", "told"]


def counted(model: nn.Module, graph: Graph, probes: Reservoir, example: Any) -> Graph:
    """Count on what calibration kept where the data decide how much is computed.

    Args:
        model: the dense model.
        graph: this rank's analysis.
        probes: samples, the same ones whatever the batches and the ranks.
        example: what the analysis ran on.

    Returns:
        the analysis, with the first rank's costs where there are several.
    """
    if ranks_where(bool(graph.costs["macs"].open)) and (kept := probes.everywhere()):
        graph = beside(model, graph, max(kept, key=batch_size), example)
    return replace(graph, costs=all_objects(graph.costs)[0]) if ranks() > 1 else graph


def chains(
    model: nn.Module, policy: Policy, graph: Graph, probes: Reservoir, *, sites: bool
) -> dict[str, ChainEvidence]:
    """Look at what flows between the blocks that a rule may remove.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        probes: samples to run.
        sites: whether activations are looked at as well.

    Returns:
        chain to what was seen.
    """
    numbered, found = probes.numbered(), dict[str, ChainEvidence]()
    for index, blocks in _asked(model, policy, graph).items():
        rule = policy.rules[index]
        assert isinstance(rule, Layers)
        if getattr(rule.criterion, "learns", False) and ranks_where(not probes.everywhere()):
            continue  # training has decided
        heard = listen(
            model, graph, blocks, probes=numbered, draws=DRAWS, seed=policy.seed, sites=sites
        )
        every = probes.everywhere()  # one copy for all chains
        for name, chain in heard.items():
            found[name] = _ahead(model, policy, graph, chain, rule=rule, probes=every)
    return found


def _ahead(
    model: nn.Module,
    policy: Policy,
    graph: Graph,
    chain: ChainEvidence,
    *,
    rule: Layers,
    probes: Sequence[Any],
) -> ChainEvidence:
    """Add the means to try what the rule's repair leaves."""
    blocks = [graph.block(name) for name in chain.blocks]
    mended = ahead(model, graph, blocks, rule, batches=probes, seed=policy.seed)
    return replace(chain, mended=mended)


def _asked(model: nn.Module, policy: Policy, graph: Graph) -> dict[int, list[Block]]:
    """List the blocks of every rule that may remove any: one that keeps all costs nothing."""
    return {
        index: blocks
        for index, blocks in owned_blocks(model, policy, graph).items()
        for rule in [policy.rules[index]]
        if isinstance(rule, Layers) and rule.dropped(len(blocks)) != 0
    }


def rows(
    model: nn.Module, policy: Policy, graph: Graph, samples: int, *, paths: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Tell how much memory the rows that are kept as they are will take, before the first batch.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        samples: probes over all ranks, at most.
        paths: consumers, whose signals may be wanted.

    Returns:
        `streams`, by the first block of each run, `signals`, by layer, `tangents`, of the model,
        and `weights`, at the layer that takes most: bytes on each rank.
    """
    found, needs = dict[str, int](), needs_of(policy)
    wide = wide_of(model, policy, paths) if needs & {"moments", "signals"} else ()
    heard = [p for p in paths if p not in wide] if "signals" in needs else ()
    for blocks in _asked(model, policy, graph).values():
        found |= streams_quote(model, graph, blocks, samples=samples)
    tangents = {"": tangents_quote(model)} if "tangents" in needs else {}
    signals = signals_quote(model, heard, samples=samples)
    signals |= signals_quote(model, wide, samples=samples, rows=WIDE_ROWS)
    weights = thinning_quote(model, policy, graph)
    return {"streams": found, "signals": signals, "tangents": tangents, "weights": weights}


def told(
    found: Observation,
    model: nn.Module,
    policy: Policy,
    probes: Reservoir,
    *,
    graph: Graph,
    paths: Sequence[str],
) -> Observation:
    """Run the probes once more for criteria that look at whole laws or at gradients.

    Args:
        found: what is known without.
        model: the dense model.
        policy: the declaration.
        probes: samples to run.
        graph: the model's analysis.
        paths: the consumers.

    Returns:
        the observation with what the policy asks for.
    """
    needs = needs_of(policy)
    wide = wide_of(model, policy, paths) if needs & {"moments", "signals"} else ()
    narrow = [p for p in paths if p not in wide] if "signals" in needs else []
    if wide or narrow:
        kept = probes.everywhere()
        heard = hear(model, narrow, kept, seed=policy.seed) if narrow else {}
        more = hear(model, wide, kept, rows=WIDE_ROWS, seed=policy.seed) if wide else {}
        found = replace(found, signals=heard | more)
    if "folds" in needs:
        found = folded(found, model, policy, graph=graph, probes=probes)
    if "tangents" in needs:
        felt = tangents(model, probes.batches(), draws=DRAWS, seed=policy.seed)
        found = replace(found, tangents=felt)
    return found


def lines(
    model: nn.Module, policy: Policy, graph: Graph, batches: Sequence[Any]
) -> dict[str, SiteEvidence]:
    """Look at what goes through the activations that a rule may make linear.

    Args:
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        batches: probes.

    Returns:
        activation to what was seen.
    """
    owned = owned_sites(model, policy, graph)
    sites = [site for found in owned.values() for site in found if not site.reason]
    return watch_sites(model, sites, batches) if sites else {}


def mixtures(model: nn.Module, policy: Policy, graph: Graph) -> list[Group]:
    """List the mixtures whose experts some rule reaches."""
    names = reached(model, policy, graph)
    return [g for g in graph.groups if g.kind == "experts" and g.name in names]


def fineness(model: nn.Module, policy: Policy, graph: Graph, example: Any) -> dict[str, int]:
    """Find out how finely the inputs of consumers that are no modules must be told apart."""
    paths = loose(model, graph, reached(model, policy, graph))
    return slots(model, paths, example) if paths else {}
