"""Triton backend of the patch_embed slice, under the names of the raw operators."""

from vitkernels.ops.patch_embed._triton_backward import patch_embed_bwd
from vitkernels.ops.patch_embed._triton_forward import patch_embed_fwd

__all__ = ["patch_embed_bwd", "patch_embed_fwd"]
