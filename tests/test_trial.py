"""The trial of a plan: what memory it takes, in parts where that is too much, and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torch_otprune as otp
from tests.cases import CASES, Case, cut, random_cuts
from tests.zoo.net import Net, conv
from tests.zoo.oracle import case_of
from tests.zoo.registry import ENTRIES
from torch_otprune.plan import Cut, Drop, Slice
from torch_otprune.plan.model import Trial
from torch_otprune.structure import trace
from torch_otprune.structure.graph import Swap
from torch_otprune.surgery import compared, copied, cut_, disagreement, parts
from torch_otprune.surgery.trial import need

TINY = 1e-9  # GiB: no group fits, so that each is tried alone


def peak(work: Callable[[], object]) -> int:
    """Measure what some work takes at its worst, in bytes, whatever was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    sizes = [
        e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"
    ]
    held = torch.tensor(sizes).cumsum(0)
    return int(held.max())


def wide() -> nn.Sequential:
    """Weights of some size, so that activations hardly count."""
    layers = [nn.Linear(256, 256) for _ in range(6)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).double()


X = torch.randn(2, 256, dtype=torch.float64)


def planned(model: nn.Module, example: Any, memory: float, *rules: Any) -> otp.Plan:
    policy = otp.Policy(rules=rules, calibration=otp.Calibration(memory=memory))
    with otp.attach(model, policy, example=example) as attached:
        return attached.plan()


# --- memory ----------------------------------------------------------------------------------


def test_the_trial_takes_no_more_than_was_quoted_beforehand_and_not_half_of_it_less() -> None:
    model, graph = wide(), None
    graph = trace(model, X)
    cuts = [cut(graph, g.name, torch.arange(0, g.units, 2)) for g in graph.groups]
    quoted = need(model, cuts)
    taken = peak(lambda: disagreement(model, cuts, X))
    assert taken <= quoted + 40 * X.nbytes  # activations come on top
    assert taken >= quoted / 2


def test_what_is_not_cut_is_not_copied() -> None:
    model = wide()
    graph = trace(model, X)
    [first, *_] = graph.groups
    one = [cut(graph, first.name, torch.arange(0, first.units, 2))]
    whole = sum(p.nbytes for p in model.parameters())
    assert need(model, one) < whole / 2
    assert peak(lambda: disagreement(model, one, X)) < whole / 2


@pytest.mark.parametrize("name", CASES)
def test_a_copy_that_shares_leaves_the_model_as_it_was_and_is_cut_alike(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cuts = random_cuts(trace(model, batch))
    plain, sharing = copied(model), copied(model, shared=True)
    for small in (plain, sharing):
        cut_(small, cuts)
    for key, value in sharing.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_buffers_and_recurrent_weights_are_not_shared() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "layer": nn.GRU(3, 4)})
    twin = copied(model, shared=True)
    assert twin["norm"].weight is model["norm"].weight
    assert twin["norm"].running_mean is not model["norm"].running_mean
    assert twin["layer"].weight_hh_l0 is not model["layer"].weight_hh_l0
    assert torch.equal(twin["layer"].weight_hh_l0, model["layer"].weight_hh_l0)
    own = sum(t.nbytes for t in (*model["norm"].buffers(), *model["layer"].parameters()))
    assert need(model, []) == own


# --- in parts --------------------------------------------------------------------------------


def test_parts_hold_every_decision_once_and_none_more_than_the_limit() -> None:
    model = wide()
    graph = trace(model, X)
    cuts = [cut(graph, g.name, torch.arange(0, g.units, 2)) for g in graph.groups]
    drop = Drop(
        block="1", rule=0, criterion="", replace="", reason="", error=0, swaps=(Swap("1", "skip"),)
    )
    limit = 2 * need(model, cuts[:1])
    found = parts(model, cuts, [drop], limit=limit)
    assert [c for part in found for c in part.cuts] == cuts
    assert 1 < len(found) < len(cuts)
    assert all(part.bytes <= limit for part in found)
    assert [part.drops for part in found] == [(drop,), *[()] * (len(found) - 1)]
    assert len(parts(model, cuts, [drop], limit=need(model, cuts))) == 1
    assert len(parts(model, cuts, [], limit=0)) == len(cuts)
    assert len(parts(model, [], [drop], limit=0)) == 1


NETS = (
    "dense_concat",
    "channels_last_linear",
    "flatten_pooled",
    "shift_of_channels",
    "write_through_a_view",
    "bert",
    "llama-grouped",
)
ENTANGLED = ("dense_concat",)  # a group alone takes more than all do
REFUSED = {"shift_of_channels": "differ by", "write_through_a_view": "does not run"}


@pytest.mark.parametrize("name", NETS)
def test_group_by_group_the_verdicts_are_the_same(name: str) -> None:
    case, rules = case_of(ENTRIES[name]), [otp.Channels(keep=0.5, criterion="random", repair=())]
    if any(group.kind == "heads" for group in case.graph.groups):
        rules.append(otp.Heads(keep=0.5, criterion="random", repair=()))

    def verdict(memory: float) -> Any:
        try:
            return planned(case.model, case.example, memory, *rules)
        except otp.OTPruneError as error:
            return str(error)

    whole, apart = verdict(4.0), verdict(TINY)
    if name in REFUSED:
        assert apart == whole
        assert REFUSED[name] in whole
        return
    assert whole.cuts == apart.cuts
    assert whole.refused == apart.refused
    assert whole.trial.parts == 1
    assert apart.trial.parts == (1 if name in ENTANGLED else len(apart.cuts))
    assert apart.trial.bytes < whole.trial.bytes or name in ENTANGLED


def test_group_by_group_less_memory_is_really_taken() -> None:
    model = wide()
    rule = otp.Channels(keep=0.5, criterion="random", repair=())
    whole, apart = (planned(model, X, memory, rule).trial for memory in (4.0, TINY))
    assert whole is not None and apart is not None
    used = [peak(lambda m=m: planned(model, X, m, rule)) for m in (4.0, TINY)]  # type: ignore[misc]
    assert used[1] < used[0] / 2
    assert used[0] - used[1] > (whole.bytes - apart.bytes) / 2


def test_a_plan_says_what_its_trial_took() -> None:
    whole = planned(wide(), X, 4.0, otp.Channels(keep=0.5, criterion="random", repair=()))
    assert f"tried on the model: {whole.trial.bytes / 2**20:.1f} MiB beside it" in str(whole)
    apart = planned(wide(), X, TINY, otp.Channels(keep=0.5, criterion="random", repair=()))
    assert "tried on the model in 5 parts, as Calibration.memory asks: " in str(apart)
    assert "groups of different parts were not tried together" in str(apart)
    assert otp.Plan.from_json(apart.to_json()) == apart
    assert str(Trial(parts=1, bytes=12)) == "tried on the model: 12 bytes beside it"


def test_a_plan_that_was_not_tried_quotes_nothing() -> None:
    policy = otp.Policy(rules=otp.Channels(keep=0.5, criterion="random", repair=()), verify="off")
    with otp.attach(wide(), policy, example=X) as attached:
        plan = attached.plan()
    assert plan.trial is None
    assert "tried on the model" not in str(plan)


# --- what a refusal names --------------------------------------------------------------------


class Numbered(nn.Module):
    """A row of numbers between two layers, in a module of its own."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.between = Net(lambda m, y: use(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.relu(self.a(x))))


def _shifted(y: Tensor) -> Tensor:
    return y * torch.linspace(1, 2, y.shape[1], dtype=y.dtype)


def _picked(y: Tensor) -> Tensor:
    return torch.cat([y[:, :4].relu(), 1 - y[:, 4:]], 1)


def _centred(y: Tensor) -> Tensor:
    return y - y.mean(1, keepdim=True)


WRONG = {
    "shifted": (_shifted, r"torch\.linspace"),
    "picked": (_picked, r"torch\.Tensor\.__getitem__"),
    "centred": (_centred, r"torch\.Tensor\.mean"),
}


def _found(model: nn.Module, group: str, keep: list[int], example: Any) -> tuple[float, str]:
    """Try a cut of a layer and its reader that no analysis has allowed."""
    out, read = group, "b"
    size = model.get_submodule(out).weight.shape[0]
    slices = (
        Slice(path=out, side="out", size=size, keep=tuple(keep)),
        Slice(path=read, side="in", size=size, keep=tuple(keep)),
    )
    given = {"rule": 0, "criterion": "random", "reason": "", "error": 0}
    one = Cut(group=group, units=size, keep=tuple(keep), slices=slices, **given)
    return compared(model, [one], example)


@pytest.mark.parametrize("name", WRONG)
def test_a_group_that_disagrees_is_told_with_the_op_the_module_the_line_and_the_numbers(
    name: str,
) -> None:
    use, op = WRONG[name]
    model = Case(lambda: Numbered(use), (6,)).model()
    far, said = _found(model, "a", [0, 2, 5, 7], torch.randn(4, 6, dtype=torch.float64))
    line = use.__code__.co_firstlineno + 1
    assert far > 1e-3
    start = r"cut and masked outputs differ by \d\.\de[-+]\d\d of the largest output, "
    where = rf"first by \d\.\de[-+]\d\d at {op} in 'between' \(at test_trial.py:{line}\)"
    assert re.fullmatch(start + where, said), said


def test_a_wrong_slice_is_told_with_the_layer_that_reads_it() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    graph = trace(model, batch)
    one, two = (cut(graph, "0", torch.tensor(k)) for k in ([0, 1, 2], [3, 4, 5]))
    crossed = one.model_copy(update={"slices": (*two.slices[:1], *one.slices[1:])})
    far, said = compared(model, [crossed], batch)
    assert far > 1e-3
    assert "first by " in said and said.endswith("at F.batch_norm in '1'"), said


def test_ops_that_agree_are_passed_over_though_they_write_in_place_and_norm_what_is_left() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.a(x))
        y = F.relu(y, inplace=True)
        y = y + m.c(y).mul_(2)
        y[:, :4] = y[:, :4].sigmoid()
        return m.b(y)

    parts_ = {"a": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "c": nn.Linear(8, 8)}
    model = Case(lambda: Net(forward, **parts_, b=nn.Linear(8, 3)), (6,)).model()
    keep = (0, 2, 5, 7)
    sides = [("a", "out"), ("norm", "through"), ("c", "in"), ("c", "out"), ("b", "in")]
    slices = tuple(Slice(path=p, side=s, size=8, keep=keep) for p, s in sides)
    given = {"rule": 0, "criterion": "random", "reason": "", "error": 0}
    one = Cut(group="a", units=8, keep=keep, slices=slices, **given)
    far, said = compared(model, [one], torch.randn(4, 6, dtype=torch.float64))
    assert far > 1e-3
    line = forward.__code__.co_firstlineno + 4
    assert f"in the model's own forward (at test_trial.py:{line})" in said, said


def test_a_shape_that_changes_is_told_with_both_shapes() -> None:
    model = nn.Sequential(nn.Linear(3, 4)).double()
    keep = Slice(path="0", side="out", size=4, keep=(0, 1))
    given = {"rule": 0, "criterion": "random", "reason": "", "error": 0}
    one = Cut(group="0", units=4, keep=(0, 1), slices=(keep,), **given)
    far, said = compared(model, [one], torch.randn(2, 3, dtype=torch.float64))
    assert far == float("inf")
    assert said.endswith("tensors of other shapes, such as (2, 2) instead of (2, 4)")


def test_a_model_without_a_line_of_its_own_is_told_with_the_module_that_fails() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch()
    [first, *_] = random_cuts(trace(model, batch))
    lame = first.model_copy(update={"slices": first.slices[:-1]})
    far, said = compared(model, [lame], batch)
    assert far == float("inf")
    assert said.startswith("without it the model does not run: ")
    assert said.rpartition(", in ")[2].strip("'") in dict(model.named_modules())


@pytest.mark.parametrize("memory", [4.0, TINY])
def test_a_plan_refuses_with_the_op_and_keeps_what_is_right(memory: float) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.b(F.relu(m.a(x))))
        return m.head(torch.cat([y[:, :4].relu(), 1 - y[:, 4:]], 1).mean((2, 3)))

    model = Case(
        lambda: Net(forward, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5)), (3, 6, 6)
    ).model()
    batch = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plan = planned(model, batch, memory, otp.Channels(keep=0.5, criterion="random", repair=()))
    (refused,) = (r for r in plan.refused if r.group == "b")
    assert plan.keep() == {"a": 4}
    assert "differ by " in refused.reason
    assert "in the model's own forward (at test_trial.py:" in refused.reason
    assert "read that number off x.shape" in refused.fix


# --- what the example does not reach ---------------------------------------------------------


class Gated(nn.Module):
    """Tokens above a threshold go to a second branch; no router that could be told what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.rare, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        y = y + self.b(torch.relu(y))
        if x.max() > 100:
            y = y + self.rare(y)
        return self.head(self.norm(y))


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_layers_that_the_first_samples_do_not_reach_are_named(far: float) -> None:
    model = Case(Gated, (6,)).model()
    batch = torch.randn(4, 6, dtype=torch.float64)
    batch[0, 0] += far
    rule = otp.Hidden(keep=0.5, criterion="random", repair=())
    plan = planned(model, batch, 4.0, rule)
    said = [note for note in plan.notes if "do not reach" in note]
    if far:
        assert not said
        assert any(piece.path == "rare" for cut_ in plan.cuts for piece in cut_.slices)
        return
    assert said == [
        "the first samples do not reach 'rare': the plan holds for the way that they take, and "
        "data that go another way may not fit the smaller model; put samples that reach them "
        "first, or pass them as example="
    ]
    cut_(model, plan.cuts)
    with pytest.raises(RuntimeError):  # as was said
        model(batch + 1000)


def test_an_expert_that_the_first_samples_do_not_reach_is_cut_with_the_others() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, out = m.a(x), 0
        for number, expert in enumerate(m.experts):
            rows = torch.where((y[:, 0] > 1000).long() == number)[0]
            out = out + torch.zeros_like(y).index_add(0, rows, expert(y[rows]))
        return m.head(out)

    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)) for _ in range(2)
    )
    parts_ = {"a": nn.Linear(6, 8), "experts": experts, "head": nn.Linear(8, 3)}
    model = Case(lambda: Net(forward, **parts_), (6,)).model()
    batch = torch.randn(4, 6, dtype=torch.float64)
    plan = planned(model, batch, 4.0, otp.Channels(keep=0.5, criterion="random", repair=()))
    assert {"experts.0.0", "experts.1.0"} <= plan.keep().keys(), plan
    with torch.no_grad():
        model.a.bias[0] += 2000  # now all tokens go to the other one
    assert disagreement(model, plan.cuts, batch) < 1e-12
