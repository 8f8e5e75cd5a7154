"""The doctor: every parameter, block and activation accounted for, and what keeps it."""

from torch_otprune.doctor.examine import doctor
from torch_otprune.doctor.model import Activation, Diagnosis, Removable

__all__ = ["Activation", "Diagnosis", "Removable", "doctor"]
