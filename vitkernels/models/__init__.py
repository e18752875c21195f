"""Readable architectures built from vitkernels.nn."""

from .hybrid import FusedHybridViT
from .maps import attention_maps, attention_rollout
from .swin import FusedSwin
from .swin_features import FeaturePyramid
from .vit import FusedViT

__all__ = [
    "FeaturePyramid",
    "FusedHybridViT",
    "FusedSwin",
    "FusedViT",
    "attention_maps",
    "attention_rollout",
]
