"""Triton backend of the attention slice, under the names of the raw operators."""

from vitkernels.ops.attention._triton_backward import attention_bwd, attention_qkvpacked_bwd
from vitkernels.ops.attention._triton_forward import attention_fwd, attention_qkvpacked_fwd

__all__ = ["attention_bwd", "attention_fwd", "attention_qkvpacked_bwd", "attention_qkvpacked_fwd"]
