"""What every repair promises, and the exact answers of least squares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune  # noqa: F401  fills the tables
from tests.cases import CASES, cut, outputs, random_cuts
from torch_otprune.errors import RepairError
from torch_otprune.plan import Cut
from torch_otprune.policy.registry import REPAIRS
from torch_otprune.repair import Note, Patient, Repair
from torch_otprune.repair.lockstep import Lockstep, Site, distance
from torch_otprune.repair.solve import Normal, solve
from torch_otprune.structure import trace
from torch_otprune.surgery import cut_, gap

QUICK: dict[str, dict[str, Any]] = {
    "reconstruct": {"kind": "reconstruct", "steps": 3},
    "sparse_map": {"kind": "sparse_map", "rows": 96},
    "domain_map": {"kind": "domain_map", "rows": 96},
    "flow": {"kind": "flow", "rows": 96, "map": {"anchors": 1}},
}
KINDS = sorted(REPAIRS)


def repair(kind: str, **settings: Any) -> Repair:
    """Build one, the slow ones short."""
    made = REPAIRS.resolve(QUICK.get(kind, {"kind": kind}) | settings)
    assert isinstance(made, Repair)
    return made


def patient(
    model: nn.Module, batches: list[Any], cuts: list[Cut] | None = None, *, seed: int = 0
) -> Patient:
    """Cut a copy and lay both side by side."""
    graph, small = trace(model, batches[0]), copy.deepcopy(model)
    chosen = random_cuts(graph, seed=seed, hidden=False) if cuts is None else cuts
    cut_(small, chosen)
    return Patient(model, small, graph, chosen, chosen, batches)


def case(name: str, *, batches: int = 3, samples: int = 16) -> tuple[nn.Module, list[Any]]:
    """Build a case and some batches."""
    return CASES[name].model(), [CASES[name].batch(samples, seed=s) for s in range(batches)]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every tensor."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "norm"])
def test_keeping_everything_changes_nothing(kind: str, name: str) -> None:
    model, batches = case(name)
    graph = trace(model, batches[0])
    whole = [cut(graph, g.name, torch.arange(g.units)) for g in graph.groups]
    sick = patient(model, batches, whole)
    repair(kind).apply_(sick)
    for key, value in state(model).items():
        torch.testing.assert_close(sick.small.state_dict()[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_brings_the_output_closer_or_says_that_it_did_not(kind: str, name: str) -> None:
    model, batches = case(name)
    sick = patient(model, batches)
    before = distance(sick.dense, sick.small, batches)
    notes = repair(kind).apply_(sick)
    after = distance(sick.dense, sick.small, batches)
    assert after <= before * (1 + 1e-9) or kind == "bias"
    for note in notes:
        assert isinstance(note, Note) and note.kind and note.site
        if note.before is not None and note.after is not None:
            assert note.after <= note.before * (1 + 1e-9)
        assert note.accepted or note.text


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_leaves_the_dense_model_and_the_shapes(kind: str, name: str) -> None:
    model, batches = case(name)
    sick = patient(model, batches)
    before, shapes = state(model), [v.shape for v in sick.small.state_dict().values()]
    flags = [(p.dtype, p.requires_grad) for p in sick.small.parameters()]
    random = torch.get_rng_state()
    repair(kind).apply_(sick)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [v.shape for v in sick.small.state_dict().values()] == shapes
    assert [(p.dtype, p.requires_grad) for p in sick.small.parameters()] == flags
    assert all(p.grad is None and p.is_leaf for p in sick.small.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sick.small.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sick.dense.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "reconstruct"])
def test_a_repair_does_the_same_every_time(kind: str) -> None:
    model, batches = case("residual")
    found = []
    for _ in range(2):
        sick = patient(model, batches)
        repair(kind).apply_(sick)
        found.append(state(sick.small))
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


@pytest.mark.parametrize("kind", ["bias", "norm"])
def test_the_split_into_batches_does_not_matter(kind: str) -> None:
    model, [batch] = case("residual", batches=1, samples=24)
    found = []
    for pieces in ([batch], list(batch.split([5, 19]))):
        sick = patient(model, pieces)
        repair(kind).apply_(sick)
        found.append(outputs(sick.small, batch))
    if kind == "bias":  # batch-norms see other batches, so only nearly the same there
        assert gap(*found) < 1e-9


def test_least_squares_does_not_depend_on_the_split_into_batches() -> None:
    model, [batch] = case("residual", batches=1, samples=24)
    found = []
    for pieces in ([batch], list(batch.split([3, 2, 19])), list(batch.split(1))):
        sick = patient(model, pieces)
        repair("least_squares").apply_(sick)
        found.append(outputs(sick.small, batch))
    assert gap(found[0], found[1]) < 1e-7 and gap(found[0], found[2]) < 1e-7


DOUBLES = ["plain", "mlp", "residual", "flatten", "depthwise", "conv1d", "branches", "named",
           "attention", "bare", "prelu", "grouped", "pair", "gated"]  # fmt: skip


def doubled(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, list[Cut]]:
    """Make the last unit of the first group a copy of the one before it, and cut it."""
    graph = trace(model, batches[0])
    group = next(g for g in graph.groups if g.kind == "channels")
    for member in group.members:
        module = model.get_submodule(member.path)
        for source, twin in zip(*member.index[-2:], strict=True):
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    _copy(tensor, int(source), int(twin), member.side, member.size)
    return model, [cut(graph, group.name, torch.arange(group.units - 1))]


@torch.no_grad()
def _copy(tensor: Tensor | None, source: int, twin: int, side: str, size: int) -> None:
    if side != "in" and tensor is not None and tensor.dim() and len(tensor) == size:
        tensor[twin] = tensor[source]


@pytest.mark.parametrize("name", DOUBLES)
def test_a_duplicated_unit_is_repaired_exactly(name: str) -> None:
    model, cuts = doubled(*case(name))
    _, batches = case(name, samples=32)
    sick = patient(model, batches, cuts)
    assert distance(sick.dense, sick.small, batches) > 1e-7
    notes = repair("least_squares", ridge=1e-13).apply_(sick)
    assert all(n.accepted or n.before < 1e-14 for n in notes)  # what is exact cannot gain
    assert distance(sick.dense, sick.small, batches) < 1e-14


def test_the_intercept_goes_into_the_bias() -> None:
    model, batches = case("mlp")
    graph = trace(model, batches[0])
    with torch.no_grad():
        model[0].weight[0] = 0  # unit 0 is a constant
        model[0].bias[0] = 2.0
    sick = patient(model, batches, [cut(graph, "0", torch.arange(1, 12))])
    repair("bias").apply_(sick)
    expected = model[2].bias + 2.0 * model[2].weight[:, 0]
    torch.testing.assert_close(sick.small.get_parameter("2.bias"), expected)
    assert distance(sick.dense, sick.small, batches) < 1e-20


@pytest.mark.parametrize("kind", ["bias", "least_squares"])
def test_the_intercept_goes_into_the_batch_norm_where_there_is_no_bias(kind: str) -> None:
    model, batches = case("residual")
    with torch.no_grad():
        model.get_parameter("blocks.0.norm1.weight")[0] = 0
        model.get_parameter("blocks.0.norm1.bias")[0] = 2.0
    inner = model.get_submodule("blocks.0.conv2")
    inner.padding_mode = "reflect"  # a constant stays one at the border
    graph = trace(model, batches[0])
    sick = patient(model, batches, [cut(graph, "blocks.0.conv1", torch.arange(1, 6))])
    repair(kind, **({"ridge": 1e-13} if kind == "least_squares" else {})).apply_(sick)
    old, new = (m.get_submodule("blocks.0.norm2").running_mean for m in (sick.dense, sick.small))
    assert not torch.equal(old, new)
    assert distance(sick.dense, sick.small, batches) < 1e-15


def test_a_layer_with_neither_bias_nor_norm_is_left_alone_and_noted() -> None:
    model, batches = case("bare")
    notes = repair("bias").apply_(patient(model, batches))
    assert {(n.site, n.accepted, n.text) for n in notes} == {
        ("2", False, "has neither bias nor batch-norm"),
        ("6", False, "has neither bias nor batch-norm"),
    }


@pytest.mark.parametrize(
    ("name", "site", "text"),
    [
        ("transposed", "up1", "a ConvTranspose2d is not refitted"),
        ("tied", "head", "shares a tensor with another layer"),
    ],
)
def test_a_layer_that_is_not_refitted_says_why(name: str, site: str, text: str) -> None:
    model, batches = case(name)
    sick = patient(model, batches)
    before = sick.small.get_parameter(f"{site}.weight").clone()
    notes = repair("least_squares").apply_(sick)
    assert (site, False, text) in [(n.site, n.accepted, n.text) for n in notes]
    assert torch.equal(sick.small.get_parameter(f"{site}.weight"), before)


def test_ties_survive_every_repair() -> None:
    for kind in KINDS:
        model, batches = case("tied")
        sick = patient(model, batches)
        repair(kind).apply_(sick)
        small = sick.small
        assert small.get_parameter("head.weight") is small.get_parameter("embed.weight")


class Twice(nn.Module):
    """Runs one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return x


def test_a_layer_that_runs_twice_is_left_alone() -> None:
    model, x = Twice().double(), torch.randn(16, 6, dtype=torch.float64)
    notes = repair("least_squares").apply_(patient(model, [x]))
    assert {n.text for n in notes} == {"runs more than once per forward pass"}


class Choosy(nn.Module):
    """Takes another way for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h) + (self.other(h) if x[0, 0] > 0 else 0)


def test_batches_that_take_different_ways_are_refused() -> None:
    model, x = Choosy().double(), torch.randn(16, 6, dtype=torch.float64)
    one, two = x.clone(), x.clone()
    one[0, 0], two[0, 0] = 1, -1
    sick = patient(model, [one, two])
    with pytest.raises(RepairError) as error:
        repair("least_squares").apply_(sick)
    assert error.value.problem == "not every batch runs the same layers in the same order."
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sick.small.modules())


def test_shapes_may_differ_between_batches() -> None:
    model = CASES["residual"].model()
    batches = [torch.randn(12, 3, s, s, dtype=torch.float64) for s in (8, 6, 10)]
    sick = patient(model, batches)
    before = distance(sick.dense, sick.small, batches)
    for kind in ("least_squares", "bias", "norm"):
        repair(kind).apply_(sick)
    assert distance(sick.dense, sick.small, batches) < before


def test_a_failing_step_ends_all_walkers() -> None:
    import threading

    model, batches = case("residual")
    sick, alive = patient(model, batches), threading.active_count()
    sites = [Site(p, sick.graph.tails[p]) for p in sick.graph.order]

    def fail(site: Site, pauses: object) -> None:
        if site.path == "blocks.0.conv2":
            raise ZeroDivisionError("on purpose")

    walk = Lockstep(sick.dense, sick.small, batches, sites)
    with pytest.raises(ZeroDivisionError, match="on purpose"), walk:
        walk.play(fail)
    assert threading.active_count() == alive
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sick.small.modules())


def test_walking_side_by_side_returns_both_outputs() -> None:
    model, batches = case("residual")
    sick = patient(model, batches)
    sites = [Site(p, sick.graph.tails[p]) for p in sick.graph.order]
    with Lockstep(sick.dense, sick.small, batches, sites) as walk:
        pairs = walk.play(lambda site, pauses: None)
    for (dense, small), batch in zip(pairs, batches, strict=True):
        assert gap(outputs(sick.dense, batch), [dense]) == 0
        assert gap(outputs(sick.small, batch), [small]) < 1e-12


# least squares itself


def normal(x: Tensor, y: Tensor) -> Normal:
    """Sum up rows."""
    found = Normal.empty(x.shape[1], y.shape[1], x.device)
    found.update(x, y)
    return found


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, dtype=torch.float64)


def test_no_other_weight_does_better_on_the_calibration_rows() -> None:
    x, y, old = draw(60, 5), draw(60, 3), draw(5, 3)
    fit = solve(normal(x[:50], y[:50]), normal(x[50:], y[50:]), old, ridge=1e-13)
    best = (y - x @ fit.weight).square().sum()
    for scale in (1e-4, 1e-2, 1.0):
        other = fit.weight + scale * draw(5, 3)
        assert (y - x @ other).square().sum() >= best
    torch.testing.assert_close(fit.weight, torch.linalg.lstsq(x, y).solution)


def test_the_reported_errors_are_the_real_ones() -> None:
    x, y, old = draw(60, 5), draw(60, 3), draw(5, 3)
    fit = solve(normal(x[:50], y[:50]), normal(x[50:], y[50:]), old)
    power = y.square().sum()
    assert fit.before == pytest.approx(float((y - x @ old).square().sum() / power))
    assert fit.after == pytest.approx(float((y - x @ fit.weight).square().sum() / power))


@pytest.mark.parametrize("ridge", [None, 1e-8, 1.0, 1e6])
def test_the_fit_is_never_worse_than_the_old_weight(ridge: float | None) -> None:
    x, y, old = draw(40, 6), draw(40, 2), draw(6, 2)
    fit = solve(normal(x[:32], y[:32]), normal(x[32:], y[32:]), old, ridge=ridge)
    assert fit.after <= fit.before


def test_a_huge_ridge_keeps_the_old_weight() -> None:
    x, y, old = draw(40, 6), draw(40, 2), draw(6, 2)
    fit = solve(normal(x[:32], y[:32]), normal(x[32:], y[32:]), old, ridge=1e12)
    torch.testing.assert_close(fit.weight, old)


def test_what_the_data_do_not_show_keeps_its_old_weight() -> None:
    x, y, old = draw(40, 6), draw(40, 2), draw(6, 2)
    x[:, 3] = 0
    fit = solve(normal(x[:32], y[:32]), normal(x[32:], y[32:]), old)
    torch.testing.assert_close(fit.weight[3], old[3])


def test_no_data_at_all_keeps_the_old_weight() -> None:
    old, none = draw(6, 2), torch.zeros(4, 6, dtype=torch.float64)
    fit = solve(normal(none, none[:, :2]), normal(none, none[:, :2]), old)
    assert torch.equal(fit.weight, old) and fit.after <= fit.before
