"""Whole experts go: the cut model is the dense one whose router never chooses them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_otprune as otp
from torch_otprune.errors import PolicyError, StructureError
from torch_otprune.policy import CRITERIA
from torch_otprune.statistics.experts import watch_experts
from torch_otprune.statistics.recorder import Recorder
from torch_otprune.structure import trace
from torch_otprune.structure.routing import Route, Routing, Visits
from torch_otprune.surgery import compared, copied, cut_, disagreement

WIDTH, EXACT = 8, 1e-12
RANKING = sorted(set(CRITERIA) - {"taylor", "bn_scale", "cpot", "dtp", "sliced_kernel"})


class Expert(nn.Module):
    """Two dense layers."""

    def __init__(self, inner: int = 9) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Sparse(nn.Module):
    """Every token goes to the `top_k` experts with the largest logits, found by number."""

    def __init__(self, count: int = 5, top_k: int = 2, order: str = "softmax first") -> None:
        super().__init__()
        self.num_experts, self.top_k, self.order = count, top_k, order
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        if self.order == "softmax first":
            weights, chosen = logits.softmax(-1).topk(self.top_k, -1)
        else:
            weights, chosen = logits.topk(self.top_k, -1)
            weights = weights.softmax(-1)
        out = torch.zeros_like(flat)
        for number in range(self.num_experts):
            rows, place = torch.where(chosen == number)
            if len(rows):
                mine = self.experts[number](flat[rows]) * weights[rows, place, None]
                out.index_add_(0, rows, mine)
        return out.view_as(x)


class Named(Sparse):
    """The same with experts that have names."""

    def __init__(self, count: int = 5, top_k: int = 2) -> None:
        super().__init__(count, top_k)
        table = {f"expert_{i}": expert for i, expert in enumerate(self.experts)}
        self.experts = nn.ModuleDict(table)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows, place = torch.where(chosen == number)
            mine = self.experts[f"expert_{number}"](flat[rows]) * weights[rows, place, None]
            out.index_add_(0, rows, mine)
        return out.view_as(x)


class Soft(nn.Module):
    """All experts run, weighted by a softmax."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(Expert(7) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return sum(gates[..., i, None] * e(x) for i, e in enumerate(self.experts))  # type: ignore[return-value]


class Fused(nn.Module):
    """All experts in two tensors, weighted by a softmax."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.up = nn.Parameter(torch.randn(count, WIDTH, 11) / 3)
        self.down = nn.Parameter(torch.randn(count, 11, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edf->betf", x, self.up))
        return torch.einsum("betf,efo,bte->bto", hidden, self.down, self.router(x).softmax(-1))


class Grouped(nn.Module):
    """Experts compete in groups first: sigmoids with a bias that only the choice sees."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.num_experts, self.num_group = 2 * groups, groups
        self.weight = nn.Parameter(torch.randn(2 * groups, WIDTH))
        self.register_buffer("bias", torch.rand(2 * groups) * 3)
        self.up = nn.Parameter(torch.randn(2 * groups, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self.weight).sigmoid()
        chosen = scores + self.bias
        per = self.num_experts // self.num_group
        groups = chosen.view(*x.shape[:2], self.num_group, per).topk(2, -1)[0].sum(-1)
        best = torch.zeros_like(groups).scatter(-1, groups.topk(2, -1)[1], 1.0)
        allowed = best.repeat_interleave(per, -1).bool()
        index = chosen.masked_fill(~allowed, float("-inf")).topk(3, -1)[1]
        weights = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        every = torch.stack([F.gelu(x @ self.up[e]) for e in range(self.num_experts)], -1)
        return (every * weights[..., None, :]).sum(-1)


class Net(nn.Module):
    """A mixture between an embedding and a head."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, WIDTH), nn.LayerNorm(WIDTH)
        self.moe = mixture
        self.a, self.b = nn.Linear(WIDTH, 11), nn.Linear(11, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.moe(self.norm(x))
        return self.head((x + self.b(F.relu(self.a(x)))).mean(1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "sparse": Sparse,
    "sparse, softmax last": partial(Sparse, order="softmax last"),
    "sparse, one of them": partial(Sparse, top_k=1),
    "named": Named,
    "soft": Soft,
    "fused": Fused,
}


def net(mixture: Callable[[], nn.Module] = Sparse) -> nn.Module:
    """Build one in float64."""
    torch.manual_seed(0)
    model = Net(mixture()).double().eval()
    nn.init.normal_(
        model.moe.get_parameter("router.weight" if hasattr(model.moe, "router") else "weight")
    )
    return model


def batches(count: int = 3) -> list[Tensor]:
    """Draw token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (16, 6), generator=generator) for _ in range(count)]


def planned(model: nn.Module, *rules: Any, **fields: Any) -> otp.Plan:
    """Plan."""
    with otp.attach(model, otp.Policy(rules=[*rules], **fields)) as attached:
        return otp.observe(attached, batches()).plan()


class Never:
    """A hook on a router: some logits are minus infinity."""

    def __init__(self, gone: list[int]) -> None:
        self.gone = gone

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(-1, torch.tensor(self.gone), float("-inf"))


# --- what is found ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least"), [("sparse", 2), ("named", 2), ("soft", 0), ("fused", 0)]
)
def test_the_analysis_finds_experts_and_how_many_a_router_chooses(kind: str, least: int) -> None:
    graph = trace(net(KINDS[kind]), batches()[0])
    (group,) = [g for g in graph.groups if g.kind == "experts"]
    assert (group.units, group.least) == (5, least)
    assert [m.path for m in group.producers] == ["moe.router"]


def test_units_of_experts_that_the_example_does_not_reach_are_found_too() -> None:
    model = net(partial(Sparse, top_k=1))
    with torch.no_grad():
        model.moe.router.weight[:4] = 0.0
        model.moe.router.weight[4] = 1e-3
    graph = trace(model, batches()[0])
    found = {g.name: g for g in graph.groups}
    assert {f"moe.experts.{i}.up" for i in range(5)} <= found.keys()
    stream = {m.path for m in found["embed"].members}
    assert {f"moe.experts.{i}.{n}" for i in range(5) for n in ("up", "down")} <= stream


def test_a_narrower_stream_runs_wherever_the_router_sends_a_token_later() -> None:
    model = net(partial(Sparse, top_k=1))
    with torch.no_grad():
        model.moe.router.weight[:4] = 0.0
    otp.prune_(model, otp.Policy(rules=otp.Hidden(keep=6)), batches(), timing=0)
    nn.init.normal_(model.moe.router.weight)
    assert model(batches()[0]).shape == (16, 3)


# --- the cut is the masked model -------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_cut_model_is_the_dense_one_with_logits_of_minus_infinity(kind: str) -> None:
    model = net(KINDS[kind])
    (cut,) = planned(model, otp.Experts(keep=3, criterion="random")).cuts
    small = copied(model)
    cut_(small, [cut])
    gone = sorted(set(range(5)) - set(cut.keep))
    hook = model.moe.router.register_forward_hook(Never(gone))
    expected = model(batches()[1])
    hook.remove()
    assert gone
    torch.testing.assert_close(small(batches()[1]), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("criterion", RANKING)
@pytest.mark.parametrize("kind", ["sparse", "fused"])
def test_every_criterion_that_ranks_experts_plans_an_exact_cut(kind: str, criterion: str) -> None:
    model = net(KINDS[kind])
    found = planned(model, otp.Experts(keep=3, criterion=criterion))
    assert [len(cut.keep) for cut in found.cuts] == [3]
    assert disagreement(model, found.cuts, batches()[1]) < EXACT


def test_groups_of_experts_go_whole_and_their_own_bias_is_no_way_back() -> None:
    model = net(Grouped)
    (cut,) = planned(model, otp.Experts(keep=2, criterion="random")).cuts
    assert (cut.units, len(cut.keep)) == (3, 2)
    assert disagreement(model, [cut], batches()[1]) < EXACT
    otp.prune_(model, otp.Policy(rules=otp.Experts(keep=2)), batches(), timing=0)
    assert (model.moe.num_experts, model.moe.num_group, len(model.moe.bias)) == (4, 2, 4)


@pytest.mark.parametrize("kind", ["sparse", "soft", "fused"])
def test_the_wrong_expert_in_the_right_place_is_noticed(kind: str) -> None:
    model = net(KINDS[kind])
    (cut,) = planned(model, otp.Experts(keep=3, criterion="random")).cuts
    other = (0, 1, 2) if cut.keep != (0, 1, 2) else (1, 2, 3)
    slices = [s.model_copy(update={"keep": other}) if s.side == "expert" else s for s in cut.slices]
    wrong = cut.model_copy(update={"slices": tuple(slices)})
    assert compared(model, [wrong], batches()[1])[0] > 1e-3


def test_it_is_noticed_too_where_the_example_never_reaches_that_expert() -> None:
    model = net(partial(Sparse, top_k=1))
    with torch.no_grad():  # all tokens go to the last expert
        model.moe.router.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.norm.weight.fill_(0.1)
        model.moe.router.weight[4] = 1.0
    graph = trace(model, batches()[0])
    (group,) = [g for g in graph.groups if g.kind == "experts"]
    pieces = {
        m.path: {"path": m.path, "side": m.side, "size": 5, "keep": keep}
        for m, keep in zip(group.members, [(0, 2, 4), (1, 2, 4)], strict=True)
    }
    cut = {"group": group.name, "rule": 0, "units": 5, "keep": (0, 2, 4), "criterion": "random"}
    from torch_otprune.plan.model import Cut

    wrong = Cut(**cut, reason="", error=0, slices=tuple(pieces.values()))
    far, said = compared(model, [wrong], batches()[0])
    assert far > 1e-3
    assert "logits that reach every expert" in said


# --- what a plan does ------------------------------------------------------------------------


def test_lists_are_numbered_anew_and_counts_follow() -> None:
    model = net()
    otp.prune_(model, otp.Policy(rules=otp.Experts(keep=3)), batches(), timing=0)
    assert type(model.moe.experts) is nn.ModuleList
    assert [name for name, _ in model.moe.experts.named_children()] == ["0", "1", "2"]
    assert (model.moe.num_experts, model.moe.top_k) == (3, 2)
    assert model.moe.router.out_features == 3


def test_named_experts_are_numbered_anew_too() -> None:
    model = net(Named)
    otp.prune_(model, otp.Policy(rules=otp.Experts(keep=3)), batches(), timing=0)
    assert [*model.moe.experts] == ["expert_0", "expert_1", "expert_2"]
    assert model(batches()[0]).shape == (16, 3)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_undo_restores_bit_for_bit(kind: str) -> None:
    model = net(KINDS[kind])
    before, values = str(model), copy.deepcopy(model.state_dict())
    report = otp.prune_(model, otp.Policy(rules=otp.Experts(keep=3)), batches(), timing=0)
    assert str(model) != before or kind == "fused"
    report.undo_()
    assert str(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = net()
    otp.prune_(model, otp.Policy(rules=otp.Experts(keep=3)), batches(), timing=0)
    otp.save(model, tmp_path / "pruned")
    again = otp.load(tmp_path / "pruned", factory=net)
    assert torch.equal(again(batches()[0]), model(batches()[0]))


@pytest.mark.parametrize("kind", ["sparse", "fused"])
def test_one_budget_trades_experts_with_channels_and_the_stream(kind: str) -> None:
    model = net(KINDS[kind])
    rules = [otp.Experts(), otp.Channels(), otp.Hidden()]
    policy = otp.Policy(rules=rules, budget=otp.Budget(params="55%"))
    report = otp.prune_(model, policy, batches(), timing=0)
    left = sum(p.numel() for p in model.parameters())
    assert left == report.plan.params.after <= 0.55 * report.plan.params.before


def test_experts_and_what_they_read_are_checked_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, WIDTH), Sparse(), nn.Linear(WIDTH, 3)).double()
    rules = [otp.Experts(keep=3), otp.Channels(keep=6)]
    cuts = planned(model, *rules).cuts
    assert {cut.group for cut in cuts} == {"0", "1.experts"}
    assert disagreement(model, cuts, batches()[1]) < EXACT


@pytest.mark.parametrize("kind", ["sparse", "soft", "fused"])
def test_hidden_units_of_experts_are_channels(kind: str) -> None:
    model = net(KINDS[kind])
    found = planned(model, otp.Channels(targets="moe", keep=0.5, repair="none"))
    assert {cut.group.split(".")[0] for cut in found.cuts} == {"moe"}
    assert disagreement(model, found.cuts, batches()[1]) < EXACT


def test_an_expert_that_is_never_chosen_goes_first() -> None:
    for criterion in ("transport", "obs", "activation"):
        model = net(partial(Sparse, top_k=1))
        with torch.no_grad():
            model.norm.bias.fill_(5.0)
            weight = model.moe.router.weight
            weight -= weight.mean(1, keepdim=True)  # blind to the bias
            weight[3] = -5.0
        (cut,) = planned(model, otp.Experts(keep=4, criterion=criterion)).cuts
        assert cut.keep == (0, 1, 2, 4)


def test_what_is_recorded_is_what_the_mixture_loses_without_an_expert() -> None:
    model, ids = net(), batches()[0]
    (group,) = [g for g in trace(model, ids).groups if g.kind == "experts"]
    recorder = Recorder(model, (), samples=16, rows_per_column=1, seed=0)
    watch_experts(model, [group], recorder)
    model(ids)
    recorder.remove()
    x = model.norm(model.embed(ids))
    lost = []
    for expert in range(5):
        hook = model.moe.router.register_forward_hook(Never([expert]))
        without = model.moe(x)
        hook.remove()
        lost.append((model.moe(x) - without).flatten(0, 1))
    changes = torch.stack(lost, 1)
    expected = torch.einsum("ned,nfd->ef", changes, changes) / len(changes)
    torch.testing.assert_close(recorder.moments[group.name].second(centred=False), expected)


# --- refusals --------------------------------------------------------------------------------


def test_fewer_experts_than_the_router_chooses_are_refused() -> None:
    with pytest.raises(
        StructureError, match=r"keep is 2 of the 5 experts of 'moe.experts', whose router chooses 3"
    ):
        planned(net(partial(Sparse, top_k=3)), otp.Experts(keep=2))


def test_a_share_keeps_as_many_as_the_router_chooses() -> None:
    (cut,) = planned(net(), otp.Experts(keep=0.2)).cuts
    assert len(cut.keep) == 2


def test_a_router_that_chooses_all_is_refused() -> None:
    with pytest.raises(StructureError, match=r"the router chooses all 5 of them"):
        planned(net(partial(Sparse, top_k=5)), otp.Experts(keep=0.5))


@pytest.mark.parametrize("criterion", ["taylor", "bn_scale", "cpot"])
def test_criteria_of_channels_are_refused(criterion: str) -> None:
    with pytest.raises(PolicyError, match="ranks channels, not experts") as error:
        otp.Experts(criterion=criterion)
    assert "choose transport, obs" in str(error.value)


def test_experts_of_different_shapes_are_refused() -> None:
    model = net()
    model.moe.experts[2] = Expert(4).double()
    with pytest.raises(StructureError, match=r"experts of 'moe.experts' have other shapes"):
        planned(model, otp.Experts(keep=3))


def test_logits_that_are_returned_are_refused() -> None:
    class Told(Net):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids), self.moe.router(self.norm(self.embed(ids)))

    torch.manual_seed(0)
    with pytest.raises(StructureError, match=r"the router's logits reach the model's output"):
        planned(Told(Sparse()).double().eval(), otp.Experts(keep=3))


def test_a_network_without_experts_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(-1))
    with pytest.raises(StructureError, match=r"no router with experts beside it among the targets"):
        otp.prune_(model, otp.Policy(rules=otp.Experts(keep=0.5)), [torch.randn(16, 4)])


def test_a_list_beside_a_softmax_that_holds_no_experts_is_no_mixture_after_the_trial() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.gate, self.head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            first = self.gate(x).softmax(-1)[:, :1]
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.head(x * first)

    torch.manual_seed(0)
    model = Chain().double().eval()
    with pytest.raises(StructureError, match=r"cut and masked outputs differ|returns tensors"):
        otp.prune_(model, otp.Policy(rules=otp.Experts(keep=2)), [torch.randn(32, WIDTH).double()])


def test_channels_name_the_rule_for_experts_and_leave_single_ones_alone_beside_it() -> None:
    told = {r.group: r for r in planned(net(), otp.Channels(keep=0.5)).refused}
    assert told["moe.experts"].fix == "cut them by a rule otp.Experts."
    both = planned(net(), otp.Channels(keep=0.5), otp.Experts(keep=3))
    told = {r.group: r for r in both.refused}
    assert "may go whole" in told["moe.experts.0.up"].reason
    assert {cut.group for cut in both.cuts} == {"a", "moe.experts"}


def test_the_width_of_an_expert_that_saw_no_data_is_refused() -> None:
    model = net(partial(Sparse, top_k=1))
    with torch.no_grad():
        model.norm.bias.fill_(5.0)
        model.moe.router.weight[3] = -5.0
    told = {r.group: r for r in planned(model, otp.Channels(keep=0.5)).refused}
    assert told["moe.experts.3.up"].reason == "no calibration data was sent to this expert"


def test_the_rule_is_spelled_in_yaml() -> None:
    policy = otp.Policy.from_yaml("rules: [{kind: experts, keep: 0.5, min_keep: 2}]")
    assert policy.rules[0] == otp.Experts(keep=0.5, min_keep=2)
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy


# --- runs with other logits ------------------------------------------------------------------


def test_visits_reach_every_expert_and_leave_the_model_alone() -> None:
    model, ids = net(partial(Sparse, count=9, top_k=1)), batches()[0][:1, :2]
    reached: set[int] = set()
    hooks = [
        e.register_forward_hook(lambda m, a, o, i=i: reached.add(i))
        for i, e in enumerate(model.moe.experts)
    ]
    weight = model.moe.router.weight
    runs = Visits([Route(weight, tuple(range(9)), 9)]).runs(lambda: model(ids).detach())
    for hook in hooks:
        hook.remove()
    assert reached == set(range(9))
    assert len(runs) == 5
    assert not weight.grad_fn


def test_drawn_logits_are_the_same_for_the_dense_and_the_cut_router() -> None:
    dense = nn.Linear(4, 5)
    small = nn.Linear(4, 3)
    x, keep = torch.randn(6, 4), (0, 2, 4)
    with torch.no_grad():
        with Routing([Route(dense.weight, keep, 5)], drawn=True):
            all_of_them = dense(x)
        with Routing([Route(small.weight, keep, 5, cut=True)], drawn=True):
            kept = small(x)
    assert torch.equal(all_of_them[:, keep], kept)
    assert bool((all_of_them[:, [1, 3]] == float("-inf")).all())


# --- Transformers ----------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "experts_implementation": "eager",  # the grouped kernel knows no float64
}
OWN: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5},
    "Qwen2Moe": {
        "num_experts": 5,
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 14,
    },
}


def language_model(kind: str, **other: Any) -> nn.Module:
    """Build one with random weights, alive, in float64."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(**SHAPE | OWN[kind] | other)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def tokens(count: int = 2) -> list[dict[str, Tensor]]:
    """Draw batches of token ids."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(0, 40, (4, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": ids} for ids in drawn]


class Gate:
    """A router of Transformers, written out, that never chooses some experts."""

    def __init__(self, gate: Any, gone: list[int]) -> None:
        self.gate, self.gone = gate, gone

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.gate.weight)
        logits = logits.index_fill(-1, torch.tensor(self.gone), float("-inf"))
        scores, index = logits.float().softmax(-1).topk(self.gate.top_k, -1)
        if getattr(self.gate, "norm_topk_prob", True):
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores, index


@pytest.mark.parametrize("kind", sorted(OWN))
def test_a_language_model_with_fewer_experts_is_the_masked_one(kind: str) -> None:
    model, data = language_model(kind), tokens()
    with otp.attach(model, otp.Policy(rules=otp.Experts(keep=3))) as attached:
        plan = otp.observe(attached, data).plan()
    small = copied(model)
    cut_(small, plan.cuts)
    layers = model.get_submodule("model.layers")
    for cut, layer in zip(plan.cuts, layers, strict=True):
        layer.mlp.gate.forward = Gate(layer.mlp.gate, sorted(set(range(5)) - set(cut.keep)))
    with torch.no_grad():
        expected, got = model(**data[1]).logits, small(**data[1]).logits
    scale = float(expected.abs().max())
    assert float((expected - got).abs().max()) < 1e-6 * scale  # the router's own float32
    assert disagreement(language_model(kind), plan.cuts, data[1]) < EXACT


def test_the_grouped_kernel_of_transformers_is_followed() -> None:
    config = {"experts_implementation": "grouped_mm"}
    model = language_model("Mixtral", **config).float()
    rules = [otp.Experts(keep=3), otp.Channels(keep=8)]  # the kernel wants multiples of four
    otp.prune_(model, otp.Policy(rules=rules), tokens(), timing=0)
    assert model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.shape == (3, 16, 16)


def test_a_width_that_the_grouped_kernel_refuses_is_explained() -> None:
    model = language_model("Mixtral", experts_implementation="grouped_mm").float()
    policy = otp.Policy(rules=[otp.Channels(targets="MixtralExperts", keep=7)])
    with pytest.raises(StructureError) as error:
        otp.prune_(model, policy, tokens(), timing=0)
    assert error.value.fix == "give the rule a multiple_of: 4 in float32, 8 in a type of 16 bits."


@pytest.mark.parametrize("kind", sorted(OWN))
def test_one_budget_trades_experts_heads_and_channels_of_a_language_model(kind: str) -> None:
    model = language_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = [otp.Experts(), otp.Heads(), otp.Channels()]
    policy = otp.Policy(rules=rules, budget=otp.Budget(params="60%"))
    report = otp.prune_(model, policy, tokens(), timing=0)
    left = sum(p.numel() for p in model.parameters())
    assert left == report.plan.params.after <= 0.6 * report.plan.params.before
    for layer in model.get_submodule("model.layers"):
        kept = layer.mlp.gate.weight.shape[0]
        assert layer.mlp.experts.num_experts == layer.mlp.gate.num_experts == kept >= 2
        assert layer.mlp.experts.gate_up_proj.shape[0] == kept
    report.undo_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Listed(nn.Module):
    """As many layers in a list as there are classes behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x).softmax(-1)


def test_a_classifier_of_as_many_classes_as_there_are_layers_is_no_router() -> None:
    graph = trace(Listed(), torch.randn(4, WIDTH))
    assert not any(one.kind == "experts" for one in (*graph.groups, *graph.blocked))
    rule = otp.Channels(keep="50%", repair="least_squares")
    report = otp.prune_(
        Listed().eval(), otp.Policy(rules=[rule]), [torch.randn(64, WIDTH)], timing=0
    )
    assert any(note.accepted for note in report.repairs)
