"""Which units live or die together: one run of the model with every number labelled."""

from torch_otprune.structure.coupling.components import Component, Sides, components

__all__ = ["Component", "Sides", "components"]
