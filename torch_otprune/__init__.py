"""Make trained PyTorch models smaller, and repair them by transport and least squares."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch_otprune.integrations.transformers_hook import install as _install

if TYPE_CHECKING:
    from torch_otprune.align import Alignment, align
    from torch_otprune.attach import Attached, attach, observe
    from torch_otprune.certify import Certificate, certify
    from torch_otprune.compare import Comparison, compare
    from torch_otprune.doctor import Diagnosis, doctor
    from torch_otprune.errors import OTPruneError
    from torch_otprune.integrations.export import export
    from torch_otprune.pipeline import apply_, prune_
    from torch_otprune.plan import Plan
    from torch_otprune.policy import (
        Budget,
        Calibration,
        Channels,
        Experts,
        Heads,
        Hidden,
        Layers,
        Linearize,
        Policy,
        Schedule,
        Weights,
        prunable,
    )
    from torch_otprune.repair.domain import adapt_
    from torch_otprune.report import Folds, Report, Trainability, folds, trainability
    from torch_otprune.store import load, save, undo_

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Attached",
    "Budget",
    "Calibration",
    "Certificate",
    "Channels",
    "Comparison",
    "Diagnosis",
    "Experts",
    "Folds",
    "Heads",
    "Hidden",
    "Layers",
    "Linearize",
    "OTPruneError",
    "Plan",
    "Policy",
    "Report",
    "Schedule",
    "Trainability",
    "Weights",
    "adapt_",
    "align",
    "apply_",
    "attach",
    "certify",
    "compare",
    "doctor",
    "export",
    "folds",
    "load",
    "observe",
    "prunable",
    "prune_",
    "save",
    "trainability",
    "undo_",
]

# Where the names come from, on first use: `otprune --help` must not wait for torch. All at
# once, because that also fills the tables of criteria and repairs.
_HOMES = (
    "align",
    "attach",
    "certify",
    "compare",
    "doctor",
    "errors",
    "integrations.export",
    "pipeline",
    "plan",
    "policy",
    "repair.domain",
    "report",
    "store",
)


class _Front(ModuleType):
    """The package as a module whose functions are not hidden by submodules of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing torch_otprune.attach would bind the module over the function.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
_install()  # pruned models load with `from_pretrained` from here on; imports nothing by itself

if not TYPE_CHECKING:  # a checker would believe any name if it saw this

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            globals().update({n: getattr(module, n) for n in module.__all__ if n in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
