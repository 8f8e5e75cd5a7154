"""A network that meets a shifted domain: moved back by folded maps, without labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_otprune.errors import (
    CalibrationError,
    OTPruneError,
    PolicyError,
    RepairError,
    TransportError,
)
from torch_otprune.maps import DomainMap, FittedMap
from torch_otprune.maps.samples import Samples
from torch_otprune.repair.domain import adapt_


class Net(nn.Module):
    """Two convolutions with norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net().double()
    made(torch.randn(200, 2, 6, 6, dtype=torch.float64))  # statistics to start from
    return made.eval()


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(96, 2, 6, 6, generator=generator, dtype=torch.float64)


def shifted(x: Tensor) -> Tensor:
    """Scale, mix and brighten the channels."""
    mix = torch.tensor([[0.6, 0.2], [0.1, 1.3]], dtype=x.dtype)
    return torch.einsum("oc,nchw->nohw", mix, x) + 0.7


def off(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = dense(x)
        return float((model(shifted(x)) - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("method", ["bures", "diagonal", "coupled"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_an_unpaired_map_brings_the_outputs_back(net: Net, side: str, method: str) -> None:
    dense, before = copy.deepcopy(net), off(net, net, images(9))
    notes = adapt_(
        net, images(0).split(32), shifted(images(1)).split(32),
        map={"kind": "domain_map", "method": method}, side=side,  # type: ignore[arg-type]
    )  # fmt: skip
    assert [note.site for note in notes] == ["conv1", "conv2", "head"]
    # scales alone undo no mixing
    assert off(net, dense, images(9)) < (0.9 if method == "diagonal" else 0.5) * before


def test_pairs_bring_an_affine_shift_back_nearly_whole(net: Net) -> None:
    dense = copy.deepcopy(net)
    before = off(net, dense, images(9))
    adapt_(net, [images(0)], [shifted(images(0))], side="in", paired=True, map="affine")
    assert off(net, dense, images(9)) < 1e-6 * before


def test_the_same_domain_changes_next_to_nothing(net: Net) -> None:
    dense = copy.deepcopy(net)
    adapt_(net, [images(0)], [images(0)])
    with torch.no_grad():
        torch.testing.assert_close(net(images(3)), dense(images(3)), atol=1e-4, rtol=1e-4)


def test_only_the_layers_that_are_asked_for_are_written(net: Net) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adapt_(net, [images(0)], [shifted(images(1))], layers=["head"])
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def test_a_pruned_network_is_moved_too(net: Net) -> None:
    import torch_otprune as otp

    otp.prune_(net, otp.Policy(rules=[otp.Channels(keep=0.7)]), images(0).split(32), timing=0)
    dense, before = copy.deepcopy(net), off(net, net, images(9))
    adapt_(net, [images(0)], [shifted(images(1))])
    assert off(net, dense, images(9)) < 0.5 * before
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("missing", ["reference", "shifted"])
def test_a_domain_without_batches_is_refused(net: Net, missing: str) -> None:
    given = {"reference": [images(0)], "shifted": [images(1)], missing: []}
    with pytest.raises(CalibrationError) as error:
        adapt_(net, given["reference"], given["shifted"])
    assert error.value.problem == f"there are no {missing} batches."


def test_a_layer_that_cannot_be_mended_is_named_before_anything_is_written(net: Net) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RepairError) as error:
        adapt_(net, [images(0)], [images(1)], layers=["head", "bn1"])
    assert error.value.problem.startswith("'bn1' cannot be mended")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_network_with_nothing_to_mend_is_refused() -> None:
    bare = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU()).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    with pytest.raises(RepairError) as error:
        adapt_(bare, [x], [x + 1])
    assert error.value.problem == "no layer can be mended."


def test_a_map_that_bends_is_refused(net: Net) -> None:
    with pytest.raises(PolicyError) as error:
        adapt_(net, [images(0)], [images(1)], map={"kind": "flow", "form": "points", "anchors": 0})
    assert "cannot be folded" in error.value.problem
    assert error.value.where == "adapt_, argument map"


def test_every_note_tells_what_the_map_s_report_tells(net: Net) -> None:
    notes = adapt_(net, [images(0)], [images(1) * 0.5], rows=256)
    for note in notes:
        for words in ("distance of laws", "by chance", "Monge gap", "channels moved"):
            assert words in note.text


def test_a_failure_half_way_leaves_the_model_as_it_was(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = {k: v.clone() for k, v in net.state_dict().items()}, DomainMap.fitted

    def fails(self: DomainMap, samples: Samples) -> FittedMap:
        if samples.x.shape[1] == 6:
            raise TransportError("no.", where="here", fix="stop.")
        return plain(self, samples)

    monkeypatch.setattr(DomainMap, "fitted", fails)
    with pytest.raises(TransportError):
        adapt_(net, [images(0)], [shifted(images(1))])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("rows", [0, True, 2.5])
def test_a_number_of_rows_that_fits_nothing_is_refused(net: Net, rows: object) -> None:
    with pytest.raises(CalibrationError) as error:
        adapt_(net, [images(0)], [images(1)], rows=rows)  # type: ignore[arg-type]
    assert error.value.problem == f"rows is {rows!r}."


def test_a_side_that_no_layer_has_is_refused(net: Net) -> None:
    with pytest.raises(RepairError) as error:
        adapt_(net, [images(0)], [images(1)], side="both")  # type: ignore[arg-type]
    assert error.value.problem == "'both' is no side of a layer."
    assert error.value.where == "adapt_, argument side"


def test_labels_of_the_home_domain_reach_every_layer_s_plan(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fit = [], DomainMap.fit

    def spy(self: DomainMap, x: Tensor, y: Tensor, pairs: object = None, **more: Tensor) -> object:
        seen.append((len(y), more["labels"]))
        return fit(self, x, y, None, **more)

    monkeypatch.setattr(DomainMap, "fit", spy)
    home, labels = images(0), torch.arange(len(images(0))) % 3
    adapt_(net, list(home.split(40)), [images(1) * 0.5], labels=labels, rows=256)
    assert seen and all(rows == len(own) for rows, own in seen)
    each = len(seen[0][1]) // len(labels)
    assert torch.equal(seen[0][1], labels.repeat_interleave(each))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"labels": torch.zeros(3).long()}, "labels name no class for each of the"),
        ({"labels": torch.zeros(3)}, "labels name no class for each of the"),
        ({"labels": None, "map": "affine"}, "a map of kind affine uses no labels."),
    ],
)
def test_labels_that_fit_no_samples_or_no_map_are_refused(
    net: Net, setting: dict[str, Any], problem: str
) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    if setting["labels"] is None:
        setting = setting | {"labels": torch.zeros(len(images(0))).long()}
    with pytest.raises(OTPruneError) as error:
        adapt_(net, [images(0)], [images(1)], **setting)
    assert problem in error.value.problem and error.value.fix
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
