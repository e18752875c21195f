from .op import BACKENDS, linear, linear_gelu

__all__ = ["BACKENDS", "linear", "linear_gelu"]
