"""Triton backend of the linear_gelu slice, under the names of the raw operators."""

from vitkernels.ops.linear_gelu._triton_backward import linear_gelu_bwd
from vitkernels.ops.linear_gelu._triton_forward import linear_gelu_fwd

__all__ = ["linear_gelu_bwd", "linear_gelu_fwd"]
