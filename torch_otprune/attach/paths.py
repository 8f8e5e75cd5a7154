"""What criteria ask of straight paths between samples, added to what is known of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from torch_otprune.criteria.layers import SpaceFolds
from torch_otprune.policy import Layers, Linearize, Policy
from torch_otprune.statistics import Observation, Reservoir, SiteEvidence
from torch_otprune.statistics.depth import SiteFold
from torch_otprune.statistics.folds import rectifiers, site_folds
from torch_otprune.statistics.paths import paths_between
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import Graph

__all__ = ["folded"]


def folded(
    found: Observation, model: nn.Module, policy: Policy, *, graph: Graph, probes: Reservoir
) -> Observation:
    """Follow paths between the probes for the criteria that ask.

    Every rank follows all paths, so all see the same. Of several such criteria with other numbers
    of paths or steps, the most of each are followed, for all of them.

    Args:
        found: what is known without.
        model: the dense model.
        policy: the declaration.
        graph: the model's analysis.
        probes: samples to pair.

    Returns:
        the observation with folds in the evidence of every rectifier.

    Raises:
        CalibrationError: if nothing lies between two samples, as between numbers of tokens.
    """
    asked = [
        rule.criterion
        for rule in policy.rules
        if isinstance(rule, (Layers, Linearize)) and isinstance(rule.criterion, SpaceFolds)
    ]
    kinked, _ = rectifiers(graph.sites)
    if not asked or not kinked:
        return found
    every = probes.everywhere()
    paths = paths_between(model, every, count=max(c.paths for c in asked), seed=policy.seed)
    seen = watch_sites(model, kinked, every)
    steps = max(c.steps for c in asked)
    folds = site_folds(model, graph.sites, paths, seen, steps=steps, seed=policy.seed)
    chains = {
        name: replace(chain, sites=tuple(tuple(_told(folds, s) for s in b) for b in chain.sites))
        for name, chain in found.chains.items()
    }
    sites = {name: _told(folds, site) for name, site in found.sites.items()}
    return replace(found, chains=chains, sites=sites)


def _told(folds: Mapping[str, SiteFold], site: SiteEvidence) -> SiteEvidence:
    return replace(site, fold=folds.get(site.name))
