"""Criteria that rank whole blocks and activations; importing this fills the table."""

from torch_otprune.criteria.layers.angular import Angular
from torch_otprune.criteria.layers.base import (
    LayerCriterion,
    LayerNeed,
    ScoreLayerCriterion,
    SiteCriterion,
    register,
)
from torch_otprune.criteria.layers.block_influence import BlockInfluence
from torch_otprune.criteria.layers.dtp import DTP
from torch_otprune.criteria.layers.easier import Easier
from torch_otprune.criteria.layers.entropy import Entropy
from torch_otprune.criteria.layers.gaussian import Gaussian
from torch_otprune.criteria.layers.lacoot import LaCoOT
from torch_otprune.criteria.layers.loss_delta import LossDelta
from torch_otprune.criteria.layers.magnitude import Magnitude
from torch_otprune.criteria.layers.max_sliced import MaxSliced
from torch_otprune.criteria.layers.random import Random
from torch_otprune.criteria.layers.space_folds import SpaceFolds
from torch_otprune.criteria.layers.stein import Stein
from torch_otprune.criteria.layers.tlc import TLC
from torch_otprune.criteria.layers.transport import Transport

__all__ = [
    "DTP",
    "TLC",
    "Angular",
    "BlockInfluence",
    "Easier",
    "Entropy",
    "Gaussian",
    "LaCoOT",
    "LayerCriterion",
    "LayerNeed",
    "LossDelta",
    "Magnitude",
    "MaxSliced",
    "Random",
    "ScoreLayerCriterion",
    "SiteCriterion",
    "SpaceFolds",
    "Stein",
    "Transport",
    "register",
]
