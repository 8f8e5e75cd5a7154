"""EGP's loop: pooled entropies, a budget that does not go to one layer, zeros that stay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.errors import CalibrationError, LoadError, PolicyError, StructureError
from torch_otprune.training import EntropySchedule
from torch_otprune.training.share import amounts

SITES = {"1": "0", "3": "2", "5": "4"}


def net(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 3),
    )


def observed(schedule: EntropySchedule, *batches: Tensor) -> EntropySchedule:
    with schedule.observe():
        for batch in batches:
            schedule.model(batch)
    return schedule


def bits(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


class Passed(nn.Module):
    """Feeds its input straight to the activation, so that a test decides what is on."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(2, 2), act
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


def test_entropy_is_pooled_over_batches() -> None:
    # On in one of eight samples: in three of four batches alone the channel looks dead, and the
    # mean over batches would read a quarter of a bit.
    x = -torch.ones(8, 2)
    x[0] = 1.0
    schedule = observed(EntropySchedule(Passed(nn.ReLU()), {"act": "layer"}), *x.split(2))
    assert schedule.entropies == pytest.approx({"act": bits(1 / 8)})
    assert schedule.rates["act"].tolist() == [0.125, 0.125]


def test_channels_that_never_switch_are_left_out_of_the_mean() -> None:
    x = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
    schedule = observed(EntropySchedule(Passed(nn.ReLU()), {"act": "layer"}), x)
    assert schedule.entropies == {"act": 1.0}
    assert schedule.collapsed() == ()


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_of_which_no_channel_switches_has_collapsed(inplace: bool) -> None:
    x = torch.tensor([[3.0, -1.0], [1.0, -2.0], [2.0, 0.0]])  # zero is off
    model = Passed(nn.ReLU(inplace=inplace))
    schedule = observed(EntropySchedule(model, {"act": "layer"}), x)
    assert schedule.entropies == {"act": 0.0}
    assert schedule.collapsed() == ("act",)


def test_the_upper_end_of_a_relu6_is_a_state_of_its_own() -> None:
    x = torch.tensor([[9.0, 1.0], [7.0, 8.0]])
    schedule = observed(EntropySchedule(Passed(nn.ReLU6()), {"act": "layer"}), x)
    assert schedule.entropies == {"act": 1.0}  # the first channel is constant


def test_channels_of_maps_are_their_second_axis_and_of_tokens_their_last() -> None:
    maps = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
    tokens = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    for model, x in ((maps, torch.randn(2, 1, 5, 6)), (tokens, torch.randn(2, 5, 2))):
        schedule = observed(EntropySchedule(model, {"1": "0"}), x)
        z = model[0](x)
        axes = (0, 2, 3) if z.dim() == 4 else (0, 1)
        torch.testing.assert_close(schedule.rates["1"], (z > 0).double().mean(axes))


def test_observing_leaves_mode_gradients_and_hooks_as_they_were() -> None:
    model = net().train()
    schedule = EntropySchedule(model, SITES)
    with schedule.observe():
        assert not model.training
        assert not model(torch.randn(4, 6)).requires_grad
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_published_share_gives_nearly_everything_to_one_layer() -> None:
    # Seventeen layers, one of them ten times less important than the others.
    importance = {str(i): 0.1 if i == 3 else 1.0 for i in range(17)}
    room = dict.fromkeys(importance, 10_000)
    published = amounts(importance, room, 10_000, share="softmax_ratio")
    assert published["3"] == 10_000
    robust = amounts(importance, room, 10_000)
    assert robust["3"] == pytest.approx(10_000 * 10 / 26, abs=1)
    assert min(robust.values()) > 300


def test_the_published_form_empties_a_whole_layer_and_the_bound_prevents_it() -> None:
    for share, bound in (("softmax_ratio", 1.0), ("softmax_log", 0.9)):
        model, x = net(), torch.randn(200, 6)
        with torch.no_grad():
            model[2].weight.mul_(1e-2)  # small weights: the layer that matters least
            model[2].bias.mul_(1e-2)
        settings = {"share": share, "max_layer_sparsity": bound}
        schedule = EntropySchedule(model, SITES, rate=0.7, **settings)  # type: ignore[arg-type]
        observed(schedule, x).prune_()
        empty = bool((model[2].weight == 0).all())
        assert empty == (share == "softmax_ratio")


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(0, 500)), min_size=1, max_size=8),
    st.integers(0, 3000),
    st.sampled_from(["softmax_log", "softmax_ratio"]),
    st.floats(0.1, 10),
)
def test_amounts_add_up_and_stay_within_their_room(
    layers: list[tuple[float, int]], budget: int, share: str, tau: float
) -> None:
    importance = {str(i): value for i, (value, _) in enumerate(layers)}
    room = {str(i): size for i, (_, size) in enumerate(layers)}
    taken = amounts(importance, room, budget, share=share, tau=tau)  # type: ignore[arg-type]
    assert sum(taken.values()) == min(budget, sum(room.values()))
    assert all(0 <= taken[name] <= room[name] for name in room)


def test_a_round_removes_the_rate_and_the_smallest_weights_first() -> None:
    model = net()
    before = {path: model.get_submodule(path).weight.detach().abs().clone() for path in "024"}
    total = sum(weight.numel() for weight in before.values())
    schedule = observed(EntropySchedule(model, SITES, rate=0.4), torch.randn(100, 6))
    taken = schedule.prune_()
    assert sum(taken.values()) == int(0.4 * total)
    for path, count in taken.items():
        gone = model.get_submodule(path).weight == 0
        assert int(gone.sum()) == count
        assert before[path][gone].max() <= before[path][~gone].min()


def test_rounds_add_up_to_the_cumulative_rate() -> None:
    model, x = net(), torch.randn(100, 6)
    schedule = EntropySchedule(model, SITES, max_layer_sparsity=1.0, protect=["0"])
    for _ in range(2):
        observed(schedule, x).prune_()
    left = sum(int((model[i].weight != 0).sum()) for i in (2, 4))
    assert left == 288 // 4
    assert bool((model[0].weight != 0).all())


def test_layers_of_zero_entropy_are_not_pruned_any_further() -> None:
    model = net()
    with torch.no_grad():
        model[4].bias.fill_(100.0)  # always on
    taken = observed(EntropySchedule(model, SITES), torch.randn(50, 6)).prune_()
    assert set(taken) == {"0", "2"}


def test_pruned_weights_stay_zero_while_training_goes_on() -> None:
    model, x = net(), torch.randn(64, 6)
    schedule = observed(EntropySchedule(model, SITES), x)
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        descent.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        descent.step()

    step()  # momentum that would bring the zeros back
    schedule.prune_()
    gone = {path: model.get_submodule(path).weight == 0 for path in "024"}
    with schedule.hold(descent):
        for _ in range(3):
            step()
        for path, zeros in gone.items():
            weight = model.get_submodule(path).weight
            assert bool((weight[zeros] == 0).all())
            assert bool((weight[~zeros] != 0).all())
    step()  # the hook is off again
    assert bool((model[2].weight[gone["2"]] != 0).any())


def test_pruning_leaves_an_ordinary_module() -> None:
    model = net()
    before = [(type(m), sorted(vars(m))) for m in model.modules()], list(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    observed(EntropySchedule(model, SITES), torch.randn(50, 6)).prune_()
    assert before == (
        [(type(m), sorted(vars(m))) for m in model.modules()],
        list(model.state_dict()),
    )
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_a_saved_schedule_keeps_its_zeros() -> None:
    model, x = net(), torch.randn(50, 6)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    schedule = observed(EntropySchedule(model, SITES), x)
    schedule.prune_()
    pruned = model[2].weight.detach().clone()
    model.load_state_dict(dense)
    resumed = EntropySchedule(model, SITES)
    resumed.load_state_dict(schedule.state_dict())
    assert torch.equal(model[2].weight, pruned)


def test_a_few_rounds_of_training_and_pruning_collapse_an_activation() -> None:
    model, x = net(8), torch.randn(256, 6)
    labels = (x[:, :3] * 2).argmax(1)
    schedule = EntropySchedule(model, SITES, protect=["0"], rate=0.6, max_layer_sparsity=1.0)
    descent = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        with schedule.hold(descent):
            for _ in range(20):
                descent.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                descent.step()
        if observed(schedule, x).collapsed():
            break
        schedule.prune_()
    assert schedule.collapsed()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "there is no activation."),
        ({"9": "0"}, "'9' is no module of this model."),
        ({"1": "3"}, "it is a ReLU"),
        ({"1": "0", "3": "0"}, "feeds 2 of the sites"),
    ],
)
def test_sites_that_make_no_sense_are_refused(sites: dict[str, str], message: str) -> None:
    with pytest.raises(StructureError) as caught:
        EntropySchedule(net(), sites)
    assert message in caught.value.problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0."),
        ({"max_layer_sparsity": 1.5}, "max_layer_sparsity is 1.5."),
        ({"tau": 0.0}, "share is 'softmax_log' and tau 0.0."),
        ({"share": "softmax"}, "share is 'softmax' and tau 1.0."),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        EntropySchedule(net(), SITES, **settings)  # type: ignore[arg-type]
    assert caught.value.problem == message


def test_an_activation_that_was_not_run_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        EntropySchedule(net(), SITES).prune_()
    assert caught.value.problem == "activation '1' was not observed."


def test_an_activation_that_runs_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[1])
    schedule = EntropySchedule(model, {"1": "0"})
    with schedule.observe(), pytest.raises(StructureError) as caught:
        model(torch.randn(3, 4))
    assert "runs more than once" in caught.value.problem


def test_nothing_left_to_prune_is_said() -> None:
    schedule = EntropySchedule(net(), SITES, protect=["0", "2", "4"])
    observed(schedule, torch.randn(20, 6))
    with pytest.raises(PolicyError) as caught:
        schedule.prune_()
    assert caught.value.problem == "no layer may lose any more weights."


def test_the_state_of_another_schedule_is_refused() -> None:
    model = net()
    with pytest.raises(LoadError) as caught:
        EntropySchedule(model, SITES).load_state_dict({"sites": {"1": "0"}, "gone": {}})
    assert caught.value.problem == "this state is of 1 other sites."
