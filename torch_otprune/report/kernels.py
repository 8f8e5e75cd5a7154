"""Compare tangent kernels without ever storing one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError
from torch_otprune.report.trainability import Curve, LayerShare, Memory, Spectrum, Trainability
from torch_otprune.statistics.jacobian import Jacobian
from torch_otprune.structure.forward import batch_size
from torch_otprune.surgery import copied

__all__ = ["lanczos", "trainability"]

_STEPS = 20  # of Lanczos: the largest eigenvalue stands out
_GONE = 1e12  # a loss that has grown so much is divergence, whatever comes next


def trainability(
    dense: nn.Module,
    pruned: nn.Module,
    batches: Sequence[Any],
    *,
    targets: Sequence[Tensor] | None = None,
    output: Callable[[Any], Any] | None = None,
    steps: int = 20,
    rate: float | None = None,
    probes: int = 16,
    seed: int = 0,
) -> Trainability:
    """Ask whether a pruned network can still learn, by its tangent kernel on a few batches.

    Every product with a kernel is one backward and one forward-mode pass; the kernel itself, of
    (samples x outputs) squared numbers, is never formed. Both models are left as they were.

    Args:
        dense: the network before.
        pruned: the network after; with outputs of the same shape.
        batches: some 100 samples, as the model takes them.
        targets: what to learn, per batch: tensors of the outputs' shape, or class numbers; None
            takes what the dense network says.
        output: picks what counts out of what the models return; None takes all floating tensors.
        steps: of gradient descent, predicted and real; 0 leaves the curve out.
        rate: learning rate of these; None takes a quarter of the largest stable one.
        probes: random sign vectors of the estimates; where there are no more outputs than
            that, a basis, and all is exact.
        seed: chooses them.

    Returns:
        the comparison; `print` it, or hand it to `report.with_trainability`.

    Raises:
        CalibrationError: if the outputs cannot be differentiated, are not finite, or differ in
            shape between both networks, or targets do not fit.

    Source: Jacot et al. 2018 for the kernel and its linear dynamics; Hutchinson 1990 for traces;
    the comparison of frozen kernel and real steps is ours.
    """
    start, batches = time.perf_counter(), _listed(batches)
    _check(batches, steps=steps, rate=rate, probes=probes)
    with Jacobian(dense, batches, output=output) as one:
        goal = one.values()
        with Jacobian(pruned, batches, output=output) as two:
            _alike(one, two, goal)
            before = _Side.open(one, seed)
            after = _Side.open(two, seed)
            found = _compare(before, after, probes, seed)
            wanted = goal if targets is None else _wanted(targets, one)
            residual = two.values() - wanted
            speed = _speed(one, two, residual)
            limit = 2 * two.samples / after.largest if after.largest > 0 else None
            rate = (limit / 4 if rate is None else rate) if limit and steps else None
            curve = rate and _curve(two, residual, wanted, rate=rate, steps=steps)
            held = _memory(one, two, krylov=_STEPS + 4)
    return Trainability(
        **found.numbers(before, after),
        speed=speed,
        rate_limit=limit,
        curve=curve or None,
        samples=one.samples,
        outputs=max(one.rows // max(one.samples, 1), 1),
        engine=two.engine,
        memory=held,
        seconds=time.perf_counter() - start,
    )


def _listed(batches: Any) -> list[Any]:
    """Take what other functions take: a list, a loader, one tensor."""
    alone = isinstance(batches, Mapping | str) or not isinstance(batches, Iterable)
    if alone:
        raise CalibrationError(
            f"the batches are of type {type(batches).__name__}.",
            where="trainability, argument batches",
            fix="pass a list of batches or a DataLoader.",
        )
    return [batches] if isinstance(batches, Tensor) else list(batches)


def _check(batches: Sequence[Any], *, steps: int, rate: float | None, probes: int) -> None:
    """Refuse what cannot be measured."""
    wrong = {
        "batches": "there are no batches." if not batches else "",
        "steps": f"{steps} steps are none." if steps < 0 else "",
        "rate": f"a learning rate of {rate} learns nothing."
        if rate is not None and not 0 < rate < float("inf")
        else "",
        "probes": f"{probes} probes see nothing." if probes < 1 else "",
    }
    for name, problem in wrong.items():
        if problem:
            raise CalibrationError(
                problem,
                where=f"trainability, argument {name}",
                fix="pass a list of batches, steps of at least 0, a positive finite rate or None, "
                "and at least one probe.",
            )


@dataclass
class _Side:
    """One network, and what the probes have added up about it."""

    jacobian: Jacobian
    largest: float
    traces: list[float] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, jacobian: Jacobian, seed: int) -> _Side:
        """Find the largest eigenvalue."""
        return cls(jacobian, lanczos(jacobian.kernel, jacobian.rows, steps=_STEPS, seed=seed))

    def probe(self, v: Tensor) -> Tensor:
        """Multiply the kernel with one probe."""
        pulled = self.jacobian.pull(v)
        total = 0.0
        for name, slope in pulled.items():
            power = float(slope.double().square().sum())
            path = name.rpartition(".")[0]
            self.layers[path] = self.layers.get(path, 0.0) + power
            total += power
        self.traces.append(total)
        return self.jacobian.push(pulled)


@dataclass
class _Found:
    """Inner products of both kernels, probe by probe."""

    exact: bool
    inner: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.inner)

    def _sums(self) -> Float[Tensor, " three"]:
        table = torch.tensor(self.inner, dtype=torch.float64, device="cpu")
        return table.sum(0) if self.exact else table.mean(0)

    def numbers(self, before: _Side, after: _Side) -> dict[str, Any]:
        """Sum up what the probes say, by field of the comparison."""
        return {
            "dense": self.spectrum(before, 0),
            "pruned": self.spectrum(after, 1),
            "alignment": self.alignment(),
            "alignment_error": self.error(),
            "drift": self.drift(),
            "shares": _shares(before, after),
            "probes": self.count,
            "exact": self.exact,
        }

    def spectrum(self, side: _Side, number: int) -> Spectrum:
        """Sum one side up: the dense network is number 0."""
        trace = sum(side.traces) / (1 if self.exact else self.count)
        power = float(self._sums()[number])
        return Spectrum(
            trace=trace,
            largest=side.largest,
            effective_rank=trace**2 / power if power > 0 else 0.0,
            parameters=side.jacobian.parameters,
        )

    def alignment(self) -> float:
        """Compare directions."""
        return _cosine(self._sums())

    def error(self) -> float:
        """Leave one probe out after the other (jackknife)."""
        if self.exact or self.count < 2:
            return 0.0
        table = torch.tensor(self.inner, dtype=torch.float64, device="cpu")
        left = [_cosine(table.sum(0) - row) for row in table]
        spread = torch.tensor(left, dtype=torch.float64, device="cpu")
        return float(((spread - spread.mean()).square().mean() * (self.count - 1)).sqrt())

    def drift(self) -> float:
        """Compare sizes as well."""
        dense, pruned, cross = self._sums().tolist()
        # probes are shared, so that equal kernels give exactly zero
        change = max(dense + pruned - 2 * cross, 0.0)
        return float((change / dense) ** 0.5) if dense > 0 else 0.0


def _cosine(sums: Tensor) -> float:
    dense, pruned, cross = sums.tolist()
    both = (dense * pruned) ** 0.5
    return min(float(cross / both), 1.0) if both > 0 else 0.0


def _compare(before: _Side, after: _Side, probes: int, seed: int) -> _Found:
    rows = before.jacobian.rows
    found = _Found(exact=rows <= probes)
    for v in _probes(rows, probes, seed):
        a, b = before.probe(v), after.probe(v)
        found.inner.append((float(a @ a), float(b @ b), float(a @ b)))
    return found


def _probes(rows: int, count: int, seed: int) -> Iterator[Float[Tensor, " rows"]]:
    """Draw sign vectors, or list a basis where that is no more work."""
    if rows <= count:
        yield from torch.eye(rows, dtype=torch.float64, device="cpu")
        return
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(count):
        drawn = torch.randint(0, 2, (rows,), generator=generator, device="cpu")
        yield drawn.double() * 2 - 1


def lanczos(
    multiply: Callable[[Tensor], Tensor], size: int, *, steps: int = _STEPS, seed: int = 0
) -> float:
    """Find the largest eigenvalue of a positive semi-definite matrix that is only multiplied with.

    Args:
        multiply: the product with a vector in float64.
        size: length of the vector.
        steps: products at most.
        seed: of the start.

    Returns:
        the largest Ritz value: never above the eigenvalue, equal to it for `steps` = `size`.

    Source: Golub & Van Loan 2013, section 10.1, every vector orthogonalised against all others.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    basis, image = [v / v.norm()], list[Tensor]()
    for _ in range(min(steps, size)):
        w = multiply(basis[-1])
        image.append(w)
        for _ in range(2):  # once is not enough where vectors are nearly dependent
            for b in basis:
                w = w - (b @ w) * b
        if float(w.norm()) <= 1e-10 * float(image[-1].norm()):
            break
        basis.append(w / w.norm())
    frame = torch.stack(basis[: len(image)])
    small = frame @ torch.stack(image).T
    return max(float(torch.linalg.eigvalsh((small + small.T) / 2)[-1]), 0.0)


def _alike(one: Jacobian, two: Jacobian, goal: Tensor) -> None:
    """Refuse networks that do not answer the same question."""
    if one.sizes != two.sizes:
        raise CalibrationError(
            f"the dense network returns {one.rows} numbers and the pruned one {two.rows}.",
            where="trainability, on the same batches",
            fix="pass output=, which picks a tensor whose shape pruning keeps, as "
            "`lambda out: out.logits`.",
        )
    for name, values in (("dense", goal), ("pruned", two.values())):
        if not bool(torch.isfinite(values).all()):
            raise CalibrationError(
                f"the {name} network's output holds NaN or infinity.",
                where="trainability, on the batches that were passed",
                fix="look for NaN or infinity in the batches and in the weights.",
            )


def _wanted(targets: Sequence[Tensor], jacobian: Jacobian) -> Tensor:
    """Lay targets out like the outputs; class numbers become ones and zeros."""
    parts = []
    for number, (target, size) in enumerate(zip(targets, jacobian.sizes, strict=False)):
        flat = target.detach().cpu()
        rows = batch_size(jacobian.batches[number])
        if not flat.is_floating_point() and flat.numel() == rows and size % rows == 0:
            flat = _one_hot(flat.flatten().long(), size // rows)
        parts.append(flat.double().flatten())
    if [len(part) for part in parts] != jacobian.sizes:
        raise CalibrationError(
            f"targets of {[len(p) for p in parts]} numbers do not fit outputs of {jacobian.sizes}.",
            where="trainability, argument targets",
            fix="pass one tensor per batch: of the outputs' shape, or a class number per sample.",
        )
    wanted = torch.cat(parts)
    if not bool(torch.isfinite(wanted).all()):
        raise CalibrationError(
            "a target is NaN or infinite.",
            where="trainability, argument targets",
            fix="pass finite targets.",
        )
    return wanted


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """Lay class numbers out; those that name no class, as for words to be ignored, are refused."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise CalibrationError(
            f"class {int(wrong[0])} is none of the {classes} that the model tells apart.",
            where="trainability, argument targets",
            fix=f"pass class numbers from 0 to {classes - 1}, or values of the outputs' shape.",
        )
    return nn.functional.one_hot(labels, classes)


def _speed(one: Jacobian, two: Jacobian, residual: Tensor) -> float | None:
    """Compare how fast either kernel reduces the pruned network's error."""
    rates = [
        sum(float(t.double().square().sum()) for t in side.pull(residual).values())
        for side in (one, two)
    ]
    return rates[1] / rates[0] if rates[0] > 0 else None


def _curve(
    jacobian: Jacobian, residual: Tensor, wanted: Tensor, *, rate: float, steps: int
) -> Curve:
    """Set the prediction of a frozen kernel beside what training does."""
    predicted = _predicted(jacobian, residual, rate=rate, steps=steps)
    real = _real(jacobian, wanted, rate=rate, steps=steps)
    return Curve(rate=rate, predicted=tuple(predicted), real=tuple(real))


def _predicted(jacobian: Jacobian, residual: Tensor, *, rate: float, steps: int) -> list[float]:
    """Follow the error under a frozen kernel."""
    losses = [float(residual @ residual) / 2 / jacobian.samples]
    for _ in range(steps):
        residual = residual - rate / jacobian.samples * jacobian.kernel(residual)
        losses.append(float(residual @ residual) / 2 / jacobian.samples)
        if not losses[-1] < _GONE * max(losses[0], 1e-300):
            break
    return losses


def _real(jacobian: Jacobian, wanted: Tensor, *, rate: float, steps: int) -> Iterator[float]:
    """Train a copy by plain gradient descent on the same batches."""
    model = copied(jacobian.model)
    with Jacobian(model, jacobian.batches, output=jacobian.output) as copy:
        for step in range(steps + 1):
            residual = copy.values() - wanted
            yield float(residual @ residual) / 2 / copy.samples
            if step < steps:
                slopes = copy.pull(residual)
                with torch.no_grad():
                    for name, parameter in copy.named.items():
                        parameter.sub_(slopes[name], alpha=rate / copy.samples)


def _shares(before: _Side, after: _Side) -> tuple[LayerShare, ...]:
    """Put the layers of both networks side by side."""
    sums = [max(sum(side.layers.values()), 1e-300) for side in (before, after)]
    return tuple(
        LayerShare(
            path=path,
            before=before.layers[path] / sums[0] if path in before.layers else None,
            after=after.layers[path] / sums[1] if path in after.layers else None,
        )
        for path in dict.fromkeys([*before.layers, *after.layers])
    )


def _memory(one: Jacobian, two: Jacobian, *, krylov: int) -> Memory:
    """Quote what is held at once: never more than one product of either network."""
    sizes = [sum(p.numel() * p.element_size() for p in side.named.values()) for side in (one, two)]
    return Memory(
        vectors=3 * max(sizes),
        activations=max(one.activations(), two.activations()),
        krylov=8 * krylov * one.rows,
        stored=8 * one.rows**2,
    )
