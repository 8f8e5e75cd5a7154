"""Prune while Lightning trains: `PruningCallback`, from the extra `lightning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from torch_otprune.integrations.extras import needed
from torch_otprune.integrations.loop import Loop, check_alone

__all__ = ["PruningCallback"]

_HOOK = "on_load_checkpoint"


class _Pruning(Loop):
    """Prune a LightningModule, or a part of it, by a policy's schedule.

        callback = PruningCallback(policy, part="model")
        Trainer(callbacks=[callback]).fit(module, loader)

    Steps are those of the optimiser, accumulation and all. Optimisers, schedulers and precision
    plugins stay the same objects. A checkpoint holds how far the schedule is, and
    `fit(ckpt_path=...)` on the dense module goes on from there.

    Limits: one process. Modules that `configure_model` builds cannot be resumed.
    """

    _steps = 0

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Be there when a checkpoint is read: Lightning tells callbacks only after the weights."""
        if stage != "fit":
            return
        check_alone(trainer.world_size, "PruningCallback, Trainer.world_size")
        self._steps = 0
        vars(pl_module)[_HOOK] = _Early(self, pl_module)

    def resume(self, pl_module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Give a dense module the shapes that it has in a checkpoint."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            self.begin(pl_module).load_state_dict(state)
            self._steps = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach."""
        vars(pl_module).pop(_HOOK, None)
        self.begin(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
        """Prune where a round is due."""
        if trainer.global_step > self._steps:  # not while gradients are accumulated
            self._steps = trainer.global_step
            self.tick(trainer.optimizers)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take the hooks off."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Take the hooks off, also where no checkpoint could be read."""
        vars(pl_module).pop(_HOOK, None)
        self.end(exception)

    def state_dict(self) -> dict[str, Any]:
        """Write how far the schedule is, also in a checkpoint that is taken behind `fit`."""
        known = self.attached or self.ended
        return {} if known is None else known.state_dict()

    @property
    def state_key(self) -> str:
        """Name the entry in a checkpoint."""
        return f"torch_otprune.PruningCallback[{self.part}]"


class _Early:
    """What Lightning calls on the module before it reads the weights of a checkpoint."""

    def __init__(self, callback: _Pruning, pl_module: Any) -> None:
        self.callback, self.pl_module = callback, pl_module
        self.own = pl_module.on_load_checkpoint

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.callback.resume(self.pl_module, checkpoint)
        self.own(checkpoint)


if TYPE_CHECKING:  # made on first use, with Lightning's own base class

    class PruningCallback(_Pruning):
        """Prune a LightningModule, or a part of it, by a policy's schedule."""


def __getattr__(name: str) -> Any:
    if name != "PruningCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    base = needed("lightning.pytorch", "lightning").Callback
    body = {"__module__": __name__, "__doc__": _Pruning.__doc__}
    globals()[name] = type(name, (_Pruning, base), body)
    return globals()[name]
