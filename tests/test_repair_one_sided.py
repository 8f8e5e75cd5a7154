"""Refits in front of a rectifier: who reads a layer's output, and what need not be matched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import cut
from tests.depth_cases import build, data
from tests.test_repair_contract import patient, repair
from torch_otprune.errors import PolicyError
from torch_otprune.policy import REPAIRS
from torch_otprune.repair.lockstep import Site, distance
from torch_otprune.repair.one_sided import OneSided, Rows
from torch_otprune.repair.rectified import rectified
from torch_otprune.repair.solve import Normal
from torch_otprune.structure import trace
from torch_otprune.structure.graph import Tail

END: dict[str, Callable[[Tensor], Tensor]] = {
    "function": F.relu,
    "tensor": torch.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: F.relu(x, inplace=True) + x,
    "asked for its shape": lambda x: torch.relu(x).reshape(x.shape),
    "twice": lambda x: torch.relu(x) + F.relu(x),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "leaky": F.leaky_relu,
    "as it is": lambda x: x,
    "both": lambda x: torch.relu(x) + 0.1 * x,
    "a part": lambda x: torch.relu(x[:, :2]),
    "beside": lambda x: torch.relu(x) + torch.cat([x, x], dim=1)[:, :4],
    "before in place": lambda x: (x * 2) + F.relu(x, inplace=True),
}


class Ends(nn.Module):
    """One layer, added to a stream or not, and what reads it."""

    def __init__(self, end: Callable[[Tensor], Tensor], *, added: bool) -> None:
        super().__init__()
        self.layer, self.norm, self.added, self.end = nn.Linear(4, 4), nn.BatchNorm1d(4), added, end

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.layer(x))
        return self.end(out + x if self.added else out)


def read_by(end: Callable[[Tensor], Tensor], *, added: bool) -> frozenset[str]:
    model = Ends(end, added=added).eval()
    site = Site("layer", Tail(("norm",), added))
    found = rectified(model, copy.deepcopy(model), [site], torch.randn(5, 4))
    assert not any(m._forward_hooks for m in model.modules())
    return found


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("end", END)
def test_a_layer_that_rectifiers_alone_read_is_found(end: str, added: bool) -> None:
    assert read_by(END[end], added=added) == {"layer"}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("end", OTHER)
def test_a_layer_that_something_else_reads_is_not(end: str, added: bool) -> None:
    assert not read_by(OTHER[end], added=added)


def test_what_is_returned_is_read_by_the_caller() -> None:
    def both(x: Tensor) -> Tensor:
        return torch.stack([torch.relu(x)]), x  # type: ignore[return-value]

    assert not read_by(both, added=True)


def test_a_layer_that_another_rank_did_not_find_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch_otprune.repair import rectified as module

    monkeypatch.setattr(module, "all_sum_", lambda missed: missed[0].add_(1))
    assert not read_by(torch.relu, added=True)


def test_no_hook_stays_where_the_model_fails() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError

    model = Ends(fails, added=False).eval()
    with pytest.raises(ArithmeticError):
        rectified(model, model, [Site("layer", Tail(("norm",)))], torch.randn(5, 4))
    assert not any(m._forward_hooks for m in model.modules())


def test_both_models_must_agree() -> None:
    dense, small = (Ends(end, added=True).eval() for end in (torch.relu, F.gelu))
    site = Site("layer", Tail(("norm",), True))
    assert not rectified(dense, small, [site], torch.randn(5, 4))


def test_in_a_residual_network_both_layers_of_a_block_are_rectified_and_the_head_is_not() -> None:
    model, x = build("pictures"), data("pictures", 4)
    graph = trace(model, x)
    sites = [Site(p, graph.tails[p]) for p in graph.order if p in graph.tails]
    found = rectified(model, model, sites, x)
    assert {"stem", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2"} <= found
    assert "head" not in found


class Halves(nn.Module):
    """relu(p - 3 q) of the two halves of one number is p: q is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.join, self.head = nn.Linear(1, 2), nn.Linear(2, 1), nn.Linear(1, 1)
        for layer, weight in ((self.split, [[1.0], [-1.0]]), (self.join, [[1.0, -3.0]])):
            layer.weight.data, layer.bias.data = torch.tensor(weight), torch.zeros(len(weight))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.join(F.relu(self.split(x)))))


def left(rounds: int) -> float:
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(400, 1, dtype=torch.float64)
    graph = trace(model, x)
    sick = patient(model, [x], [cut(graph, graph.groups[0].name, torch.tensor([0]))])
    repair("least_squares", one_sided=rounds, ridge=1e-13).apply_(sick)
    return distance(sick.dense, sick.small, [x])


def test_one_sided_targets_are_exact_where_plain_least_squares_is_not() -> None:
    plain, few, many = left(0), left(3), left(300)
    assert plain > 1e-3
    assert few < plain / 2
    assert many < 1e-16


def rows_of(seed: int, *, held: bool) -> Rows:
    torch.manual_seed(seed)
    design, scale = torch.randn(60, 4).double(), torch.tensor([1.0, -0.5, 2.0]).double()
    target = design @ torch.randn(4, 3).double() - 3 * (design @ torch.randn(4, 3).double()).relu()
    return Rows(design, target, held, (target * scale, scale))


@pytest.mark.parametrize("seed", range(5))
def test_no_round_increases_the_error_behind_the_rectifier(seed: int) -> None:
    rows = [rows_of(seed, held=held) for held in (False, True)]  # the same ones
    sums = [Normal.empty(4, 3, torch.device("cpu")) for _ in rows]
    for some, total in zip(rows, sums, strict=True):
        total.update(some.design, some.target)
    part = (torch.arange(4), torch.arange(3), 1e-13)
    solver = OneSided(lambda: rows, *sums, torch.zeros(4, 3).double(), [part])

    def error(weight: Tensor | None) -> float:
        design, (reached, scale) = rows[0].design, rows[0].behind or (None, None)
        assert reached is not None
        best = torch.linalg.lstsq(design, rows[0].target).solution if weight is None else weight
        return float(((design @ best * scale).relu() - reached.relu()).square().sum())

    errors = [error(solver.solve(rounds)) for rounds in range(6)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_rows_that_do_not_fit_in_memory_give_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch_otprune.repair import least_squares

    kept = left(3)
    monkeypatch.setattr(least_squares, "_KEPT", 0)
    assert left(3) == pytest.approx(kept, rel=1e-9)


def test_each_group_of_a_layer_is_fitted_as_if_it_were_alone() -> None:
    def solved(columns: list[int], out: list[int], parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        rows = []
        for held in (False, True):
            full = rows_of(0, held=held)
            assert full.behind is not None
            behind = full.behind[0][:, out], full.behind[1][out]
            rows.append(Rows(full.design[:, columns], full.target[:, out], held, behind))
        sums = [Normal.empty(len(columns), len(out), torch.device("cpu")) for _ in rows]
        for some, total in zip(rows, sums, strict=True):
            total.update(some.design, some.target)
        old = torch.zeros(len(columns), len(out)).double()
        weight = OneSided(lambda: rows, *sums, old, [(*part, 1e-6) for part in parts]).solve(4)
        assert weight is not None
        return weight

    place = torch.tensor
    together = solved(
        [0, 1, 2, 3], [0, 1, 2], [(place([0, 1]), place([0])), (place([2, 3]), place([1, 2]))]
    )
    first = solved([0, 1], [0], [(place([0, 1]), place([0]))])
    second = solved([2, 3], [1, 2], [(place([0, 1]), place([0, 1]))])
    torch.testing.assert_close(together, torch.block_diag(first, second))


def test_a_note_says_that_its_errors_are_those_of_the_plain_fit() -> None:
    texts = []
    for rounds in (0, 3):
        torch.manual_seed(0)
        model, x = Halves(), torch.randn(400, 1, dtype=torch.float64)
        graph = trace(model, x)
        sick = patient(model, [x], [cut(graph, graph.groups[0].name, torch.tensor([0]))])
        notes = repair("least_squares", one_sided=rounds).apply_(sick)
        texts.append({note.site: note.text for note in notes}["join"])
    assert texts == ["", "fitted behind its rectifier; the errors are plain least squares'"]


def test_rounds_below_zero_are_refused() -> None:
    with pytest.raises(PolicyError, match="one_sided"):
        REPAIRS.resolve({"kind": "least_squares", "one_sided": -1})
