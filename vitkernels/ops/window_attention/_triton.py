"""Triton backend of the window_attention slice, under the names of the raw operators."""

from vitkernels.ops.window_attention._triton_backward import window_attention_bwd
from vitkernels.ops.window_attention._triton_forward import window_attention_fwd

__all__ = ["window_attention_bwd", "window_attention_fwd"]
