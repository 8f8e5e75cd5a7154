"""Pruning inside other training loops: each trains a small net on digits and says how well.

Stated: at most 30 % of the parameters, at least 90 % of held-out digits right, in 198 steps.
"""

from __future__ import annotations

import sys
from functools import cache
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_otprune as otp
from torch_otprune.attach import Attached
from torch_otprune.errors import OTPruneError

RIGHT, KEPT, ROUNDS = 0.9, 0.3, (60, 110)
POLICY = otp.Policy(
    rules=otp.Channels(),
    budget=otp.Budget(params=KEPT),
    calibration=otp.Calibration(samples=256, probe=32),
    schedule=otp.Schedule(at=ROUNDS),
)
EPOCHS = 9  # of 22 steps


@cache
def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """Split the digits of scikit-learn: what to train on, held-out images, their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:1408], order[1408:]
    return TensorDataset(x[train], y[train]), x[held], y[held]


def loader() -> DataLoader[Any]:
    data = digits()[0]
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers)


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def right(model: nn.Module) -> float:
    _, x, y = digits()
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


def check(model: nn.Module, reports: list[otp.Report]) -> None:
    """Hold a trained network to what was stated."""
    assert len(reports) == len(ROUNDS)
    assert params(model) == reports[-1].plan.params.after <= KEPT * params(net())
    assert right(model) >= RIGHT


def test_a_plain_loop() -> None:
    model, reports = net(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    with otp.attach(model, POLICY) as attached:
        for _ in range(EPOCHS):
            model.train()
            for images, labels in loader():
                loss = F.cross_entropy(model(images), labels) + attached.distill(0.5)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                reports += filter(None, [attached.step(optimizer)])
            schedule.step()
    check(model, reports)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int, tmp_path: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from torch_otprune.integrations.lightning import PruningCallback

    class Digits(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]

    module, callback = Digits(), PruningCallback(POLICY, part="model")
    trainer(pl, tmp_path, callback, max_steps=198, accumulate_grad_batches=accumulate).fit(
        module, loader()
    )
    check(module.model, callback.reports)
    assert callback.attached is None and not module.model._forward_pre_hooks


def trainer(pl: Any, path: Any, callback: Any, **options: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[callback], default_root_dir=path,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=-1, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_behind_a_round(tmp_path: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from torch_otprune.integrations.lightning import PruningCallback

    class Whole(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = net()

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    class Saving(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 70:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    callback = PruningCallback(POLICY)
    first = trainer(pl, tmp_path, callback, max_steps=70)
    first.callbacks.append(Saving())
    first.fit(Whole(), loader())
    again, resumed = Whole(), PruningCallback(POLICY)
    trainer(pl, tmp_path, resumed, max_steps=198).fit(
        again, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert "on_load_checkpoint" not in vars(again)
    assert len(resumed.reports) == len(callback.reports) == 1
    assert params(again) <= KEPT * params(net()) and right(again) >= RIGHT


def test_a_fit_that_fails_before_it_starts_leaves_nothing_on_the_module() -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from torch_otprune.integrations.lightning import PruningCallback

    module, callback = pl.LightningModule(), PruningCallback(POLICY)
    before = set(vars(module))
    callback.setup(SimpleNamespace(world_size=1), module, "fit")
    callback.on_exception(None, module, RuntimeError("this checkpoint is damaged"))
    assert set(vars(module)) == before


class Wrapped(nn.Module):
    """A classifier as a Trainer wants it: labels in, loss and logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixels)
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


@pytest.mark.filterwarnings("ignore")
def test_the_transformers_trainer(tmp_path: Any) -> None:
    hf = pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    images, labels = digits()[0].tensors
    rows = [{"pixels": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    model, callback = Wrapped(), PruningCallback(POLICY)
    args = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=198, per_device_train_batch_size=64,
        learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    hf.Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert len(callback.reports) == len(ROUNDS)
    assert params(model) == callback.reports[-1].plan.params.after <= KEPT * params(net())
    assert right(model.model) >= RIGHT
    assert not model._forward_pre_hooks


def written(path: Any, callback: Any, steps: int, **options: Any) -> Any:
    """Make a Trainer that writes a checkpoint in the end."""
    hf = pytest.importorskip("transformers", reason="Transformers is not installed")
    rows = [{"pixels": torch.rand(64), "labels": torch.tensor(i % 10)} for i in range(8)]
    args = hf.TrainingArguments(
        output_dir=str(path), max_steps=steps, per_device_train_batch_size=8, use_cpu=True,
        report_to=[], save_strategy="steps", save_steps=steps, disable_tqdm=True, seed=0,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    return hf.Trainer(Wrapped(), args, train_dataset=rows, callbacks=[callback])


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_counts_on_from_a_checkpoint_before_the_first_round(tmp_path: Any) -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    policy = POLICY.model_copy(update={"schedule": otp.Schedule(at=4)})
    written(tmp_path, PruningCallback(policy), 3).train()
    callback = PruningCallback(policy)
    trainer = written(tmp_path, callback, 5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(callback.reports) == 1
    assert not trainer.model._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_refuses_a_checkpoint_from_behind_a_round(tmp_path: Any) -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    policy = POLICY.model_copy(update={"schedule": otp.Schedule(at=2)})
    written(tmp_path, PruningCallback(policy), 3).train()
    trainer = written(tmp_path, PruningCallback(policy), 5)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(OTPruneError) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "was written behind a pruning round: 'model.0.weight' is [" in error.value.problem
    assert "from_pretrained or otp.load" in error.value.fix
    assert all(map(torch.equal, trainer.model.parameters(), before))


@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_model_are_left_to_torch() -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    model, callback = Wrapped(), PruningCallback(POLICY)
    callback.on_init_end(None, None, None, model=model)
    wider = {"model.0.weight": torch.zeros(65, 64)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(wider, strict=False)
    with pytest.raises(OTPruneError, match="behind a pruning round"):
        model.load_state_dict({"model.0.weight": torch.zeros(60, 64)}, strict=False)


def test_a_step_behind_a_round_is_refused_where_shapes_tell_nothing() -> None:
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    model, callback = Wrapped(), PruningCallback(POLICY)
    args = SimpleNamespace(world_size=1, n_gpu=0, load_best_model_at_end=False)
    state = SimpleNamespace(global_step=60)
    with pytest.raises(OTPruneError, match="of step 60, and the first round was due at step 60"):
        callback.on_train_begin(args, state, None, model=model)
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_a_bert_in_the_trainer_keeps_training_after_a_round(tmp_path: Any) -> None:
    hf = pytest.importorskip("transformers", reason="Transformers is not installed")
    from torch_otprune.integrations.trainer import PruningCallback

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config)
    ids = torch.randint(2, 20, (64, 6))
    marked = ids.clone()
    marked[::2, 3] = 1  # whether the one token is there is what is asked
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(marked, (marked == 1).any(1).long(), strict=True)
    ]
    policy = otp.Policy(
        rules=[otp.Channels(keep="50%", targets="bert.encoder.layer.*.intermediate")],
        calibration=otp.Calibration(samples=32, probe=8),
        schedule=otp.Schedule(at=20),
    )
    callback = PruningCallback(policy)
    args = hf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=80, per_device_train_batch_size=16,
        learning_rate=5e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    hf.Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 16
    with torch.no_grad():
        answers = model.eval()(input_ids=marked).logits.argmax(1)
    assert float((answers == (marked == 1).any(1).long()).double().mean()) >= RIGHT


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    hf = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from torch_otprune.integrations import accelerate as ours

    accelerator = hf.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    bare = net()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=3e-3)
    model, optimizer, batches = accelerator.prepare(bare, optimizer, loader())
    reports = []
    with ours.attach(accelerator, model, POLICY) as pruning:
        for _ in range(EPOCHS * accumulate):
            model.train()
            for images, labels in batches:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                reports += filter(None, [pruning.step(optimizer)])
    check(accelerator.unwrap_model(model), reports)


def test_accelerate_distills_with_the_same_choices() -> None:
    from torch_otprune.integrations.accelerate import Accelerated

    own, ours = (signature(kind.distill) for kind in (Accelerated, Attached))
    assert own.parameters == ours.parameters


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("lightning", "lightning", "lightning"), ("trainer", "transformers", "hf")],
)
def test_without_the_extra_the_message_names_it(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    module: ModuleType = importlib.import_module(f"torch_otprune.integrations.{name}")
    monkeypatch.delitem(vars(module), "PruningCallback", raising=False)
    for key in [k for k in sys.modules if k.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(OTPruneError) as error:
        module.PruningCallback  # noqa: B018
    assert error.value.fix == f"run pip install 'torch-otprune[{extra}]'."


def test_a_callback_without_a_schedule_or_with_a_wrong_part_is_refused() -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from torch_otprune.integrations.lightning import PruningCallback

    with pytest.raises(OTPruneError) as error:
        PruningCallback(POLICY, part="modle").begin(net())
    assert error.value.problem == "'modle' is no module of this model."
    model, at_once = net(), POLICY.model_copy(update={"schedule": None})
    with pytest.raises(OTPruneError) as error:
        PruningCallback(at_once).begin(model)
    assert error.value.problem.startswith("this policy has no schedule")
    assert not model._forward_pre_hooks


def test_several_processes_are_refused() -> None:
    from torch_otprune.integrations.loop import check_alone

    with pytest.raises(OTPruneError) as error:
        check_alone(2, "here")
    assert error.value.problem.startswith("2 processes train together")
