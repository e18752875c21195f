"""Readable architectures built from vitkernels.nn."""

from .deit import FusedDeiT
from .hybrid import FusedHybridViT
from .maps import attention_maps, attention_rollout
from .swin import FusedSwin
from .swin_features import FeaturePyramid
from .vit import FusedViT

__all__ = [
    "FeaturePyramid",
    "FusedDeiT",
    "FusedHybridViT",
    "FusedSwin",
    "FusedViT",
    "attention_maps",
    "attention_rollout",
]
