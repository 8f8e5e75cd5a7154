"""What zeros did to every layer, and what that can do to the output at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from torch_otprune.structure.graph import Graph
from torch_otprune.structure.layers import is_dense, tensor

__all__ = ["LayerZeros", "OutputBound", "bound", "gain"]

_CALM = frozenset(
    """
    relu relu6 hardtanh hardsigmoid sigmoid logsigmoid softplus softshrink softsign tanh tanhshrink
    """.split()
)  # activations that never move two values further apart
_LARGE = 2048  # above, singular values take too long, and the Frobenius norm stands in


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerZeros(_Frozen):
    """One layer with zeros, measured on calibration rows."""

    layer: str = Field(description="path of the layer")
    criterion: str
    pattern: str
    weights: int = Field(gt=0, description="weights of the layer")
    left: int = Field(ge=0, description="weights that are not zero")
    masked: float | None = Field(
        default=None,
        description="relative error of its output by the zeros alone, behind its rectifier if the "
        "criterion knows that; null unmeasured",
    )
    error: float | None = Field(
        default=None, description="the same with what stays refitted; null unmeasured"
    )
    distance: float | None = Field(
        default=None,
        description="bound of the W2 between its dense and pruned answers, behind its rectifier if "
        "the criterion knows that: root mean squared distance, all outputs together",
    )
    radius: float | None = Field(
        default=None, description="what the criterion guaranteed of `distance`; null without one"
    )
    gap: float | None = Field(
        default=None, description="by which share the norm, before the refit, may exceed the least"
    )
    growth: float | None = Field(
        default=None, description="factor by which an error in front may grow, as guaranteed"
    )
    mode: str = Field(description="whose inputs and answers: parallel, sequential or cascade")
    rows: int = Field(ge=0, description="rows that were looked at")
    note: str = ""

    @property
    def kept(self) -> float:
        """Divide what is left by what there was."""
        return self.left / self.weights


class OutputBound(_Frozen):
    """How far zeros can move what a chain of layers writes, on the calibration rows.

    Both are root mean squared distances over all outputs, and so bound a W2 as well.
    """

    layer: str = Field(description="the last layer of the chain, whose output is meant")
    certified: float | None = Field(
        default=None, description="from what was measured at every layer; null where unknown"
    )
    promised: float | None = Field(
        default=None, description="from the radii, before anything was solved; null without them"
    )
    reason: str = Field(default="", description="why a bound is not known; empty where one is")


def bound(
    models: tuple[nn.Module, nn.Module], graph: Graph, zeros: Sequence[LayerZeros], samples: int
) -> OutputBound | None:
    """Compose the layers' errors along a chain of dense layers.

    An error in front passes a layer by its spectral norm at most, and an activation undiminished
    at worst. Where a layer was fitted to dense inputs, its own error is added; where it was given
    the inputs it has now, its error was measured with all that is in front of it.

    Args:
        models: before the zeros, and with them.
        graph: the analysis.
        zeros: what was measured.
        samples: rows that a layer sees which is run once per sample.

    Returns:
        the bound at the last dense layer, or why there is none; None without zeros.

    Source: Aghasi et al. 2017, theorems 1 and 2, which assume layers of norm 1; here each layer's
    own norm is taken. A cascade's factor is the root of its gamma.
    """
    if not zeros:
        return None
    told = {entry.layer: entry for entry in zeros}
    last = graph.order[-1] if graph.order else zeros[-1].layer
    if reason := next(_objections(models[0], graph, told, samples), ""):
        return OutputBound(layer=last, reason=reason)
    certified: float | None = 0.0
    promised: float | None = 0.0
    for path in graph.order:
        before, after = (gain(model.get_submodule(path)) for model in models)
        entry = told.get(path)
        if entry is None:
            certified, promised = _times(certified, before), _times(promised, before)
            continue
        assert entry.distance is not None
        along = entry.mode == "parallel"
        certified = _plus(entry.distance, _times(certified, after) if along else 0.0)
        promised = _promise(entry, promised, before, after)
    return OutputBound(layer=last, certified=certified, promised=promised)


def _promise(
    entry: LayerZeros, promised: float | None, before: float, after: float
) -> float | None:
    if entry.radius is None:
        return None
    if entry.mode == "parallel":
        return _plus(entry.radius, _times(promised, after))
    return entry.radius if entry.growth is None else _times(promised, entry.growth * before)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _plus(value: float, other: float | None) -> float | None:
    return None if other is None else value + other


def gain(module: nn.Module) -> float:
    """Bound by how much a dense layer stretches a vector: its spectral norm.

    Args:
        module: dense layer.

    Returns:
        the largest singular value; of very large layers the Frobenius norm, which is no smaller.
    """
    weight = tensor(module, "weight").double()
    if min(weight.shape) > _LARGE:
        return float(weight.norm())
    return float(torch.linalg.matrix_norm(weight, 2))


def _objections(
    model: nn.Module, graph: Graph, told: Mapping[str, LayerZeros], samples: int
) -> Iterator[str]:
    """Say why errors do not compose along one chain."""
    for path in graph.order:
        if not is_dense(model.get_submodule(path)):
            yield f"'{path}' is no dense layer"
        if graph.tails[path].added or path in graph.repeated:
            yield f"'{path}' is added to a stream, or runs several times"
        if any(type(model.get_submodule(m)) is not nn.Dropout for m in graph.tails[path].modules):
            yield f"a norm stands behind '{path}'"
    for front, behind in pairwise(graph.order):
        sites = [s for s in graph.sites if s.producer == front]
        if len(sites) != 1 or sites[0].readers != (behind,) or sites[0].others:
            yield f"more than one activation lies between '{front}' and '{behind}'"
        elif sites[0].function not in _CALM:
            yield f"'{sites[0].name}', a {sites[0].function}, may move values apart"
    for path, entry in told.items():
        if path not in graph.order:
            yield f"'{path}' was not seen to run"
        elif entry.distance is None:
            yield f"criterion {entry.criterion} looked at no data"
        elif entry.rows != samples:
            yield f"{entry.rows} rows were seen at '{path}', and {samples} samples there are"
