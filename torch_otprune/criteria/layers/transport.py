"""The flagship for depth: let go what a cheap map can stand in for."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from torch_otprune.criteria.base import Ranking, settle
from torch_otprune.criteria.layers.base import LayerCriterion, LayerNeed, register
from torch_otprune.criteria.layers.look import Look, look_ahead, rising
from torch_otprune.criteria.layers.runs import greedy, priced_runs
from torch_otprune.criteria.layers.spans import Replace, span_costs
from torch_otprune.statistics.depth import ChainEvidence

__all__ = ["Transport"]

_MAPS: dict[str, Replace] = {
    "identity": "identity",
    "scale": "scale",
    "low_rank": "scale",
    "monge_net": "scale",
}


@register
class Transport(LayerCriterion):
    """Keep the blocks whose work no cheap map could do, as the network's output sees it.

    A block carries every row of the stream to a new place. If a map R carries them nearly there,
    the block can go: with x in front of a span of blocks and y behind it, the span costs what the
    output feels of y - R(x), `sum_c feel_c E(y - R(x))_c^2`, as a share of the output's power.
    Pairs are known here, so the coupling is given and the transport cost is a plain mean. R is the
    identity, a scale and shift per channel, or the best affine change of the last linear layer in
    front that writes to the stream, which can take it up; where there is none, `affine` is a scale
    and shift. R is always fitted on other samples than those that price it.

    Adjacent blocks that go together are replaced by one map, so a set of blocks costs the sum over
    its contiguous runs. Blocks go one by one, each time the one that adds least.

    What the output feels is taken to first order, and what the repair of the layers that stay
    wins back is not in these prices. So a plan tries: it takes each block out, mends the rest
    quickly on half of the probes, and sees what is left of the output on the other half. The
    cheapest goes; then those that still could be the next are tried together with it, in
    whichever stage of the network they are, and so on, at most `trials` times. A block's price is
    what it adds to those that went before, in the unit of the prices of channels.

    `rank` sees one chain and tries single blocks only; there a span costs as much more than its
    blocks as it does to the output before any repair.

    Settings that are read when: a plan whose rule tries blocks (`measured: repair`, and probes
    enough to hold half of them out) reads `trials` alone. `rank`, and a plan that cannot try,
    prices spans: with `measured: repair` it reads `longest_span`; with `removal`, and where a block
    cannot be tried, also `replace`, `folds` and `left`; with `none`, the same but `left`.

    Limits: a block that is worth much alone is not tried together with others before its turn
    comes, so a pair of blocks that undo each other may be missed. In `rank`, runs are priced
    apart: an error made early also moves what later maps read. Where a rectifier follows the
    addition, the layer in front can take the map up only where the rectifier is on.
    A run beyond `longest_span` is priced as spans in a row, although only the first of them has
    a layer to fold into. The curve never falls as blocks go, so it is too high where two blocks
    undo each other. The ridge is the best of four on the rows that price it, which flatters the
    price a little.

    Source: ours; fitting the layer in front as in ReplaceMe (Shopkhoev et al. 2025), with an
    intercept, and weighted by what the output feels.
    """

    kind: Literal["transport"] = "transport"
    needs: ClassVar[frozenset[LayerNeed]] = frozenset({"points", "writers", "feel", "trial"})
    priced: ClassVar[bool] = True
    replace: Replace | None = Field(
        default=None,
        description="the map that takes a block's place where no repair is tried, which takes what "
        "the rule says; null follows the rule's replacement",
    )
    longest_span: int = Field(
        default=8, ge=1, description="most blocks under one map; read where spans are priced"
    )
    folds: int = Field(
        default=4,
        ge=2,
        description="parts of the samples, held out in turn; read where no repair is tried",
    )
    measured: Literal["repair", "removal", "none"] = Field(
        default="repair",
        description="bring prices to what taking a block out alone really does, measured on the "
        "probes: after a quick run of the rule's repair, without repair, or not at all",
    )
    trials: int = Field(
        default=64,
        ge=1,
        description="most sets of blocks that a plan takes out and mends; every block alone is "
        "always tried",
    )
    left: float = Field(
        default=0.4,
        gt=0,
        description="share of a price measured by removal that the repair leaves; read where no "
        "repair is tried",
    )

    def following(self, replacement: str) -> LayerCriterion:
        """Price what the rule puts in a block's place."""
        if self.replace is not None:
            return self
        return self.model_copy(update={"replace": _MAPS.get(replacement, "affine")})

    def price(
        self, chains: Sequence[ChainEvidence], *, look: Look | None = None, count: int | None = None
    ) -> dict[str, float]:
        """Let blocks go one by one, and see each time how the others stand now."""
        names = [name for evidence in chains for name in evidence.blocks]
        if self.measured == "repair" and look is not None:
            wanted = len(names) if count is None else count
            if steps := look_ahead(look, names, count=wanted, trials=self.trials):
                added = settle(
                    torch.tensor([more for _, more in steps], dtype=torch.float64, device="cpu")
                )
                order = (name for name, _ in steps)
                return rising(list(zip(order, added.tolist(), strict=True)))
        return super().price(chains, look=look, count=count)

    def rank(self, evidence: ChainEvidence) -> Ranking:
        """Price every span, then remove block by block."""
        return greedy(self.prices(evidence))

    def prices(self, evidence: ChainEvidence) -> Float[Tensor, "blocks blocks"]:
        """Price every run of blocks.

        Args:
            evidence: what is known about the chain.

        Returns:
            at [i, j] what removing blocks i to j together costs, as a share of the network's
            squared output; infinite below the diagonal.
        """
        span = self._mended(evidence) if self.measured == "repair" else None
        if span is None:
            span = span_costs(
                evidence,
                replace=self.replace or "affine",
                longest=self.longest_span,
                folds=self.folds,
            )
            span = span if self.measured == "none" else span * self._shortfall(evidence)
        price = priced_runs(span)
        above = torch.ones_like(price, dtype=torch.bool).triu()
        price[above] = settle(price[above])
        return price

    def _mended(self, evidence: ChainEvidence) -> Float[Tensor, "blocks blocks"] | None:
        """Price single blocks by what a repair leaves, and spans by how much more they do.

        Args:
            evidence: what is known about the chain.

        Returns:
            price of every span: the sum of its blocks' own, times what removing them together
            does to the output over what removing them one by one does; infinite for spans that
            are not tried, None where a block could not be.
        """
        blocks = range(len(evidence.blocks))
        left = [] if evidence.mended is None else [evidence.mended([b]) for b in blocks]
        if not left or not all(map(isfinite, left)):
            return None
        alone = [evidence.trial([b]) for b in blocks]
        price = torch.full((len(left), len(left)), torch.inf, dtype=torch.float64, device="cpu")
        for i in blocks:
            for j in blocks[i : i + self.longest_span]:
                apart = sum(alone[i : j + 1])
                more = evidence.trial(range(i, j + 1)) / apart if j > i and apart > 0 else 1.0
                price[i, j] = sum(left[i : j + 1]) * max(more, 1.0)
        return price

    def _shortfall(self, evidence: ChainEvidence) -> Float[Tensor, "blocks blocks"]:
        """Measure how much more removing a block does than its first-order price says.

        A span is raised by the most of its blocks: what is far from first order for one of them
        is no nearer for all.

        Args:
            evidence: what is known about the chain.

        Returns:
            factors of at least `left`, at [i, j] for blocks i to j.
        """
        plain = span_costs(evidence, replace="identity", longest=1, folds=self.folds).diagonal()
        real = plain.new_tensor([evidence.trial([b]) for b in range(len(evidence.blocks))])
        ratio = torch.where(plain > 0, real / plain.clamp_min(1e-300), 1.0).clamp(1.0, 100.0)
        spans = ratio.expand(len(ratio), -1).triu()
        return self.left * spans.cummax(1).values.clamp_min(1.0)
