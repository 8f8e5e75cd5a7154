"""The handle of an attached policy: it turns what its hooks saw into a plan."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torch_otprune.attach.ahead import ahead
from torch_otprune.attach.needs import looks_at_channels, needs_of
from torch_otprune.attach.pressures import pressures
from torch_otprune.decide import decide
from torch_otprune.errors import CalibrationError, PolicyError
from torch_otprune.fold import linearized
from torch_otprune.plan import Plan, owned_blocks, owned_sites
from torch_otprune.policy import Layers, Policy, Units, module_classes
from torch_otprune.policy.targets import selects
from torch_otprune.statistics import (
    ChainEvidence,
    Observation,
    Recorder,
    Reservoir,
    SiteEvidence,
    blame,
    check_batch,
    check_memory,
    conclude,
    consumers,
    finite,
    listen,
    quote,
    streams_quote,
)
from torch_otprune.statistics.experts import watch_experts
from torch_otprune.statistics.observation import DRAWS
from torch_otprune.statistics.reduce import ranks, ranks_where, share
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import Call, Graph, batch_size, head, map_tensors, trace
from torch_otprune.structure.forward import outside_inference
from torch_otprune.structure.graph import Group
from torch_otprune.structure.layers import holder
from torch_otprune.structure.routing import around
from torch_otprune.training import Pressure

__all__ = ["EXAMPLE", "LIVE", "Attached"]

EXAMPLE = 2  # samples of the first batch that the trace runs on


class Attached:
    """A model being watched. Made by `attach`.

    Args:
        model: the dense model.
        policy: the declaration.
        example: one batch to analyse the model on; None waits for the first.
    """

    def __init__(self, model: nn.Module, policy: Policy, example: Any) -> None:
        self.model, self.policy = model, policy
        self.graph: Graph | None = None
        self.samples = 0
        self._recorder = Recorder(model, (), samples=1, rows_per_column=1, seed=0)
        # half of them are held out where a rule's repair is tried
        halves = 2 if any(isinstance(rule, Layers) for rule in policy.rules) else 1
        self._probes = Reservoir(halves * policy.calibration.probe, policy.seed)
        self._example: Any = None
        self._batch: Any = None
        self._batches = 0
        self._paths: tuple[str, ...] = ()
        self._needs = needs_of(policy)
        self._pressures: tuple[Pressure, ...] = ()
        if example is not None:
            self._analyse(example)
            self._pressures = pressures(model, policy, self._known())
        self._watch = _Watch(self)
        self._handles = [
            model.register_forward_pre_hook(self._watch, with_kwargs=True),
            model.register_forward_hook(_Leave(self._watch)),
        ]
        LIVE.add(self)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def trains(self) -> bool:
        """Tell whether penalties are at work while the model trains."""
        return bool(self._pressures)

    @property
    def bytes(self) -> int:
        """Quote the memory of the statistics; known once the model was analysed, before data."""
        if self.graph is None:
            return 0
        moments = quote(self.model, self._paths) if "moments" in self._needs else 0
        return moments + sum(self._streams(self.graph).values())

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Run the model without taking notice of it.

        Yields:
            nothing.
        """
        before = self._watch.busy, self._recorder.active
        self._watch.busy, self._recorder.active = True, False
        try:
            yield
        finally:
            self._watch.busy, self._recorder.active = before

    def remove(self) -> None:
        """Take every hook off. What was seen stays available to `plan`."""
        for pressure in self._pressures:
            pressure.remove()
        for handle in self._handles:
            handle.remove()
        self._recorder.remove()
        self._batch = None
        LIVE.discard(self)

    def penalty(self) -> Tensor:
        """Say what the rules' penalties add to the loss of the last forward pass.

        Returns:
            a scalar that gradients flow through.

        Raises:
            PolicyError: if no rule has a penalty.
        """
        if not self._pressures:
            raise PolicyError(
                "no rule has a penalty.",
                where=f"attach({type(self.model).__name__})",
                fix="write Layers(penalty='max_sliced') or Linearize(penalty='linearity').",
            )
        return torch.stack([pressure.penalty() for pressure in self._pressures]).sum()

    def step(self) -> None:
        """Tell the penalties that the optimiser took a step: weights ramp, directions move."""
        for pressure in self._pressures:
            pressure.step()

    def plan(self) -> Plan:
        """Decide what to remove, and check the decision on the real model. Nothing is removed.

        Returns:
            the plan.

        Raises:
            CalibrationError: if the model was not run.
        """
        graph = self._known()
        with self.unwatched(), outside_inference():
            observation = self.observation()
            plan = decide(self.model, self.policy, graph, observation, self._example)
            return linearized(self.model, plan, graph, observation.sites, example=self._example)

    def observation(self) -> Observation:
        """Sum up what was seen, over all ranks. What is seen later adds to it.

        Returns:
            the statistics.

        Raises:
            CalibrationError: if the model was not run.
        """
        self._known()
        blind = "moments" in self._needs and bool(self._paths) and not self._recorder.moments
        if len(ranks_where(blind)) == ranks():
            raise self._not_run("run calibration batches through the model before plan().")
        with self.unwatched():  # the probes of the sensitivity are no new data
            return conclude(
                self.model,
                self._recorder,
                self._probes.batches(),
                (*self._paths, *self._blocks()),
                chains=self._chains(),
                sites=self._lines(),
                samples=self.samples,
                feel="sensitivity" in self._needs,
                seed=self.policy.seed,
            )

    def _blocks(self) -> list[str]:
        """List the modules whose output the mixtures that a rule reaches write."""
        return [] if ranks() > 1 else [around(g) for g in self._mixtures(self._known())]

    def _chains(self) -> dict[str, ChainEvidence]:
        """Look at what flows between the blocks that a rule may remove."""
        graph, probes, found = self._known(), self._probes.numbered(), dict[str, ChainEvidence]()
        model, seed, sites = self.model, self.policy.seed, "sites" in self._needs
        for index, blocks in owned_blocks(model, self.policy, graph).items():
            heard = listen(model, graph, blocks, probes=probes, draws=DRAWS, seed=seed, sites=sites)
            every = self._probes.everywhere()  # one copy for all chains
            found |= {name: self._ahead(chain, index, every) for name, chain in heard.items()}
        return found

    def _ahead(self, chain: ChainEvidence, index: int, probes: Sequence[Any]) -> ChainEvidence:
        """Add the means to try what the rule's repair leaves."""
        rule, graph = self.policy.rules[index], self._known()
        assert isinstance(rule, Layers)
        blocks, seed = [graph.block(name) for name in chain.blocks], self.policy.seed
        mended = ahead(self.model, graph, blocks, rule, batches=probes, seed=seed)
        return replace(chain, mended=mended)

    def _streams(self, graph: Graph) -> dict[str, int]:
        """Quote what the rows of every run of removable blocks will take, in bytes."""
        found: dict[str, int] = {}
        for blocks in owned_blocks(self.model, self.policy, graph).values():
            found |= streams_quote(self.model, graph, blocks, samples=self._probes.size)
        return found

    def _lines(self) -> dict[str, SiteEvidence]:
        """Look at what goes through the activations that a rule may make linear."""
        owned = owned_sites(self.model, self.policy, self._known())
        sites = [site for found in owned.values() for site in found if not site.reason]
        return watch_sites(self.model, sites, self._probes.batches()) if sites else {}

    def _known(self) -> Graph:
        missing = ranks_where(self.graph is None)  # all ranks fail, or those that wait hang
        if missing or self.graph is None:
            raise self._not_run(
                "run calibration batches through the model before plan(), or pass example="
                + (f"; rank {missing[0]} saw none." if ranks() > 1 else ".")
            )
        return self.graph

    def _not_run(self, fix: str) -> CalibrationError:
        return CalibrationError(
            "the model was not run since the policy was attached.",
            where=f"attach({type(self.model).__name__})",
            fix=fix,
        )

    def _analyse(self, batch: Any) -> None:
        with outside_inference():
            example = map_tensors(head(batch, EXAMPLE), lambda t: t.detach().clone())
        graph = trace(self.model, example, channels=looks_at_channels(self.policy))
        paths = self._readers(graph)
        moments = paths if "moments" in self._needs else ()
        limit = self.policy.calibration.memory
        check_memory(self.model, moments, limit, streams=self._streams(graph))
        if "moments" in self._needs:
            self._recorder = self._recording(paths)
            watch_experts(self.model, self._mixtures(graph), self._recorder)
        # last: after a refusal nothing is known
        self._example, self._paths, self.graph = example, paths, graph

    def _recording(self, paths: tuple[str, ...]) -> Recorder:
        calibration = self.policy.calibration
        return Recorder(
            self.model,
            paths,
            samples=calibration.samples,
            rows_per_column=calibration.rows_per_dim,
            seed=self.policy.seed,
            explain=self._explain,
        )

    def _mixtures(self, graph: Graph) -> list[Group]:
        """List the mixtures whose experts some rule reaches."""
        names = self._reached(graph)
        return [g for g in graph.groups if g.kind == "experts" and g.name in names]

    def _explain(self, seen: str) -> CalibrationError:
        """Run the batch that is under way once more, to find where it went wrong."""
        with self.unwatched(), outside_inference():
            return blame(self.model, self._batch, seen)

    def _readers(self, graph: Graph) -> tuple[str, ...]:
        """List the consumers of the groups that some rule reaches."""
        return consumers(graph, self._reached(graph))

    def _reached(self, graph: Graph) -> list[str]:
        """List the groups that some rule reaches."""
        classes = module_classes(self.model)
        rules = [rule for rule in self.policy.rules if isinstance(rule, Units)]
        ignore = self.policy.ignore
        return [
            group.name
            for group in graph.groups
            for path in (holder(path, classes) for path in group.owners)
            if not selects(ignore, path, classes)
            and any(
                selects(r.targets, path, classes) and not selects(r.ignore, path, classes)
                for r in rules
                if r.unit == group.kind
            )
        ]

    def see(self, batch: Call) -> None:
        """Take notice of a batch that is about to run.

        Args:
            batch: the model's arguments.
        """
        size = batch_size(batch)
        wanted = min(size, share(self.policy.calibration.samples) - self.samples)
        if wanted > 0 or self.graph is None:
            check_batch(batch, self._batches)
        if self.graph is None:
            self._analyse(batch)
        self._recorder.look(size, wanted)
        self._batches += 1
        if wanted <= 0:
            return
        self._batch = batch
        self.samples += wanted
        if self._needs & {"sensitivity", "chains", "lines"}:
            self._probes.add(head(batch, wanted))

    def leave(self, output: Any) -> None:
        """Take notice of what came out.

        Args:
            output: the model's.

        Raises:
            CalibrationError: if it holds NaN or infinity.
        """
        if self._batch is not None and not finite(output):
            raise self._explain("the model's output")
        self._batch = None


class _Watch:
    """The one hook on the root: it sees every batch before the model does."""

    def __init__(self, attached: Attached | None) -> None:
        self.attached = attached
        self.busy = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.attached is None or self.busy:  # the analysis runs the model itself
            return
        if self.attached.trains and module.training and torch.is_grad_enabled():
            return  # weights that are still moving are no calibration
        self.busy = True
        try:
            self.attached.see(Call(args, kwargs))
        finally:
            self.busy = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the handle: a copy of the model is not attached."""
        return _Watch, (None,)


class _Leave:
    """The hook on the root that sees what comes out."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if self.watch.attached is not None and not self.watch.busy:
            self.watch.attached.leave(out)


LIVE: weakref.WeakSet[Attached] = weakref.WeakSet()  # all that is attached at the moment
