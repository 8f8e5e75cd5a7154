"""How a training may end or never begin: what is said where pruning would not happen in silence."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_otprune as otp
from tests.test_callbacks import POLICY, Wrapped, loader, trainer
from tests.test_callbacks import net as digit_net
from tests.test_rebind import data, net, take
from tests.test_schedule import gradual, params, train
from torch_otprune.errors import OTPruneError, PolicyError, StructureError


def descent(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def test_step_of_a_policy_that_would_never_prune_is_refused() -> None:
    model = net()
    attached = otp.attach(model, otp.Policy(rules=otp.Channels(keep="50%")))
    with attached, pytest.raises(PolicyError) as error:
        attached.step(descent(model))
    assert error.value.problem.startswith("this policy has no schedule and no penalty")
    assert "schedule=otp.Schedule(at=[500])" in error.value.fix


def test_whoever_stops_between_two_rounds_is_warned_once() -> None:
    model = net()
    attached = otp.attach(model, gradual(at=[2, 6]))
    train(model, attached, descent(model), 3)
    with pytest.warns(
        UserWarning, match="behind 1 of 2 rounds: the budget is not met; train on .steps left: 3."
    ):
        attached.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.remove()


def test_who_only_looks_or_is_done_or_fails_is_not_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otp.attach(net(), gradual(at=2)).remove()
        model = net()
        with otp.attach(model, gradual(at=2)) as attached:
            train(model, attached, descent(model), 2)
        with pytest.raises(KeyboardInterrupt):
            _interrupted()


def _interrupted() -> None:
    model = net()
    with otp.attach(model, gradual(at=9)) as attached:
        train(model, attached, descent(model), 2)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 0}, "the temperature is 0."),
        ({"temperature": float("nan")}, "the temperature is nan."),
        ({"temperature": None}, "the temperature is None."),
        ({"weight": -1.0}, "the weight is -1.0."),
        ({"weight": float("nan")}, "the weight is nan."),
        ({"weight": "0.5"}, "the weight is '0.5'."),
        ({"match": "logit"}, "'logit' is nothing that can be matched."),
        ({"match": []}, "[] is nothing that can be matched."),
    ],
)
def test_a_distillation_that_makes_no_sense_is_refused_from_the_first_step(
    given: dict[str, Any], said: str
) -> None:
    with otp.attach(net(), gradual(at=2)) as attached, pytest.raises(PolicyError) as error:
        attached.distill(**given)
    assert error.value.problem == said
    assert error.value.where == f"distill, {next(iter(given))}"
    assert error.value.fix.startswith(
        ("give a finite number", "write 'auto', 'logits' or 'values'")
    )


def test_a_wrong_step_is_named_with_its_place() -> None:
    with pytest.raises(PolicyError) as error:
        otp.Schedule(at=[1.5])  # type: ignore[list-item]
    assert error.value.problem == "1.5 is no valid at[0]: it should be a whole number."


def test_adapters_are_sent_behind_the_pruning() -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"], r=2))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(StructureError) as error:
            otp.prune_(model, otp.Policy(rules=otp.Channels(keep="50%")), [data()[0]], timing=0)
        assert error.value.problem.startswith("the model holds adapters of PEFT: ")
        assert error.value.fix == "prune the plain model first, then add adapters."


def test_swapped_arguments_of_accelerate_are_told_apart() -> None:
    hf = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from torch_otprune.integrations import accelerate as ours

    with pytest.raises(OTPruneError) as error:
        ours.attach(net(), hf.Accelerator(cpu=True), POLICY)  # type: ignore[arg-type]
    assert error.value.problem.endswith("then the model; it got Sequential and Accelerator.")
    assert error.value.fix == "write attach(accelerator, model, policy)."


def test_accelerate_without_a_schedule_is_refused_at_the_first_step() -> None:
    hf = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from torch_otprune.integrations import accelerate as ours

    policy = otp.Policy(rules=otp.Channels(keep="50%"))
    pruning = ours.attach(hf.Accelerator(cpu=True), net(), policy)
    with pruning, pytest.raises(PolicyError, match="no schedule and no penalty"):
        pruning.step()


def test_the_trainer_may_not_load_its_best_checkpoint_into_a_pruned_model() -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    model, callback = Wrapped(), PruningCallback(POLICY)
    callback.on_init_end(None, None, None, model=model)
    args = SimpleNamespace(world_size=1, n_gpu=0, load_best_model_at_end=True)
    with pytest.raises(PolicyError) as error:
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)
    assert error.value.problem.startswith("load_best_model_at_end is on: ")
    assert error.value.fix.startswith("set load_best_model_at_end=False")
    assert not model._forward_pre_hooks and not model._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [3, 5])
def test_a_lightning_checkpoint_taken_behind_fit_is_gone_on_from(steps: int, tmp_path: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from torch_otprune.integrations.lightning import PruningCallback

    class Digits(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    policy = POLICY.model_copy(update={"schedule": otp.Schedule(at=[2, 4])})
    callback = PruningCallback(policy, part="model")
    first, module = trainer(pl, tmp_path, callback, max_steps=steps), Digits()
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "end.ckpt")

    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    again = Digits()  # for inference
    with otp.attach(again.model, policy) as attached:
        attached.load_state_dict(saved["callbacks"][callback.state_key])
    again.load_state_dict(saved["state_dict"])
    images = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(images), module.model.eval()(images))

    dense, resumed = Digits(), PruningCallback(policy, part="model")
    trainer(pl, tmp_path, resumed, max_steps=6).fit(
        dense, loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
    )
    assert len(callback.reports) + len(resumed.reports) == 2
    assert params(dense.model) <= 0.3 * params(digit_net())


def test_step_without_an_optimiser_leaves_rebinding_to_the_caller() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with otp.attach(model, gradual(at=1)) as attached:
        take(model.train(), optimizer)
        report = attached.step()
        assert report is not None
        with pytest.raises(RuntimeError):
            take(model, optimizer)
        report.rebind_(optimizer)
        take(model, optimizer)
