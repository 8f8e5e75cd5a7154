"""Rounds of pruning while somebody trains: when, how much, and what goes on afterwards."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torch_otprune as otp
from tests.test_rebind import data, deep, net, take
from torch_otprune.errors import CalibrationError, LoadError, OTPruneError, PolicyError

SMALL = otp.Calibration(samples=64, probe=16)


def gradual(**schedule: Any) -> otp.Policy:
    return otp.Policy(
        rules=otp.Channels(),
        budget=otp.Budget(params=0.4),
        calibration=SMALL,
        schedule=otp.Schedule(**schedule),
    )


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(
    model: nn.Module, attached: otp.Attached, optimizer: Any, steps: int
) -> dict[int, otp.Report]:
    """Train, and list the reports by step."""
    found = {}
    model.train()
    for step in range(1, steps + 1):
        take(model, optimizer)
        report = attached.step(optimizer)
        if report is not None:
            found[step] = report
    return found


@given(
    final=st.floats(0.01, 1.0),
    every=st.integers(1, 50),
    rounds=st.integers(1, 12),
    shape=st.sampled_from(["cubic", "linear"]),
)
def test_the_kept_share_falls_from_all_to_exactly_what_the_policy_keeps(
    final: float, every: int, rounds: int, shape: Any
) -> None:
    schedule = otp.Schedule(every=every, until=every * rounds, shape=shape)
    shares = [schedule.kept(final, i) for i in range(rounds + 1)]
    assert shares[0] == pytest.approx(1.0) and shares[-1] == final
    assert shares == sorted(shares, reverse=True)


def test_cubic_takes_most_at_first() -> None:
    schedule = otp.Schedule(at=[1, 2])
    assert schedule.kept(0.2, 1) == pytest.approx(0.3)
    assert otp.Schedule(at=[1, 2], shape="linear").kept(0.2, 1) == pytest.approx(0.6)


def test_a_schedule_is_data() -> None:
    policy = gradual(every=5, start=3, until=14)
    assert tuple(policy.schedule.steps) == (3, 8, 13)  # type: ignore[union-attr]
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    assert otp.Policy.from_json(policy.to_json()) == policy
    written = "rules: channels\nbudget: {params: 50%}\nschedule: {at: 500, shape: one_shot}\n"
    assert otp.Policy.from_yaml(written).schedule == otp.Schedule(at=500, shape="one_shot")
    fields = otp.Policy.json_schema()["$defs"]["Schedule"]["properties"]
    assert set(fields) == {"at", "every", "start", "until", "shape"}


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ({}, "the schedule does not say when."),
        ({"every": 5}, "the schedule does not say when."),
        ({"at": [5], "until": 9}, "at and until both say when."),
        ({"at": [5, 3]}, "the steps 5, 3 do not ascend."),
        ({"every": 5, "until": 4}, "no round is due: the first would be at step 5, and until is 4"),
        ({"at": [1, 2], "shape": "one_shot"}, "one_shot has one round, and 2 are due."),
        ({"at": [0]}, "0 is no valid"),
        ({"at": []}, "at is empty."),
        ({"evry": 5, "until": 4}, "'evry' is no key of Schedule."),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(written: Any, problem: str) -> None:
    with pytest.raises(PolicyError) as error:
        otp.Schedule(**written)
    assert error.value.problem.startswith(problem)


@pytest.mark.parametrize("shape", ["cubic", "linear"])
def test_rounds_leave_what_the_schedule_says_and_the_plan_is_measured(shape: Any) -> None:
    model = net()
    dense, policy = params(model), gradual(at=[4, 8, 12], shape=shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        reports = train(model, attached, optimizer, 20)
        assert attached.step(optimizer) is None
    assert list(reports) == [4, 8, 12]
    for number, report in enumerate(reports.values(), start=1):
        assert report.params.after == report.plan.params.after
        limit = policy.schedule.kept(0.4, number) * dense  # type: ignore[union-attr]
        assert 0.85 * limit < report.params.after <= limit
    assert params(model) == reports[12].params.after <= 0.4 * dense
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


@pytest.mark.parametrize("keep", ["50%", 5])
def test_a_rule_s_own_keep_ends_where_one_shot_ends(keep: Any) -> None:
    rule = otp.Channels(keep=keep, criterion="magnitude", repair="none")
    model, other = net(), net()
    policy = otp.Policy(rules=rule, calibration=SMALL, schedule=otp.Schedule(at=[1, 2, 3]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        train(model, attached, optimizer, 3)
    otp.prune_(other, otp.Policy(rules=rule), [data()[0]], timing=0)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [
        m.out_features for m in other if isinstance(m, nn.Linear)
    ]


def test_layers_go_one_after_another_and_their_list_closes_in_the_end() -> None:
    model = deep()
    policy = otp.Policy(
        rules=otp.Layers(drop=3), calibration=SMALL, schedule=otp.Schedule(at=[2, 4, 6, 8])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        reports = train(model, attached, optimizer, 10)
    assert sum(len(report.plan.drops) for report in reports.values()) == 3
    assert len(model.blocks) == 1
    take(model, optimizer)


@pytest.mark.parametrize("build", [net, deep])
def test_what_several_rounds_left_saves_and_loads_from_the_dense_factory(
    build: Any, tmp_path: Any
) -> None:
    model = build()
    rules: list[Any] = [otp.Channels()] if build is net else [otp.Channels(), otp.Layers(drop=2)]
    policy = otp.Policy(
        rules=rules,
        budget=otp.Budget(params=0.5 if build is net else 0.3),
        calibration=SMALL,
        schedule=otp.Schedule(every=2, until=6),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        assert len(train(model, attached, optimizer, 7)) >= 2
    otp.save(model, tmp_path / "model")
    again = otp.load(tmp_path / "model", factory=build)
    x = data()[0]
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_round_can_be_undone_and_is_made_up_for_by_the_next() -> None:
    model = net()
    policy = gradual(at=[2, 4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        report = train(model, attached, optimizer, 2)[2]
        attached.remove()
        report.undo_()
        assert params(model) == report.params.before
    with otp.attach(model, policy) as attached:
        train(model, attached, optimizer, 4)
    assert params(model) <= 0.4 * report.params.before


def test_data_given_decides_instead_of_what_the_model_trains_on() -> None:
    model, policy = net(), gradual(at=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, policy, data=[data()[0][:32]]) as attached:
        report = train(model, attached, optimizer, 2)[2]
    assert report.plan.samples == 32


def test_no_more_inputs_are_kept_than_calibration_wants() -> None:
    model = net()
    policy = gradual(at=20).model_copy(update={"calibration": otp.Calibration(samples=100)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        train(model, attached, optimizer, 19)
        kept = attached._course.rounds.recent  # type: ignore[union-attr]
        model(data()[0])
        assert [len(call.args[0]) for call in kept] == [64, 64]
        report = train(model, attached, optimizer, 2)[1]
        assert not attached._course.rounds.recent  # type: ignore[union-attr]
    assert report.plan.samples == 100


def test_a_round_without_any_batch_is_refused_and_stays_due() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, gradual(at=1)) as attached:
        with pytest.raises(CalibrationError) as error:
            attached.step(optimizer)
        assert error.value.problem == "a round is due, and no batch was seen since the last one."
        assert params(model) == params(net())
        take(model.train(), optimizer)
        assert attached.step(optimizer) is not None


def test_a_foreign_optimiser_takes_the_round_back() -> None:
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in other.parameters()]
    with otp.attach(model, gradual(at=1)) as attached:
        model.train()
        loss = F.cross_entropy(model(data()[0]), data()[1])
        loss.backward()
        with pytest.raises(OTPruneError) as error:
            attached.step(torch.optim.SGD(other.parameters(), lr=0.01))
        assert "trains no parameter of the pruned model" in error.value.problem
        assert all(map(torch.equal, model.parameters(), before))
        assert attached.step(optimizer) is not None


def test_a_round_behind_remove_puts_no_hook_back() -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attached = otp.attach(model, gradual(at=1), data=[data()[0]])
    attached.remove()
    with pytest.raises(PolicyError) as error:
        attached.step(optimizer)
    assert error.value.problem == "the policy was removed: step would never prune."
    assert "call step before remove" in error.value.fix
    attached.load_state_dict(attached.state_dict())
    assert not model._forward_pre_hooks
    otp.attach(model, gradual(at=1)).remove()  # not refused as a second attachment


def test_whatever_plans_at_once_ignores_the_schedule() -> None:
    model = net()
    report = otp.prune_(model, gradual(at=[5, 9]), [data()[0]], timing=0)
    assert report.params.after <= 0.4 * report.params.before


def test_a_resumed_run_ends_where_an_uninterrupted_one_does() -> None:
    policy = gradual(at=[3, 6, 9])

    def start() -> tuple[nn.Module, otp.Attached]:
        model = net().train()
        return model, otp.attach(model, policy, data=[data()[0]])

    def checkpoint(model: nn.Module, attached: otp.Attached, optimizer: Any) -> Any:
        buffer = io.BytesIO()
        parts = {"model": model, "attached": attached, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    model, attached = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, attached, optimizer, 7)
    state = checkpoint(model, attached, optimizer)
    train(model, attached, optimizer, 5)
    attached.remove()
    again, resumed = start()
    resumed.load_state_dict(state["attached"])
    second = torch.optim.AdamW(again.parameters(), lr=0.01)
    again.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    assert list(train(again, resumed, second, 5)) == [2]
    resumed.remove()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_a_state_of_another_model_or_policy_is_refused() -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, gradual(at=[1, 9])) as attached:
        train(model, attached, optimizer, 1)
        state = attached.state_dict()
    other = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    with otp.attach(other, gradual(at=[1, 9])) as attached:
        with pytest.raises(LoadError) as error:
            attached.load_state_dict(state)
        assert error.value.problem == "this state is of another model."
    with otp.attach(other, gradual(at=[1, 8])) as attached, pytest.raises(LoadError) as error:
        attached.load_state_dict(state)
    assert error.value.problem == "this state was written under another policy."


@pytest.mark.parametrize("state", [net().state_dict(), {"x": 1}, None])
def test_what_is_no_state_is_refused(state: Any) -> None:
    model = net()
    with otp.attach(model, gradual(at=1)) as attached, pytest.raises(LoadError) as error:
        attached.load_state_dict(state)
    assert error.value.problem == "this is no state of an attached policy: it has no 'policy'."
    assert error.value.fix.startswith("pass what attached.state_dict() returned")


def test_penalties_go_on_over_the_rounds_and_end_with_them() -> None:
    model = deep().train()
    rule = otp.Layers(drop=2, penalty={"kind": "max_sliced", "weight": 0.1})
    policy = otp.Policy(rules=rule, calibration=SMALL, schedule=otp.Schedule(at=[3, 6]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = data()
    pulls, counts = [], []
    with otp.attach(model, policy, example=x[:2]) as attached:
        for _ in range(8):
            loss = F.cross_entropy(model(x), y)
            pull = attached.penalty()
            optimizer.zero_grad()
            (loss + pull).backward()
            optimizer.step()
            attached.step(optimizer)
            pulls.append(float(pull.detach()))
            counts.append([p.steps for p in attached._course.pressures])
    assert all(pull > 0 for pull in pulls[:6]) and pulls[6:] == [0.0, 0.0]
    assert counts[4] == [5]
    assert len(model.blocks) == 2


def test_training_passes_are_no_calibration_where_a_penalty_is_at_work() -> None:
    model = deep().train()
    rules = [otp.Layers(drop=1, penalty="max_sliced"), otp.Channels(keep="50%")]
    with otp.attach(model, otp.Policy(rules=rules), example=data()[0][:2]) as attached:
        model(data()[0])
        assert attached.samples == 0 and not attached._recorder.moments


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_network_trains_on_over_a_round(how: str) -> None:
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = data()
    with otp.attach(model, gradual(at=3), data=[x]) as attached:
        compiled: Any = torch.compile(model, backend="eager")
        if how == "in place":
            model.compile(backend="eager")
            compiled = model
        for step in range(1, 6):
            loss = F.cross_entropy(compiled(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if how == "in place" and step == 3:
                with pytest.raises(OTPruneError) as error:
                    attached.step(optimizer)
                assert error.value.problem == "the model is compiled."
                return
            attached.step(optimizer)
    assert params(model) < 0.5 * params(net())
    torch.testing.assert_close(compiled(x), model(x))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_gradients_may_be_accumulated() -> None:
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = data()
    with otp.attach(model, gradual(at=[2, 4])) as attached:
        for _ in range(5):
            optimizer.zero_grad()
            for part, labels in zip(x.split(16), y.split(16), strict=True):
                (F.cross_entropy(model(part), labels) / 4).backward()
            optimizer.step()
            attached.step(optimizer)
    assert params(model) <= 0.4 * params(net())


def test_a_wrapped_network_is_refused_with_what_to_do() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(OTPruneError) as error:
            otp.attach(wrapped, gradual(at=1))
    finally:
        dist.destroy_process_group()
    assert "DistributedDataParallel" in error.value.problem
    assert error.value.fix.startswith("attach to model.module")


def test_the_example_of_a_schedule_checks_the_policy_at_once() -> None:
    policy = otp.Policy(
        rules=otp.Channels(targets="nothing"), budget=otp.Budget(params=0.5),
        schedule=otp.Schedule(at=5),
    )  # fmt: skip
    with pytest.raises(PolicyError):
        otp.attach(net(), policy)


def test_several_layers_share_one_keep_through_odd_widths() -> None:
    torch.manual_seed(0)
    widths = (6, 11, 7, 13, 5, 4)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double().train()
    rule = otp.Channels(keep="45%", criterion="magnitude", repair="none")
    policy = otp.Policy(rules=rule, calibration=SMALL, schedule=otp.Schedule(at=[1, 2, 3, 4]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        train(model, attached, optimizer, 4)
    left = [m.out_features for m in model if isinstance(m, nn.Linear)]
    assert left == [rule.widths(n)[0] for n in widths[1:-1]] + [4]


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_loses_heads_layers_and_channels_in_rounds_and_loads_both_ways(
    tmp_path: Any,
) -> None:
    hf = pytest.importorskip("transformers", reason="Transformers is not installed")

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, pad_token_id=0,
        )  # fmt: skip
        model: nn.Module = hf.LlamaForCausalLM(config)
        return model

    model = build().train()
    rules = [
        otp.Channels(targets="model.layers.*.mlp"), otp.Layers(drop=2), otp.Heads(keep="50%")
    ]  # fmt: skip
    policy = otp.Policy(
        rules=rules, budget=otp.Budget(params=0.6), calibration=SMALL,
        schedule=otp.Schedule(at=[1, 2, 3]),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 50, (8, 12))
    with otp.attach(model, policy) as attached:
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss + attached.distill()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            attached.step(optimizer)
    assert len(model.model.layers) == 3 and params(model) <= 0.6 * params(build())
    assert model.model.layers[0].self_attn.q_proj.out_features == 12
    otp.save(model.eval(), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = model(ids).logits
        ours = otp.load(tmp_path / "ours", factory=build).eval()
        assert torch.equal(ours(ids).logits, wanted)
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
        assert torch.equal(theirs(ids).logits, wanted)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


def picture() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Residual(), Residual(), Residual(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_convolutional_net_with_norms_goes_through_rounds_and_loads(tmp_path: Any) -> None:
    model = picture().train()
    policy = otp.Policy(
        rules=[otp.Channels(keep="50%", targets="*.body.0"), otp.Layers(drop=2)],
        calibration=SMALL,
        schedule=otp.Schedule(at=[2, 4, 6], shape="linear"),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with otp.attach(model, policy) as attached:
        for _ in range(8):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            attached.step(optimizer)
    assert all(p.grad is not None for p in model.parameters())
    otp.save(model.eval(), tmp_path / "net")
    again = otp.load(tmp_path / "net", factory=picture).eval()
    assert torch.equal(again(x), model(x)) and params(model) < params(picture())


def test_a_linearize_rule_acts_in_the_last_round() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ).double().train()  # fmt: skip
    policy = otp.Policy(
        rules=[otp.Channels(keep="50%"), otp.Linearize(drop=1)],
        calibration=SMALL,
        schedule=otp.Schedule(at=[2, 4]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        reports = train(model, attached, optimizer, 5)
    assert [len(report.plan.lines) for report in reports.values()] == [0, 1]
    assert {id(p) for p in model.parameters()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    take(model, optimizer)


def test_a_rule_with_nothing_left_does_not_stop_the_others() -> None:
    model = deep().train()
    policy = otp.Policy(
        rules=[otp.Layers(targets="Block", drop=3), otp.Channels(targets="blocks", keep="50%")],
        calibration=SMALL,
        schedule=otp.Schedule(at=[1, 2, 3, 4]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, policy) as attached:
        train(model, attached, optimizer, 4)
    assert [block.up.out_features for block in model.blocks] == [12]
