"""All that calibration found out, ready for criteria: summed over ranks, hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence
from torch_otprune.statistics.evidence import Learnt
from torch_otprune.statistics.loose import agreed, filed
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.patches import columns, full_weight, supported
from torch_otprune.statistics.recorder import Recorder
from torch_otprune.statistics.reduce import all_objects, all_sum_, ranks
from torch_otprune.statistics.sensitivity import Sensitivity, sense
from torch_otprune.statistics.tangents import Tangents

__all__ = ["DRAWS", "Observation", "conclude", "summed"]

DRAWS = 4


@dataclass(frozen=True)
class Observation:
    """What is known about every consumer.

    Args:
        moments: second moments of their inputs.
        sensitivity: what the output feels; None where nobody asked.
        samples: calibration samples seen, over all ranks.
        chains: what flows between blocks that may go, by the first block of each run.
        sites: what goes through activations that may become linear, by name.
        signals: rows of what consumers read, by consumer; empty where nobody asked.
        tangents: squared gradients of every parameter; None where nobody asked.
        learnt: what training decided, by group and block.
    """

    moments: Mapping[str, Moments]
    sensitivity: Sensitivity | None
    samples: int
    chains: Mapping[str, ChainEvidence] = field(default_factory=dict)
    sites: Mapping[str, SiteEvidence] = field(default_factory=dict)
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    tangents: Tangents | None = None
    learnt: Mapping[str, Learnt] = field(default_factory=dict)

    def chain(self, names: Sequence[str]) -> ChainEvidence:
        """Look up what is known about blocks that follow one another.

        Args:
            names: blocks in order.

        Returns:
            the evidence about these alone.
        """
        return next(c for c in self.chains.values() if names[0] in c.blocks).part(names)

    def hash(self) -> str:
        """Fingerprint the data by four digits of every consumer's mean square.

        Returns:
            16 hexadecimal digits; `none` where nothing was observed.
        """
        seen = any((self.moments, self.chains, self.sites, self.signals))
        if not seen and not self.learnt and self.tangents is None:
            return "none"
        lines = [f"{self.samples}"]
        if self.tangents is not None:
            lines.append(f"tangents {self.tangents.trace:.3e}")
        for name in sorted(self.chains):
            powers = self.chains[name].points.square().mean((1, 2)).tolist()
            lines.append(f"{name} {' '.join(f'{power:.3e}' for power in powers)}")
        for name in sorted(self.sites):
            site = self.sites[name]
            lines.append(f"{name} {site.count} {float(site.out_var.sum()):.3e}")
        for path in sorted(self.moments):
            found = self.moments[path]
            lines.append(f"{path} {found.count} {float(found.second(centred=False).trace()):.3e}")
        for path in sorted(self.signals):
            heard = self.signals[path]
            lines.append(f"{path} {len(heard)} {float(heard.double().square().sum()):.3e}")
        for name in sorted(self.learnt):
            lines.append(f"{name} {self.learnt[name].keep.nonzero().flatten().tolist()}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def conclude(
    model: nn.Module,
    recorder: Recorder,
    probes: Sequence[Any],
    paths: Sequence[str],
    *,
    chains: Mapping[str, ChainEvidence],
    sites: Mapping[str, SiteEvidence],
    samples: int,
    feel: bool,
    seed: int,
    loose: Sequence[str] = (),
) -> Observation:
    """Close the books: probe the sensitivity and add everything up over ranks.

    On one rank the moments are the recorder's own, so they go on growing with it: a copy would
    take twice the memory that was quoted.

    Args:
        model: the model.
        recorder: what the hooks gathered; left as it was.
        probes: a few batches for the sensitivity.
        paths: the consumers.
        chains: what flows between blocks, summed up already.
        sites: what goes through activations, summed up already.
        samples: samples this rank saw.
        feel: whether the sensitivity is wanted.
        seed: the policy's seed.
        loose: consumers that are no modules.

    Returns:
        the observation, equal on every rank.
    """
    moments, total = summed(model, recorder, samples)
    found = None
    if feel and total:
        centres = {path: _centre(model, path, moments) for path in paths}
        found = sense(model, centres, probes, draws=DRAWS, seed=seed, loose=loose)
        if ranks() > 1:
            _sum_sensitivity_(found)
    return Observation(dict(moments), found, total, chains, sites)


def summed(model: nn.Module, recorder: Recorder, samples: int) -> tuple[dict[str, Moments], int]:
    """Add up over ranks what every rank has for every path: zeros where a layer did not run.

    Args:
        model: the model.
        recorder: what this rank's hooks gathered; left as it was.
        samples: samples this rank saw.

    Returns:
        the moments, on one rank the recorder's own, and the samples of all ranks.
    """
    if ranks() == 1:
        return recorder.moments, samples
    widths = {path: columns(model.get_submodule(path)) for path in recorder.paths}
    widths |= agreed(all_objects(dict(recorder.others)))
    moments = {path: _copy(recorder, path, width) for path, width in widths.items()}
    counts = torch.tensor(
        [samples, *(m.count for m in moments.values())], dtype=torch.float64, device="cpu"
    )
    all_sum_([counts, *(t for m in moments.values() for t in (m.total, m.product))])
    for entry, count in zip(moments.values(), counts[1:].tolist(), strict=True):
        entry.count = int(count)
    return {path: m for path, m in moments.items() if m.count}, int(counts[0])


def _copy(recorder: Recorder, name: str, width: int) -> Moments:
    own = filed(recorder.moments, name)
    if own is None:
        return Moments.empty(width, torch.device("cpu"))
    return Moments(own.total.clone(), own.product.clone(), own.count)


def _centre(model: nn.Module, path: str, moments: Mapping[str, Moments]) -> Tensor | None:
    """Compute a layer's mean output from its mean input."""
    module = model.get_submodule(path)
    if path not in moments or not supported(module):
        return None
    mean = full_weight(module) @ moments[path].mean
    bias = getattr(module, "bias", None)
    return mean if bias is None else mean + bias.detach().double()


def _sum_sensitivity_(found: Sensitivity) -> None:
    """Add up over ranks what any of them felt: zeros where a layer did not run."""
    mine = [{path: len(value) for path, value in table.items()} for table in found.tables()]
    every = all_objects(mine)
    power = found.power.new_tensor([float(found.power), found.samples])
    all_sum_([power])
    found.power, found.samples = power[0], int(power[1])
    for number, table in enumerate(found.tables()):
        sizes = {path: size for told in every for path, size in told[number].items()}
        for path, size in sizes.items():
            table.setdefault(path, torch.zeros(size, dtype=torch.float64, device="cpu"))
        all_sum_(table[path] for path in sorted(sizes))
