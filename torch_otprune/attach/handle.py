"""The handle of an attached policy: it turns what its hooks saw into a plan."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from torch_otprune.attach.course import Course
from torch_otprune.attach.evidence import chains, counted, fineness, lines, mixtures, rows, told
from torch_otprune.attach.hooks import Watch, hooked
from torch_otprune.attach.needs import PROBED, looks_at_channels, needs_of, reached, wide_of
from torch_otprune.decide import decide
from torch_otprune.errors import CalibrationError
from torch_otprune.fold import linearized
from torch_otprune.plan import Plan
from torch_otprune.policy import Layers, Policy
from torch_otprune.report import Report
from torch_otprune.statistics import (
    Moments,
    Observation,
    Recorder,
    Reservoir,
    blame,
    check_batch,
    check_memory,
    conclude,
    consumers,
    finite,
    quote,
)
from torch_otprune.statistics.experts import watch_experts
from torch_otprune.statistics.loose import loose, others, watch_products
from torch_otprune.statistics.reduce import ranks, ranks_where, share
from torch_otprune.structure import Call, Graph, batch_size, head, trace_head
from torch_otprune.structure.forward import outside_inference, uncollected
from torch_otprune.structure.routing import around
from torch_otprune.surgery.rebind import Optimizes
from torch_otprune.training.distill import Match

__all__ = ["EXAMPLE", "LIVE", "Attached"]

EXAMPLE = 2  # samples of the first batch that the trace runs on


class Attached:
    """A model being watched. Made by `attach`.

    Args:
        model: the dense model.
        policy: the declaration.
        example: one batch to analyse the model on; None waits for the first.
        data: what the rounds of a schedule decide on; None takes what the model trained on last.
    """

    def __init__(self, model: nn.Module, policy: Policy, example: Any, *, data: Any = None) -> None:
        self.model, self.policy, self._given = model, policy, example
        self._needs = needs_of(policy)
        self._course = Course(model, policy, data)
        self._open = policy.schedule is None
        self._begin()

    def _begin(self) -> None:
        """Put the hooks on, and forget what was seen of the model as it was before."""
        model, policy = self.model, self.policy
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
        if self._given is not None and not self._course.over:
            self._analyse(self._given)
        self._course.press(self.graph, self._example)
        self._watch = Watch(self)
        self._hooks = hooked(model, self._watch, calibrates=self._open)
        LIVE.add(self)

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lift()
        self._course.remove(failed=kind is not None)

    @property
    def trains(self) -> bool:
        """Tell whether penalties or rounds are at work while the model trains."""
        return self._course.trains

    @property
    def listens(self) -> bool:
        """Tell whether passes that do not train are calibration."""
        return self._open

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take what is run for calibration, also where a schedule takes its own.

        Yields:
            nothing.
        """
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = self._recorder.active = before

    @property
    def bytes(self) -> int:
        """Quote the memory of the statistics; known once the model was analysed, before data."""
        if self.graph is None:
            return 0
        moments = quote(self.model, self._recorder.paths)
        moments += sum(map(Moments.bytes, self._recorder.others.values()))
        kept = self._rows(self.graph, self._paths).values()
        return moments + sum(size for sizes in kept for size in sizes.values())

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
        """Take every hook off. What was seen stays available to `plan`. Warns of rounds to come."""
        self._lift()
        self._course.remove()

    def _lift(self) -> None:
        self._course.lift()
        self._hooks.close()
        self._recorder.remove()
        self._batch = None
        LIVE.discard(self)

    def penalty(self) -> Tensor:
        """Say what the rules' penalties add to the loss of the last forward pass.

        Returns:
            a scalar that gradients flow through; 0 behind the last round of a schedule.

        Raises:
            PolicyError: if no rule has a penalty.
        """
        return self._course.penalty()

    def distill(
        self, weight: float = 1.0, *, temperature: float = 2.0, match: Match = "auto"
    ) -> Tensor:
        """Say what learning from the dense network adds to the loss of the last forward pass.

        The dense network is the model just before the first round, kept if this was called before.

        Args:
            weight: factor of the term.
            temperature: above 0; divides logits before the softmax.
            match: `logits`, `values`, or `auto`: logits are a mapping's `logits`, or the only
                tensor if it is samples x classes.

        Returns:
            a scalar that gradients flow through; exactly 0 before the first round.

        Raises:
            CalibrationError: if no dense network was kept, or the model was not run.
        """
        return self._course.distill(weight, temperature=temperature, match=match)

    def step(
        self, *optimizers: Optimizes, ema: nn.Module | Iterable[nn.Module] = ()
    ) -> Report | None:
        """Tell the handle that the optimiser took a step, once per step.

        Penalties move on. Where a round is due, the model is pruned in place, on what it was
        trained on last or on `data`, and the optimisers follow.

        Args:
            *optimizers: those that train the model; none leaves `report.rebind_` to you.
            ema: averaged copies that follow as well.

        Returns:
            the report of a round, nothing otherwise.

        Raises:
            OTPruneError: if the round fails: all is as it was, and the next call tries again; if
                the policy has neither schedule nor penalty, or was removed.
        """
        if not (number := self._course.tick()):
            return None
        with self._off():
            return self._course.round_(number, optimizers, ema)

    @contextmanager
    def _off(self) -> Iterator[None]:
        """Change the model without hooks on it, and begin anew behind; not if all was removed."""
        live = self in LIVE
        self._lift()
        try:
            yield
        finally:
            if live:
                self._begin()

    def harden(self) -> None:
        """End the search of a criterion that learns masks now, so that `plan` can be asked."""
        self._course.harden()

    def state_dict(self) -> dict[str, Any]:
        """Write everything that training needs to go on, beside model and optimiser.

        Returns:
            plain values and tensors, which `torch.load(weights_only=True)` reads.
        """
        return self._course.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was called; before the optimiser is made.

        A dense model gets the shapes that it had then. Load its weights, and the optimiser's
        state, afterwards.

        Args:
            state: what it returned, under the same policy.

        Raises:
            LoadError: if it is of another policy or model.
        """
        with self._off():
            self._course.load_state_dict(state)
        self._course.resume(state)

    def plan(self) -> Plan:
        """Decide what to remove, and check the decision on the real model. Nothing is removed.

        Returns:
            the plan.

        Raises:
            CalibrationError: if the model was not run.
        """
        graph = self._known()
        with self.unwatched(), self._course.plain(), outside_inference(), uncollected():
            observation = self._course.told(self.observation())
            graph = counted(self.model, graph, self._probes, self._example)
            plan = decide(self.model, self.policy, graph, observation, self._example)
            plan = linearized(self.model, plan, graph, observation.sites, example=self._example)
            return self._course.signed(plan)

    def observation(self) -> Observation:
        """Sum up what was seen, over all ranks. What is seen later adds to it.

        Returns:
            the statistics.

        Raises:
            CalibrationError: if the model was not run.
        """
        model, policy, graph = self.model, self.policy, self._known()
        blind = bool(self._recorder.paths) and not self._recorder.moments
        if len(ranks_where(blind)) == ranks():
            raise self._not_run("run calibration batches through the model before plan().")
        with self.unwatched():  # the probes of the sensitivity are no new data
            probes = self._probes.batches()
            written = [around(group) for group in mixtures(model, policy, graph)]
            found = conclude(
                model,
                self._recorder,
                probes,
                (*self._paths, *written),
                chains=chains(model, policy, graph, self._probes, sites="sites" in self._needs),
                sites=lines(model, policy, graph, probes),
                samples=self.samples,
                feel="sensitivity" in self._needs,
                seed=policy.seed,
                loose=loose(model, graph, reached(model, policy, graph)),
            )
            return told(found, model, policy, self._probes, graph=graph, paths=self._paths)

    def _rows(self, graph: Graph, paths: tuple[str, ...]) -> dict[str, dict[str, int]]:
        return rows(self.model, self.policy, graph, self._probes.size, paths=paths)

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
        asked = looks_at_channels(self.policy)
        graph, example = trace_head(self.model, batch, EXAMPLE, channels=asked)
        paths = consumers(graph, reached(self.model, self.policy, graph))
        moments, limit = "moments" in self._needs, self.policy.calibration.memory
        wide = wide_of(self.model, self.policy, paths) if moments else ()
        seen = tuple(path for path in paths if path not in wide) if moments else ()
        counts = fineness(self.model, self.policy, graph, example) if moments else {}
        more = others(self.model, counts)
        check_memory(self.model, seen, limit, **self._rows(graph, paths), others=more)
        self._needs |= {"rows"} if wide else set()
        if moments:
            self._recorder = self._recording(seen)
            watch_products(self.model, counts, self._recorder)
            watch_experts(self.model, mixtures(self.model, self.policy, graph), self._recorder)
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
            active=self._open,
        )

    def _explain(self, seen: str) -> CalibrationError:
        """Run the batch that is under way once more, to find where it went wrong."""
        with self.unwatched(), outside_inference():
            return blame(self.model, self._batch, seen)

    def train(self, batch: Call) -> None:
        """Take notice of a batch that the model trains on: it is no calibration.

        Args:
            batch: the model's arguments.
        """
        self._recorder.active = False
        self._course.look(batch)

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
            self._recorder.begin()
        self._recorder.look(size, wanted)
        self._batches += 1
        if wanted <= 0:
            return
        self._batch = batch
        self.samples += wanted
        if self._needs & PROBED:
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


LIVE: weakref.WeakSet[Attached] = weakref.WeakSet()  # all that is attached at the moment
