from .op import BACKENDS, window_attention

__all__ = ["BACKENDS", "window_attention"]
