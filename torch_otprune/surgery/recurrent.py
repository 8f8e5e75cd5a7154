"""Recurrent layers and others whose integers and caches repeat what their tensors say."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["fit_shapes_", "refresh_"]

_GATES = {"LSTM": 4, "GRU": 3}


def fit_shapes_(model: nn.Module) -> None:
    """Let integers say what the tensors beside them say.

    Args:
        model: with its tensors cut; written in place.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            _fit_layers_(module)
        elif isinstance(module, nn.RNNCellBase):
            module.input_size = module.weight_ih.shape[1]
            module.hidden_size = module.weight_hh.shape[1]
        elif isinstance(module, nn.Bilinear):
            names = ("out_features", "in1_features", "in2_features")
            for name, size in zip(names, module.weight.shape, strict=True):
                setattr(module, name, size)
        elif isinstance(module, nn.EmbeddingBag):
            module.embedding_dim = module.weight.shape[1]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)


def _fit_layers_(module: nn.RNNBase) -> None:
    shapes = {name: tensor.shape for name, tensor in module.named_parameters(recurse=False)}
    module.input_size = shapes["weight_ih_l0"][1]
    module.hidden_size = shapes["weight_ih_l0"][0] // _GATES.get(module.mode, 1)
    if module.proj_size:
        module.proj_size = shapes["weight_hr_l0"][0]
    refresh_(module)


def refresh_(module: nn.Module) -> None:
    """Let a recurrent layer's list of weights hold what the layer holds.

    Args:
        module: any; others than recurrent layers are left alone.
    """
    if not isinstance(module, nn.RNNBase):
        return
    held = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weights = held
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in held]
    if all(w is None or w.is_cuda for w in held):
        module.flatten_parameters()
