"""What goes into activations and comes out: sums per channel over all samples and positions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.depth import SiteEvidence
from torch_otprune.statistics.reduce import all_sum_, ranks_where
from torch_otprune.structure.flow import Enter, Leave
from torch_otprune.structure.forward import evaluating, outside_inference, run
from torch_otprune.structure.graph import Block, Site
from torch_otprune.structure.layers import Conv
from torch_otprune.structure.sites import FUNCTIONS, op_of
from torch_otprune.structure.wiring import first_of, stream_of

__all__ = ["Taker", "Watch", "mean_weights", "real", "watch_sites"]

_PIECE = 1 << 22  # values that are widened to float64 at a time

_Key = tuple[str, str, int]  # module, function or nothing, which call in this forward pass


def watch_sites(
    model: nn.Module, sites: Iterable[Site], batches: Sequence[Any]
) -> dict[str, SiteEvidence]:
    """Run the model once on every batch and pool what every activation reads and writes.

    Counts are exact, and means and squares are merged without cancellation, so that neither the
    split into batches nor that among ranks matters beyond rounding. Positions that a batch's
    `attention_mask` calls padding are left out.

    Args:
        model: the dense model; left as it was.
        sites: the activations of its graph to look at; those that mix values are left out.
        batches: this rank's probes, possibly none.

    Returns:
        the evidence of every activation, by its name, the same on all ranks. One that no batch
        reached has a count of 0.

    Raises:
        CalibrationError: if an activation's channels differ in number between batches.

    Source: Chan, Golub & LeVeque 1979 for merging.
    """
    wanted = [site for site in sites if site.channels]
    pools = [_Pool(site) for site in wanted]
    watch = Watch(model, wanted, pools)
    with outside_inference(), evaluating(model), torch.no_grad(), watch:
        for batch in batches:
            watch.begin(batch)
            run(model, batch)
    _check(pools)
    _share_(pools)
    return {pool.site.name: pool.evidence(model) for pool in pools}


def real(batch: Any, size: int, total: int) -> Bool[Tensor, "samples positions"]:
    """Tell tokens from padding, where the batch says what is padding.

    Args:
        batch: as the model takes it.
        size: samples of a tensor inside the model.
        total: its positions.

    Returns:
        True where there is no mask, or it is of another shape.
    """
    mask = batch.kwargs.get("attention_mask") if hasattr(batch, "kwargs") else None
    if mask is None and isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (size, total):
        return mask.cpu() > 0
    return torch.ones(size, total, dtype=torch.bool, device="cpu")


def mean_weights(model: nn.Module, blocks: Sequence[Block]) -> Float[Tensor, " blocks"]:
    """Average the absolute weights of each block's linear layers.

    Args:
        model: the dense model.
        blocks: of one chain.

    Returns:
        one number per block; 0 for a block without matrices.
    """
    return torch.tensor(
        [_mean_weight(model, block) for block in blocks], dtype=torch.float64, device="cpu"
    )


def _mean_weight(model: nn.Module, block: Block) -> float:
    """Take every matrix, so that layers of a make of their own count as well."""
    total, count = 0.0, 0
    for path, module in model.named_modules():
        if block.holds(path) and not isinstance(module, nn.Embedding):
            for weight in (p for p in module.parameters(recurse=False) if p.dim() > 1):
                total += float(weight.detach().double().abs().sum())
                count += weight.numel()
    return total / max(count, 1)


@dataclass
class _Pool:
    """The sums of one activation."""

    site: Site
    count: Tensor = field(init=False)
    states: Tensor = field(init=False)  # inputs above zero, not below zero, not below six
    mean: Tensor = field(init=False)  # of input and output
    centred: Tensor = field(init=False)  # input squared, output squared, their product
    odd: tuple[int, ...] = ()  # a shape that does not fit

    def __post_init__(self) -> None:
        channels = self.site.channels
        self.count = torch.zeros((), dtype=torch.float64, device="cpu")
        self.states, self.mean, self.centred = (
            torch.zeros(n, channels, dtype=torch.float64, device="cpu") for n in (3, 2, 3)
        )

    def take(self, z: Tensor, phi: Tensor, batch: Any) -> None:
        """Add one call."""
        axis = self.site.axis
        if z.shape != phi.shape or z.shape[axis] != self.site.channels:
            self.odd = self.odd or tuple(z.shape)
            return
        wide, image = z.movedim(axis, -1), phi.detach().movedim(axis, -1)
        rows = max(_PIECE * len(wide) // max(wide.numel(), 1), 1)
        kept = self._kept(wide, batch)
        for first in range(0, len(wide), rows):
            part = slice(first, first + rows)
            chosen = None if kept is None else kept[part].flatten()
            self._add(*(self._flat(t[part], chosen) for t in (wide, image)))

    def _kept(self, wide: Tensor, batch: Any) -> Tensor | None:
        if wide.dim() < 3:
            return None
        kept = real(batch, len(wide), wide[0].numel() // max(wide.shape[-1], 1))
        return None if bool(kept.all()) else kept

    def _flat(self, wide: Tensor, chosen: Tensor | None) -> Tensor:
        flat = wide.reshape(-1, self.site.channels)
        flat = flat if chosen is None else flat[chosen.to(flat.device)]
        return flat.cpu().double() if flat.device.type == "mps" else flat.double()

    def _add(self, z: Tensor, phi: Tensor) -> None:
        fresh = len(z)
        if not fresh:
            return
        states = torch.stack([(z > 0).sum(0), (z >= 0).sum(0), (z >= 6).sum(0)])
        mean = torch.stack([z.mean(0), phi.mean(0)])
        a, b = z - mean[0], phi - mean[1]
        centred = torch.stack([a.square().sum(0), b.square().sum(0), (a * b).sum(0)]).cpu()
        total = self.count + fresh
        gap = mean.cpu() - self.mean
        self.centred += centred + _squares(gap) * (self.count * fresh / total)
        self.mean += gap * (fresh / total)
        self.states += states.cpu()
        self.count = total

    def evidence(self, model: nn.Module) -> SiteEvidence:
        """Turn sums into what criteria ask for."""
        site, n = self.site, self.count.clamp_min(1)
        states, spread = self.states / n, self.centred / n
        return SiteEvidence(
            name=site.name,
            function=site.function,
            count=int(self.count),
            positive=states[0],
            nonnegative=states[1],
            capped=states[2],
            mean=self.mean[0],
            var=spread[0],
            out_mean=self.mean[1],
            out_var=spread[1],
            cov=spread[2],
            norm=_norm(model, site),
            reads=_reads(model, site),
            magnitude=_magnitude(model, site),
        )


def _squares(gap: Tensor) -> Tensor:
    return torch.stack([gap[0].square(), gap[1].square(), gap[0] * gap[1]])


def _share_(pools: Sequence[_Pool]) -> None:
    """Sum up over ranks: first where the middle is, then how far everything lies from it."""
    sums = [pool.mean * pool.count for pool in pools]
    counts = [pool.count.clone() for pool in pools]
    all_sum_([*sums, *counts, *(pool.states for pool in pools)])
    for pool, total, count in zip(pools, sums, counts, strict=True):
        middle = total / count.clamp_min(1)
        pool.centred += _squares(pool.mean - middle) * pool.count
        pool.mean, pool.count = middle, count
    all_sum_([pool.centred for pool in pools])


def _check(pools: Sequence[_Pool]) -> None:
    """Fail on all ranks if an activation's channels are not told by its layers."""
    odd = [pool for pool in pools if pool.odd]
    places = ranks_where(bool(odd))  # those that wait for the sums of others would hang
    if not places:
        return
    site, shape = (odd[0].site, list(odd[0].odd)) if odd else (None, None)
    raise CalibrationError(
        f"activation '{site.name}' had {site.channels} channels, then an input of shape {shape}."
        if site is not None
        else f"an activation on rank {places[0]} changed its number of channels.",
        where=f"axis {site.axis} of its input" if site is not None else f"rank {places[0]}",
        fix="make all batches of one length, or use a criterion of the stream: 'transport'.",
    )


def _norm(model: nn.Module, site: Site) -> tuple[Tensor, Tensor] | None:
    if site.norm is None:
        return None
    norm = model.get_submodule(site.norm)
    scale, shift = (getattr(norm, name) for name in ("weight", "bias"))
    ones = torch.ones(site.channels, dtype=torch.float64, device="cpu")
    return (
        torch.zeros_like(ones) if shift is None else shift.detach().double().cpu(),
        ones if scale is None else scale.detach().double().cpu().abs(),
    )


def _reads(model: nn.Module, site: Site) -> Tensor | None:
    """Add up the squared weights on each channel, if linear layers are all that reads it."""
    if site.others or not site.readers:
        return None
    readers = (model.get_submodule(path) for path in site.readers)
    found = [_columns(module, site.channels) for module in readers]
    return torch.stack(found).sum(0)


def _columns(module: nn.Module, channels: int) -> Tensor:
    weight = module.get_parameter("weight").detach().double().cpu().square()
    if not isinstance(module, Conv):
        return weight.sum(0).view(channels, -1).sum(1)
    if module.transposed:
        return weight.flatten(1).sum(1)
    groups = module.groups
    return weight.view(groups, -1, channels // groups, weight[0, 0].numel()).sum((1, 3)).flatten()


def _magnitude(model: nn.Module, site: Site) -> float | None:
    if site.producer is None:
        return None
    weight = model.get_submodule(site.producer).get_parameter("weight").detach()
    alive = weight[weight != 0].double().abs()
    return float(alive.mean()) if len(alive) else 0.0


class Taker(Protocol):
    """What wants to see every call of one activation."""

    def take(self, z: Tensor, phi: Tensor, batch: Any) -> None:
        """Look at the input and the output of one call.

        Args:
            z: what went in, a copy.
            phi: what came out.
            batch: what the model was run on.
        """


class Watch(TorchFunctionMode):
    """Catch the wanted activations, whether they are modules or functions.

    Args:
        model: it is hooked while the watch is entered.
        sites: the activations to catch.
        takers: who sees each of them.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], takers: Sequence[Taker]) -> None:
        super().__init__()
        self.model = model
        self.wanted: dict[_Key, Taker] = {
            (s.module, s.function if s.functional else "", s.ordinal): taker
            for s, taker in zip(sites, takers, strict=True)
        }
        self.open: list[tuple[str, Taker | None, Tensor | None]] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.batch: Any = None
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, batch: Any) -> None:
        """Note that a forward pass is about to start."""
        self.batch = batch
        self.calls.clear()
        self.open.clear()

    def __enter__(self) -> Watch:
        # All modules: a function belongs to the innermost one that is running.
        for name, module in self.model.named_modules():
            enter, leave = Enter(self, name), Leave(self)
            self.handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.open.clear()

    def _due(self, path: str, function: str) -> Taker | None:
        self.calls[path, function] += 1
        return self.wanted.get((path, function, self.calls[path, function]))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = op_of(getattr(function, "__name__", ""))
        path = self.open[-1][0] if self.open else ""
        pool = self._due(path, FUNCTIONS[name].lower()) if name in FUNCTIONS else None
        z = _before(args, kwargs or {}) if pool is not None else None
        out = function(*args, **(kwargs or {}))
        if pool is not None and z is not None:
            pool.take(z, out, self.batch)
        return out

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is about to run."""
        pool = self._due(path, "")
        self.open.append((path, pool, _before(args, kwargs) if pool is not None else None))

    def leave(self, output: Any) -> None:
        """Note that the innermost module is done; None where it failed."""
        _, pool, z = self.open.pop()
        phi = first_of(output)
        if pool is not None and z is not None and phi is not None:
            pool.take(z, phi, self.batch)


def _before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Copy an activation's input, which it may overwrite."""
    given = stream_of(args, kwargs)
    return None if given is None else given.detach().clone()
