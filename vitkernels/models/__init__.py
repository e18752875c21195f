"""Readable architectures built from vitkernels.nn."""

from .maps import attention_maps, attention_rollout
from .vit import FusedViT

__all__ = ["FusedViT", "attention_maps", "attention_rollout"]
