"""Fused kernels for Vision Transformers: the same numbers as timm, transformers and torchvision, faster."""

from . import ops
from ._dispatch import available_backends, use_backend

__version__ = "0.1.0"

__all__ = ["available_backends", "ops", "use_backend"]
