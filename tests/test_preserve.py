"""What a policy promises to preserve is proved before, and kept by every write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.certify import keeper
from torch_otprune.certify.study import study
from torch_otprune.errors import OTPruneError, PolicyError
from torch_otprune.nn import FICNN, ICLSTM, ICRNN, PICNN, InputConvex, NonNegative
from torch_otprune.policy import REPAIRS
from torch_otprune.policy.preserve import Lipschitz

EIGHT = {"keep": "50%", "criterion": "transport"}
QUICK = {"reconstruct": {"kind": "reconstruct", "steps": 5}}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(net: InputConvex, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.double().parameters():
            p.add_(torch.randn_like(p) * 0.2)
    net.project_()
    return net.eval()


def policy(repair: Any, preserve: Any = "convex", **rule: Any) -> otp.Policy:
    return otp.Policy(rules=otp.Channels(**(EIGHT | rule), repair=repair), preserve=preserve)


NETS = {
    "ficnn": (lambda: FICNN(4, (12, 10), 2), (64, 4)),
    "icrnn": (lambda: ICRNN(3, 10, 2), (64, 5, 3)),
    "log": (lambda: ICLSTM(3, 8, 2, gates="exp"), (64, 4, 3)),
}


def batches(name: str) -> list[Tensor]:
    return [drawn(*NETS[name][1], seed=s) for s in range(4)]


# -- how it is said --------------------------------------------------------------------------


def test_a_policy_says_what_it_preserves_and_reads_it_back() -> None:
    said = policy("none", ["convex", "monotone", {"lipschitz": 2.0}])
    assert said.preserve == ("convex", "monotone", Lipschitz(lipschitz=2.0))
    assert otp.Policy.from_yaml(said.to_yaml()) == said
    assert otp.Policy.from_json(said.to_json()) == said
    assert policy("none", {"lipschitz": 3}).preserve == (Lipschitz(lipschitz=3.0),)


@pytest.mark.parametrize(
    "wrong",
    ["konvex", ["convex", 3], 7, {"lipshitz": 2.0}, {}, None, b"convex", torch.tensor(2.0)],
)
def test_what_cannot_be_preserved_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        policy("none", wrong)
    assert "is nothing that can be preserved" in caught.value.problem
    assert "Policy.preserve" in caught.value.where
    assert "{'lipschitz': 2.0}" in caught.value.fix


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan"), True, "2", None])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(PolicyError, match="lipschitz"):
        policy("none", {"lipschitz": bound})


# -- what must be so before ------------------------------------------------------------------


def refused(net: nn.Module, data: list[Any], preserve: Any) -> OTPruneError:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(PolicyError) as caught:
        otp.prune_(net, policy("none", preserve), data, timing=0)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    return caught.value


def test_a_net_with_a_negative_weight_is_no_convex_net() -> None:
    net = spread(FICNN(4, (8,), 2))
    with torch.no_grad():
        net.z[0].weight[1, 3] = -0.5
    said = refused(net, [drawn(32, 4)], "convex")
    assert "`z.0.weight` has 1 negative entry" in said.problem and "-0.5" in said.problem
    assert said.where == "Policy.preserve"
    assert "`project_()`" in said.fix


def test_an_activation_that_is_not_convex_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    said = refused(net, [drawn(32, 4)], "convex")
    assert "'1': `tanh` is not convex" in said.problem
    assert said.fix.startswith("use relu, softplus, leaky_relu or elu there")


def test_the_published_lstm_is_refused_with_the_gates_that_are_convex() -> None:
    said = refused(spread(ICLSTM(3, 6, 2)), [drawn(32, 3, 3)], "convex")
    assert "are multiplied" in said.problem and "gates='exp'" in said.fix


def test_a_bound_that_the_dense_net_passes_is_refused() -> None:
    net = spread(FICNN(4, (8,), 2))
    said = refused(net, [drawn(32, 4)], {"lipschitz": 1e-3})
    assert "more than 0.001" in said.problem
    assert said.fix.startswith("allow a larger bound")


def test_what_has_no_bound_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 2)).double()
    assert "nothing bounds its slopes" in refused(net, [drawn(32, 4)], {"lipschitz": 9.0}).problem


# -- what stays so ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ficnn", "icrnn"])
@pytest.mark.parametrize("kind", sorted(REPAIRS))
def test_every_repair_keeps_a_convex_net_convex(kind: str, name: str) -> None:
    net, data = spread(NETS[name][0]()), batches(name)
    dense = sum(p.numel() for p in net.parameters())
    report = otp.prune_(net, policy(QUICK.get(kind, kind)), data, timing=0)
    assert sum(p.numel() for p in net.parameters()) < dense
    assert study(net, data[0]).holds("convex")
    assert all(bool((t >= 0).all()) for _, t in net.constrained())
    assert report.output_error.after_repair <= report.output_error.before_repair * (1 + 1e-9)


def test_a_free_refit_would_lose_what_the_bound_one_keeps() -> None:
    """Or the constraint would not be needed."""
    signs = []
    for preserve in ((), ("convex",)):
        net = spread(FICNN(6, (24, 24), 3), seed=3)
        data = [drawn(128, 6, seed=s) for s in range(4)]
        otp.prune_(net, policy("least_squares", preserve, keep="25%"), data, timing=0)
        signs.append(study(net, data[0]).holds("convex"))
    assert signs == [False, True]


def test_a_bound_refit_is_better_than_none() -> None:
    errors = []
    for repair in ("none", "least_squares"):
        net = spread(FICNN(6, (24, 24), 3), seed=3)
        data = [drawn(128, 6, seed=s) for s in range(4)]
        errors.append(otp.prune_(net, policy(repair, keep="50%"), data, timing=0).output_error)
    assert errors[1].after_repair < 0.5 * errors[0].after_repair


def test_a_recurrent_refit_keeps_its_certificate_and_helps() -> None:
    errors = []
    for repair in ("none", "recurrent"):
        net, data = spread(ICRNN(3, 16, 2), seed=2), [drawn(64, 6, 3, seed=s) for s in range(4)]
        report = otp.prune_(net, policy(repair), data, timing=0)
        errors.append(report.output_error.after_repair)
        assert study(net, data[0]).holds("convex")
    assert errors[1] < 0.5 * errors[0]


def test_a_lipschitz_bound_holds_after_the_repairs() -> None:
    net = spread(FICNN(6, (24, 24), 3), seed=3)
    data = [drawn(128, 6, seed=s) for s in range(4)]
    free, bound = copy.deepcopy(net), study(net, data[0]).bound
    assert bound is not None
    otp.prune_(free, policy("least_squares", "convex", keep="25%"), data, timing=0)
    cut = copy.deepcopy(net)
    otp.prune_(cut, policy("none", "convex", keep="25%"), data, timing=0)
    low, high = study(cut, data[0]).bound, study(free, data[0]).bound
    assert low is not None and high is not None and low < high <= bound * 1.5
    tight = (low + high) / 2
    # the dense net must keep it too: its rows are shortened until it does
    assert bound > tight
    report = otp.prune_(
        net, policy("least_squares", ["convex", {"lipschitz": bound}], keep="25%"), data, timing=0
    )
    after = study(net, data[0]).bound
    assert after is not None and after <= bound * (1 + 1e-9)
    assert report.params.after < report.params.before


def test_a_repair_that_passes_the_bound_goes_back_part_of_the_way() -> None:
    net = spread(FICNN(4, (8,), 2))
    held = keeper(net, policy("none", {"lipschitz": 50.0}).preserve, drawn(4, 4))
    assert held is not None
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(40)
    text = held.settle_(net, before)
    bound = study(net, drawn(1, 4)).bound
    assert "% of the way" in text and bound is not None and 45 < bound <= 50 * (1 + 1e-9)
    assert not torch.equal(net.first.weight, before["first.weight"])


def test_a_repair_that_cannot_be_kept_is_taken_back() -> None:
    net = spread(FICNN(4, (8,), 2))
    with torch.no_grad():
        net.z[0].weight[0, 0] = 0.0
    held = keeper(net, policy("none", "convex").preserve, drawn(4, 4))
    assert held is not None
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        net.z[0].weight[0, 0] = -1.0
    assert held.settle_(net, before).startswith("lost: it is not proved to be convex at 'z.0'")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_monotone_net_stays_monotone() -> None:
    net, data = spread(ICRNN(3, 12, 2, doubled=False)), [drawn(64, 5, 3, seed=s) for s in range(4)]
    otp.prune_(net, policy("recurrent", ["convex", "monotone"]), data, timing=0)
    found = otp.certify(net, data[0], pairs=100, steps=0)
    assert (found.convex.how, found.monotone.how) == ("structural", "structural")


def test_units_that_are_merged_stay_convex() -> None:
    net, data = spread(FICNN(4, (12, 12), 2)), batches("ficnn")
    repair = {"kind": "coupling", "guard": False}
    otp.prune_(net, policy(repair), data, timing=0)
    assert study(net, data[0]).holds("convex")
    assert all(bool((t >= 0).all()) for _, t in net.constrained())


def test_an_activation_that_became_linear_keeps_the_net_convex() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    ).double()
    with torch.no_grad():
        net[2].weight.abs_()
        net[4].weight.abs_()
    data = [drawn(64, 4, seed=s) for s in range(4)]
    folded = otp.Policy(rules=otp.Linearize(targets=["3"], drop=1), preserve="convex")
    report = otp.prune_(net, folded, data, timing=0)
    assert report.plan.lines and study(net, data[0]).holds("convex")


class Block(nn.Module):
    """A residual block of non-negative layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = NonNegative(8, 12), NonNegative(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


@pytest.mark.parametrize("replace", ["identity", "affine", "scale", "low_rank"])
def test_what_stands_in_for_a_block_keeps_the_net_convex(replace: str) -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *blocks, NonNegative(8, 2)).double()
    data = [drawn(64, 4, seed=s) for s in range(4)]
    rule = otp.Layers(drop=1, replace=replace, repair="least_squares")
    report = otp.prune_(net, otp.Policy(rules=rule, preserve="convex"), data, timing=0)
    assert report.plan.drops and study(net, data[0]).holds("convex")


def test_a_partial_net_is_pruned_with_its_context() -> None:
    net = spread(PICNN(3, 4, (10, 8)))
    data = [(drawn(64, 3, seed=s), drawn(64, 4, seed=s + 9)) for s in range(4)]
    otp.prune_(net, policy("least_squares"), data, timing=0)
    assert study(net, data[0]).holds("convex")


def test_undo_goes_back_bit_for_bit() -> None:
    net, data = spread(ICRNN(3, 8, 2)), batches("icrnn")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = otp.prune_(net, policy("recurrent"), data, timing=0)
    report.undo_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_plan_holds_what_is_to_be_preserved() -> None:
    net, data = spread(ICRNN(3, 8, 2)), batches("icrnn")
    with otp.attach(net, policy("none")) as attached:
        for batch in data:
            net(batch)
        plan = attached.plan()
    assert plan.policy.preserve == ("convex",)
    with torch.no_grad():
        net.cells[0].v.weight[0, 0] = -1.0
    with pytest.raises(OTPruneError):  # the plan is for other weights, or they are not convex
        otp.apply_(net, plan, data, timing=0)


# -- PyTorch's own recurrent layers ----------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_hidden_units_of_plain_recurrent_layers_go(kind: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.o = kind(4, 12, 2, batch_first=True), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.o(self.r(x)[0])
            return out

    torch.manual_seed(0)
    net, data = Model().double(), [drawn(64, 5, 4, seed=s) for s in range(4)]
    report = otp.prune_(net, otp.Policy(rules=otp.Channels(**EIGHT)), data, timing=0)
    assert net.r.hidden_size == 6
    assert report.output_error.after_repair <= report.output_error.before_repair
