"""The sums of an activation are exact, however the data is split and however it is called."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES
from tests.test_distributed import _run
from torch_otprune.criteria.layers import Stein
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics import SiteEvidence
from torch_otprune.statistics.sites import watch_sites
from torch_otprune.structure import Call, trace
from torch_otprune.structure.flow import flow
from torch_otprune.structure.sites import find_sites

VALUES = ("positive", "nonnegative", "capped", "mean", "var", "out_mean", "out_var", "cov")
SITE_CRITERIA = ("easier", "entropy", "stein", "tlc")


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def see(model: nn.Module, batches: Sequence[Any], example: Any = None) -> dict[str, SiteEvidence]:
    """Watch every activation of a model."""
    model = model.double()
    found = find_sites(model, flow(model, batches[0] if example is None else example))
    return watch_sites(model, found, batches)


def close(one: SiteEvidence, two: SiteEvidence) -> None:
    """Compare two pieces of evidence: counts exactly, sums to rounding."""
    assert (one.function, one.count, one.magnitude) == (two.function, two.count, two.magnitude)
    for value in VALUES[:3]:
        assert torch.equal(getattr(one, value), getattr(two, value)), value
    for value in VALUES[3:]:
        torch.testing.assert_close(getattr(one, value), getattr(two, value), rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """A residual block whose activations are functions, in place or not, or modules."""

    def __init__(self, width: int, make: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.make = make
        if make == "modules":
            self.relu1, self.relu2 = nn.ReLU(), nn.ReLU(inplace=True)
        if make == "one module":
            self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first, last = {
            "functions": (F.relu, torch.relu),
            "in place": (torch.relu_, Tensor.relu_),
            "modules": (self._modules.get("relu1"), self._modules.get("relu2")),
            "one module": (self._modules.get("relu"),) * 2,
        }[self.make]
        assert first is not None
        assert last is not None
        y = self.norm2(self.conv2(first(self.norm1(self.conv1(x)))))
        y += x
        return last(y)


MAKES = ("functions", "in place", "modules", "one module")
FIRST = ("blocks.0:relu", "blocks.0:relu", "blocks.0.relu1", "blocks.0.relu")
LAST = ("blocks.0:relu#2", "blocks.0:relu#2", "blocks.0.relu2", "blocks.0.relu#2")


class Net(nn.Module):
    """A stem, some blocks of one shape, and a head."""

    def __init__(self, make: str = "modules", blocks: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, make) for _ in range(blocks)))
        self.head = nn.Linear(width, 5)
        for parameter in self.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def inputs(net: Net, x: Tensor) -> dict[str, Tensor]:
    """Write the first block out: what goes into both of its activations, positions x channels."""
    block = net.blocks[0]
    x = net.stem(x)
    first = block.norm1(block.conv1(x))
    last = block.norm2(block.conv2(first.relu())) + x
    return {
        name: z.detach().movedim(1, -1).reshape(-1, z.shape[1])
        for name, z in (("first", first), ("last", last))
    }


# the sums


@pytest.mark.parametrize("make", range(len(MAKES)), ids=MAKES)
def test_the_sums_are_those_of_the_written_out_forward(make: int) -> None:
    net, x = Net(MAKES[make]), 3 * draw(7, 3, 5, 4)
    found = see(net, [x[:3], x[3:]])
    for place, name in (("first", FIRST[make]), ("last", LAST[make])):
        z, seen = inputs(net, x)[place], found[name]
        phi, n = z.relu(), len(z)
        assert seen.count == n == 7 * 5 * 4
        assert torch.equal((seen.positive * n).round(), (z > 0).double().sum(0))
        assert torch.equal((seen.nonnegative * n).round(), (z >= 0).double().sum(0))
        assert torch.equal((seen.capped * n).round(), (z >= 6).double().sum(0))
        assert float(seen.capped.sum()) > 0
        wanted = (
            z.mean(0),
            z.var(0, correction=0),
            phi.mean(0),
            phi.var(0, correction=0),
            ((z - z.mean(0)) * (phi - phi.mean(0))).mean(0),
        )
        for value, right in zip(VALUES[3:], wanted, strict=True):
            torch.testing.assert_close(getattr(seen, value), right, rtol=1e-12, atol=1e-12)


def test_an_input_of_exactly_zero_is_not_negative_and_not_positive() -> None:
    x = torch.tensor([[0.0, -0.0], [1.0, 6.0], [-1.0, 7.0]], dtype=torch.float64)
    seen = see(nn.Sequential(nn.ReLU6()), [x])["0"]
    assert (seen.positive * 3).tolist() == [1, 2]
    assert (seen.nonnegative * 3).tolist() == [2, 3]
    assert (seen.capped * 3).tolist() == [0, 2]


@pytest.mark.parametrize("make", range(1, len(MAKES)), ids=MAKES[1:])
def test_functions_and_modules_in_place_or_not_say_the_same(make: int) -> None:
    x = draw(6, 3, 4, 4)
    ours, other = see(Net(MAKES[make]), [x]), see(Net("functions"), [x])
    for mine, name in ((FIRST[make], FIRST[0]), (LAST[make], LAST[0])):
        close(ours[mine], other[name])
        assert ours[mine].reads is not None or other[name].reads is None


@given(cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=20, deadline=None)
def test_the_split_into_batches_does_not_matter(cuts: set[int]) -> None:
    net, x = Net(blocks=1), draw(12, 3, 4, 3)
    whole = see(net, [x])
    ends = [0, *sorted(cuts), 12]
    parts = see(net, [x[a:b] for a, b in pairwise(ends)])
    assert whole.keys() == parts.keys()
    for name, seen in whole.items():
        close(seen, parts[name])


def test_large_feature_maps_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), draw(8, 3, 5, 5)
    whole = see(net, [x])
    monkeypatch.setattr("torch_otprune.statistics.sites._PIECE", 3 * 6 * 25)
    for name, seen in see(net, [x]).items():
        close(seen, whole[name])


def test_a_large_offset_leaves_the_variance_as_it_is() -> None:
    noise = draw(400, 3)
    x = 1e7 + 1e-3 * noise
    seen = see(nn.Sequential(nn.Softplus()), list(x.split(30)))["0"]
    # the offset itself is rounded to 2e-9, a millionth of the spread
    right = (x - 1e7).var(0, correction=0)
    assert float((x.square().mean(0) - x.mean(0).square() - right).abs().max()) > 1e-4
    for value in ("var", "out_var", "cov"):
        torch.testing.assert_close(getattr(seen, value), right, rtol=1e-5, atol=0)


def test_half_precision_is_summed_in_float64() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(torch.bfloat16)
    x = draw(5000, 3).to(torch.bfloat16)
    found = find_sites(model, flow(model, x[:2]))
    seen = watch_sites(model, found, [x])["1"]
    z = model[0](x).detach().double()
    torch.testing.assert_close(seen.mean, z.mean(0), rtol=1e-12, atol=1e-12)
    assert seen.mean.dtype == seen.positive.dtype == torch.float64


def test_channels_of_tokens_are_the_last_axis_and_padding_is_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = nn.Linear(3, 4), nn.GELU()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.act(self.up(x))

    torch.manual_seed(0)
    model, x = Masked().double(), draw(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = find_sites(model, flow(model, x))
    padded = {"x": x, "attention_mask": mask}
    apart = [x[0:1, :3], x[1:2]]
    seen = watch_sites(model, found, [padded])["act"]
    assert seen.count == 8
    close(seen, watch_sites(model, found, apart)["act"])
    close(seen, watch_sites(model, found, [Call((), padded)])["act"])


# what stands around


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, bias=False), (4, 9, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 9, 9)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 9, 9)),
        (nn.Conv1d(4, 8, 5, groups=2, bias=False), (4, 19)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 9, 9)),
        (nn.Linear(4, 6, bias=False), (4,)),
    ],
    ids=["dense", "grouped", "depthwise", "signal", "transposed", "linear"],
)
def test_what_a_reader_reads_of_a_channel_is_its_answer_to_an_impulse(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x = draw(2, *shape)
    model = nn.Sequential(nn.Identity(), nn.ReLU(), layer)
    reads = see(model, [x])["1"].reads
    assert reads is not None
    for channel in range(4):
        impulse = torch.zeros(1, *shape, dtype=torch.float64)
        middle = (0, channel, *(size // 2 for size in shape[1:]))
        impulse[middle] = 1
        power = layer(impulse).square().sum()
        torch.testing.assert_close(reads[channel], power.detach(), rtol=1e-12, atol=0)


def test_a_flattened_channel_is_read_at_all_its_positions() -> None:
    head = nn.Linear(4 * 6, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), head)
    reads = see(model, [draw(2, 3, 2, 3)])["1"].reads
    assert reads is not None
    wanted = torch.stack([head.weight[:, 6 * c : 6 * c + 6].square().sum() for c in range(4)])
    torch.testing.assert_close(reads, wanted.detach(), rtol=1e-12, atol=0)


def test_several_readers_add_up_and_another_reader_hides_them() -> None:
    class Fork(nn.Module):
        def __init__(self, shortcut: bool) -> None:
            super().__init__()
            self.up, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.shortcut = shortcut

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.up(x))
            y = self.one(x) + self.two(x)
            return x + y if self.shortcut else y

    model, x = Fork(False), draw(2, 3)
    reads = see(model, [x])[":relu"].reads
    wanted = sum(layer.weight.detach().square().sum(0) for layer in (model.one, model.two))
    assert reads is not None
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(reads, wanted, rtol=1e-12, atol=0)
    assert see(Fork(True), [x])[":relu"].reads is None


@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_is_the_shift_and_the_absolute_scale(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    seen = see(nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU()), [draw(3, 3)])["2"]
    assert seen.norm is not None
    shift, scale = seen.norm
    torch.testing.assert_close(shift, norm.bias.detach() if affine else torch.zeros_like(shift))
    torch.testing.assert_close(
        scale, norm.weight.detach().abs() if affine else torch.ones_like(scale)
    )


def test_the_magnitude_is_the_mean_over_the_weights_that_are_left() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].weight.data = torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    assert see(model, [draw(2, 2)])["1"].magnitude == 2.0
    model[0].weight.data.zero_()
    assert see(model, [draw(2, 2)])["1"].magnitude == 0.0
    assert see(nn.Sequential(nn.ReLU()), [draw(2, 2)])["0"].magnitude is None


# care


def test_watching_leaves_no_trace() -> None:
    net = Net("one module")
    net.train()
    before, state = copy.deepcopy(net), torch.random.get_rng_state()
    see(net, [draw(2, 3, 4, 4)])
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, two in zip(net.modules(), before.modules(), strict=True):
        assert one.__dict__.keys() == two.__dict__.keys()
        assert one.training
        hooks = (one._forward_hooks, one._forward_pre_hooks)
        assert not any(hooks)
        assert not one._forward_hooks_always_called
        assert not one._forward_hooks_with_kwargs
        assert not one._forward_pre_hooks_with_kwargs
    for a, b in zip(net.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_model_that_fails_keeps_no_hooks() -> None:
    net = Net()
    found = find_sites(net, flow(net, draw(2, 3, 4, 4)))
    with pytest.raises(RuntimeError):
        watch_sites(net, found, [draw(2, 2, 4, 4)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert watch_sites(net, found, [draw(2, 3, 4, 4)])["blocks.0.relu1"].count == 32


def test_an_activation_that_no_data_reached_counts_nothing_and_still_has_its_norm() -> None:
    net = Net()
    found = find_sites(net, flow(net, draw(2, 3, 4, 4)))
    seen = watch_sites(net, found, [])["blocks.0.relu1"]
    assert seen.count == 0
    assert not any(bool(getattr(seen, value).any()) for value in VALUES)
    assert 0 < Stein().site(seen) < 1  # by the batch-norm's moments


def test_activations_that_mix_values_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 4), nn.ReLU())
    assert list(see(model, [draw(2, 3)])) == ["3"]


def test_channels_that_change_with_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(CalibrationError) as error:
        see(model, [draw(2, 3), draw(2, 4)])
    assert error.value.problem == ("activation '0' had 3 channels, then an input of shape [2, 4].")
    assert error.value.where == "axis -1 of its input"
    assert error.value.fix == (
        "make all batches of one length, or use a criterion of the stream: 'transport'."
    )


# through the front door


def quiet(net: Net, number: int) -> None:
    """Make the activations of a block linear: nothing is ever negative."""
    for norm in (net.blocks[number].norm1, net.blocks[number].norm2):
        norm.bias.data.fill_(200.0)


def dropped(net: nn.Module, x: Tensor, criterion: Any) -> tuple[otp.Plan, nn.Module]:
    """Drop one block of four."""
    policy = otp.Policy(rules=otp.Layers(drop=1, criterion=criterion, replace="identity"))
    with otp.attach(net, policy) as attached:
        plan = otp.observe(attached, list(x.split(5))).plan()
    return plan, net


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("criterion", [*SITE_CRITERIA, {"kind": "entropy", "magnitude": False}])
def test_the_block_whose_activations_never_switch_goes_first(criterion: Any, make: str) -> None:
    net = Net(make)
    quiet(net, 2)
    plan, _ = dropped(net, draw(16, 3, 6, 6), criterion)
    assert [drop.block for drop in plan.drops] == ["blocks.2"]


def test_the_block_with_the_smallest_weights_goes_first() -> None:
    net = Net()
    for weight in (net.blocks[1].conv1.weight, net.blocks[1].conv2.weight):
        weight.data.mul_(0.5)
    plan, _ = dropped(net, draw(8, 3, 6, 6), "magnitude")
    assert [drop.block for drop in plan.drops] == ["blocks.1"]
    with otp.attach(net, otp.Policy(rules=otp.Layers(criterion="magnitude", drop=1))) as attached:
        found = otp.observe(attached, [draw(8, 3, 6, 6)]).observation()
    (chain,) = found.chains.values()
    both = [torch.cat([b.conv1.weight.flatten(), b.conv2.weight.flatten()]) for b in net.blocks]
    wanted = torch.stack([weights.detach().abs().mean() for weights in both])
    torch.testing.assert_close(chain.weights, wanted, rtol=1e-12, atol=0)
    assert chain.part(["blocks.1", "blocks.2"]).weights.tolist() == chain.weights[1:3].tolist()


@pytest.mark.parametrize("make", ["functions", "one module"])
def test_pruning_by_entropy_leaves_a_smaller_model_that_runs(make: str) -> None:
    net, x = Net(make), draw(16, 3, 6, 6)
    policy = otp.Policy(rules=otp.Layers(drop=2, criterion="entropy"))
    otp.prune_(net, policy, [x], timing=0)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 5
    assert torch.isfinite(net(x)).all()


@pytest.mark.parametrize(("criterion", "looks"), [("stein", True), ("transport", False)])
def test_activations_are_looked_at_only_where_a_criterion_asks(
    criterion: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(*given: Any) -> dict[str, SiteEvidence]:
        seen.append(1)
        return watch_sites(*given)

    monkeypatch.setattr("torch_otprune.statistics.stream.watch_sites", counted)
    policy = otp.Policy(rules=otp.Layers(drop=1, criterion=criterion))
    with otp.attach(Net(), policy) as attached:
        found = otp.observe(attached, [draw(8, 3, 6, 6)]).observation()
    assert len(seen) == looks
    assert {len(sites) for c in found.chains.values() for sites in c.sites} == {2 * looks}


# ranks

WORKER = """
import sys
import torch
import torch.distributed as dist
import torch_otprune as otp
from tests.test_statistics_sites import Net, draw, see

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
net, x = Net("functions"), draw(15, 3, 4, 4)
policy = otp.Policy(
    rules=otp.Layers(drop=2, criterion="stein"),
    calibration=otp.Calibration(samples=15, probe=15),
)
with otp.attach(net, policy) as attached:
    plan = otp.observe(attached, list(x[rank::world].split(3))).plan()
own = [x] if world == 1 else ([] if rank == 0 else list(x.split(4)))  # one rank sees nothing
found = see(net, own, x[:2])
odd = ""
try:
    see(torch.nn.Sequential(torch.nn.ReLU()), [draw(2, 3), draw(2, 3 + rank)])
except otp.OTPruneError as error:
    odd = error.problem
torch.save((plan.to_json(), {n: vars(s) for n, s in found.items()}, odd), out)
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_one_rank_and_two_say_the_same_and_fail_together(tmp_path: Path) -> None:
    files = [f for world in (1, 2) for f in _run(world, "sites", tmp_path, WORKER)]
    plans, found, odd = zip(*(torch.load(f) for f in files), strict=True)
    assert json.loads(plans[0])["drops"]
    assert plans[0] == plans[1] == plans[2]
    for name, seen in found[0].items():
        for other in found[1:]:
            close(SiteEvidence(**seen), SiteEvidence(**other[name]))
    assert odd == (
        "",
        "an activation on rank 1 changed its number of channels.",
        "activation '0' had 3 channels, then an input of shape [2, 4].",
    )


# real stacks


def test_the_activations_of_a_transformer_are_pooled_by_token() -> None:
    case = CASES["attention"]
    model, batch = case.model(), case.batch(4)
    (name,) = (s.name for s in trace(model, batch).sites if s.channels)
    seen = watch_sites(model, trace(model, batch).sites, [batch])[name]
    assert seen.count == 4 * 7
    assert len(seen.mean) == 16
