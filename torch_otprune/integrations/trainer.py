"""Prune while Transformers' Trainer trains: `PruningCallback`, from the extra `hf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torch_otprune.errors import LoadError, PolicyError
from torch_otprune.integrations.accelerate import bare
from torch_otprune.integrations.extras import needed
from torch_otprune.integrations.loop import Loop, check_alone

__all__ = ["PruningCallback"]


class _Pruning(Loop):
    """Prune a model by a policy's schedule while a Trainer trains it.

        callback = PruningCallback(policy)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    Limits: one process, and no other wrapper such as DataParallel. `load_best_model_at_end` is
    refused: the best checkpoint may be one of another shape, from before a round. Resuming from a
    checkpoint that was written behind a round is refused: build the pruned model first, by
    `from_pretrained` or `otp.load`, and train it without the callback.
    """

    _guard: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Be there when a checkpoint is read: the Trainer tells callbacks only afterwards."""
        self._guard = given["model"].register_load_state_dict_pre_hook(_Guard())

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach."""
        check_alone(max(args.world_size, args.n_gpu), "PruningCallback, TrainingArguments")
        if self._guard is not None:
            self._guard.remove()
        if args.load_best_model_at_end:
            raise _best()
        model: nn.Module = given["model"]
        if state.global_step:
            self.end()
        self.begin(model)
        if state.global_step:
            self._resume(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Prune where a round is due."""
        self.tick([bare(given["optimizer"])])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take the hooks off."""
        self.end()

    def _resume(self, step: int) -> None:
        """Count on from where a checkpoint was written."""
        attached = self.attached
        assert attached is not None
        if attached.policy.schedule is None:
            self.end()
            raise LoadError(
                "a checkpoint of the Trainer holds no masks, and criterion 'dtp' needs them.",
                where="PruningCallback, resume_from_checkpoint",
                fix="train from the start; or in a loop of your own, with attached.state_dict().",
            )
        first = attached.policy.schedule.steps[0]
        if step >= first:
            self.end()
            raise _behind(f"it is of step {step}, and the first round was due at step {first}")
        told = attached.state_dict()
        told["rounds"]["steps"] = step
        attached.load_state_dict(told)


class _Guard:
    """Looks at the weights of a checkpoint before a model reads them."""

    def __call__(self, module: nn.Module, state: Mapping[str, Any], *_: Any) -> None:
        for name, own in module.state_dict().items():
            found = state.get(name)
            if isinstance(found, Tensor) and _is_cut(found.shape, own.shape):
                shapes = f"{list(found.shape)} there, {list(own.shape)} in the model"
                raise _behind(f"'{name}' is {shapes}")


def _is_cut(less: Sequence[int], more: Sequence[int]) -> bool:
    """Tell a shape that a cut may have left; of others, torch says what is wrong."""
    pairs = [*zip(less, more, strict=False)]
    return len(less) == len(more) and less != more and all(a <= b for a, b in pairs)


def _best() -> PolicyError:
    return PolicyError(
        "load_best_model_at_end is on: the best checkpoint may be from before a pruning round, and "
        "the pruned model cannot take its weights.",
        where="PruningCallback, TrainingArguments.load_best_model_at_end",
        fix="set load_best_model_at_end=False; to choose the best, train the pruned model once "
        "more without the callback.",
    )


def _behind(reason: str) -> LoadError:
    return LoadError(
        f"this checkpoint was written behind a pruning round: {reason}.",
        where="PruningCallback, resume_from_checkpoint",
        fix="build the pruned model first, by from_pretrained or otp.load, and train it without "
        "the callback.",
    )


if TYPE_CHECKING:  # made on first use, with Transformers' own base class

    class PruningCallback(_Pruning):
        """Prune a model by a policy's schedule while a Trainer trains it."""


def __getattr__(name: str) -> Any:
    if name != "PruningCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    base = needed("transformers", "hf").TrainerCallback
    body = {"__module__": __name__, "__doc__": _Pruning.__doc__}
    globals()[name] = type(name, (_Pruning, base), body)
    return globals()[name]
