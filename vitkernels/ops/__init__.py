"""The fused operators: one slice a folder, each with its reference, its backends and its public function."""

from .add_layer_norm import add_layer_norm, layer_norm_add
from .attention import attention, attention_qkvpacked, attention_weights

__all__ = ["add_layer_norm", "attention", "attention_qkvpacked", "attention_weights", "layer_norm_add"]
