"""Prove what a model is as a function of its input: convex, monotone, Lipschitz."""

from torch_otprune.certify.keep import Keeper, keeper
from torch_otprune.certify.result import Certificate
from torch_otprune.certify.study import certify

__all__ = ["Certificate", "Keeper", "certify", "keeper"]
