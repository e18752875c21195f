"""The fused operators: a folder each, with public function, reference and backends."""

from .add_layer_norm import add_layer_norm, layer_norm_add
from .attention import attention, attention_qkvpacked, attention_weights
from .distillation_loss import distillation_loss
from .linear_gelu import linear, linear_gelu
from .patch_embed import patch_embed
from .patch_merge import patch_merge_layer_norm
from .window_attention import window_attention

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_weights",
    "distillation_loss",
    "layer_norm_add",
    "linear",
    "linear_gelu",
    "patch_embed",
    "patch_merge_layer_norm",
    "window_attention",
]
