"""Prune while Transformers' Trainer trains: `PruningCallback`, from the extra `hf`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from torch_otprune.integrations.accelerate import bare
from torch_otprune.integrations.extras import needed
from torch_otprune.integrations.loop import Loop, check_alone

__all__ = ["PruningCallback"]


class _Pruning(Loop):
    """Prune a model by a policy's schedule while a Trainer trains it.

        callback = PruningCallback(policy)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    Limits: one process, and no other wrapper such as DataParallel. Resuming from a checkpoint
    that was written behind a round is not possible: build the pruned model first, by
    `from_pretrained` or `otp.load`, and train it without the callback.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach."""
        check_alone(max(args.world_size, args.n_gpu), "PruningCallback, TrainingArguments")
        model: nn.Module = given["model"]
        if state.global_step:
            self.end()
        self.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Prune where a round is due."""
        self.tick([bare(given["optimizer"])])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take the hooks off."""
        self.end()


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
