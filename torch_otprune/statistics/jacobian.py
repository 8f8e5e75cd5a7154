"""A network's Jacobian as two products: never stored, however many outputs and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_otprune.errors import CalibrationError
from torch_otprune.statistics.sensitivity import gradients
from torch_otprune.structure.forward import (
    batch_size,
    evaluating,
    first_line,
    flat_tensors,
    outside_inference,
    run,
)

__all__ = ["Engine", "Jacobian"]

Engine = Literal["auto", "forward", "double"]
Output = Callable[[Any], Any]
_CLOSE = 1e-3  # relative: what both directions of one product may differ by, also in float32


class Jacobian:
    """Products with the Jacobian of all outputs on some batches, by all parameters.

    Use it as a context: inside, the model is in evaluation mode (a batch-norm would couple the
    samples and move its statistics) and attention runs in its plain form, which can be
    differentiated twice. Each product takes one to three runs per batch, and holds one batch's
    activations and two vectors of the model's size.

    Args:
        model: any module; left as it was.
        batches: as the model takes them.
        output: picks what counts out of what the model returns; None takes every floating tensor.
        engine: how `push` works: `forward` mode, or `double` backward; `auto` takes forward mode
            where it agrees with `pull`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        output: Output | None = None,
        engine: Engine = "auto",
    ) -> None:
        self.model, self.batches, self.output = model, list(batches), output
        self.engine: Engine = engine
        self.named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self.samples = sum(batch_size(batch) for batch in self.batches)
        self.sizes: list[int] = []
        self._open = ExitStack()

    def __enter__(self) -> Jacobian:
        self._open.enter_context(outside_inference())
        self._open.enter_context(evaluating(self.model))
        self._open.enter_context(gradients(self.model))
        self._open.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._open.callback(torch.backends.mha.set_fastpath_enabled, _fused())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            self.sizes = [len(self._plain(batch)) for batch in self.batches]
            self._check()
        except BaseException:  # whatever happened, the model must be as it was
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    @property
    def rows(self) -> int:
        """Count the outputs of all batches: the kernel has as many rows."""
        return sum(self.sizes)

    @property
    def parameters(self) -> int:
        """Count the parameters."""
        return sum(p.numel() for p in self.named.values())

    def values(self) -> Float[Tensor, " rows"]:
        """Run the model on all batches.

        Returns:
            its outputs, batch after batch, in float64 on the CPU.
        """
        return torch.cat([self._plain(batch) for batch in self.batches])

    def pull(self, v: Float[Tensor, " rows"]) -> dict[str, Tensor]:
        """Multiply the transposed Jacobian with a vector: one backward pass per batch.

        Args:
            v: one number per output.

        Returns:
            one tensor per parameter, by name.
        """
        total = {n: torch.zeros_like(p) for n, p in self.named.items()}
        for batch, part in zip(self.batches, v.split(self.sizes), strict=True):
            out = self._flat(batch)
            for (name, _), slope in zip(
                self.named.items(), _grad(out, [*self.named.values()], part.to(out)), strict=True
            ):
                if slope is not None:
                    total[name] += slope.detach()
        return {n: t.detach() for n, t in total.items()}

    def push(self, u: Mapping[str, Tensor]) -> Float[Tensor, " rows"]:
        """Multiply the Jacobian with a change of the parameters.

        Args:
            u: one tensor per parameter, by name.

        Returns:
            the change of every output, to first order, in float64 on the CPU.
        """
        how = self._push_double if self.engine == "double" else self._push_forward
        return torch.cat([how(batch, u).detach().double().cpu() for batch in self.batches])

    def kernel(self, v: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Multiply the tangent kernel with a vector.

        Args:
            v: one number per output.

        Returns:
            the product.
        """
        return self.push(self.pull(v))

    def activations(self) -> int:
        """Measure what one backward pass keeps of the largest batch.

        Returns:
            bytes, parameters aside.
        """
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.named.values()}

        def note(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            alive = self._flat(max(self.batches, key=batch_size))
        del alive
        return sum(size for place, size in kept.items() if place not in own)

    def _plain(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return self._flat(batch).double().cpu()

    def _flat(self, batch: Any) -> Tensor:
        return self._line(run(self.model, batch))

    def _line(self, out: Any) -> Tensor:
        picked = out if self.output is None else self.output(out)
        found = [t.flatten() for t in flat_tensors(picked) if t.is_floating_point()]
        if not found:
            raise CalibrationError(
                "the model returns no floating tensor.",
                where=f"the Jacobian of {type(self.model).__name__}",
                fix="pass output=, which picks the tensor that counts.",
            )
        return torch.cat(found)

    def _check(self) -> None:
        """Choose an engine whose products are adjoint to those of `pull`."""
        if not self.rows or not self.named:
            raise CalibrationError(
                "there is nothing to differentiate.",
                where=f"the Jacobian of {type(self.model).__name__}",
                fix="pass batches with samples, and a model with floating parameters.",
            )
        wanted: list[Engine] = ["forward", "double"] if self.engine == "auto" else [self.engine]
        said = ""
        for engine in wanted:
            self.engine = engine
            try:
                far = self._apart()
            except (RuntimeError, NotImplementedError) as error:
                said = first_line(error)
                continue
            if far <= _CLOSE:
                return
            said = f"both directions of the product differ by {far:.0%}"
        raise CalibrationError(
            f"the model cannot be linearised: {said}.",
            where=f"the Jacobian of {type(self.model).__name__}",
            fix="let forward be made of differentiable torch operations, or pass output=.",
        )

    def _apart(self) -> float:
        """Compare `<J'v, u>` with `<v, J u>` for random vectors: code may hide its parameters."""
        generator = torch.Generator("cpu").manual_seed(0)
        v = torch.randn(self.rows, generator=generator, dtype=torch.float64, device="cpu")
        u = {
            n: torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p)
            for n, p in self.named.items()
        }
        pulled, pushed = self.pull(v), self.push(u)
        one = sum(float((pulled[n].double() * u[n].double()).sum()) for n in u)
        scale = float(v.norm() * pushed.norm())
        scale = max(scale, float(sum(t.double().square().sum() for t in pulled.values())) ** 0.5)
        return abs(one - float(v @ pushed)) / scale if scale > 0 else 0.0

    def _push_forward(self, batch: Any, u: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad(), forward.dual_level(), _exchanged(self.model, self.named, u):
            out = self._flat(batch)
            tangent = forward.unpack_dual(out).tangent
            return torch.zeros_like(out) if tangent is None else tangent.clone()

    def _push_double(self, batch: Any, u: Mapping[str, Tensor]) -> Tensor:
        """Differentiate the gradient, which is linear in what it starts from."""
        out = self._flat(batch)
        start = torch.zeros_like(out, requires_grad=True)
        slopes = _grad(out, [*self.named.values()], start, again=True)
        both = zip(self.named, slopes, strict=True)
        inner = [(s * u[n]).sum() for n, s in both if s is not None and s.requires_grad]
        if not inner:
            return torch.zeros_like(out)
        (found,) = torch.autograd.grad(torch.stack(inner).sum(), start, allow_unused=True)
        return torch.zeros_like(out) if found is None else found


def _fused() -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled())


def _grad(
    out: Tensor, points: Sequence[Tensor], start: Tensor, *, again: bool = False
) -> Sequence[Tensor | None]:
    if not out.requires_grad:
        return [None] * len(points)
    return torch.autograd.grad(out, points, start, create_graph=again, allow_unused=True)


@contextmanager
def _exchanged(
    model: nn.Module, named: Mapping[str, Tensor], u: Mapping[str, Tensor]
) -> Iterator[None]:
    """Put dual numbers in the place of parameters, also where several modules share one."""
    twins = {id(p): forward.make_dual(p.detach(), u[n]) for n, p in named.items()}
    places = [
        (module, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and id(p) in twins
    ]
    try:
        for module, key, p in places:
            module._parameters[key] = twins[id(p)]
        yield
    finally:
        for module, key, p in places:
            module._parameters[key] = p
