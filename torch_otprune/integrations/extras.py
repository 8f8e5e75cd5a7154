"""What to install, said where something that is optional is missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch_otprune.errors import OTPruneError

__all__ = ["EXTRAS", "needed"]

EXTRAS: dict[str, tuple[str, ...]] = {
    "hf": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
"""Each extra of ours, with the packages that it brings."""


def needed(module: str, extra: str) -> ModuleType:
    """Import an optional package, or name the extra that brings it.

    Args:
        module: what to import, maybe dotted.
        extra: one of `EXTRAS`.

    Returns:
        the module, `a.b` for `a.b`.

    Raises:
        OTPruneError: if the package is not installed, or does not import.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name in {package, module}
        reason = "is not installed" if absent else f"does not import: {str(error).rstrip('.')}"
        raise OTPruneError(
            f"this needs {package}, which {reason}.",
            where=f"torch_otprune's extra '{extra}': {', '.join(EXTRAS[extra])}",
            fix=f"run pip install 'torch-otprune[{extra}]'.",
        ) from error
