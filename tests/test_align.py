"""Two networks of one architecture: permuted copies are recovered, other widths start nearer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES, cut, outputs
from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.repair.lockstep import distance
from torch_otprune.repair.matching import Matching
from torch_otprune.repair.moves import Carrier, Move
from torch_otprune.structure import trace
from torch_otprune.structure.layers import shared
from torch_otprune.surgery import cut_, gap

# scales of tokens are bare parameters, units of gated have two channels, those of flatten nine
NAMES = (
    "plain mlp residual concat depthwise grouped flatten branches gated attention tokens conv1d "
    "prelu transposed squeeze_excite"
).split()


def permuted(model: nn.Module, batch: Any, *, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Rename the units of every group of a copy; it computes the same."""
    graph, twin = trace(model, batch), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    moves, orders = [], {}
    for group in graph.groups:
        order = torch.randperm(group.units, generator=generator)
        block = torch.eye(group.units, dtype=torch.float64)[:, order]
        moves.append(Move(group.name, group.members, group.members, block, block, plain=True))
        orders[group.name] = order
    carrier = Carrier(model, twin, graph, moves, ties=shared(model))
    for move in moves:
        carrier.write_(move)
    return twin, orders


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_copy_is_recovered_to_the_bit(name: str, features: Any) -> None:
    model, batch = CASES[name].model(), CASES[name].batch(32)
    twin, orders = permuted(model, batch)
    assert gap(outputs(model, batch), outputs(twin, batch)) < 1e-12
    found = otp.align(model, twin, batch, features=features)
    assert {g: c.assignment().tolist() for g, c in found.couplings.items()} == {
        g: order.argsort().tolist() for g, order in orders.items()
    }
    blank = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    found.transfer_(blank)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in tensors(blank).items())


def test_neither_network_is_written_by_aligning() -> None:
    model, batch = CASES["residual"].model(), CASES["residual"].batch(16)
    other = CASES["residual"].model(seed=3)
    before = [tensors(m) for m in (model, other)]
    otp.align(model, other, batch)
    for old, net in zip(before, (model, other), strict=True):
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in old.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def mlp(*widths: int, seed: int = 0) -> nn.Module:
    """Build a dense network with rectifiers and a batch-norm, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for into, out in zip((6, *widths[:-1]), widths, strict=True):
            layers += [nn.Linear(into, out), nn.BatchNorm1d(out), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(widths[-1], 4)).double()
        model.train()(torch.randn(256, 6, dtype=torch.float64))
    return model.eval()


def points(samples: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("features", ["weights", "activations"])
def test_a_student_several_times_as_wide_computes_what_the_teacher_does(
    times: int, features: Any
) -> None:
    teacher, student = mlp(8, 10), mlp(8 * times, 10 * times, seed=5)
    found = otp.align(teacher, student, points(), features=features)
    for name, width in (("0", 8), ("3", 10)):
        sent = found.couplings[name].plan()
        assert (sent > 0).sum(1).tolist() == [times] * width
    found.transfer_(student)
    assert distance(teacher, student, [points()]) < 1e-24


@pytest.mark.parametrize("widths", [(9, 11), (9, 10), (19, 13), (8, 27)])
@pytest.mark.parametrize("features", ["weights", "activations"])
def test_a_wider_student_of_any_width_computes_what_the_teacher_does(
    widths: tuple[int, int], features: Any
) -> None:
    teacher, student = mlp(8, 10), mlp(*widths, seed=5)
    found = otp.align(teacher, student, points(), features=features)
    for name, old, new in zip(("0", "3"), (8, 10), widths, strict=True):
        copies = (found.couplings[name].plan() > 1e-9).sum(1)
        assert copies.sum() == new and copies.min() == new // old
    found.transfer_(student)
    assert distance(teacher, student, [points()]) < 1e-24


def test_copies_go_where_they_are_nearest() -> None:
    x = torch.tensor([[1.0], [5.0], [9.0]], dtype=torch.float64)
    y = torch.tensor([[5.1], [0.9], [9.2], [8.8], [1.1]], dtype=torch.float64)
    found = Matching("l2").copied(x, y).plan()
    assert (found > 1e-9).long().tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize("features", ["weights", "activations"])
@pytest.mark.parametrize("seed", [5, 6, 7])
def test_a_narrower_student_starts_nearer_to_the_teacher_than_at_random(
    seed: int, features: Any
) -> None:
    teacher, student = mlp(16, 12), mlp(10, 8, seed=seed)
    before = distance(teacher, student, [points()])
    otp.align(teacher, student, points(), features=features).transfer_(student)
    assert distance(teacher, student, [points()]) < 0.9 * before


def test_a_pruned_student_is_aligned_with_the_units_that_it_kept() -> None:
    teacher, batch = CASES["plain"].model(), CASES["plain"].batch(32)
    graph, student = trace(teacher, batch), copy.deepcopy(teacher)
    keep = {"0": [0, 2, 3, 5], "3": [1, 2, 4, 5, 7]}
    cut_(student, [cut(graph, name, torch.tensor(units)) for name, units in keep.items()])
    found = otp.align(teacher, student, batch)
    for name, units in keep.items():
        best = found.couplings[name].plan()[units].argmax(1)
        assert best.tolist() == list(range(len(units)))


def test_a_share_of_one_half_is_the_mean_of_both() -> None:
    one, two = mlp(8, 10), mlp(8, 10, seed=4)
    found = otp.align(one, two, points())
    whole, half = copy.deepcopy(two), copy.deepcopy(two)
    found.transfer_(whole)
    found.transfer_(half, share=0.5)
    for name, value in half.named_parameters():
        mean = (whole.get_parameter(name) + two.get_parameter(name)) / 2
        torch.testing.assert_close(value, mean)


def test_an_optimiser_that_holds_the_student_goes_on() -> None:
    teacher, student = mlp(8, 10), mlp(6, 7, seed=2)
    before = [id(p) for p in student.parameters()]
    otp.align(teacher, student, points()).transfer_(student)
    assert [id(p) for p in student.parameters()] == before
    assert all(p.requires_grad for p in student.parameters())


def test_an_entropic_coupling_comes_close_to_the_exact_one() -> None:
    teacher, student = mlp(8, 10), mlp(6, 7, seed=2)
    exact = otp.align(teacher, student, points(), sweeps=1)
    near = otp.align(teacher, student, points(), sweeps=1, eps=0.002)
    for name in exact.couplings:
        cost = exact.couplings[name].cost
        assert near.couplings[name].solver != exact.couplings[name].solver
        assert near.couplings[name].cost == pytest.approx(cost, rel=0.01)


def test_networks_of_other_names_are_refused() -> None:
    with pytest.raises(StructureError) as error:
        otp.align(mlp(8, 10), mlp(8, seed=1), points())
    assert error.value.problem.startswith("only the teacher has a tensor '4.")
    assert "Sequential" in error.value.where


def test_networks_that_differ_outside_of_their_groups_are_refused() -> None:
    teacher, student = mlp(8, 10), mlp(8, 10, seed=1)
    student[6] = nn.Linear(10, 5).double()
    with pytest.raises(StructureError) as error:
        otp.align(teacher, student, points())
    assert error.value.problem == (
        "the teacher's tensor is (4, 10), the student's (5, 10), and no group accounts for that."
    )
    assert error.value.where == "'6.weight'"


def test_a_student_of_other_widths_than_the_aligned_one_is_refused_before_it_is_written() -> None:
    found = otp.align(mlp(8, 10), mlp(6, 7, seed=2), points())
    other = mlp(5, 7, seed=3)
    before = tensors(other)
    with pytest.raises(StructureError) as error:
        found.transfer_(other)
    assert error.value.problem == "the student's tensor is (5, 6), not (6, 6)."
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    found = otp.align(mlp(8, 10), mlp(8, 10, seed=2), points())
    with pytest.raises(StructureError, match=r"share is .*\n.*\n.*pass one in"):
        found.transfer_(mlp(8, 10), share=share)


def test_a_parametrised_layer_is_refused() -> None:
    student = mlp(8, 10, seed=2)
    nn.utils.parametrizations.weight_norm(student[0])
    with pytest.raises(StructureError):
        otp.align(mlp(8, 10), student, points())
    teacher = copy.deepcopy(student)
    with pytest.raises(StructureError, match="computes its weight from others"):
        otp.align(teacher, student, points())


class Encoder(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.e, self.g = nn.Linear(5, width), nn.Linear(width, 3)
        self.l = nn.TransformerEncoderLayer(width, heads, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.l(self.e(x)).mean(1))


def test_heads_of_another_width_are_refused_and_their_group_is_named() -> None:
    with pytest.raises(StructureError) as error:
        otp.align(Encoder(16, 4).eval(), Encoder(32, 4).eval(), torch.randn(8, 6, 5))
    assert "heads, has" in error.value.problem and "in the teacher" in error.value.problem
    assert "'l.self_attn" in error.value.problem


@pytest.mark.parametrize(("name", "value"), [("features", "foo"), ("cost", "cos"), ("cost", None)])
def test_features_and_costs_that_there_are_none_of_are_refused(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=f"{name} is .*\n.*align\n.*pass one of"):
        otp.align(mlp(8, 10), mlp(8, 10, seed=2), points(), **{name: value})


def test_a_recurrent_layer_is_aligned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.f = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.r(x)[0][:, -1])

    torch.manual_seed(0)
    teacher, x = Net().double().eval(), torch.randn(16, 4, 5, dtype=torch.float64)
    twin, orders = permuted(teacher, x)
    assert orders
    found = otp.align(teacher, twin, x)
    torch.testing.assert_close(found.transfer_(Net().double().eval())(x), twin(x))


def test_an_alignment_cannot_be_changed() -> None:
    found = otp.align(mlp(8, 10), mlp(8, 10, seed=2), points())
    with pytest.raises(AttributeError):
        found.couplings = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.couplings["0"] = None  # type: ignore[index]
