"""Calibration batches in, statistics of a fixed size out."""

from torch_otprune.statistics.blame import blame, finite
from torch_otprune.statistics.data import check_batch, collect, rebatched
from torch_otprune.statistics.depth import ChainEvidence, SiteEvidence
from torch_otprune.statistics.evidence import Consumer, Evidence, Learnt, gather
from torch_otprune.statistics.moments import Moments
from torch_otprune.statistics.observation import Observation, conclude
from torch_otprune.statistics.recorder import Recorder, check_memory, consumers, quote
from torch_otprune.statistics.reservoir import Reservoir
from torch_otprune.statistics.sensitivity import Sensitivity, sense
from torch_otprune.statistics.signals import hear, signals_quote
from torch_otprune.statistics.stream import listen, streams_quote
from torch_otprune.statistics.tangents import Tangents, tangents, tangents_quote

__all__ = [
    "ChainEvidence",
    "Consumer",
    "Evidence",
    "Learnt",
    "Moments",
    "Observation",
    "Recorder",
    "Reservoir",
    "Sensitivity",
    "SiteEvidence",
    "Tangents",
    "blame",
    "check_batch",
    "check_memory",
    "collect",
    "conclude",
    "consumers",
    "finite",
    "gather",
    "hear",
    "listen",
    "quote",
    "rebatched",
    "sense",
    "signals_quote",
    "streams_quote",
    "tangents",
    "tangents_quote",
]
