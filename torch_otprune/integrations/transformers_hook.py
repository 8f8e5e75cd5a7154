"""Tell Transformers about pruned models as soon as it is imported, and not before.

Transformers has tables of loaders, but no entry point by which a package could add itself to
them, and importing it takes seconds. So we wait on `sys.meta_path` for the one module that holds
the tables, let it load as ever, and add ourselves. Whoever never imports it pays nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["METHOD", "install", "register"]

METHOD = "otprune"  # said here once more, since importing this file must not import torch

_TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Register now if Transformers is loaded, else once it is. Doing it twice changes nothing."""
    loaded = sys.modules.get(_TABLES)
    if loaded is not None:
        register(loaded)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds nothing itself: it lets the others find the tables and goes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # an import that fails may be tried again
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module as its own loader does, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Put back first: tracebacks ask a module's loader for its source.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Watch)]
        register(module)


def register(tables: ModuleType) -> None:
    """Add ourselves to the tables of Transformers, once.

    Args:
        tables: its module `quantizers.auto`, loaded.
    """
    if METHOD in tables.AUTO_QUANTIZER_MAPPING:
        return
    tables.register_quantization_config(METHOD)(_settings(tables))
    tables.register_quantizer(METHOD)(_quantizer(tables))


def _settings(tables: Any) -> type:
    """Make the class that holds what a configuration carries; its base is Transformers'."""

    class OTPruneConfig(tables.QuantizationConfigMixin):  # type: ignore[misc]
        """The entry of `config.json`: plans, and what the fields said before them."""

        def __init__(self, **said: Any) -> None:
            self.__dict__.update(said)
            self.quant_method = METHOD

    return OTPruneConfig


def _quantizer(tables: Any) -> type:
    """Make the class that Transformers calls; nothing is quantised, the hook is what we need."""

    class OTPruneQuantizer(tables.HfQuantizer):  # type: ignore[misc]
        """Gives an empty model the shapes that a plan has left, then steps back."""

        seen = False

        def update_attn_implementation(self, config: Any) -> Any:
            """Take the one chance to see the configuration before the model is built."""
            from torch_otprune.integrations.transformers.loading import widen_

            widen_(config, vars(self.quantization_config))
            self.seen = True
            return config

        def _process_model_before_weight_loading(self, model: Any, **given: Any) -> Any:
            from torch_otprune.integrations.transformers.loading import rebuild_

            files = given.get("checkpoint_files") or ()
            rebuild_(model, vars(self.quantization_config), files, seen=self.seen)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            from torch_otprune.integrations.transformers.loading import release_

            release_(model, vars(self.quantization_config))
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return OTPruneQuantizer
