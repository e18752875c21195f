from .op import BACKENDS, patch_embed

__all__ = ["BACKENDS", "patch_embed"]
