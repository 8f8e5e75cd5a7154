"""The contract of a replacement: what stands where a block was."""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import ClassVar, Literal

from torch_otprune.policy.registry import REPLACEMENTS, Setting
from torch_otprune.structure.graph import Block, Swap

__all__ = ["Replacement", "register"]

register = REPLACEMENTS.register


class Replacement(Setting, ABC):
    """Say what stands in for a removed block. A subclass is one file."""

    aims: ClassVar[bool] = False  # whether the layer in front writes what the block would have
    stand_in: ClassVar[Literal["scale", "low_rank", "hidden"] | None] = (
        None  # the module that stays in the block's place
    )

    def swaps(self, block: Block) -> tuple[Swap, ...]:
        """Spell the removal of a block, module by module.

        Args:
            block: what goes.

        Returns:
            one swap per module that makes way.
        """
        if self.stand_in is None or block.kind == "branch":
            return block.swaps
        first, *others = block.swaps
        rank = self.rank_for(block)
        return (replace(first, by=self.stand_in, rank=rank, like=block.like), *others)

    def costs(self, block: Block) -> dict[str, int]:
        """Count what stands in for a block costs.

        Args:
            block: what goes.

        Returns:
            `params`, and `macs` per sample, at the dense width; both grow with the channels.
        """
        if self.stand_in is None or block.kind == "branch":
            return {}
        if self.stand_in == "scale":
            return {"params": 2 * block.channels}
        rank = self.rank_for(block)
        each, own = 2 * block.channels * rank, 2 if self.stand_in == "hidden" else 1
        return {"params": each + own * block.channels, "macs": each * block.positions}

    def rank_for(self, block: Block) -> int:
        """Choose the rank of a map that stands in, or its hidden units; 0 where there is none.

        Args:
            block: what goes.

        Returns:
            at most the stream's channels.
        """
        return 0
