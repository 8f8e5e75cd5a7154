"""Odd networks and odd company for the removal of layers: each of these went wrong once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from tests.depth_cases import Stack, build, data
from tests.test_distributed import _run
from torch_otprune import pipeline
from torch_otprune.errors import CalibrationError
from torch_otprune.policy import LAYER_CRITERIA, REPLACEMENTS
from torch_otprune.repair.replace import left_to_repair
from torch_otprune.report import count_macs, count_params
from torch_otprune.statistics.taps import Taps
from torch_otprune.structure import trace
from torch_otprune.structure.forward import flat_tensors
from torch_otprune.structure.graph import Block
from torch_otprune.structure.mute import exchanged, muted


def stack(block: Any = None, *, width: int = 6, blocks: int = 3) -> Stack:
    """A stack in double precision, with blocks of another make if wished."""
    torch.manual_seed(0)
    model = Stack(blocks)
    if block is not None:
        model.blocks = nn.ModuleList([block(width) for _ in range(blocks)])
    return model.double().eval()


def tokens(samples: int = 64) -> Tensor:
    return torch.randn(
        samples, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )


def found(model: nn.Module, example: Tensor) -> dict[str, Block]:
    return {block.name: block for block in trace(model, example).blocks}


def prune(model: nn.Module, *rules: Any, batch: Tensor, **more: Any) -> otp.Report:
    return otp.prune_(model, otp.Policy(rules=rules, **more), [batch], timing=0)


class Half(nn.Module):
    """x + f(x), where `f` is two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


# What a module returns


class Named(NamedTuple):
    """A return value with names."""

    stream: Tensor
    rest: Any


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, 1),
        lambda t: [None, (t, "a")],
        lambda t: Named(t, [t]),
        lambda t: {"a": (t,), "b": 2},
    ],
)
def test_one_tensor_takes_another_s_place_in_whatever_a_module_returns(wrap: Any) -> None:
    old, new = torch.zeros(2), torch.ones(2)
    changed, wanted = exchanged(wrap(old), old, new), wrap(new)
    assert type(changed) is type(wanted)
    assert flat_tensors(changed) and all(t is new for t in flat_tensors(changed))


# Several processes


WORKER = """
import sys
import torch
import torch.distributed as dist
import torch_otprune as otp
from tests.depth_cases import build

torch.set_num_threads(1)
rank, world, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
torch.manual_seed(0)
model = build("pictures").float()
batch = torch.randn(16, 3, 40, 40, generator=torch.Generator().manual_seed(1))
policy = otp.Policy(
    rules=otp.Layers(drop=1), calibration=otp.Calibration(samples=16, probe=8)
)
if name == "apply":
    otp.prune_(model, policy, list(batch[rank::world].split(3)), timing=0)
    text = [value.tolist() for value in model.state_dict().values()]
elif name == "idle":
    with otp.attach(model, policy, example=batch[:2]) as attached:
        if rank == 0:
            model(batch)
        text = attached.plan().to_json()
else:
    with otp.attach(model, policy) as attached:
        text = otp.observe(attached, list(batch[rank::world].split(3))).plan().to_json()
torch.save(text, out)
if world > 1:
    dist.destroy_process_group()
"""


def _plans(world: int, name: str, folder: Path) -> list[str]:
    return [torch.load(file) for file in _run(world, name, folder, WORKER)]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_the_layers_to_drop_are_the_same_on_one_and_two_ranks(tmp_path: Path) -> None:
    plans = _plans(1, "plan", tmp_path) + _plans(2, "plan", tmp_path)
    assert len(set(plans)) == 1


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_a_rank_that_saw_nothing_drops_the_same_layers(tmp_path: Path) -> None:
    one, two = _plans(2, "idle", tmp_path)
    assert one == two


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_what_is_left_is_repaired_alike_on_all_ranks(tmp_path: Path) -> None:
    one, two = _plans(2, "apply", tmp_path)
    assert one == two


# Memory


def test_the_rows_of_the_stream_count_against_the_memory_that_was_granted() -> None:
    policy = otp.Policy(rules=otp.Layers(drop=1), calibration=otp.Calibration(memory=1e-6))
    with otp.attach(stack(), policy) as attached, pytest.raises(CalibrationError) as caught:
        otp.observe(attached, [tokens()])
    assert "the stream at 'blocks.0'" in caught.value.where


def test_the_quote_is_what_the_rows_take() -> None:
    policy = otp.Policy(rules=otp.Layers(drop=1), calibration=otp.Calibration(probe=32))
    with otp.attach(stack(), policy) as attached:
        otp.observe(attached, [tokens()])
        (chain,) = attached.observation().chains.values()
        held = [chain.points, *(fed for fed in chain.writers if fed is not None)]
        assert attached.bytes == sum(t.numel() * t.element_size() for t in held)


def test_rows_lie_in_the_order_of_the_stream_and_know_their_sample() -> None:
    model = stack()
    policy = otp.Policy(rules=otp.Layers(drop=1), calibration=otp.Calibration(probe=8))
    with otp.attach(model, policy) as attached:
        otp.observe(attached, list(tokens(32).split(5)))
        (chain,) = attached.observation().chains.values()
    with torch.no_grad():
        stem = model.stem(tokens(32)[chain.sample.unique()]).flatten(0, 1)
    torch.testing.assert_close(chain.points[0], stem)


# In place


class Rectified(Half):
    """Writes over its own input."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(x)
        return x + self.branch(x)


class Clean(Half):
    """The same, out of place."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.branch(x)


@pytest.mark.parametrize("drop", [1, 2, 3])
def test_blocks_that_write_over_their_input_go_like_those_that_do_not(drop: int) -> None:
    plans = []
    for make in (Rectified, Clean):
        report = prune(stack(make), otp.Layers(drop=drop), batch=tokens())
        plans.append([(d.block, d.error) for d in report.plan.drops])
    assert plans[0] == plans[1]
    assert len(plans[0]) == drop


def test_muting_a_block_that_writes_over_its_input_hands_on_what_came() -> None:
    model, x = stack(Rectified, blocks=1), tokens(2)
    (block,) = found(model, x).values()
    with torch.no_grad(), muted(model, block.swaps):
        torch.testing.assert_close(model(x), model.head(model.stem(x)))


def test_what_comes_next_does_not_change_what_a_block_wrote() -> None:
    model, x = stack(Rectified), tokens(2)
    blocks = list(found(model, x).values())
    with torch.no_grad(), Taps(model, blocks, ()) as taps:
        model(x)
    assert float(taps.pairs["blocks.0"][1].min()) < 0  # the next block has rectified it


# What is a block, and what is none


class TwoUses(nn.Module):
    """A branch that is added to the stream, and read by another head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head, self.other = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = F.relu(self.one(x))
        x = x + y
        x = x + self.two(x)
        return self.head(x), self.other(y)


def test_a_branch_that_is_read_elsewhere_is_not_offered() -> None:
    model = TwoUses().double().eval()
    assert list(found(model, tokens(2))) == ["two"]


class Dense(nn.Module):
    """Blocks in a row whose outputs are all added up in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Half(6) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.stem(x)]
        for block in self.blocks:
            kept.append(block(kept[-1]))
        return self.head(kept[3] + kept[1] + kept[2])


def test_a_block_at_the_end_of_a_long_shortcut_is_offered_once() -> None:
    torch.manual_seed(0)
    model = Dense().double().eval()
    chain = [(b.name, b.place) for b in trace(model, tokens(2)).blocks]
    assert chain == [("blocks.0", 0), ("blocks.1", 1), ("blocks.2", 2)]
    assert len(prune(model, otp.Layers(drop=2), batch=tokens()).plan.drops) == 2


class Squeezed(nn.Module):
    """A convolutional block with a dense gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x)) * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Permuted(nn.Module):
    """A depthwise convolution, then tokens: the stream itself has its channels first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [Squeezed, Permuted])
def test_channels_of_pictures_are_told_even_where_dense_layers_work_inside(make: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(4), make(4), nn.Conv2d(4, 2, 1)).eval()
    for block in found(model, torch.randn(2, 3, 6, 5)).values():
        assert (block.axis, block.channels, block.positions) == (1, 4, 30)


class Twice(Half):
    """Returns its stream twice."""

    def forward(self, x: Any) -> Any:
        x = x[0] if isinstance(x, tuple) else x
        y = x + self.branch(x)
        return y, y


class Wrapped(Half):
    """Is given its stream inside of a tuple."""

    def forward(self, pair: Any) -> Any:
        return super().forward(pair[0])


class Odd(nn.Module):
    """A row of blocks with odd ways of passing their stream on."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([make(6) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block((x, None))
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


@pytest.mark.parametrize("make", [Twice, Wrapped])
def test_a_stream_that_no_stand_in_could_pass_on_is_no_block(make: Any) -> None:
    blocks = trace(Odd(make).double().eval(), tokens(2)).blocks
    assert not [block for block in blocks if block.kind == "block"]


class Queries(nn.Module):
    """A stream that starts as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.start = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.start.expand(len(x), 4, 6)
        y = y + self.one(F.relu(self.stem(x)))
        return self.head(y + self.two(F.relu(y)))


class Widened(nn.Module):
    """A stream that no layer writes alone: the first that is cut with it ends a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7)
        self.rise, self.fall = nn.Linear(7, 9), nn.Linear(9, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x[..., :2]], -1)
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x + self.fall(F.relu(self.rise(x))))


def test_a_group_and_a_branch_at_one_layer_have_names_of_their_own() -> None:
    torch.manual_seed(0)
    graph = trace(Widened().double().eval(), tokens(2))
    names = [group.name for group in graph.groups] + [block.name for block in graph.blocks]
    assert len(names) == len(set(names))


def test_a_stream_that_is_a_parameter_can_be_mended() -> None:
    torch.manual_seed(0)
    model = Queries().double().eval()
    rule = otp.Layers(targets="two", drop=1)
    report = prune(model, rule, otp.Channels(targets="stem", keep=0.5), batch=tokens())
    assert report.output_error.after_repair < report.output_error.before_repair


# Width and depth


@pytest.mark.parametrize("replace", sorted(REPLACEMENTS))
def test_layers_go_from_a_stream_that_is_cut(replace: str, tmp_path: Path) -> None:
    model, x = stack(), tokens()
    report = prune(model, otp.Layers(drop=1, replace=replace), otp.Channels(keep=0.5), batch=x)
    assert "stem" in report.plan.keep()
    assert report.output_error.after_repair < report.output_error.before_repair
    assert (report.plan.params.after, report.plan.macs.after) == (
        count_params(model),
        count_macs(model, x),
    )
    again = otp.load(otp.save(model, tmp_path / "small"), factory=stack)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


class Flat(nn.Module):
    """Two branches without a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.rise, self.fall = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x + self.fall(F.relu(self.rise(x))))


def test_branches_go_from_a_stream_that_is_cut() -> None:
    torch.manual_seed(0)
    report = prune(
        Flat().double().eval(), otp.Layers(drop=1), otp.Channels(keep=0.5), batch=tokens()
    )
    assert "stem" in report.plan.keep()
    assert report.plan.layers.after == 1


@pytest.mark.parametrize("params", [0.25, 0.3, 0.4])
def test_a_block_may_become_cheaper_than_what_would_stand_in_for_it(params: float) -> None:
    model = stack()
    whole = count_params(model)
    rule = otp.Layers(replace={"kind": "low_rank", "rank": 6})
    report = prune(model, rule, otp.Channels(), batch=tokens(), budget=otp.Budget(params=params))
    assert report.plan.params.after == count_params(model) <= params * whole


def test_a_network_with_a_map_of_low_rank_can_be_pruned_again() -> None:
    model = stack()
    prune(model, otp.Layers(drop=1, replace="low_rank"), batch=tokens())
    macs = count_macs(model, tokens(2))
    report = prune(model, otp.Channels(targets="blocks.*.up", keep=0.5), batch=tokens())
    assert report.plan.macs.before == macs
    assert report.plan.macs.after == count_macs(model, tokens(2)) < macs


class Grouped(nn.Module):
    """A convolutional block whose last layer is grouped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.relu(self.first(x)))


def test_bures_leaves_grouped_convolutions_alone_and_says_so() -> None:
    torch.manual_seed(0)
    blocks = [Grouped(4) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Conv2d(4, 2, 1)).double().eval()
    rule = otp.Layers(targets=["2"], drop=1, replace="bures", repair=())
    report = prune(model, rule, batch=torch.randn(16, 3, 6, 6, dtype=torch.float64))
    (note,) = report.repairs
    assert not note.accepted
    assert note.note == "a grouped convolution cannot mix all its channels"


def test_each_target_stands_for_layers_or_for_halves() -> None:
    rule = otp.Layers(targets=["layers.0", "layers.1.mlp"], drop=2)
    report = prune(build("transformer"), rule, batch=data("transformer", 32))
    assert [drop.block for drop in report.plan.drops] == ["layers.0", "layers.1.mlp"]


def test_a_half_of_a_layer_on_offer_is_refused_with_the_reason() -> None:
    rule = otp.Layers(targets=["layers.0", "layers.0.mlp"], drop=1)
    report = prune(build("transformer"), rule, batch=data("transformer", 32))
    refused = {r.group: r.reason for r in report.plan.refused}
    assert refused["layers.0.mlp"] == "it is part of 'layers.0', which is on offer"


@pytest.mark.parametrize("criterion", sorted(LAYER_CRITERIA))
def test_a_default_device_does_not_matter(criterion: str) -> None:
    plans = []
    for device in ("cpu", "meta"):
        model, x = stack(), tokens()
        with torch.device(device):
            report = prune(
                model, otp.Layers(drop=1, criterion=criterion, replace="low_rank"), batch=x
            )
        plans.append(report.plan)
    assert plans[0] == plans[1]


class Frozen(Stack):
    """Lets no gradient out."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def test_where_no_gradient_comes_out_the_stream_itself_is_priced() -> None:
    torch.manual_seed(0)
    model = Frozen().double().eval()
    policy = otp.Policy(rules=otp.Layers(drop=1))
    with otp.attach(model, policy) as attached:
        otp.observe(attached, [tokens()])
        (chain,) = attached.observation().chains.values()
    assert bool((chain.feel == 1).all())
    assert chain.power == 1.0
    (drop,) = prune(model, otp.Layers(drop=1), batch=tokens()).plan.drops
    assert drop.error > 0


def test_padding_does_not_count_for_what_stands_in() -> None:
    """See `tests/test_layers_transformers.py` for refits; this is for scales and maps."""
    from torch_otprune.repair.base import Patient
    from torch_otprune.repair.replace.base import paired

    model = Masked().double().eval()
    policy = otp.Policy(rules=otp.Layers(drop=1, replace="scale", repair=()))
    mask = torch.ones(16, 4)
    mask[:, 3:] = 0
    batch = {"x": tokens(16), "attention_mask": mask}
    with otp.attach(model, policy) as attached:
        plan = otp.observe(attached, [batch]).plan()
    graph = trace(model, batch)
    patient = Patient(model, model, graph, (), (), [batch], drops=plan.drops)
    assert float(paired(patient, plan.drops[0]).count) == 16 * 3


class Masked(Stack):
    """Says what is padding, as Transformers do."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


# Work that is done once, or not at all


def test_nothing_is_folded_where_no_activation_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("there is nothing to fold")

    monkeypatch.setattr(pipeline, "_fold_", never)
    for rule in (otp.Layers(drop=1), otp.Channels(targets="blocks.*.up", keep=0.5)):
        report = prune(stack(), rule, batch=tokens())
        assert "fold" not in report.seconds


QUICK = {"kind": "reconstruct", "steps": 1}
REFITS: list[tuple[Any, Any, bool]] = [
    ("affine", "least_squares", True),
    ("affine", ("norm", "least_squares"), True),
    ("affine", QUICK, True),
    ("affine", {**QUICK, "least_squares": None}, False),
    ("affine", "norm", False),
    ("affine", (), False),
    ("identity", "least_squares", False),
    ("scale", "least_squares", False),
    ("bures", QUICK, False),
]


@pytest.mark.parametrize(("standing", "repair", "left"), REFITS)
def test_what_stands_in_is_left_to_a_repair_that_refits_it_and_to_no_other(
    standing: str, repair: Any, left: bool
) -> None:
    rule = otp.Layers(drop=1, replace=standing, repair=repair)
    assert left_to_repair(rule.replace, rule.repair) is left


@pytest.mark.parametrize("repair", [repair for _, repair, _ in REFITS[:6]])
def test_the_layer_in_front_is_fitted_once_in_place_of_a_block(repair: Any) -> None:
    rule = otp.Layers(targets="blocks.1", drop=1, repair=repair)
    notes = prune(stack(Half), rule, batch=tokens()).repairs
    alone = [note for note in notes if note.kind == "affine"]
    assert bool(alone) is not left_to_repair(rule.replace, rule.repair)
