"""Redundant layers in, none out: exact, or refused with the reason."""

from torch_otprune.fold.apply import Fold, fold_
from torch_otprune.fold.certificate import Certificate, Folded
from torch_otprune.fold.conv import BiasMap, commuted, compose, constant, with_shortcut
from torch_otprune.fold.linear import absorbed, rescaled, unscaled
from torch_otprune.fold.linearize import linearized
from torch_otprune.fold.lines import changes, linearize_, lines_of, refold_, refolded, surrogate
from torch_otprune.fold.pads import Reordered, reorder_padding
from torch_otprune.fold.segments import (
    FunctionalActivation,
    Segment,
    functional_activations,
    segments,
)

__all__ = [
    "BiasMap",
    "Certificate",
    "Fold",
    "Folded",
    "FunctionalActivation",
    "Reordered",
    "Segment",
    "absorbed",
    "changes",
    "commuted",
    "compose",
    "constant",
    "fold_",
    "functional_activations",
    "linearize_",
    "linearized",
    "lines_of",
    "refold_",
    "refolded",
    "reorder_padding",
    "rescaled",
    "segments",
    "surrogate",
    "unscaled",
    "with_shortcut",
]
