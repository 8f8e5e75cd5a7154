"""A policy on a module: hooks that watch, and the handle that turns what they saw into a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from torch_otprune.criteria.base import Criterion
from torch_otprune.decide import decide
from torch_otprune.errors import CalibrationError, PolicyError, StructureError
from torch_otprune.plan import Plan
from torch_otprune.policy import Policy, match, module_classes, policy_of
from torch_otprune.policy.targets import selects
from torch_otprune.statistics import (
    Observation,
    Recorder,
    Reservoir,
    collect,
    conclude,
    consumers,
    quote,
)
from torch_otprune.statistics.reduce import share
from torch_otprune.structure import Call, Graph, batch_size, evaluating, head, trace
from torch_otprune.structure.forward import run_checked
from torch_otprune.structure.trace import check

__all__ = ["EXAMPLE", "Attached", "attach", "check_unattached", "observe"]

_log = logging.getLogger(__name__)
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
        StructureError: if the model cannot be pruned, or has a policy attached already.
        TargetError: if a target matches nothing.
    """
    check(model)
    found = policy or policy_of(model)
    if found is None:
        raise PolicyError(
            "there is no policy for this model.",
            where=f"attach({type(model).__name__})",
            fix="pass a Policy, or declare one with @otp.prunable on the class.",
        )
    check_unattached(model)
    classes = module_classes(model)
    for index, rule in enumerate(found.rules):
        match(rule.targets, rule.ignore, classes, where=f"Policy.rules[{index}]")
    return Attached(model, found, example)


def check_unattached(model: nn.Module) -> None:
    """Refuse a model that is being watched: its hooks would watch the work on it.

    Args:
        model: any module.

    Raises:
        StructureError: if a policy is attached.
    """
    if any(isinstance(h, _Watch) and h.attached for h in model._forward_pre_hooks.values()):
        raise StructureError(
            "a policy is attached to this model already.",
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
        CalibrationError: if there is no batch, or one holds NaN or infinity.
    """
    model = attached.model
    with attached.unwatched():  # a callable runs the model to show its batches
        batches = collect(model, data, share(attached.policy.calibration.samples))
    with evaluating(model), torch.no_grad():
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
        self._paths: tuple[str, ...] = ()
        self._needs = _needs(policy)
        if example is not None:
            self._analyse(example)
        self._watch = _Watch(self)
        self._handle = model.register_forward_pre_hook(self._watch, with_kwargs=True)

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
        self._handle.remove()
        self._recorder.remove()

    def plan(self) -> Plan:
        """Decide what to remove, and check the decision on the real model. Nothing is removed.

        Returns:
            the plan.

        Raises:
            CalibrationError: if the model was not run.
        """
        graph = self._known()
        with self.unwatched():
            return decide(self.model, self.policy, graph, self.observation(), self._example)

    def observation(self) -> Observation:
        """Sum up what was seen, over all ranks.

        Returns:
            the statistics.

        Raises:
            CalibrationError: if the model was not run.
        """
        self._known()
        if "moments" in self._needs and not self._recorder.moments and self._paths:
            raise CalibrationError(
                "the model was not run since the policy was attached.",
                where=f"attach({type(self.model).__name__})",
                fix="run calibration batches through the model before plan().",
            )
        return conclude(
            self.model,
            self._recorder,
            self._probes.batches(),
            self._paths,
            samples=self.samples,
            feel="sensitivity" in self._needs and self.samples > 0,
            seed=self.policy.seed,
        )

    def _known(self) -> Graph:
        if self.graph is None:
            raise CalibrationError(
                "the model was not run since the policy was attached.",
                where=f"attach({type(self.model).__name__})",
                fix="run calibration batches through the model before plan(), or pass example=.",
            )
        return self.graph

    def _analyse(self, batch: Any) -> None:
        self._example = head(batch, EXAMPLE)
        self.graph = trace(self.model, self._example)
        self._paths = self._readers(self.graph)
        if "moments" not in self._needs:
            return
        calibration = self.policy.calibration
        _log.info("statistics will take %.1f MiB", self.bytes / 2**20)
        if self.bytes > calibration.memory * 2**30:
            self._refuse()
        self._recorder = Recorder(
            self.model,
            self._paths,
            samples=calibration.samples,
            rows_per_column=calibration.rows_per_dim,
            seed=self.policy.seed,
        )

    def _readers(self, graph: Graph) -> tuple[str, ...]:
        """List the consumers of the groups that some rule reaches."""
        classes = module_classes(self.model)
        rules, ignore = self.policy.rules, self.policy.ignore
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

    def _refuse(self) -> None:
        widest = sorted(self._paths, key=lambda path: -quote(self.model, [path]))[:3]
        sizes = [f"'{path}' {quote(self.model, [path]) / 2**30:.1f} GiB" for path in widest]
        raise CalibrationError(
            f"the statistics would take {self.bytes / 2**30:.1f} GiB.",
            where=f"Calibration.memory = {self.policy.calibration.memory:g}; {', '.join(sizes)}",
            fix="raise Calibration.memory, or ignore the layers that feed the widest ones.",
        )

    def see(self, batch: Call) -> None:
        """Take notice of a batch that is about to run.

        Args:
            batch: the model's arguments.
        """
        if self.graph is None:
            self._analyse(batch)
        calibration = self.policy.calibration
        wanted = self.samples < share(calibration.samples)
        self._recorder.active = wanted
        if wanted:
            self.samples += batch_size(batch)
            if "sensitivity" in self._needs:
                self._probes.add(batch)


def _needs(policy: Policy) -> frozenset[str]:
    """Collect the statistics that the chosen criteria, repairs and weighting ask for."""
    needs: set[str] = set()
    for rule in policy.rules:
        criterion = getattr(rule, "criterion", None)
        needs |= criterion.needs if isinstance(criterion, Criterion) else set()
        if any(r.kind in ("least_squares", "reconstruct") for r in getattr(rule, "repair", ())):
            needs.add("moments")
    if policy.budget is not None and policy.budget.weighting == "output":
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
