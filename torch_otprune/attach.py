"""A policy on a module: hooks that watch, and the handle that turns what they saw into a plan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torch_otprune.criteria.base import Criterion
from torch_otprune.decide import decide
from torch_otprune.errors import CalibrationError, PolicyError, StructureError
from torch_otprune.plan import Plan, owned_blocks
from torch_otprune.policy import Channels, Layers, Policy, Rule, match, module_classes, policy_of
from torch_otprune.policy.targets import selects
from torch_otprune.repair.base import Repair
from torch_otprune.statistics import (
    ChainEvidence,
    Observation,
    Recorder,
    Reservoir,
    blame,
    check_batch,
    check_memory,
    collect,
    conclude,
    consumers,
    finite,
    listen,
    quote,
)
from torch_otprune.statistics.observation import DRAWS
from torch_otprune.statistics.reduce import ranks, ranks_where, share
from torch_otprune.structure import Call, Graph, batch_size, evaluating, head, map_tensors, trace
from torch_otprune.structure.forward import outside_inference, run_checked
from torch_otprune.structure.trace import check

__all__ = ["EXAMPLE", "Attached", "attach", "check_unattached", "observe"]

EXAMPLE = 2  # samples of the first batch that the trace runs on


def attach(model: nn.Module, policy: Policy | None = None, *, example: Any = None) -> Attached:
    """Put a policy on a model: forward hooks and nothing else.

    Use it as a context manager, or call `remove` yourself. Run data through the model in any
    mode; then ask for the plan. A policy given here wins over one declared on the class.

    Args:
        model: the dense model.
        policy: the declaration; by default the one that `@prunable` put on the class.
        example: one batch to analyse the model on; by default the first that comes by.

    Returns:
        the handle.

    Raises:
        PolicyError: if there is no policy.
        StructureError: if the model cannot be pruned, or it, a part of it or what it is a part of
            has a policy attached already.
        TargetError: if a target matches nothing.
    """
    check(model)
    found = _policy(model, policy)
    check_unattached(model)
    classes = module_classes(model)
    for index, rule in enumerate(found.rules):
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    return Attached(model, found, example)


def _policy(model: nn.Module, given: object) -> Policy:
    found = policy_of(model) if given is None else given
    where = f"attach({type(model).__name__})"
    if found is None:
        raise PolicyError(
            "there is no policy for this model.",
            where=where,
            fix="pass a Policy, or declare one with @otp.prunable on the class.",
        )
    if not isinstance(found, Policy):
        wrap = "wrap it: Policy(rules=...)" if isinstance(found, Rule) else "pass a Policy"
        raise PolicyError(
            f"the policy is of type {type(found).__name__}.", where=where, fix=f"{wrap}."
        )
    return found


def check_unattached(model: nn.Module) -> None:
    """Refuse a model that is being watched: its hooks would watch the work on it.

    Nor may a part of it be watched, or what it is a part of: they share modules.

    Args:
        model: any module.

    Raises:
        StructureError: if a policy is attached.
    """
    own = set(model.modules())
    for other in (attached.model for attached in _LIVE):
        if own.isdisjoint(other.modules()):
            continue
        what = "this model" if other is model else f"a {type(other).__name__} that shares modules"
        raise StructureError(
            f"a policy is attached to {what} already.",
            where=type(model).__name__,
            fix="remove the first attachment, or leave its `with` block.",
        )


def observe(attached: Attached, data: Iterable[Any] | Callable[[nn.Module], Any]) -> Attached:
    """Run calibration data through an attached model, in evaluation mode, without gradients.

    Args:
        attached: the handle.
        data: batches (tensor, tuple, mapping, Transformers batch), or a function that runs the
            model it is given.

    Returns:
        the same handle.

    Raises:
        CalibrationError: if there is no batch, one holds NaN, or the model makes NaN or infinity.
    """
    model = attached.model
    with attached.unwatched():  # a callable runs the model to show its batches
        batches = collect(model, data, share(attached.policy.calibration.samples))
    with outside_inference(), evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            run_checked(model, batch, index)
    return attached


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
        self._probes = Reservoir(policy.calibration.probe, policy.seed)
        self._example: Any = None
        self._batch: Any = None
        self._batches = 0
        self._paths: tuple[str, ...] = ()
        self._needs = _needs(policy)
        if example is not None:
            self._analyse(example)
        self._watch = _Watch(self)
        self._handles = [
            model.register_forward_pre_hook(self._watch, with_kwargs=True),
            model.register_forward_hook(_Leave(self._watch)),
        ]
        _LIVE.add(self)

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
    def bytes(self) -> int:
        """Quote the memory of the statistics; known once the model was analysed, before data."""
        if self.graph is None or "moments" not in self._needs:
            return 0
        return quote(self.model, self._paths)

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
        for handle in self._handles:
            handle.remove()
        self._recorder.remove()
        self._batch = None
        _LIVE.discard(self)

    def plan(self) -> Plan:
        """Decide what to remove, and check the decision on the real model. Nothing is removed.

        Returns:
            the plan.

        Raises:
            CalibrationError: if the model was not run.
        """
        graph = self._known()
        with self.unwatched(), outside_inference():
            return decide(self.model, self.policy, graph, self.observation(), self._example)

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
                self._paths,
                chains=self._chains(),
                samples=self.samples,
                feel="sensitivity" in self._needs,
                seed=self.policy.seed,
            )

    def _chains(self) -> dict[str, ChainEvidence]:
        """Look at what flows between the blocks that a rule may remove."""
        graph, probes, found = self._known(), self._probes.batches(), dict[str, ChainEvidence]()
        for blocks in owned_blocks(self.model, self.policy, graph).values():
            found |= listen(self.model, graph, blocks, probes, draws=DRAWS, seed=self.policy.seed)
        return found

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
        graph = trace(self.model, example)
        paths = self._readers(graph)
        if "moments" in self._needs:
            self._recorder = self._recording(paths)
        # last: after a refusal nothing is known
        self._example, self._paths, self.graph = example, paths, graph

    def _recording(self, paths: tuple[str, ...]) -> Recorder:
        calibration = self.policy.calibration
        check_memory(self.model, paths, calibration.memory)
        return Recorder(
            self.model,
            paths,
            samples=calibration.samples,
            rows_per_column=calibration.rows_per_dim,
            seed=self.policy.seed,
            explain=self._explain,
        )

    def _explain(self, seen: str) -> CalibrationError:
        """Run the batch that is under way once more, to find where it went wrong."""
        with self.unwatched(), outside_inference():
            return blame(self.model, self._batch, seen)

    def _readers(self, graph: Graph) -> tuple[str, ...]:
        """List the consumers of the groups that some rule reaches."""
        classes = module_classes(self.model)
        rules = [rule for rule in self.policy.rules if isinstance(rule, Channels)]
        ignore = self.policy.ignore
        reached = [
            group.name
            for group in graph.groups
            for path in (member.path for member in group.producers)
            if not selects(ignore, path, classes)
            and any(
                selects(r.targets, path, classes) and not selects(r.ignore, path, classes)
                for r in rules
            )
        ]
        return consumers(graph, reached)

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
        if self._needs & {"sensitivity", "chains"}:
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


def _needs(policy: Policy) -> frozenset[str]:
    """Collect the statistics that the chosen criteria, repairs and weighting ask for."""
    needs = {"chains"} if any(isinstance(rule, Layers) for rule in policy.rules) else set[str]()
    for rule in (rule for rule in policy.rules if isinstance(rule, Channels)):
        criterion = getattr(rule, "criterion", None)
        needs |= criterion.needs if isinstance(criterion, Criterion) else set()
        for repair in getattr(rule, "repair", ()):
            needs |= repair.needs if isinstance(repair, Repair) else set()
    channels = any(isinstance(rule, Channels) for rule in policy.rules)
    if channels and policy.budget is not None and policy.budget.weighting == "output":
        needs |= {"moments", "sensitivity"}
    return frozenset(needs)


class _Watch:
    """The one hook on the root: it sees every batch before the model does."""

    def __init__(self, attached: Attached | None) -> None:
        self.attached = attached
        self.busy = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.attached is None or self.busy:  # the analysis runs the model itself
            return
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


_LIVE: weakref.WeakSet[Attached] = weakref.WeakSet()  # all that is attached at the moment
