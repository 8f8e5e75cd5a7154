"""What would fold: rows of layers that are affine once their activations are."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.errors import StructureError
from torch_otprune.fold.certificate import Certificate
from torch_otprune.fold.chains import Layer, chains, runs
from torch_otprune.fold.modules import ACTIVATIONS
from torch_otprune.fold.pieces import growing
from torch_otprune.structure.flow import Flow, flow
from torch_otprune.structure.forward import batch_size
from torch_otprune.structure.trace import check

__all__ = ["FunctionalActivation", "Segment", "functional_activations", "segments"]

_FUNCTIONS = frozenset(
    """
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logsigmoid mish
    prelu relu relu6 rrelu selu silu sigmoid softplus softshrink softsign tanh tanhshrink threshold
    """.split()
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Frozen):
    """Consecutive layers that would fold into one."""

    layers: tuple[str, ...] = Field(min_length=2, description="paths of the affine layers")
    activations: tuple[str, ...] = Field(
        description="paths of the activations between them; empty: it folds now"
    )
    certificate: Certificate = Field(description="with every activation taken for the identity")


class FunctionalActivation(_Frozen):
    """An activation that no module stands for, so that none can be exchanged for the identity."""

    function: str = Field(description="name of the function")
    module: str = Field(description="path of the module whose forward calls it")
    kind: str = Field(description="class of that module")


def segments(
    model: nn.Module, example: Any, *, linear: Collection[str] | None = None
) -> tuple[Segment, ...]:
    """List the longest segments that would fold, and those that fold as the model is.

    Args:
        model: any module; it is read, never written.
        example: one batch, as the model takes it.
        linear: paths of the activations to take for linear; None takes all.

    Returns:
        in order of execution, a longer one before those inside it; costs before and after are
        of folding it whole, which for a long segment may cost more than it saves.

    Raises:
        StructureError: if `linear` names no activation, or the model cannot be analysed.

    Limits: an activation's best line may shift; where the certificate is exact because nothing
    shifts in front of a padded layer, only lines through the origin keep it exact.
    """
    check(model)
    rows = chains(model, flow(model, example), batch_size(example))
    known = [x.path for chain in rows for x in chain if x.kind == "activation"]
    if linear is not None:
        _check_known(linear, known)
    chosen = frozenset(known if linear is None else linear)
    found = {s for chain in rows for names in (chosen, ()) for s in _maximal(chain, names)}
    order = {x.path: i for i, x in enumerate(x for chain in rows for x in chain)}
    return tuple(sorted(found, key=lambda s: (order[s.layers[0]], -len(s.layers))))


def _check_known(linear: Collection[str], known: Sequence[str]) -> None:
    for path in linear:
        if path not in known:
            close = ", ".join(difflib.get_close_matches(path, known, cutoff=0.0)) or "none"
            raise StructureError(
                f"'{path}' is no activation module between two layers.",
                where=f"segments(linear=); closest: {close}",
                fix="name activation modules that run once, and whose output one layer reads.",
            )


def _maximal(chain: tuple[Layer, ...], linear: Collection[str]) -> Iterator[Segment]:
    for row in runs(chain, linear):
        places = [i for i, x in enumerate(row) if x.geometry is not None]
        while places:
            *_, found = growing([row[i] for i in places])
            size = len(found.layers)
            if size > 1:
                inside = row[places[0] : places[size - 1]]
                yield Segment(
                    layers=tuple(x.path for x in found.layers),
                    activations=tuple(x.path for x in inside if x.geometry is None),
                    certificate=found.certificate,
                )
            del places[:size]


def functional_activations(model: nn.Module, example: Any) -> tuple[FunctionalActivation, ...]:
    """List the activations that are called as functions.

    Args:
        model: any module; it is read, never written.
        example: one batch, as the model takes it.

    Returns:
        in order of execution, one entry per call; write each as a module, such as `nn.ReLU`, to
        have it listed in `segments`.
    """
    return tuple(_functional(model, flow(model, example)))


def _functional(model: nn.Module, notes: Flow) -> Iterator[FunctionalActivation]:
    for op in notes.ops:
        name, module = op.name.rstrip("_"), model.get_submodule(op.module)
        if name in _FUNCTIONS and not isinstance(module, ACTIVATIONS):
            yield FunctionalActivation(function=name, module=op.module, kind=type(module).__name__)
