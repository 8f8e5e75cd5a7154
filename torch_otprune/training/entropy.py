"""Prune weights where activations hardly switch, until some never do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torch_otprune.errors import CalibrationError, LoadError, PolicyError, StructureError
from torch_otprune.policy.base import nearest
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.forward import evaluating, first_tensor
from torch_otprune.training.share import Share, amounts

__all__ = ["EntropySchedule"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class EntropySchedule:
    """Train, observe, prune, train again: the loop that drives some activations to never switch.

        schedule = EntropySchedule(model, {"relu1": "conv1", "layer1.0.relu": "layer1.0.conv1"})
        for _ in range(rounds):
            with schedule.observe():
                for images, _ in calibration:
                    model(images)
            schedule.prune_()
            with schedule.hold(optimizer):
                train(model, optimizer)

    A unit is on where its pre-activation is above zero. How often that is so is counted over all
    batches and positions together, in evaluation mode, so a rare event counts as what it is. A
    layer's entropy is the mean over its units that do switch, in bits; a unit that is always on or
    always off counts neither way. Each round removes `rate` of the weights that are left in layers
    of positive entropy: more from layers of low entropy and small weights, the smallest ones first.

    Weights become zeros in the user's own tensors; nothing else is left in the model.

    Limits: on and off describe ReLU and its kin (ReLU6's upper end is a third state); for GELU or
    SiLU the sign is a proxy. Counting N events, a rate below 3 / N may be missed. In a residual net
    an activation behind the addition also sees the shortcut: give only such pairs as belong
    together. A collapsed activation saves nothing until it is removed and its neighbours folded.

    Source: Liao et al. 2023 (EGP) and NEPENTHE, by the public code. Ours: pooled counts instead of
    a mean over batches; shares by `softmax_log`, where the published `softmax_ratio` gives nearly
    the whole budget to one layer; a bound on every layer's share of zeros.

    Args:
        model: the model that is trained.
        sites: path of every activation, and the convolution or linear layer that feeds it.
        rate: share of the candidates' weights that a round removes.
        share: `softmax_log`, or `softmax_ratio` as published.
        tau: temperature of `softmax_log`: above 1 evens the shares out, below 1 sharpens them.
        max_layer_sparsity: no layer gets a larger share of zeros; 1 as published.
        protect: layers that are not pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, str],
        *,
        rate: float = 0.5,
        share: Share = "softmax_log",
        tau: float = 1.0,
        max_layer_sparsity: float = 0.98,
        protect: Iterable[str] = (),
    ) -> None:
        _check_numbers(rate=rate, max_layer_sparsity=max_layer_sparsity)
        if share not in ("softmax_log", "softmax_ratio") or not 0 < tau < math.inf:
            raise PolicyError(
                f"share is {share!r} and tau {tau}.",
                where="EntropySchedule",
                fix="use share 'softmax_log' or 'softmax_ratio', and a tau above 0.",
            )
        self.model, self.sites = model, _checked(model, sites, protect)
        self.rate, self.share, self.tau = rate, share, tau
        self.max_layer_sparsity, self.protect = max_layer_sparsity, frozenset(protect)
        self._counts: dict[str, _Count] = {}
        self._gone: dict[str, Tensor] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Count what every activation does while the caller runs batches, then forget the rest.

        The model is in evaluation mode meanwhile and gradients are off. What earlier rounds
        counted is dropped first, as the weights have changed.

        Yields:
            nothing.
        """
        self._counts = {
            site: _Count(site, axis=1 if isinstance(self._layer(layer), _CONV) else -1)
            for site, layer in self.sites.items()
        }
        handles = [
            self.model.get_submodule(site).register_forward_pre_hook(_Look(count), with_kwargs=True)
            for site, count in self._counts.items()
        ]
        handles.append(self.model.register_forward_pre_hook(_Next(tuple(self._counts.values()))))
        try:
            with evaluating(self.model), torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
        for count in self._counts.values():
            count.pool_()

    @property
    def entropies(self) -> dict[str, float]:
        """Tell each activation's entropy in bits, from 0 where no unit switches.

        Returns:
            the mean over the units that do.
        """
        return {site: count.entropy() for site, count in self._seen().items()}

    @property
    def rates(self) -> dict[str, Tensor]:
        """Tell how often each unit of each activation is on.

        Returns:
            one share per channel, float64.
        """
        return {site: count.share(1) for site, count in self._seen().items()}

    def collapsed(self) -> tuple[str, ...]:
        """List the activations in which no unit switched: each of them is linear per channel.

        Returns:
            module paths, in the order of `sites`; what `Linearize` and folding can remove.
        """
        return tuple(site for site, value in self.entropies.items() if value == 0.0)

    def prune_(self) -> dict[str, int]:
        """Zero this round's weights, in place.

        Returns:
            how many weights each layer lost; layers of entropy zero or protected are not listed.

        Raises:
            PolicyError: if no layer may lose any weight.
        """
        weights = {site: self._weight(layer) for site, layer in self.sites.items()}
        room = {site: self._room(site, weight) for site, weight in weights.items()}
        entropies = self.entropies
        pool = [site for site in self.sites if entropies[site] > 0 and room[site] > 0]
        if not pool:
            raise PolicyError(
                "no layer may lose any more weights.",
                where=f"EntropySchedule, max_layer_sparsity {self.max_layer_sparsity}",
                fix="stop here, raise max_layer_sparsity, or protect fewer layers.",
            )
        left = {site: int((weights[site] != 0).sum()) for site in pool}
        size = {site: float(weights[site].abs().sum()) / left[site] for site in pool}
        taken = amounts(
            {site: entropies[site] * size[site] for site in pool},
            {site: room[site] for site in pool},
            int(self.rate * sum(left.values())),
            share=self.share,
            tau=self.tau,
        )
        for site, count in taken.items():
            self._zero_(site, count)
        return {self.sites[site]: count for site, count in taken.items()}

    def mask_(self) -> None:
        """Set every weight that was pruned to zero again; call it after each optimiser step."""
        for layer, gone in self._gone.items():
            weight = self._weight(layer)
            weight.masked_fill_(gone.to(weight.device), 0.0)

    @contextmanager
    def hold(self, optimizer: Optimizer) -> Iterator[None]:
        """Call `mask_` after every step of an optimiser.

        Args:
            optimizer: the one that trains the model.

        Yields:
            nothing.
        """
        handle: RemovableHandle = optimizer.register_step_post_hook(_Hold(self))
        try:
            yield
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Write which weights are pruned."""
        return {"sites": dict(self.sites), "gone": {k: v.cpu() for k, v in self._gone.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read what `state_dict` wrote, and zero those weights again.

        Args:
            state: of a schedule over the same sites.

        Raises:
            LoadError: if it is of another one.
        """
        if state["sites"] != dict(self.sites):
            raise LoadError(
                f"this state is of {len(state['sites'])} other sites.",
                where=f"EntropySchedule: {', '.join(self.sites)}",
                fix="build the schedule as it was when the state was saved.",
            )
        self._gone = {k: v.to(self._weight(k).device) for k, v in state["gone"].items()}
        self.mask_()

    def _layer(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def _weight(self, path: str) -> Tensor:
        return self._layer(path).get_parameter("weight").detach()

    def _room(self, site: str, weight: Tensor) -> int:
        """Count the weights that a layer may still lose."""
        if self.sites[site] in self.protect:
            return 0
        zeros = int((weight == 0).sum())
        return max(0, int(self.max_layer_sparsity * weight.numel()) - zeros)

    def _zero_(self, site: str, count: int) -> None:
        layer = self.sites[site]
        weight = self._weight(layer)
        size = weight.abs().flatten()
        order = torch.where(size == 0, torch.inf, size).argsort(stable=True)
        gone = self._gone.setdefault(layer, torch.zeros_like(weight, dtype=torch.bool))
        gone |= (
            torch.zeros_like(size, dtype=torch.bool)
            .index_fill_(0, order[:count], True)
            .view(weight.shape)
        )
        weight.masked_fill_(gone, 0.0)

    def _seen(self) -> dict[str, _Count]:
        blind = [site for site in self.sites if not self._has(site)]
        if blind:
            raise CalibrationError(
                f"activation '{blind[0]}' was not observed.",
                where=f"EntropySchedule, {len(blind)} of {len(self.sites)} activations",
                fix="run batches through the model inside `with schedule.observe():` first.",
            )
        return self._counts

    def _has(self, site: str) -> bool:
        return site in self._counts and self._counts[site].states is not None


class _Count:
    """How often every channel of one activation was off, on, or at its upper end."""

    def __init__(self, site: str, *, axis: int) -> None:
        self.site, self.axis, self.runs = site, axis, 0
        self.states: Tensor | None = None

    def look(self, module: nn.Module, z: Tensor) -> None:
        """Add one batch of pre-activations."""
        self.runs += 1
        if self.runs > 1:
            raise StructureError(
                f"activation '{self.site}' runs more than once in a forward pass.",
                where=self.site,
                fix="give each place a module of its own, or leave this one out.",
            )
        rows = z.movedim(self.axis, -1).reshape(-1, z.shape[self.axis])
        top = float(module.max_val) if isinstance(module, nn.Hardtanh) else math.inf
        on, capped = (rows > 0).sum(0), (rows >= top).sum(0)
        states = torch.stack([len(rows) - on, on - capped, capped])
        self.states = states if self.states is None else self.states + states

    def pool_(self) -> None:
        """Add the counts of all ranks."""
        if self.states is not None:
            self.states = self.states.double()
            all_sum_([self.states])

    def share(self, state: int) -> Tensor:
        """Tell how often each channel is in a state."""
        assert self.states is not None
        counts = self.states.double()
        return counts[state] / counts.sum(0)

    def entropy(self) -> float:
        """Average the entropy, in bits, over the channels that switch."""
        shares = torch.stack([self.share(state) for state in range(3)])
        bits = -(shares * shares.clamp(min=1e-300).log2()).sum(0)
        switching = shares.max(0).values < 1
        return float(bits[switching].mean()) if bool(switching.any()) else 0.0


class _Look:
    """The hook of one activation."""

    def __init__(self, count: _Count | None) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = first_tensor(args, kwargs)
        if self.count is not None and z is not None:
            self.count.look(module, z)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the counts."""
        return _Look, (None,)


class _Next:
    """The hook in front of the model: a new pass begins."""

    def __init__(self, counts: tuple[_Count, ...]) -> None:
        self.counts = counts

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for count in self.counts:
            count.runs = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the counts."""
        return _Next, ((),)


class _Hold:
    """The hook behind an optimiser's step."""

    def __init__(self, schedule: EntropySchedule) -> None:
        self.schedule = schedule

    def __call__(self, *args: Any) -> None:
        self.schedule.mask_()


def _check_numbers(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise PolicyError(
                f"{name} is {value}.",
                where=f"EntropySchedule.{name}",
                fix="give a share above 0 and at most 1.",
            )


def _checked(model: nn.Module, sites: Mapping[str, str], protect: Iterable[str]) -> dict[str, str]:
    """Refuse sites that do not exist, layers without weights, and layers named twice."""
    known, layers = dict(model.named_modules()), list(sites.values())
    for path in (*sites, *layers, *protect):
        if path not in known:
            raise StructureError(
                f"{path!r} is no module of this model.",
                where=f"EntropySchedule.sites; {nearest(path, list(known)[1:], 'modules')}",
                fix="use full module paths.",
            )
    for site, layer in sites.items():
        if not isinstance(known[layer], (*_CONV, nn.Linear)) or layers.count(layer) > 1:
            raise StructureError(
                f"layer '{layer}' cannot be pruned for activation '{site}': it is a "
                f"{type(known[layer]).__name__} that feeds {layers.count(layer)} of the sites.",
                where=f"EntropySchedule.sites[{site!r}]",
                fix="name one convolution or linear layer per activation.",
            )
    if not sites:
        raise StructureError(
            "there is no activation.", where="EntropySchedule.sites", fix="name at least one."
        )
    return dict(sites)
