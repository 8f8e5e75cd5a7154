"""Maps in the place of removed blocks: what they promise beyond what every replacement does."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import PolicyError, RepairError
from torch_otprune.maps import FittedMap, FreeFit, TransportMap
from torch_otprune.maps.samples import Samples
from torch_otprune.nn import Perceptron
from torch_otprune.policy.registry import MAPS


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), *(Block() for _ in range(4)), nn.Linear(6, 3)).double()


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(4)]


def prune(model: nn.Module, replace: object) -> otp.Report:
    rule = otp.Layers(targets=["3"], drop=1, replace=replace, repair=())  # type: ignore[arg-type]
    return otp.prune_(model, otp.Policy(rules=[rule]), batches(), timing=0)


@pytest.mark.parametrize(
    "replace",
    [
        "monge_map",
        "sparse_map",
        "transport_map",
        {"kind": "monge_map", "paired": False, "map": {"steps": 5}},
        {"kind": "transport_map", "map": {"kind": "flow", "anchors": 2}, "paired": False},
        {"kind": "transport_map", "map": {"kind": "domain_map", "method": "coupled"}},
    ],
)
def test_the_report_tells_fit_gap_moved_channels_and_chance(replace: object) -> None:
    (note,) = prune(net(), replace).repairs
    assert note.site == "2.down"
    for words in ("distance of laws", "by chance", "Monge gap", "of 6 channels moved"):
        assert words in note.note
    assert note.accepted and note.after is not None and note.before is not None
    assert note.after < note.before


def test_a_budget_leaves_the_other_channels_of_the_layer_as_they_were() -> None:
    model = net()
    before = copy.deepcopy(model[2].down.weight)
    prune(model, {"kind": "sparse_map", "map": {"budget": 2}})
    same = (model[2].down.weight == before).all(dim=1)
    assert int(same.sum()) == 4


def test_a_hidden_layer_does_what_a_block_that_is_affine_did() -> None:
    model = net()
    with torch.no_grad():
        model[3].up.bias.fill_(1e3)  # all units on: the block is affine
        model[3].down.bias.sub_(1e3 * model[3].down.weight.sum(1))
    dense = copy.deepcopy(model)
    rule = otp.Layers(targets=["3"], drop=1, repair=(), replace="monge_net")
    otp.prune_(model, otp.Policy(rules=[rule]), batches(), timing=0)
    x = batches(7)[0]
    torch.testing.assert_close(model(x), dense(x), atol=1e-2, rtol=1e-2)


def test_a_hidden_layer_starts_at_a_map_of_low_rank_and_never_ends_worse() -> None:
    low, bent = (prune(net(), r).repairs[0] for r in (
        {"kind": "low_rank", "rank": 3}, {"kind": "monge_net", "hidden": 6},
    ))  # fmt: skip
    assert low.after is not None and bent.after is not None
    assert bent.after <= low.after * 1.05
    assert "objective on held-out rows" in bent.note


def test_an_odd_number_of_units_is_rounded_down_and_priced_so() -> None:
    model = net()
    report = prune(model, {"kind": "monge_net", "hidden": 5})
    assert isinstance(model[3], Perceptron) and model[3].hidden == 4
    assert report.plan.params.after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("replace", "problem"),
    [
        ({"kind": "monge_map", "map": {"form": "mlp"}}, "what monge_map fits with these settings"),
        ({"kind": "sparse_map", "map": {"solver": "mbo"}}, "what sparse_map fits"),
        *(
            ({"kind": "transport_map", "map": {"kind": "sparse_map", "solver": s}}, "bends")
            for s in ("mbo", "icnn", "w2gn", "lbfgs")
        ),
        ({"kind": "transport_map", "map": {"kind": "flow", "form": "points"}}, "what flow fits"),
        ({"kind": "transport_map", "map": "nonsense"}, "'nonsense' is no known map."),
    ],
)
def test_a_map_that_does_not_fold_is_refused_in_the_policy(replace: object, problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        otp.Layers(drop=1, replace=replace)  # type: ignore[arg-type]
    assert problem in error.value.problem and error.value.fix


class Curved(TransportMap):
    """A map of a user's own, that does not say that it bends."""

    kind: Literal["curved"] = "curved"

    def fitted(self, samples: Samples) -> FittedMap:
        return FreeFit(self.kind, samples, body=nn.Tanh())


def test_a_map_of_one_s_own_that_bends_is_refused_and_nothing_is_written() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    MAPS.register(Curved)
    try:
        with pytest.raises(RepairError) as error:
            prune(model, {"kind": "transport_map", "map": "curved"})
    finally:
        MAPS.remove("curved")
    assert "is not affine" in error.value.problem and "2.down" in error.value.where
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("replace", ["affine", "bures", "sparse_map"])
def test_a_gap_that_nothing_can_stand_in_for_is_told(replace: str) -> None:
    model = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(6, 3)).double()
    rule = otp.Layers(targets=["0"], drop=1, replace=replace, repair=())
    data = [torch.randn(64, 6, dtype=torch.float64)]
    (note,) = otp.prune_(model, otp.Policy(rules=[rule]), data, timing=0).repairs
    assert (note.site, note.accepted) == ("0", False)
    assert note.note.startswith("nothing stands in: no layer in front writes to this stream")
