"""Readable architectures built from vitkernels.nn."""

from .maps import attention_maps, attention_rollout
from .swin import FusedSwin
from .vit import FusedViT

__all__ = ["FusedSwin", "FusedViT", "attention_maps", "attention_rollout"]
