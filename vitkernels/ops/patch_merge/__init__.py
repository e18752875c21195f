from .op import BACKENDS, patch_merge_layer_norm

__all__ = ["BACKENDS", "patch_merge_layer_norm"]
