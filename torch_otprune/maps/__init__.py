"""Maps that carry one set of activations onto another; importing this fills the table."""

from torch_otprune.maps.affine import AffineMap
from torch_otprune.maps.base import AffineFit, FittedMap, FreeFit, MapReport, TransportMap, register
from torch_otprune.maps.domain_map import DomainMap
from torch_otprune.maps.elastic import Elastic
from torch_otprune.maps.flow import Flow
from torch_otprune.maps.gap import monge_gap
from torch_otprune.maps.monge_map import MongeMap
from torch_otprune.maps.neurons import NeuronFlow, flow_neurons
from torch_otprune.maps.sparse_map import SparseMap

__all__ = [
    "AffineFit",
    "AffineMap",
    "DomainMap",
    "Elastic",
    "FittedMap",
    "Flow",
    "FreeFit",
    "MapReport",
    "MongeMap",
    "NeuronFlow",
    "SparseMap",
    "TransportMap",
    "flow_neurons",
    "monge_gap",
    "register",
]
