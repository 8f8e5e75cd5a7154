"""Consumers that are no modules: what they read is observed, and priced exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from tests.zoo.net import Net
from torch_otprune.criteria import OBS, Transport
from torch_otprune.criteria.transport import ground_cost
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics import Moments, Recorder, gather, sense
from torch_otprune.statistics.evidence import Evidence
from torch_otprune.statistics.loose import agreed, filed, loose, others, slots, watch_products
from torch_otprune.statistics.products import Product, Products
from torch_otprune.structure import Graph, batch_size, run, trace

SAMPLES = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Own(nn.Module):
    """A layer whose second matrix is a parameter, multiplied in a way of the test's choice."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply, self.up = multiply, nn.Linear(5, 7)
        self.down = nn.Parameter(drawn(7, 4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.up(x).tanh(), self.down)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w.T),
    "einsum": lambda x, w: torch.einsum("...i,io->...o", x, w),
    "bmm": lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)),
    "from the left": lambda x, w: (w.T @ x.mT).mT,
    "a copy": lambda x, w: x @ w.T.clone().T.contiguous(),
    "in float32": lambda x, w: (x.float() @ w.float()).double(),
    "vector by vector": lambda x, w: torch.stack([w.T @ row for row in x.flatten(0, 1)]),
    "a convolution": lambda x, w: F.conv1d(x.mT, w.T[..., None]).mT,
    "a transposed convolution": lambda x, w: F.conv_transpose1d(x.mT, w[..., None]).mT,
    "column by column": lambda x, w: torch.cat([x @ part for part in w.chunk(2, 1)], -1),
}


class Table(nn.Module):
    """Three experts in one tensor; each token goes to all, to one, or to a stretch of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.up = way, nn.Linear(5, 7)
        self.down = nn.Parameter(drawn(3, 7, 4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        if self.way == "all":
            return torch.einsum("bti,eio->bteo", h, self.down).sum(2)
        number = torch.arange(h.shape[1]) % 3
        if self.way == "picked":
            flat, chosen = h.flatten(0, 1), number.repeat(len(h))
            return torch.bmm(flat[:, None], self.down[chosen])[:, 0].view(*h.shape[:2], 4)
        out = h.new_zeros(*h.shape[:2], 4)
        for expert in range(3):
            out[:, number == expert] = h[:, number == expert] @ self.down[expert]
        return out


def seen(model: nn.Module, batch: Any) -> tuple[Graph, Recorder]:
    """Analyse a model and observe all that it reads."""
    graph = trace(model, batch)
    paths = loose(model, graph, graph.full())
    recorder = Recorder(model, (), samples=1, rows_per_column=1000, seed=0)
    watch_products(model, slots(model, paths, batch), recorder)
    recorder.look(batch_size(batch), batch_size(batch))
    with torch.no_grad():
        run(model, batch)
    recorder.remove()
    return graph, recorder


def evidence(model: nn.Module, batch: Any, name: str) -> tuple[Evidence, Recorder]:
    """Gather what is known about one group."""
    graph, recorder = seen(model, batch)
    moments = recorder.moments
    group = graph.group(name)
    found = gather(model, graph, group, moments=moments, sensitivity=None, seed=0)
    return found, recorder


def changed(model: nn.Module, batch: Any, unit: int, silent: Callable[[Tensor], Tensor]) -> float:
    """Measure what the output of the net changes by when its consumer misses a unit."""
    with torch.no_grad():
        before = run(model, batch)
        kept = model.down.detach().clone()
        model.down.copy_(silent(kept))
        after = run(model, batch)
        model.down.copy_(kept)
    return float((before - after).square().sum())


def without(unit: int, axis: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w.index_fill(axis, torch.tensor([unit]), 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_unit_costs_what_the_consumer_s_output_changes_by(way: str) -> None:
    model, x = Own(WAYS[way]).double().eval(), drawn(SAMPLES, 3, 5)
    found, recorder = evidence(model, x, "up")
    rows = max(m.count for m in recorder.moments.values())
    _, null = ground_cost(found)
    exact = [changed(model, x, unit, without(unit, 0)) for unit in range(7)]
    tolerance = 1e-4 if way == "in float32" else 1e-7  # costs are rounded to nine digits
    torch.testing.assert_close(
        null * rows, torch.tensor(exact, dtype=torch.float64), rtol=tolerance, atol=1e-6
    )


@pytest.mark.parametrize("way", ["picked", "routed"])
def test_every_expert_is_priced_by_the_tokens_it_is_sent(way: str) -> None:
    model, x = Table(way).double().eval(), drawn(SAMPLES, 4, 5)
    found, recorder = evidence(model, x, "up")
    assert len(found.consumers) == 3
    rows = max(m.count for m in recorder.moments.values())
    _, null = ground_cost(found)
    exact = [changed(model, x, unit, without(unit, 1)) for unit in range(7)]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(null * rows, expected, rtol=1e-7, atol=1e-6)


def test_experts_that_read_the_same_are_one_consumer() -> None:
    found, recorder = evidence(Table("all").double().eval(), drawn(SAMPLES, 4, 5), "up")
    (consumer,) = found.consumers
    assert consumer.weight.shape == (12, 7, 1)
    assert {m.count for m in recorder.moments.values()} == {SAMPLES * 4}


def recurrent(kind: type[nn.RNNBase], **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.head(m.r(x)[0]), r=kind(3, 5, **settings), head=nn.Linear(5, 2))
    return net.double().eval()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_are_read_one_step_late(kind: type[nn.RNNBase], first: bool) -> None:
    model, x = recurrent(kind, batch_first=first, num_layers=2), drawn(4, 6, 3)
    _, recorder = seen(model, x)
    with torch.no_grad():
        out, _ = model.r(x)
        steps = out if first else out.transpose(0, 1)
    late = torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], 1).flatten(0, 1)
    found = recorder.moments["r.weight_hh_l1@0/1"]
    assert found.count == len(late)
    torch.testing.assert_close(found.product, late.T @ late)
    torch.testing.assert_close(found.total, late.sum(0))


def test_the_input_of_every_layer_of_a_recurrent_net_is_observed() -> None:
    model, x = recurrent(nn.LSTM, num_layers=2, batch_first=True), drawn(4, 6, 3)
    lower = nn.LSTM(3, 5, batch_first=True).double()
    lower.load_state_dict({k: v for k, v in model.r.state_dict().items() if k.endswith("l0")})
    _, recorder = seen(model, x)
    with torch.no_grad():
        inner = lower(x)[0].flatten(0, 1)
    torch.testing.assert_close(recorder.moments["r.weight_ih_l1@0/1"].product, inner.T @ inner)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_does_not_matter_how_gradients_are_switched(mode: Callable[[], Any]) -> None:
    model, x = recurrent(nn.GRU, batch_first=True), drawn(4, 6, 3)
    graph = trace(model, x)
    paths = loose(model, graph, graph.full())
    recorder = Recorder(model, (), samples=4, rows_per_column=100, seed=0)
    watch_products(model, slots(model, paths, x), recorder)
    recorder.look(4, 4)
    with mode():
        watched = model(x)
    recorder.remove()
    torch.testing.assert_close(watched, model(x))
    assert recorder.moments["r.weight_hh_l0@0/1"].count == 24


def attention(same: bool) -> nn.Module:
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.embed(x)
        return m.a(y, y if same else m.other(x), y, need_weights=False)[0]

    embed, other = nn.Linear(3, 8), nn.Linear(3, 8)
    inner = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(forward, embed=embed, other=other, a=inner).double().eval()


def test_an_attention_s_projections_read_what_they_are_given() -> None:
    model, x = attention(same=True), drawn(4, 5, 3)
    _, recorder = seen(model, x)
    y = model.embed(x).detach().flatten(0, 1)
    assert set(recorder.moments) == {"a.in_proj_weight@0/1", "a.out_proj.weight@0/1"}
    torch.testing.assert_close(recorder.moments["a.in_proj_weight@0/1"].product, y.T @ y)
    mixed = recorder.moments["a.out_proj.weight@0/1"]
    w, bias = model.a.out_proj.weight.detach(), model.a.out_proj.bias.detach()
    out = model(x).detach().flatten(0, 1) - bias
    torch.testing.assert_close(w @ mixed.product @ w.T, out.T @ out)


def test_queries_keys_and_values_are_told_apart_where_they_read_other_things() -> None:
    model, x = attention(same=False), drawn(4, 5, 3)
    _, recorder = seen(model, x)
    told = [recorder.moments[f"a.in_proj_weight@{i}/3"].product for i in range(3)]
    q, k = (f(x).detach().flatten(0, 1) for f in (model.embed, model.other))
    torch.testing.assert_close(told, [q.T @ q, k.T @ k, q.T @ q])


class Dead(nn.Module):
    """A recurrent layer with one silent unit and one of a few that says what another says."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.head = nn.LSTM(3, 6, batch_first=True), nn.LSTM(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.r(x)[0])[0]


def test_a_silent_unit_of_a_recurrent_layer_goes_first() -> None:
    torch.manual_seed(0)
    model, x = Dead().double().eval(), drawn(8, 5, 3)
    with torch.no_grad():
        model.r.weight_ih_l0[[2, 8, 14, 20]] = 0.0  # the gates of unit 2
        model.r.weight_hh_l0[[2, 8, 14, 20]] = 0.0
        model.r.bias_ih_l0[[2, 8, 14, 20]] = 0.0
        model.r.bias_hh_l0[[2, 8, 14, 20]] = 0.0
        model.r.weight_hh_l0[:, 2] = 1.0  # whoever takes its inputs as white holds it dear
        model.head.weight_ih_l0[:, 2] = 1.0
    graph, recorder = seen(model, x)
    (group,) = [g for g in graph.groups if g.units == 6]
    for criterion in (Transport(), OBS()):
        for moments, gone in ((recorder.moments, True), ({}, False)):
            found = gather(model, graph, group, moments=moments, sensitivity=None, seed=0)
            assert (int(criterion.rank(found).order[-1]) == 2) == gone


def test_a_unit_that_says_what_another_says_goes_before_it_is_missed() -> None:
    torch.manual_seed(0)
    model, x = Dead().double().eval(), drawn(8, 5, 3)
    with torch.no_grad():
        for parameter in model.r.parameters():  # unit 4 is unit 1, also to those that read them
            table = parameter.view(4, 6, -1)
            table[:, 4] = table[:, 1]
            if parameter.dim() == 2 and parameter.shape[1] == 6:
                parameter[:, 4] = parameter[:, 1]
        model.head.weight_ih_l0[:, 4] = model.head.weight_ih_l0[:, 1]
    found, _ = evidence(model, x, "r.bias_hh_l0")
    cost, null = ground_cost(found)
    assert float(cost[4, 1]) < 1e-7 * float(null[4])
    assert int(Transport().rank(found).order[-1]) in (1, 4)


def test_what_the_output_feels_of_a_parameter_is_what_it_feels_of_a_layer() -> None:
    up, down = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)
    head = nn.Linear(4, 3)
    layers = Net(lambda m, x: m.head(m.down(m.up(x).tanh()).tanh()), up=up, down=down, head=head)
    bare = Net(lambda m, x: m.head((m.up(x).tanh() @ m.down).tanh()), up=up, head=head)
    bare.down = nn.Parameter(down.weight.detach().T.clone())
    x, told = drawn(SAMPLES, 3, 5), []
    for model in (layers.double(), bare.double()):
        graph = trace(model, x)
        paths = loose(model, graph, graph.full())
        recorder = Recorder(
            model, [] if paths else ["down"], samples=1, rows_per_column=1000, seed=0
        )
        watch_products(model, slots(model, paths, x), recorder)
        recorder.look(SAMPLES, SAMPLES)
        run(model, x)
        recorder.remove()
        centres = {} if paths else {"down": None}
        felt = sense(model, centres, [x], draws=3, seed=0, loose=paths)
        told.append(
            gather(
                model, graph, graph.group("up"), moments=recorder.moments, sensitivity=felt, seed=0
            )
        )
    module, parameter = told
    torch.testing.assert_close(parameter.consumers[0].feel, module.consumers[0].feel)
    torch.testing.assert_close(parameter.taylor, module.taylor)
    torch.testing.assert_close(ground_cost(parameter)[0], ground_cost(module)[0])


def test_the_quote_is_what_is_kept() -> None:
    model, x = Table("routed").double().eval(), drawn(SAMPLES, 4, 5)
    graph = trace(model, x)
    paths = loose(model, graph, graph.full())
    quoted = sum(map(Moments.bytes, others(model, slots(model, paths, x)).values()))
    _, recorder = seen(model, x)
    kept = [t for m in recorder.moments.values() for t in (m.total, m.product)]
    assert quoted == sum(t.numel() * t.element_size() for t in kept) == 3 * 8 * 7 * 8


def test_more_than_the_limit_is_refused_before_data() -> None:
    policy = otp.Policy(
        rules=otp.Channels(),
        budget=otp.Budget(params=0.8),
        calibration=otp.Calibration(memory=1e-7),
    )
    with pytest.raises(CalibrationError, match=r"statistics would take .*") as caught:
        otp.attach(Table("routed").double().eval(), policy, example=drawn(2, 4, 5))
    assert "'down:1@0/3'" in caught.value.where


def test_what_is_not_finite_names_the_parameter() -> None:
    model, x = Own(WAYS["matmul"]).double().eval(), drawn(SAMPLES, 3, 5)
    graph = trace(model, x)
    recorder = Recorder(model, (), samples=1, rows_per_column=9, seed=0)
    watch_products(model, slots(model, loose(model, graph, graph.full()), x), recorder)
    with pytest.raises(CalibrationError, match="what 'down' is multiplied with holds NaN"):
        model(x.fill_(float("nan")))
    recorder.remove()


def test_switches_and_hooks_are_as_they_were_after_an_error() -> None:
    model, x = recurrent(nn.LSTM, batch_first=True), drawn(4, 6, 3)
    before = torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled()
    graph = trace(model, x)
    recorder = Recorder(model, (), samples=1, rows_per_column=9, seed=0)
    watch_products(model, slots(model, loose(model, graph, graph.full()), x), recorder)
    with pytest.raises(RuntimeError):
        model(drawn(4, 6, 99))
    recorder.remove()
    assert before == (torch._C._get_mkldnn_enabled(), torch.backends.mha.get_fastpath_enabled())
    assert not model.r._forward_hooks and not model.r._forward_pre_hooks
    model(x)


def test_rows_are_thinned_alike_however_data_is_split() -> None:
    model, x = recurrent(nn.GRU, batch_first=True, num_layers=2), drawn(8, 40, 3)
    graph = trace(model, x)
    paths = loose(model, graph, graph.full())
    told = []
    for size in (2, 8):
        recorder = Recorder(model, (), samples=8, rows_per_column=4, seed=0)
        watch_products(model, slots(model, paths, x), recorder)
        for batch in x.split(size):
            recorder.look(size, size)
            model(batch)
        recorder.look(4, 2)  # of the last one half counts
        model(x[:4])
        recorder.remove()
        told.append(recorder.moments)
    few = told[0]["r.weight_ih_l1@0/1"]
    assert few.count == (8 + 2) * 8
    for name, own in told[0].items():
        torch.testing.assert_close(own.product, told[1][name].product)


def test_a_root_that_holds_the_parameter_is_heard_from_the_first_batch() -> None:
    model = Own(WAYS["matmul"]).double().eval()
    policy = otp.Policy(
        rules=otp.Channels(), budget=otp.Budget(params=0.8), calibration=otp.Calibration(samples=8)
    )
    with otp.attach(model, policy) as attached:
        model(drawn(8, 3, 5))
        model(drawn(8, 3, 5))
        (found,) = attached.observation().moments.values()
        assert found.count == 24
        plan = attached.plan()
    assert [cut.group for cut in plan.cuts] == ["up"]


def test_a_part_that_ran_on_no_rank_alike_is_told_as_finely_as_on_any() -> None:
    told = agreed([{"w@0/1": 4, "moe": 3}, {"w@0/2": 4, "w@1/2": 4}, {"w@0/3": 4}])
    assert list(told) == ["moe", *(f"w@{i}/6" for i in range(6))]
    own = {f"w@{i}/2": Moments.empty(4) for i in range(2)}
    assert [filed(own, f"w@{i}/6") is own[f"w@{i // 3}/2"] for i in range(6)] == [True] * 6
    assert filed(own, "moe") is None


def test_a_product_says_where_in_the_parameter_it_lies() -> None:
    table, heard = drawn(3, 4, 5), list[Product]()
    x = drawn(2, 4)
    with Products({"t:1": table}, heard.append):
        x @ table[2][:, 1:3]
        x @ table.transpose(0, 1)[:, 1]
        table[0] @ drawn(5, 2)  # summed along an axis that is not watched
    assert [p.outs.tolist() for p in heard] == [[11, 12], [5, 6, 7, 8, 9]]
    assert all(torch.equal(p.rows, x) and p.columns.tolist() == [0, 1, 2, 3] for p in heard)
