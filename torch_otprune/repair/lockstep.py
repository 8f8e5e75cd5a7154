"""Two models, all batches, side by side: stop at every site, mend it, go on.

A sequential repair needs each layer's input from the already repaired prefix. Running the model
anew for every layer would cost time quadratic in depth. Here each batch is run once, in a thread
of its own that stops at the sites; the conductor lets one thread run at a time, so the order of
all operations is fixed. Time is one forward pass of each model; memory is the activations of one
layer for all calibration samples, twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_otprune.errors import RepairError
from torch_otprune.repair.goals import ends, off
from torch_otprune.statistics.reduce import all_sum_
from torch_otprune.structure.forward import Call, evaluating, flat_tensors, run_checked
from torch_otprune.structure.graph import Tail
from torch_otprune.structure.probe import summands

__all__ = ["Lockstep", "Pause", "Site", "distance"]


@dataclass(frozen=True)
class Site:
    """A linear layer to be mended.

    Args:
        path: the layer.
        tail: what its output passes next.
        aim: the layer of the dense model whose output or stream it is to write, and its tail; its
            own where None. Without a stream, an identity stands there in the smaller model.
    """

    path: str
    tail: Tail
    aim: tuple[str, Tail] | None = None


@dataclass
class Pause:
    """What one batch shows at one site.

    Args:
        path: the site.
        inputs: the layer's input.
        output: what the module returned, before the tail; None before it ran.
        written: the same behind the tail, as it is added; None where it is not added.
        stream: what the tail's output is about to be added to; None where it is not added.
        call: all arguments, where the module has not run yet.
    """

    path: str
    inputs: Tensor
    output: Any = None
    stream: Tensor | None = None
    call: Call | None = None
    written: Tensor | None = None


class Lockstep:
    """Walk a dense and a smaller model through all batches, site by site.

    The walking threads take over the caller's autocast, default device and current CUDA device.

    Limits: other state of the caller's thread (a `TorchFunctionMode`, saved-tensor hooks, thread
    locals of a model's own) is not seen by them. Every batch must take the way that the trace saw.

    Args:
        dense: the reference.
        small: the model being mended.
        batches: calibration batches.
        sites: layers to stop at; each runs once per forward pass.
    """

    def __init__(
        self, dense: nn.Module, small: nn.Module, batches: Sequence[Any], sites: Sequence[Site]
    ) -> None:
        self.sites = sites
        self.pair = (_Cast(dense, sites, wait=False), _Cast(small, sites, wait=True))
        self.walkers = [
            tuple(_Walker(cast, batch, i) for cast in self.pair) for i, batch in enumerate(batches)
        ]
        self.models = (dense, small)

    def __enter__(self) -> Lockstep:
        with ExitStack() as stack:  # undoes what was attached if the rest fails
            for model, cast in zip(self.models, self.pair, strict=True):
                stack.enter_context(evaluating(model))
                stack.callback(cast.remove)
                cast.attach()
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pair in self.walkers:
            for walker in pair:
                walker.abandon()
        self.stack.close()

    def play(
        self, mend: Callable[[Site, list[tuple[Pause, Pause]]], None]
    ) -> list[tuple[Any, Any]]:
        """Stop everywhere in turn and let `mend` write the small model's layer.

        Args:
            mend: called once per site with the pauses of every batch, dense and small.

        Returns:
            the outputs of both models for every batch.
        """
        by_path = {site.path: site for site in self.sites}
        for _ in self.sites:
            # The model says where it stopped: a shortcut that runs first may be added last.
            pauses = [(dense.advance(), small.advance()) for dense, small in self.walkers]
            with torch.no_grad():  # a stream may be a view of a parameter, which keeps its flag
                mend(by_path[_common(pauses)], pauses)
        for pair in self.walkers:
            for walker in pair:
                walker.advance()
        return [(dense.result, small.result) for dense, small in self.walkers]


def _common(pauses: Sequence[tuple[Pause | None, Pause | None]]) -> str:
    """Name the site where every batch stopped, in both models."""
    paths = {pause.path if pause else "the output" for pair in pauses for pause in pair}
    if len(paths) > 1 or "the output" in paths:
        raise RepairError(
            "not every batch runs the same layers in the same order.",
            where=f"calibration batches that stand at {', '.join(sorted(paths))}; the analysis saw "
            "one way only",
            fix="use repair 'norm' or 'none', or batches that take the same way.",
        )
    return paths.pop()


class _Walker:
    """One batch on its way through one model, in a thread that runs only when told to."""

    def __init__(self, cast: _Cast, batch: Any, index: int) -> None:
        self.cast, self.batch, self.index = cast, batch, index
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.pause: Pause | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.left = False
        self.surroundings = _Surroundings.here()
        self.thread: threading.Thread | None = None

    def advance(self) -> Pause:
        """Run to the next site, or to the end."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._walk, daemon=True)
            self.thread.start()
        self.pause = None
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error
        return self.pause  # type: ignore[return-value]

    def stop(self, pause: Pause) -> None:
        """Wait, inside the walking thread, for the conductor."""
        self.pause = pause
        self.stopped.release()
        self.go.acquire()
        if self.left:
            raise _Abandoned

    def abandon(self) -> None:
        """End the thread wherever it waits."""
        if self.thread is not None and self.thread.is_alive():
            self.left = True
            self.go.release()
            self.thread.join()

    def _walk(self) -> None:
        self.go.acquire()
        try:
            if not self.left:
                with torch.no_grad(), self.surroundings.entered(), _Additions(self):
                    self.cast.here.walker = self
                    self.cast.here.noted, self.cast.here.expected = {}, {}
                    self.result = run_checked(self.cast.model, self.batch, self.index)
        except _Abandoned:
            pass  # the conductor gave up and has its own error to raise
        except BaseException as error:  # noqa: BLE001  handed to the conductor, who raises it
            self.error = error
        self.stopped.release()


@dataclass(frozen=True)
class _Surroundings:
    """What torch keeps per thread and a forward pass may depend on."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    device: torch.device
    cuda: int | None

    @classmethod
    def here(cls) -> _Surroundings:
        """Read them off the calling thread."""
        cuda = torch.cuda.is_initialized()
        kinds = ("cpu", "cuda") if cuda else ("cpu",)
        on = [(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)]
        current = torch.cuda.current_device() if cuda else None
        return cls(tuple(on), torch.get_default_device(), current)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Bring them into another thread."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast:
                # cached casts would outlive a repair of the weight
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            if self.cuda is not None:
                stack.enter_context(torch.cuda.device(self.cuda))
            if self.device != torch.get_default_device():
                stack.enter_context(self.device)
            yield


class _Abandoned(BaseException):
    """Unwinds a walking thread."""


class _Cast:
    """One model's hooks, shared by all its walkers."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], *, wait: bool) -> None:
        self.model, self.sites, self.wait = model, sites, wait
        self.here = threading.local()
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        for site in self.sites:
            path, tail = site.path, site.tail
            if site.aim is not None and not self.wait:
                path, tail = site.aim
            module = self.model.get_submodule(path)
            if tail.added:
                ends = tail.modules[-1:] or (path,)
                note = _Note(self, site)
                self.handles.append(module.register_forward_hook(note, with_kwargs=True))
                last = self.model.get_submodule(ends[0])
                self.handles.append(last.register_forward_hook(_Expect(self, site)))
            elif self.wait and site.aim is not None:
                # Other layers may run in between; both models must come to all in one order.
                note, last = _Note(self, site), self.model.get_submodule(site.aim[0])
                self.handles.append(module.register_forward_hook(note, with_kwargs=True))
                self.handles.append(last.register_forward_hook(_StopBehind(self, site)))
            elif self.wait:
                self.handles.append(
                    module.register_forward_pre_hook(_StopBefore(self, site), with_kwargs=True)
                )
            else:
                self.handles.append(
                    module.register_forward_hook(_StopAfter(self, site), with_kwargs=True)
                )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def again(self, site: Site, inputs: Tensor) -> Tensor:
        """Compute a site and its tail anew, with the weights as they are now."""
        out = self.model.get_submodule(site.path).forward(inputs)
        for name in site.tail.modules:
            out = self.model.get_submodule(name).forward(out)
        return out  # type: ignore[no-any-return]


@dataclass
class _Hook:
    cast: _Cast
    site: Site


class _StopBefore(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        self.cast.here.walker.stop(Pause(self.site.path, flat_tensors(call)[0], call=call))


class _StopAfter(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        first = flat_tensors(Call(args, kwargs))[0]
        self.cast.here.walker.stop(Pause(self.site.path, first, out))


class _StopBehind(_Hook):
    """Stop where the identity stands whose input is the site's output."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        cast = self.cast
        given, before = cast.here.noted.pop(self.site.path)
        cast.here.walker.stop(Pause(self.site.path, given, before))
        out.copy_(cast.again(self.site, given))


class _Note(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Tensor) -> None:
        first = flat_tensors(Call(args, kwargs))[0]
        self.cast.here.noted[self.site.path] = (first, out)


class _Expect(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        # One dropout may serve several layers: this is the site's turn only once it has run.
        if self.site.path in self.cast.here.noted:
            self.cast.here.expected[self.site.path] = (out, self.site)


class _Additions(TorchFunctionMode):
    """Catch the addition of a site's output to its stream, just before it happens."""

    def __init__(self, walker: _Walker) -> None:
        super().__init__()
        self.walker = walker

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operands := summands(function, args, kwargs):
            for out, site in list(self.walker.cast.here.expected.values()):
                if any(operand is out for operand in operands):
                    self._meet(operands, out, site)
        return function(*args, **(kwargs or {}))

    def _meet(self, operands: tuple[Tensor, Tensor], out: Tensor, site: Site) -> None:
        """Stop at one operand; the other may be a site of its own, such as a shortcut's."""
        cast = self.walker.cast
        inputs, before = cast.here.noted.pop(site.path)
        del cast.here.expected[site.path]
        other = operands[1] if operands[0] is out else operands[0]
        # A shortcut that is mended next is no stream to make up for yet.
        waits = any(other is later for later, _ in cast.here.expected.values())
        stream = None if waits else other
        self.walker.stop(Pause(site.path, inputs, before, stream, written=out))
        if cast.wait:  # into the operand itself: an addition in place must find it there
            out.copy_(cast.again(site, inputs))


def distance(dense: nn.Module, small: nn.Module, batches: Sequence[Any]) -> float:
    """Measure how far the small model's output is from the dense one's.

    Args:
        dense: the reference.
        small: the other.
        batches: what to run both on.

    Returns:
        squared error over squared reference, over all batches, outputs and ranks; padding does
        not count.
    """
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    with evaluating(dense), evaluating(small), torch.no_grad():
        for batch in batches:
            sums += off(ends(dense, batch), ends(small, batch), batch)
    all_sum_([sums])
    return float(sums[0] / sums[1].clamp_min(1e-300))
