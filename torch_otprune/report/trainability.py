"""Whether the pruned network can still learn: its tangent kernel beside the dense one's."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Curve", "LayerShare", "Memory", "Spectrum", "Trainability"]

_DEAD = 1e-4  # of the trace: a layer that holds less hardly learns
_ALIKE, _TURNED = 0.9, 0.5  # alignment: the kernel is the dense one's, or another
_SAME = 0.8  # of the dense rate: as fast, for what one batch can tell
_NEAR = 0.1  # of the loss: the linear prediction holds


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Spectrum(_Frozen):
    """What is known of one network's tangent kernel `J J'` on the probe batch."""

    trace: float = Field(ge=0, description="sum of the eigenvalues")
    largest: float = Field(ge=0, description="the largest eigenvalue")
    effective_rank: float = Field(
        ge=0, description="squared trace over the sum of squared eigenvalues"
    )
    parameters: int = Field(ge=0)


class LayerShare(_Frozen):
    """How much of the kernel's trace one layer's own parameters hold."""

    path: str
    before: float | None = Field(description="dense, in [0, 1]; None where there is no such layer")
    after: float | None = Field(description="pruned, likewise")


class Curve(_Frozen):
    """Gradient descent on the probe batch: what the kernel predicts, and what happens.

    The loss is half the squared distance of the outputs to the targets, averaged over samples.
    """

    rate: float = Field(gt=0, description="learning rate of plain gradient descent on that loss")
    predicted: tuple[float, ...] = Field(description="loss after 0, 1, 2, ... steps, frozen kernel")
    real: tuple[float, ...] = Field(description="the same, of a copy that was trained")


class Memory(_Frozen):
    """What the measurement took, in bytes, and what it avoided."""

    vectors: int = Field(ge=0, description="gradients, directions and a copy of the parameters")
    activations: int = Field(ge=0, description="of one backward pass on the largest batch")
    krylov: int = Field(ge=0, description="vectors of the length of all outputs")
    stored: int = Field(ge=0, description="what the kernel itself would take in double precision")

    @property
    def total(self) -> int:
        """Add up what was held at the same time."""
        return self.vectors + self.activations + self.krylov


class Trainability(_Frozen):
    """The tangent kernels of a dense and a pruned network on one batch, compared.

    Limits: the kernel of the outputs as the model returns them (logits, not probabilities) under
    squared error, of all floating parameters, batch-norms frozen. It describes the first steps of
    plain gradient descent, not Adam, nor a long training.
    """

    dense: Spectrum
    pruned: Spectrum
    alignment: float = Field(description="cosine between both kernels; 1 where they are parallel")
    alignment_error: float = Field(ge=0, description="standard error of that over the probes")
    drift: float = Field(ge=0, description="norm of the difference over the dense kernel's norm")
    speed: float | None = Field(
        description="how fast the pruned network reduces its own error at first, over how fast the "
        "dense kernel would; None where there is no error"
    )
    rate_limit: float | None = Field(
        description="learning rate above which gradient descent on the curve's loss diverges"
    )
    curve: Curve | None = None
    shares: tuple[LayerShare, ...] = ()
    samples: int = Field(gt=0)
    outputs: int = Field(gt=0, description="per sample")
    probes: int = Field(gt=0)
    exact: bool = Field(description="whether the probes are a basis, so that nothing is estimated")
    engine: str = Field(description="how products with the Jacobian were computed")
    memory: Memory
    seconds: float = Field(ge=0)

    @property
    def dead(self) -> tuple[str, ...]:
        """List layers that held some of the kernel and now hold next to nothing."""
        return tuple(
            s.path
            for s in self.shares
            if s.before is not None and s.after is not None and s.before >= _DEAD > s.after
        )

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Say in plain sentences what the numbers mean."""
        return tuple(self._judge())

    def _judge(self) -> Iterator[str]:
        """Say it, most important first."""
        if self.pruned.trace <= 0:
            yield "the pruned network cannot learn: no output depends on any parameter"
            return
        kind = "close to"
        if self.alignment < _ALIKE:
            kind = "related to" if self.alignment >= _TURNED else "unlike"
        yield f"the tangent kernel is {kind} the dense one: {self._alignment()}"
        if self.speed is not None:
            pace = "as fast as" if _SAME <= self.speed <= 1 / _SAME else "slower than"
            pace = "faster than" if self.speed > 1 / _SAME else pace
            yield (
                f"fine-tuning starts {pace} with the dense kernel: {self.speed:.2f} times its rate"
            )
        if self.curve is not None and self.curve.predicted[0] > 0:
            yield self._prediction(self.curve)
        if self.dead:
            yield f"these layers have stopped learning: {', '.join(self.dead)}"

    def _alignment(self) -> str:
        error = "" if self.exact else f" ± {self.alignment_error:.3f}"
        return f"alignment {self.alignment:.3f}{error}"

    def _prediction(self, curve: Curve) -> str:
        first, steps = curve.predicted[0], len(curve.predicted) - 1
        predicted, real = curve.predicted[-1] / first, curve.real[-1] / first
        holds = "holds" if abs(predicted - real) <= _NEAR else "does not hold"
        return (
            f"the linear prediction {holds} for {steps} steps: "
            f"{predicted:.1%} of the loss foreseen, {real:.1%} left"
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """List the numbers of both networks.

        Returns:
            rows of name, dense, pruned.
        """
        pairs = [
            ("trace", f"{self.dense.trace:.3g}", f"{self.pruned.trace:.3g}"),
            ("largest eigenvalue", f"{self.dense.largest:.3g}", f"{self.pruned.largest:.3g}"),
            (
                "effective rank",
                f"{self.dense.effective_rank:.1f}",
                f"{self.pruned.effective_rank:.1f}",
            ),
            ("drift", "", f"{self.drift:.3g}"),
        ]
        if self.rate_limit is not None:
            pairs.append(("largest stable rate", "", f"{self.rate_limit:.3g}"))
        return pairs

    def basis(self) -> str:
        """Say what the numbers rest on.

        Returns:
            one sentence.
        """
        probes = "exact" if self.exact else f"{self.probes} probes"
        used, stored = self.memory.total / 2**20, self.memory.stored / 2**20
        return (
            f"{self.samples} samples of {self.outputs} outputs, {probes}, {self.seconds:.1f} s; "
            f"{used:.1f} MiB held, where the kernel would take {stored:.1f} MiB"
        )

    def __str__(self) -> str:
        """Print the verdicts, the numbers, and what they rest on."""
        lines = [f"- {verdict}" for verdict in self.verdicts]
        lines += [f"{name:<20} {a:>12} {b:>12}" for name, a, b in [("", "dense", "pruned")]]
        lines += [f"{name:<20} {a:>12} {b:>12}" for name, a, b in self.rows()]
        return "\n".join([*lines, self.basis()])
