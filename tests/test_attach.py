"""Attaching: hooks and nothing else, gone without a trace, the same statistics every way."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from tests.cases import CASES
from torch_otprune.errors import CalibrationError, PolicyError, StructureError, TargetError
from torch_otprune.plan import Plan
from torch_otprune.structure import map_tensors, run

POLICY = otp.Policy(
    rules=otp.Channels(),
    budget=otp.Budget(macs=0.6),
    calibration=otp.Calibration(samples=64, probe=16),
)


def marks(model: nn.Module) -> list[object]:
    """Note all that an attachment might leave behind."""
    found: list[object] = list(model.state_dict())
    for name, module in model.named_modules():
        tables = [k for k in vars(module) if k.endswith("_hooks")]
        found += [name, module.training, sorted(vars(module))]
        found += [len(vars(module)[table]) for table in tables if vars(module)[table] is not None]
        found += [id(p) for p in module._parameters.values()]
    return found + [p.requires_grad for p in model.parameters()]


def values(model: nn.Module) -> list[Tensor]:
    """Copy every tensor."""
    return [v.clone() for v in model.state_dict().values()]


def pieces(batch: Any, sizes: list[int]) -> list[Any]:
    """Split a batch."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        map_tensors(batch, lambda t, a=end - size, b=end: t[a:b])
        for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_leaving_leaves_no_trace(name: str, training: bool) -> None:
    model = CASES[name].model().train(training)
    before, tensors, random = marks(model), values(model), torch.get_rng_state()
    with otp.attach(model, POLICY) as attached:
        otp.observe(attached, [CASES[name].batch(16)])
        attached.plan()
    assert marks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(tensors, values(model), strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_leaving_by_an_exception_leaves_no_trace() -> None:
    model = CASES["residual"].model().train()
    before = marks(model)
    with pytest.raises(KeyError):
        _fail(model, KeyError())
    assert marks(model) == before


def _fail(model: nn.Module, error: Exception) -> None:
    with otp.attach(model, POLICY) as attached:
        otp.observe(attached, [CASES["residual"].batch(16)])
        raise error


def test_a_forward_that_fails_leaves_no_trace() -> None:
    model = CASES["residual"].model()
    before = marks(model)
    batches = [CASES["residual"].batch(16), torch.zeros(2, 3, dtype=torch.float64)]
    with otp.attach(model, POLICY) as attached, pytest.raises(CalibrationError):
        otp.observe(attached, batches)
    assert marks(model) == before


@pytest.mark.parametrize("name", CASES)
def test_attached_models_compute_the_same(name: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    expected = run(model, batch)
    with otp.attach(model, POLICY):
        got = run(model, batch)
    for a, b in zip(_flat(expected), _flat(got), strict=True):
        assert torch.equal(a, b)


def _flat(output: Any) -> list[Tensor]:
    from torch_otprune.structure import flat_tensors

    return flat_tensors(output)


def test_it_works_without_with() -> None:
    model = CASES["plain"].model()
    before = marks(model)
    attached = otp.attach(model, POLICY)
    otp.observe(attached, [CASES["plain"].batch(16)])
    attached.remove()
    attached.remove()
    assert marks(model) == before
    assert attached.plan().cuts


def test_it_works_while_the_user_trains() -> None:
    model = CASES["plain"].model().train()
    twin = copy.deepcopy(model)
    batches = [CASES["plain"].batch(16, seed=s) for s in range(3)]
    with otp.attach(model, POLICY) as attached:
        _train(model, batches)
        assert attached.samples == 48
    _train(twin, batches)
    for a, b in zip(values(model), values(twin), strict=True):
        assert torch.equal(a, b)


def _train(model: nn.Module, batches: list[Tensor]) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        optimiser.zero_grad()
        model(batch).square().mean().backward()
        optimiser.step()


def test_it_works_inside_inference_mode() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY) as attached:
        with torch.inference_mode():
            model(CASES["plain"].batch(16))
        model(CASES["plain"].batch(16))
        assert attached.plan().cuts


@pytest.mark.parametrize("name", CASES)
def test_the_plan_does_not_depend_on_the_split_into_batches(name: str) -> None:
    batch = CASES[name].batch(24)
    texts = set()
    for sizes in ([24], [8, 8, 8], [1, 20, 3]):
        model = CASES[name].model()
        with otp.attach(model, POLICY) as attached:
            texts.add(otp.observe(attached, pieces(batch, sizes)).plan().to_json())
    assert len(texts) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_the_same_every_time(name: str) -> None:
    texts = []
    for _ in range(2):
        model = CASES[name].model()
        with otp.attach(model, POLICY) as attached:
            otp.observe(attached, [CASES[name].batch(16)])
            texts += [attached.plan().to_json(), attached.plan().to_json()]
    assert len(set(texts)) == 1
    assert otp.Plan.from_json(texts[0]).to_json() == texts[0]


@pytest.mark.parametrize("name", ["plain", "residual", "attention", "transposed"])
def test_memory_is_quoted_before_and_kept(name: str) -> None:
    model = CASES[name].model()
    with otp.attach(model, POLICY, example=CASES[name].batch(2)) as attached:
        quoted = attached.bytes
        for seed in range(3):
            otp.observe(attached, [CASES[name].batch(16, seed=seed)])
        assert attached._recorder is not None
        seen = attached._recorder.moments.values()
        real = sum(t.untyped_storage().nbytes() for m in seen for t in (m.total, m.product))
    assert 0 < real <= quoted == attached.bytes


def test_a_function_s_batches_are_seen_once() -> None:
    def feed(model: nn.Module) -> None:
        model(CASES["plain"].batch(16))

    model = CASES["plain"].model()
    with otp.attach(model, POLICY) as attached:
        for seen in (16, 32):
            assert otp.observe(attached, feed).samples == seen
            assert attached._recorder is not None
            assert attached._recorder.moments["10"].count == seen


def test_an_example_is_no_sample() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY, example=CASES["plain"].batch(2)) as attached:
        assert attached.samples == 0
        with pytest.raises(CalibrationError) as error:
            attached.plan()
    assert error.value.problem == "the model was not run since the policy was attached."


def test_no_more_samples_are_seen_than_declared() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY) as attached:
        for _ in range(6):
            model(CASES["plain"].batch(16))
        assert attached.samples == 64


def test_nan_in_a_batch_names_the_place() -> None:
    model, batch = CASES["plain"].model(), CASES["plain"].batch(16)
    batch[3, 1, 2, 2] = float("nan")
    with otp.attach(model, POLICY) as attached, pytest.raises(CalibrationError) as error:
        otp.observe(attached, [CASES["plain"].batch(16), batch])
    assert error.value.problem == "the input holds NaN."
    assert "batch 1" in error.value.where and "[3, 1, 2, 2]" in error.value.where


def test_infinity_in_a_weight_names_the_weight() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY) as attached:
        model(CASES["plain"].batch(16))
        with torch.no_grad():
            model[3].weight[0] = float("inf")
        with pytest.raises(CalibrationError) as error:
            otp.observe(attached, [CASES["plain"].batch(16)])
    assert error.value.problem == "'3.weight' holds NaN or infinity."
    assert "(Conv2d); seen in the input of '6'" in error.value.where


@pytest.mark.parametrize("feed", ["by hand", "observe"])
def test_the_plan_does_not_depend_on_where_the_last_batch_ends(feed: str) -> None:
    policy = POLICY.model_copy(update={"calibration": otp.Calibration(samples=20, probe=8)})
    data, texts = CASES["plain"].batch(32), set()
    for size in (4, 7, 32):
        model = CASES["plain"].model().eval()
        with otp.attach(model, policy) as attached:
            if feed == "observe":
                otp.observe(attached, data.split(size))
            else:
                for batch in data.split(size):
                    model(batch)
            assert attached.samples == 20
            texts.add(attached.plan().to_json())
    assert len(texts) == 1


def test_summing_up_adds_no_data() -> None:
    model = CASES["plain"].model()
    policy = POLICY.model_copy(update={"calibration": otp.Calibration(samples=999, probe=16)})
    with otp.attach(model, policy) as attached:
        otp.observe(attached, [CASES["plain"].batch(16)])
        counts = [{p: m.count for p, m in attached.observation().moments.items()} for _ in "ab"]
    assert counts[0] == counts[1]


def test_summing_up_on_one_rank_copies_nothing() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY) as attached:
        found = otp.observe(attached, [CASES["plain"].batch(16)]).observation()
        for path, moments in found.moments.items():
            own = attached._recorder.moments[path]
            assert moments.product.data_ptr() == own.product.data_ptr()


def test_after_a_refusal_for_memory_nothing_is_known() -> None:
    model = CASES["plain"].model()
    policy = POLICY.model_copy(update={"calibration": otp.Calibration(memory=1e-6)})
    with otp.attach(model, policy) as attached:
        for _ in range(2):
            with pytest.raises(CalibrationError) as error:
                otp.observe(attached, [CASES["plain"].batch(16)])
        assert attached.graph is None
    assert " MiB." in error.value.problem and "Calibration.memory = 1e-06" in error.value.where


def test_all_is_planned_inside_inference_mode() -> None:
    model = CASES["residual"].model()
    with torch.inference_mode(), otp.attach(model, POLICY) as attached:
        assert otp.observe(attached, [CASES["residual"].batch(16)]).plan().cuts
    assert not any(p.is_inference() for p in model.parameters())


def test_a_batch_without_samples_is_refused() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY), pytest.raises(CalibrationError) as error:
        model(torch.zeros(0, 3, 8, 8, dtype=torch.float64))
    assert error.value.problem == "batch 0 holds no sample."


def test_a_copy_of_an_attached_model_is_not_attached() -> None:
    model = CASES["residual"].model()
    with otp.attach(model, POLICY) as attached:
        otp.observe(attached, [CASES["residual"].batch(16)])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            seen = attached.samples
            torch.testing.assert_close(
                twin(CASES["residual"].batch()), model(CASES["residual"].batch())
            )
            assert attached.samples == seen + 8
            with otp.attach(twin, POLICY):
                twin(CASES["residual"].batch())


def test_an_attached_model_saves_only_what_it_had() -> None:
    model = CASES["residual"].model()
    keys = list(model.state_dict())
    with otp.attach(model, POLICY) as attached:
        otp.observe(attached, [CASES["residual"].batch(16)])
        assert list(model.state_dict()) == keys


def test_a_second_attachment_is_refused() -> None:
    model = CASES["plain"].model()
    with otp.attach(model, POLICY), pytest.raises(StructureError) as error:
        otp.attach(model, POLICY)
    assert error.value.problem == "a policy is attached to this model already."
    otp.attach(model, POLICY).remove()


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_model_and_a_part_of_it_are_not_attached_at_once(inner_first: bool) -> None:
    model = CASES["plain"].model()
    first, second = (model[0], model) if inner_first else (model, model[0])
    with (
        otp.attach(first, otp.Policy(rules=otp.Channels(keep=0.5))),
        pytest.raises(StructureError) as error,
    ):
        otp.attach(second, POLICY)
    assert "that shares modules already." in error.value.problem


@pytest.mark.parametrize(
    ("policy", "fix"),
    [("x", "pass a Policy."), (otp.Channels(), "wrap it: Policy(rules=...).")],
)
def test_what_is_no_policy_is_an_error(policy: Any, fix: str) -> None:
    with pytest.raises(PolicyError) as error:
        otp.attach(CASES["plain"].model(), policy)
    assert error.value.fix == fix


def test_what_is_no_model_is_an_error() -> None:
    with pytest.raises(StructureError) as error:
        otp.attach(None, POLICY)  # type: ignore[arg-type]
    assert error.value.problem == "the model is of type NoneType."


def test_no_policy_is_an_error() -> None:
    with pytest.raises(PolicyError) as error:
        otp.attach(CASES["plain"].model())
    assert error.value.problem == "there is no policy for this model."


def test_a_policy_on_the_class_is_found_and_one_on_the_instance_wins() -> None:
    @otp.prunable(otp.Channels(keep=0.5, criterion="magnitude", repair="none"))
    class Net(nn.Sequential):
        pass

    model = Net(*CASES["mlp"].model())
    batch = CASES["mlp"].batch(16)
    with otp.attach(model) as attached:
        assert otp.observe(attached, [batch]).plan().keep() == {"0": 6, "2": 5}
    own = otp.Policy(rules=otp.Channels(keep=0.25, criterion="magnitude"))
    with otp.attach(model, own) as attached:
        assert otp.observe(attached, [batch]).plan().keep() == {"0": 3, "2": 2}


def test_an_unmatched_target_is_an_error_with_the_nearest_names() -> None:
    policy = otp.Policy(rules=otp.Channels(targets="bloks.*", keep=0.5))
    with pytest.raises(TargetError) as error:
        otp.attach(CASES["residual"].model(), policy)
    assert error.value.problem == "'bloks.*' matches no module of this model."
    assert "blocks" in error.value.where


def test_batches_of_different_sizes_are_fine() -> None:
    model = CASES["residual"].model()
    batches = [torch.randn(9, 3, s, s, dtype=torch.float64) for s in (8, 6, 12)]
    with otp.attach(model, POLICY) as attached:
        assert otp.observe(attached, batches).plan().cuts


def test_a_frozen_trunk_in_half_precision_is_fine() -> None:
    model = CASES["frozen"].model(dtype=torch.bfloat16)
    batch = CASES["frozen"].batch(16, dtype=torch.bfloat16)
    with otp.attach(model, POLICY) as attached:
        assert otp.observe(attached, [batch]).plan().cuts


class Padded(nn.Module):
    """An encoder that packs padded texts into nested tensors when it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def padded() -> tuple[Padded, dict[str, Tensor]]:
    torch.manual_seed(0)
    mask = torch.arange(5).expand(6, 5) > torch.tensor([[4], [2], [4], [3], [1], [4]])
    return Padded().eval(), {"x": torch.randn(6, 5, 8), "mask": mask}


WIDE = otp.Channels(targets="encoder.layers.*.linear1", keep=0.5)


def test_a_loop_of_ones_own_over_padded_texts_sees_what_observe_sees() -> None:
    plans = []
    for own in (True, False):
        model, batch = padded()
        with otp.attach(model, otp.Policy(rules=WIDE)) as attached:
            if own:
                with torch.no_grad():
                    model(**batch)
            plans.append((attached if own else otp.observe(attached, [batch])).plan())
        assert model.encoder.use_nested_tensor
    assert plans[0].keep() == plans[1].keep()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_schedule_leaves_validation_on_padded_texts_alone() -> None:
    model, batch = padded()
    policy = otp.Policy(rules=WIDE, schedule=otp.Schedule(at=3))
    with torch.no_grad():
        expected = model(**batch)  # packed: zeros at padded places
        with otp.attach(model, policy, example=batch):
            assert torch.equal(model(**batch), expected)


def test_planning_keeps_python_from_collecting_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_otprune.attach import handle

    seen, decide = [], handle.decide

    def spy(*args: Any) -> Plan:
        seen.append(gc.isenabled())
        return decide(*args)

    monkeypatch.setattr(handle, "decide", spy)
    with otp.attach(CASES["mlp"].model(), POLICY) as attached:
        otp.observe(attached, [CASES["mlp"].batch(16)]).plan()
    assert seen == [False]
    assert gc.isenabled()
