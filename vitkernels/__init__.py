"""Fused kernels for Vision Transformers: the numbers of timm, in fewer passes."""

from . import ops
from ._dispatch import available_backends, use_backend
from ._version import __version__

__all__ = [
    "FusedDeiT",
    "FusedHybridViT",
    "FusedSwin",
    "FusedViT",
    "__version__",
    "available_backends",
    "ops",
    "use_backend",
]


def __getattr__(name: str):
    """The models are imported at first use, to keep the import of the operators short."""
    if name in ("FusedDeiT", "FusedHybridViT", "FusedSwin", "FusedViT"):
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module 'vitkernels' has no attribute {name!r}")
