"""Trainability: every number against an explicit Jacobian, and the laws of a kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import CalibrationError
from torch_otprune.report.kernels import lanczos
from torch_otprune.statistics.jacobian import Engine, Jacobian


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(width: int = 4) -> nn.Module:
    """Make a convolutional network with batch-norms that have seen something."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 2),
        nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip
    net(draw(16, 2, 5, 5))
    return net


class Attends(nn.Module):
    """A transformer block between two layers, mean-pooled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.into = nn.Linear(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, width, dropout=0.1, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.into(x)).mean(1))


class Dots(nn.Module):
    """Attention through torch's own fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)[:, :2]


class Tied(nn.Module):
    """One matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()).mean(1)


class Recurs(nn.Module):
    """A recurrent layer, which holds its weights in a list of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


def nets() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """List networks with two batches each."""
    torch.manual_seed(1)
    words = [draw(2, 5, 4), draw(1, 5, 4, seed=1)]
    return {
        "batch-norm": (normed(), [draw(2, 2, 5, 5), draw(1, 2, 5, 5, seed=1)]),
        "transformer": (Attends().double(), words),
        "attention": (Dots().double(), words),
        "tied": (Tied().double(), words),
        "recurrent": (Recurs().double(), words),
    }


def explicit(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Store the Jacobian, row by row, by plain backward passes in evaluation mode."""
    frozen = copy.deepcopy(model).eval()
    rows = []
    for batch in batches:
        for out in frozen(batch).flatten():
            slopes = torch.autograd.grad(out, [*frozen.parameters()], retain_graph=True)
            rows.append(torch.cat([s.flatten() for s in slopes]))
    return torch.stack(rows)


# products


@pytest.mark.parametrize("engine", ["auto", "forward", "double"])
@pytest.mark.parametrize("name", list(nets()))
def test_products_are_those_of_the_explicit_jacobian(name: str, engine: Engine) -> None:
    model, batches = nets()[name]
    exact = explicit(model, batches)
    with Jacobian(model.train(), batches, engine=engine) as found:
        assert found.rows == len(exact) and found.parameters == exact.shape[1]
        v = draw(found.rows, seed=3)
        pulled = torch.cat([t.flatten() for t in found.pull(v).values()])
        torch.testing.assert_close(pulled, exact.T @ v, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.kernel(v), exact @ (exact.T @ v), rtol=1e-9, atol=1e-12)
        assert found.activations() > 0


@pytest.mark.parametrize("name", list(nets()))
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, batches = nets()[name]
    model.train()
    first = next(iter(model.parameters())).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = [p for m in model.modules() for p in m._parameters.values()]
    fast, state = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    with Jacobian(model, batches) as found:
        found.kernel(draw(found.rows))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = [p for m in model.modules() for p in m._parameters.values()]
    assert all(a is b for a, b in zip(places, after, strict=True))
    assert model.training and not first.requires_grad and first.grad is None
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.equal(torch.get_rng_state(), state)


class Sly(nn.Module):
    """A layer whose forward reads a copy of its weight that nobody exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        self.same = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.same[0].T


def test_code_that_hides_a_parameter_is_found_out() -> None:
    model, x = Sly(), draw(4, 3)
    with Jacobian(model, [x]) as found:
        assert found.engine == "double"
        exact = explicit(model, [x])
        v = draw(8, seed=2)
        torch.testing.assert_close(found.kernel(v), exact @ exact.T @ v)
    with (
        pytest.raises(CalibrationError) as error,
        Jacobian(model, [x], engine="forward"),
    ):
        pass
    assert "both directions" in error.value.problem


# the comparison


@pytest.mark.parametrize("name", ["batch-norm", "transformer"])
def test_with_a_basis_of_probes_every_number_is_exact(name: str) -> None:
    torch.manual_seed(2)
    small: nn.Module = normed(3) if name == "batch-norm" else Attends(6).double()
    dense, batches = nets()[name]
    one, two = (explicit(m, batches) for m in (dense, small))
    a, b = one @ one.T, two @ two.T
    found = otp.trainability(dense, small, batches, steps=4)
    assert found.exact and found.probes == len(a)
    for kernel, told in ((a, found.dense), (b, found.pruned)):
        top = torch.linalg.eigvalsh(kernel)[-1]
        assert told.trace == pytest.approx(float(kernel.trace()), rel=1e-9)
        assert told.largest == pytest.approx(float(top), rel=1e-9)
        rank = float(kernel.trace() ** 2 / kernel.square().sum())
        assert told.effective_rank == pytest.approx(rank, rel=1e-9)
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    assert found.alignment == pytest.approx(cosine, rel=1e-9) and found.alignment_error == 0
    assert found.drift == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    residual = torch.cat([(small.eval()(x) - dense.eval()(x)).flatten() for x in batches]).detach()
    fast, slow = (float((j.T @ residual).square().sum()) for j in (two, one))
    assert found.speed == pytest.approx(fast / slow, rel=1e-9)
    assert found.curve is not None
    rate = found.curve.rate / 3  # of the summed loss: there are three samples
    for step, told_loss in enumerate(found.curve.predicted):
        left = torch.linalg.matrix_power(torch.eye(len(b)) - rate * b, step) @ residual
        assert told_loss == pytest.approx(float(left @ left) / 6, rel=1e-9)
    shares = {s.path: s for s in found.shares}
    assert sum(s.before or 0 for s in found.shares) == pytest.approx(1)
    assert sum(s.after or 0 for s in found.shares) == pytest.approx(1)
    head = "7" if name == "batch-norm" else "out"
    last = one[:, -sum(p.numel() for p in dense.get_submodule(head).parameters()) :]
    expected = float(last.square().sum() / one.square().sum())
    assert shares[head].before == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["batch-norm", "transformer"])
@pytest.mark.parametrize("probes", [3, 64])
def test_a_network_is_aligned_with_itself(name: str, probes: int) -> None:
    model, batches = nets()[name]
    found = otp.trainability(model, copy.deepcopy(model), batches, probes=probes, steps=2)
    assert found.alignment == pytest.approx(1, abs=1e-12) and found.drift == 0
    assert found.alignment_error < 1e-9 and found.speed is None  # nothing is left to learn
    assert found.dense == found.pruned and not found.dead
    assert all(s.before == pytest.approx(s.after) for s in found.shares)
    assert "close to the dense one" in found.verdicts[0]


def test_estimates_agree_with_the_exact_numbers() -> None:
    model, _ = nets()["batch-norm"]
    x = [draw(12, 2, 5, 5, seed=4)]
    small = normed(3)
    exact = otp.trainability(model, small, x, probes=36, steps=0)
    rough = otp.trainability(model, small, x, probes=24, steps=0, seed=5)
    assert exact.exact and not rough.exact and rough.alignment_error > 0
    assert rough.dense.trace == pytest.approx(exact.dense.trace, rel=0.2)
    assert rough.alignment == pytest.approx(exact.alignment, abs=5 * rough.alignment_error)
    assert rough.dense.largest == pytest.approx(exact.dense.largest, rel=1e-3)


def test_a_linear_model_does_what_the_kernel_predicts() -> None:
    dense, small = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    x, y = draw(10, 4), draw(10, 3, seed=1)
    found = otp.trainability(dense, small, [x], targets=[y], steps=15)
    assert found.curve is not None and found.alignment == pytest.approx(1)
    assert found.curve.real == pytest.approx(found.curve.predicted, rel=1e-9)
    assert found.curve.real[-1] < found.curve.real[0] and found.speed == pytest.approx(1)
    assert any("holds for 15 steps" in verdict for verdict in found.verdicts)


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.1, 0.9) | st.floats(1.1, 2.0))
def test_beyond_the_limit_descent_diverges_and_below_it_does_not(factor: float) -> None:
    dense, small = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
    x = draw(6, 4)
    limit = otp.trainability(dense, small, [x], steps=0).rate_limit
    assert limit is not None
    curve = otp.trainability(dense, small, [x], steps=80, rate=factor * limit).curve
    assert curve is not None
    assert (curve.real[-1] < curve.real[0]) == (factor < 1)
    assert (curve.predicted[-1] < curve.predicted[0]) == (factor < 1)


def test_class_numbers_are_targets() -> None:
    model, small = normed(), normed(3)
    x, y = draw(4, 2, 5, 5), torch.tensor([0, 2, 1, 2])
    one, two = (
        otp.trainability(model, small, [x], targets=[t], steps=2)
        for t in (y, nn.functional.one_hot(y).double())
    )
    assert one.curve == two.curve


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_lanczos_never_exceeds_the_largest_eigenvalue_and_ends_there(steps: int) -> None:
    root = draw(12, 12)
    matrix = root @ root.T
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    found = lanczos(lambda v: matrix @ v, 12, steps=steps)
    assert found <= top * (1 + 1e-12)
    if steps == 12:
        assert found == pytest.approx(top, rel=1e-12)
    assert lanczos(lambda v: v * 0, 12) == 0
    assert lanczos(lambda v: v * 3, 12) == pytest.approx(3)  # stops at once


# in the report


@pytest.fixture
def pruned() -> tuple[nn.Module, nn.Module, otp.Report]:
    """Prune a network, and keep the dense one."""
    model = normed(6).eval()
    dense, x = copy.deepcopy(model), draw(16, 2, 5, 5, seed=7)
    report = otp.prune_(model, otp.Policy(rules=[otp.Channels(keep="50%")]), [x])
    return dense, model, report


def test_a_report_prints_writes_and_saves_it(pruned: Any, tmp_path: Path) -> None:
    dense, model, report = pruned
    found = otp.trainability(dense, model, [draw(8, 2, 5, 5)])
    whole = report.with_trainability(found)
    assert report.trainability is None and "tangent kernel" not in str(report)
    assert "tangent kernel is" in str(whole) and "effective rank" in str(whole)
    page = whole.write(tmp_path).read_text()
    assert "<h2>Trainability</h2>" in page and "where the kernel would take" in page
    assert "<h2>Trainability</h2>" not in report.write(tmp_path / "b").read_text()
    assert otp.Report.from_json(whole.to_json()).trainability == found
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    whole.undo_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_memory_is_quoted_and_does_not_grow_with_the_square_of_the_outputs(pruned: Any) -> None:
    dense, model, _ = pruned
    few, many = (
        otp.trainability(dense, model, [draw(n, 2, 5, 5)], steps=0, probes=2).memory
        for n in (8, 32)
    )
    assert many.stored == 16 * few.stored == 8 * 96**2
    assert many.vectors == few.vectors == 3 * 8 * sum(p.numel() for p in dense.parameters())
    assert many.total - many.vectors < 4.5 * (few.total - few.vectors)


def test_a_dead_network_is_called_dead() -> None:
    model, dead = normed(), normed()
    with torch.no_grad():
        for p in dead.parameters():
            p.zero_()
    dead[7].register_parameter("bias", None)
    found = otp.trainability(model, dead, [draw(4, 2, 5, 5)])
    assert found.pruned.trace == 0 and found.rate_limit is None and found.curve is None
    assert found.verdicts == (
        "the pruned network cannot learn: no output depends on any parameter",
    )


def test_a_layer_that_stopped_learning_is_named() -> None:
    model, small = normed(), normed()
    with torch.no_grad():
        small[4].weight.zero_()  # nothing behind it sees the layer in front
    found = otp.trainability(model, small, [draw(4, 2, 5, 5)], steps=0)
    assert {"0", "1", "3"} <= set(found.dead)
    assert any("stopped learning: 0" in verdict for verdict in found.verdicts)


class Many(nn.Module):
    """Returns its hidden signal beside its answer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, width).double(), nn.Linear(width, 2).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x).tanh()
        return {"logits": self.b(h), "hidden": h}


def test_an_output_can_be_picked() -> None:
    x = draw(4, 3)
    with pytest.raises(CalibrationError) as error:
        otp.trainability(Many(5), Many(3), [x])
    assert "returns 28 numbers" in error.value.problem and "output=" in error.value.fix
    found = otp.trainability(Many(5), Many(3), [x], output=lambda out: out["logits"], steps=0)
    assert found.outputs == 2


@pytest.mark.parametrize(
    ("change", "problem", "where"),
    [
        ({"batches": []}, "there are no batches", "argument batches"),
        ({"steps": -1}, "-1 steps", "argument steps"),
        ({"rate": 0.0}, "learning rate of 0.0", "argument rate"),
        ({"rate": float("nan")}, "learning rate of nan", "argument rate"),
        ({"probes": 0}, "0 probes", "argument probes"),
        ({"targets": [torch.zeros(7)]}, "do not fit outputs", "argument targets"),
        ({"targets": []}, "do not fit outputs", "argument targets"),
        ({"targets": [torch.tensor([0, 3, 1, 2])]}, "class 3 is none of the 3", "argument targets"),
        ({"targets": [torch.tensor([0, -100, 1, 2])]}, "class -100 is none", "argument targets"),
        ({"targets": [torch.full((4, 3), torch.inf)]}, "a target is NaN", "argument targets"),
        ({"batches": {"x": torch.zeros(2, 4)}}, "of type dict", "argument batches"),
        ({"batches": [torch.full((2, 4), float("nan")).double()]}, "NaN or infinity", "batches"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    change: dict[str, Any], problem: str, where: str
) -> None:
    dense, small = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    batches = change.pop("batches", [draw(4, 4)])
    with pytest.raises(CalibrationError) as error:
        otp.trainability(dense, small, batches, **change)
    assert problem in error.value.problem and where in error.value.where and error.value.fix


def test_one_tensor_is_one_batch() -> None:
    dense, small, x = nn.Linear(4, 3).double(), nn.Linear(4, 3).double(), draw(4, 4)
    one, two = (otp.trainability(dense, small, b, steps=0) for b in (x, [x]))
    assert one.samples == 4 and one.alignment == two.alignment


class Words(nn.Module):
    """Answers with whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).argmax(1)


def test_a_model_without_floating_answers_is_refused() -> None:
    with pytest.raises(CalibrationError) as error:
        otp.trainability(Words(), Words(), [torch.randn(2, 4)])
    assert "no floating tensor" in error.value.problem and "Words" in error.value.where
