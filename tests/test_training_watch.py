"""A penalty while somebody else trains: what it measures, how it weighs, what it leaves behind."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_otprune.errors import CalibrationError, LoadError, StructureError, TargetError
from torch_otprune.training import Linearity, MaxSliced, Memory, Penalty, Pressure

FIXED = MaxSliced(weight=2.0)


class Change(Penalty):
    """Mean squared change: simple enough to work out by hand."""

    kind: str = "change"

    def value(self, x: Tensor, y: Tensor, memory: Memory) -> Tensor:
        return (y - x).square().mean()


class Block(nn.Module):
    """A residual block whose ReLUs write in place, the first one on the block's own input."""

    def __init__(self, width: int, *, inplace: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.act, self.out = nn.ReLU(inplace=inplace), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.act(self.first(x))) + x)


class Net(nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self, width: int = 16, *, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(Block(width, inplace=inplace) for _ in range(2)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()))


BLOCKS = ("blocks.0", "blocks.1")


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def data(samples: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1))
    return x, (x[:, :4] + x[:, 4:].abs()).argmax(1)


def train(
    model: nn.Module, pressure: Pressure | None, steps: int, *, lr: float = 0.1, scale: float = 1.0
) -> list[float]:
    x, labels = data(256)
    descent, losses = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), []
    model.train()
    for step in range(steps):
        part = torch.arange(step * 64, step * 64 + 64) % 256
        loss = task = F.cross_entropy(model(x[part]), labels[part])
        if pressure is not None:
            loss = task + pressure.penalty()
        descent.zero_grad()
        (scale * loss).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= scale
        descent.step()
        if pressure is not None:
            pressure.step()
        losses.append(float(task.detach()))
    return losses


def test_the_penalty_is_the_weighted_mean_over_the_blocks() -> None:
    model = net()
    with Pressure(model, BLOCKS, FIXED) as pressure:
        model(data()[0])
        got = float(pressure.penalty().detach())
        assert got == pytest.approx(sum(pressure.values.values()))  # twice the mean of two
        assert list(pressure.values) == list(BLOCKS)


def test_the_whole_blocks_input_is_compared_with_its_output() -> None:
    model, x = net(inplace=False), data()[0]
    with Pressure(model, ["blocks.0"], Change(weight=1.0)) as pressure:
        model(x)
        stream = model.stem(x).relu()
        want = (model.blocks[0](stream) - stream).square().mean()
        torch.testing.assert_close(pressure.penalty(), want)


class Overwrites(nn.Module):
    """A block that writes on its own input, followed by one that writes on the block's output."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(8, 8))
        self.after = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.stem(x)))


@pytest.mark.parametrize("penalty", [Change(weight=1.0), MaxSliced(weight=1.0, paired=1.0)])
def test_activations_in_place_do_not_change_the_penalty_or_its_gradient(penalty: Penalty) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Overwrites(inplace=inplace)
        with Pressure(model, ["block"], penalty) as pressure:
            out = model(data()[0])
            loss = pressure.penalty() + out.square().mean()
            loss.backward()
        found.append((loss.detach(), model.stem.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_an_activation_in_place_is_measured_on_what_went_in() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    x = data()[0]
    z = model[0](x)
    with Pressure(model, ["1"], Linearity(weight=1.0)) as pressure:
        model(x)
        torch.testing.assert_close(pressure.penalty(), Linearity().value(z, z.relu(), Memory(0)))


def test_no_feature_map_is_kept_after_the_block() -> None:
    model = net()
    with Pressure(model, BLOCKS, FIXED) as pressure:
        model(data()[0])
        kept = [t for t in _tensors(vars(pressure)) if t.dim() > 1 and len(t) == 64]
        assert not kept


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in _tensors(value)]
    return [t for value in tree for t in _tensors(value)] if isinstance(tree, (list, tuple)) else []


def test_a_block_that_runs_twice_counts_twice() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model.forward = lambda x: model[1](model[0](model[0](x)))  # type: ignore[method-assign]
    x = data()[0]
    with Pressure(model, ["0"], Change(weight=1.0)) as pressure:
        model(x)
        y = model[0](x)
        want = ((y - x).square().mean() + (model[0](y) - y).square().mean()) / 2
        torch.testing.assert_close(pressure.penalty(), want)


def test_the_first_tensor_of_a_tuple_is_the_blocks_output() -> None:
    class Tupled(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return hidden + 1, None

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(8, 4), Tupled()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(hidden=self.stem(x), mask=None)[0]

    model = Outer()
    with Pressure(model, ["block"], Change(weight=3.0)) as pressure:
        model(data()[0])
        assert float(pressure.penalty().detach()) == pytest.approx(3.0)


@pytest.mark.parametrize("case", ["never", "eval", "no_grad", "stepped"])
def test_a_penalty_without_a_forward_pass_is_refused(case: str) -> None:
    model, x = net(), data()[0]
    with Pressure(model, BLOCKS, FIXED) as pressure:
        if case == "eval":
            model.eval()(x)
        if case == "no_grad":
            with torch.no_grad():
                model(x)
        if case == "stepped":
            model(x)
            pressure.penalty()
            pressure.step()
        with pytest.raises(CalibrationError) as caught:
            pressure.penalty()
    assert "no forward pass in training mode since the last step" in caught.value.problem
    assert "call model.train()" in caught.value.fix


def test_validation_between_forward_and_penalty_changes_nothing() -> None:
    model, x = net(), data()[0]
    with Pressure(model, BLOCKS, FIXED) as pressure:
        model(x)
        before = pressure.penalty()
        with torch.no_grad():
            model.eval()(x * 2)
        assert pressure.penalty() == before


def test_a_block_that_changes_the_shape_is_refused() -> None:
    model = net()
    with Pressure(model, ["stem"], FIXED), pytest.raises(StructureError) as caught:
        model(data()[0])
    assert "'stem' cannot be watched: it maps (64, 8) to (64, 16)." in caught.value.problem
    assert "keep the shape" in caught.value.fix


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([], "there is no block to watch."), (["block.0"], "'block.0' is no module of this model.")],
)
def test_blocks_that_are_not_there_are_refused(blocks: list[str], message: str) -> None:
    model = net()
    with pytest.raises(TargetError) as caught:
        Pressure(model, blocks, FIXED)
    assert caught.value.problem == message
    assert not model._forward_hooks and not model._forward_pre_hooks


class Checkpointed(Net):
    """The net with its blocks recomputed in backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_recomputed_blocks_have_the_same_penalty_and_gradient() -> None:
    found = []
    for kind in (Net, Checkpointed):
        torch.manual_seed(0)
        model, (x, labels) = kind(), data()
        with Pressure(model, BLOCKS, MaxSliced()) as pressure:
            for _ in range(2):
                model.zero_grad()
                (F.cross_entropy(model(x), labels) + pressure.penalty()).backward()
                pressure.step()
            found.append((pressure.base, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_re_entrant_checkpoints_are_refused() -> None:
    model = Checkpointed()
    model.reentrant = True
    with Pressure(model, BLOCKS, FIXED), pytest.raises(StructureError) as caught:
        model(data()[0])
    assert "runs without gradients" in caught.value.problem
    assert "use_reentrant=False" in caught.value.fix


@pytest.mark.parametrize("penalty", [FIXED, Linearity(weight=1.0), MaxSliced()])
def test_it_works_under_autocast(penalty: Penalty) -> None:
    model, (x, labels) = net(), data()
    blocks = ["blocks.0.act"] if isinstance(penalty, Linearity) else BLOCKS
    with Pressure(model, blocks, penalty) as pressure:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels) + pressure.penalty()
        assert pressure.penalty().dtype == torch.float32
        loss.backward()
        pressure.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_weight_ramps_from_zero_over_its_share_of_the_steps() -> None:
    model = net()
    ramped = MaxSliced(weight=2.0, total=40, ramp=0.25)
    with Pressure(model, BLOCKS, ramped) as pressure:
        weights = []
        for _ in range(12):
            weights.append(pressure.weight)
            model(data()[0])
            pressure.penalty()
            pressure.step()
    assert weights == pytest.approx([0.2 * step for step in range(10)] + [2.0, 2.0])


def ratio(model: nn.Module, pressure: Pressure) -> float:
    """Work out the ratio of gradient norms with two backward passes of their own."""
    x, labels = data(256)
    watched = [p for path in BLOCKS for p in model.get_submodule(path).parameters()]
    task = F.cross_entropy(model.train()(x), labels)
    loss = pressure.penalty()
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(s, watched, retain_graph=True)]).norm()
        for s in (loss, task)
    ]
    return float(norms[0] / norms[1])


@pytest.mark.parametrize("fraction", [0.05, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_automatic_weight_holds_the_ratio_of_the_gradients(
    fraction: float, scale: float
) -> None:
    model, seen = net(), []
    with Pressure(model, BLOCKS, MaxSliced(fraction=fraction, every=5)) as pressure:
        train(model, pressure, 1, lr=0.02, scale=scale)  # so that no look falls on a measurement
        for _ in range(12):
            train(model, pressure, 5, lr=0.02, scale=scale)
            seen.append(ratio(model, pressure))
    middle = float(torch.tensor(seen).median())
    assert middle == pytest.approx(fraction, rel=0.2)


def test_accumulated_gradients_are_measured_on_one_batch() -> None:
    bases = []
    for parts in (1, 3):
        model, (x, labels) = net(), data(64)
        with Pressure(model, BLOCKS, MaxSliced()) as pressure:
            for _ in range(parts):
                loss = F.cross_entropy(model(x), labels) + pressure.penalty()
                (loss / parts).backward()
            pressure.step()
            bases.append(pressure.base)
    assert bases[0] == pytest.approx(bases[1], rel=1e-4)


def test_a_batch_that_was_never_run_back_is_not_measured() -> None:
    bases = []
    for stray in (False, True):
        model, (x, labels) = net(), data(64)
        with Pressure(model, BLOCKS, MaxSliced()) as pressure:
            if stray:
                model(x * 3)
                pressure.penalty()
            (F.cross_entropy(model(x), labels) + pressure.penalty()).backward()
            pressure.step()
            bases.append(pressure.base)
    assert bases[0] == bases[1] > 0


def test_the_automatic_weight_is_exact_on_the_batch_that_it_measured() -> None:
    model, (x, labels) = net(), data(256)
    with Pressure(model, BLOCKS, MaxSliced(fraction=0.25)) as pressure:
        (F.cross_entropy(model(x), labels) + pressure.penalty()).backward()
        pressure.step()
        model(x)  # nothing has moved, but for the random directions
        assert ratio(model, pressure) == pytest.approx(0.25, rel=1e-3)


def test_a_step_that_was_skipped_leaves_the_weight_alone() -> None:
    model, (x, labels) = net(), data()
    with Pressure(model, BLOCKS, MaxSliced(every=1)) as pressure:
        train(model, pressure, 2)
        before = pressure.base
        loss = F.cross_entropy(model(x), labels) + pressure.penalty()
        (loss * float("inf")).backward()
        pressure.step()
        model(x)
        pressure.penalty()  # never run back
        pressure.step()
        assert pressure.base == before > 0


def test_blocks_without_parameters_are_weighed_at_all_parameters() -> None:
    model = net()
    acts = ["blocks.0.act", "blocks.1.act"]
    with Pressure(model, acts, Linearity(every=1)) as pressure:
        train(model, pressure, 3)
        assert pressure.base > 0


def test_frozen_parameters_are_no_obstacle() -> None:
    model, (x, labels) = net(), data()
    model.blocks[0].requires_grad_(False)
    with Pressure(model, BLOCKS, MaxSliced()) as pressure:
        (F.cross_entropy(model(x), labels) + pressure.penalty()).backward()
        pressure.step()
        assert pressure.base > 0


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped() -> None:
    def start() -> tuple[Net, Pressure]:
        model = net()
        return model, Pressure(model, BLOCKS, MaxSliced(total=20, ramp=0.5, every=3), seed=7)

    model, pressure = start()
    train(model, pressure, 4)
    saved = io.BytesIO()
    torch.save((model.state_dict(), pressure.state_dict()), saved)
    train(model, pressure, 4)

    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    other, resumed = start()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.weight > 0
    train(other, resumed, 4)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert resumed.state_dict()["base"] == pressure.state_dict()["base"]


def test_the_same_seed_trains_the_same_network() -> None:
    models = []
    for seed in (3, 3, 4):
        models.append(net())
        with Pressure(models[-1], BLOCKS, MaxSliced(), seed=seed) as pressure:
            train(models[-1], pressure, 6)
    first, again, other = (m.blocks[0].first.weight for m in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_state_of_other_blocks_is_refused() -> None:
    model = net()
    with Pressure(model, BLOCKS, FIXED) as one:
        state = one.state_dict()
    other = Pressure(model, BLOCKS[:1], FIXED)
    with other, pytest.raises(LoadError) as caught:
        other.load_state_dict(state)
    assert "this state is of 'max_sliced' on blocks.0, blocks.1." in caught.value.problem


def test_removing_leaves_no_trace() -> None:
    model = net()
    before = [
        (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    with Pressure(model, BLOCKS, MaxSliced()) as pressure:
        x, labels = data()
        (F.cross_entropy(model(x), labels) + pressure.penalty()).backward()
    after = [
        (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    assert before == after
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model, x = net(), data()[0]
    with Pressure(model, BLOCKS, FIXED) as pressure:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(x)
            assert pressure.values == {}


def test_a_watched_model_computes_what_it_did() -> None:
    model, x = net(), data()[0]
    want = model(x)
    with Pressure(model, BLOCKS, FIXED):
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("penalty", [MaxSliced(fraction=0.3), MaxSliced(fraction=0.3, paired=1.0)])
def test_training_with_the_penalty_brings_a_block_nearer_to_the_identity(penalty: Penalty) -> None:
    plain, pulled = net(width=32), net(width=32)
    without = train(plain, None, 300, lr=0.05)
    with Pressure(pulled, BLOCKS, penalty) as pressure:
        beside = train(pulled, pressure, 300, lr=0.05)
    found = []
    for model in (plain, pulled):
        with Pressure(model, BLOCKS, MaxSliced(weight=1.0)) as measure:
            model(data(256)[0])
            found.append(sum(measure.values.values()))
    assert found[1] < found[0] / 2
    assert sum(beside[-20:]) < sum(without[-20:]) + 20 * 0.05
