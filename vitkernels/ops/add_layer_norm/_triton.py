"""Triton backend of the add_layer_norm slice, under the names of the raw operators."""

from vitkernels.ops.add_layer_norm._triton_backward import add_layer_norm_bwd, layer_norm_add_bwd
from vitkernels.ops.add_layer_norm._triton_forward import add_layer_norm_fwd, layer_norm_add_fwd

__all__ = ["add_layer_norm_bwd", "add_layer_norm_fwd", "layer_norm_add_bwd", "layer_norm_add_fwd"]
