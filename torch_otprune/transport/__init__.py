"""Two measures in, a cost, a coupling or a map out; the only door to geomloss and pykeops."""

from __future__ import annotations

from torch_otprune.transport.facility import FacilityLocation, facility_location
from torch_otprune.transport.swaps import improve, lower_bound

__all__ = ["FacilityLocation", "facility_location", "improve", "lower_bound"]
