"""Before and after in, a verified report out: table, pictures, one page."""

from torch_otprune.report.anatomy import draw_groups
from torch_otprune.report.compare import agreement, layer_errors, output_error, per_layer_error
from torch_otprune.report.measure import count_macs, count_params, interval, latency
from torch_otprune.report.model import (
    Agreement,
    Interval,
    Latency,
    LayerError,
    OutputError,
    RepairNote,
    Report,
    environment,
)

__all__ = [
    "Agreement",
    "Interval",
    "Latency",
    "LayerError",
    "OutputError",
    "RepairNote",
    "Report",
    "agreement",
    "count_macs",
    "count_params",
    "draw_groups",
    "environment",
    "interval",
    "latency",
    "layer_errors",
    "output_error",
    "per_layer_error",
]
