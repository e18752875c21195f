from .op import BACKENDS, add_layer_norm, layer_norm_add

__all__ = ["BACKENDS", "add_layer_norm", "layer_norm_add"]
