"""A pruned model on disk: its weights, its plan, and no pickle.

A directory holds `model.safetensors` (every tensor once; several files with an index where that
is large) and `plan.json` (how to get from the factory's dense model to these tensors, and how to
tell that nothing was swapped). Beside it may lie the way back: the dense model and `undo.json`.
"""

from torch_otprune.store.files import Saved
from torch_otprune.store.plans import PLANS, WayBack, forget, plan_of, remember
from torch_otprune.store.read import load
from torch_otprune.store.rebind import Rebinding
from torch_otprune.store.undo import undo_
from torch_otprune.store.write import save

__all__ = [
    "PLANS",
    "Rebinding",
    "Saved",
    "WayBack",
    "forget",
    "load",
    "plan_of",
    "remember",
    "save",
    "undo_",
]
