"""Model and example in, units that live or die together out."""

from torch_otprune.structure.forward import (
    Call,
    batch_size,
    evaluating,
    flat_tensors,
    head,
    map_tensors,
    run,
)
from torch_otprune.structure.graph import (
    Blocked,
    CostModel,
    Dim,
    Graph,
    Group,
    Member,
    Side,
    Tail,
    Term,
)
from torch_otprune.structure.trace import check, trace, trace_head

__all__ = [
    "Blocked",
    "Call",
    "CostModel",
    "Dim",
    "Graph",
    "Group",
    "Member",
    "Side",
    "Tail",
    "Term",
    "batch_size",
    "check",
    "evaluating",
    "flat_tensors",
    "head",
    "map_tensors",
    "run",
    "trace",
    "trace_head",
]
