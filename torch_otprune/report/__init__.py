"""Before and after in, a verified report out: table, pictures, one page."""

from torch_otprune.report.anatomy import draw_groups
from torch_otprune.report.compare import (
    agreement,
    layer_errors,
    output_error,
    per_layer_error,
    sample_errors,
)
from torch_otprune.report.folds import Folds, LayerFolds, folds
from torch_otprune.report.images import Images, images_of
from torch_otprune.report.kernels import trainability
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
from torch_otprune.report.table import tabulated
from torch_otprune.report.trainability import Trainability

__all__ = [
    "Agreement",
    "Folds",
    "Images",
    "Interval",
    "Latency",
    "LayerError",
    "LayerFolds",
    "OutputError",
    "RepairNote",
    "Report",
    "Trainability",
    "agreement",
    "count_macs",
    "count_params",
    "draw_groups",
    "environment",
    "folds",
    "images_of",
    "interval",
    "latency",
    "layer_errors",
    "output_error",
    "per_layer_error",
    "sample_errors",
    "tabulated",
    "trainability",
]
