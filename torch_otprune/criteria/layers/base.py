"""The contract of a layer criterion: evidence about a chain of blocks in, a ranking out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from torch_otprune.criteria.base import Ranking, checked
from torch_otprune.criteria.layers.look import Look, rising
from torch_otprune.errors import CalibrationError
from torch_otprune.policy.registry import LAYER_CRITERIA, Setting
from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence

__all__ = ["LayerCriterion", "LayerNeed", "ScoreLayerCriterion", "SiteCriterion", "register"]

LayerNeed = Literal["points", "writers", "feel", "sites", "folds", "trial"]
register = LAYER_CRITERIA.register


class LayerCriterion(Setting, ABC):
    """Rank the blocks of a chain. A subclass is one file: settings, limits, source, algorithm."""

    needs: ClassVar[frozenset[LayerNeed]] = frozenset({"points"})
    learns: ClassVar[bool] = False  # whether masks are trained while the policy is attached
    priced: ClassVar[bool] = False  # whether costs are shares of the network's squared output

    def following(self, replacement: str) -> LayerCriterion:
        """Fit in with what stands in for a removed block.

        Args:
            replacement: its kind.

        Returns:
            the criterion to use; itself unless it prices what stands in.
        """
        return self

    @abstractmethod
    def rank(self, evidence: ChainEvidence) -> Ranking:
        """Order the blocks from the first to keep to the first to go.

        Args:
            evidence: what is known about the chain.

        Returns:
            the ranking over blocks; `curve[k]` is what keeping only `order[:k]` costs.
        """

    def price(
        self, chains: Sequence[ChainEvidence], *, look: Look | None = None, count: int | None = None
    ) -> dict[str, float]:
        """Price every block of several chains by what it adds to those that go before it.

        Args:
            chains: what is known about each.
            look: tries sets of blocks of all of them, for a criterion that looks ahead.
            count: how many blocks go; None where a budget decides.

        Returns:
            block to price; no block of a chain goes before its turn.
        """
        prices: dict[str, float] = {}
        for evidence in chains:
            ranking = self.rank(evidence)
            added = (ranking.curve[:-1] - ranking.curve[1:]).clamp_min(0).flip(0).tolist()
            order = [evidence.blocks[b] for b in ranking.order.flip(0).tolist()]
            prices |= rising(list(zip(order, added, strict=True)))
        return prices

    def told(
        self, chains: Sequence[ChainEvidence], *, look: Look | None = None, count: int | None = None
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Price, and say what a reader of the plan should know beside the prices.

        Args:
            chains: as for `price`.
            look: likewise.
            count: likewise.

        Returns:
            block to price, and block to note; as a rule no notes.
        """
        return self.price(chains, look=look, count=count), {}


class ScoreLayerCriterion(LayerCriterion, ABC):
    """Rank by one independent number per block."""

    @abstractmethod
    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Score every block; larger means keep.

        Args:
            evidence: what is known about the chain.

        Returns:
            one finite number per block, not below zero.
        """

    def rank(self, evidence: ChainEvidence) -> Ranking:
        """Sort by score; removing blocks costs the sum of their scores."""
        score = checked(self.score(evidence), "block", where=f"chain '{evidence.name}'")
        order = torch.argsort(score, descending=True, stable=True)
        left = score[order].flip(0).cumsum(0).flip(0)
        return Ranking(order, torch.cat([left, left.new_zeros(1)]))


class SiteCriterion(ScoreLayerCriterion, ABC):
    """Score activations one by one; a block scores the mean of its activations."""

    needs: ClassVar[frozenset[LayerNeed]] = frozenset({"sites"})

    @abstractmethod
    def site(self, evidence: SiteEvidence) -> float:
        """Score one activation.

        Args:
            evidence: what is known about it.

        Returns:
            a finite number, not below zero; 0 where it is linear already.
        """

    def score(self, evidence: ChainEvidence) -> Float[Tensor, " blocks"]:
        """Average over the activations of each block.

        Args:
            evidence: what is known about the chain.

        Returns:
            one number per block.

        Raises:
            CalibrationError: if a block has no activation of its own.
        """
        for name, sites in zip(evidence.blocks, evidence.sites, strict=True):
            if not sites:
                raise CalibrationError(
                    f"block '{name}' has no activation to look at.",
                    where=f"criterion {self.kind}",
                    fix="use criterion 'transport', or target whole layers.",
                )
        means = [sum(map(self.site, sites)) / len(sites) for sites in evidence.sites]
        return torch.tensor(means, dtype=torch.float64, device="cpu")
