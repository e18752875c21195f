"""Where hybrid Vision Transformers come from."""

from __future__ import annotations

import os

from torch import nn

from .hybrid_names import hybrid_settings
from .loaders import Loaders


class HybridLoaders(Loaders):
    """Class methods of FusedHybridViT that make a model: see Loaders."""

    @classmethod
    def from_timm(cls, model: str | nn.Module, pretrained: bool = False, **kwargs):
        """From a timm VisionTransformer with a HybridEmbed, or the name of one (**kwargs go to
        timm.create_model). A ResNetV2 in it becomes ours; another backbone is copied as it is."""
        from ..checkpoints.hybrid_timm import hybrid_from_timm

        return hybrid_from_timm(cls, model, pretrained, **kwargs)

    @classmethod
    def from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
        """From transformers' ViTHybridModel or ViTHybridForImageClassification (version 4), or from
        a folder with their config.json and weights."""
        from ..checkpoints.hybrid_huggingface import hybrid_from_huggingface

        return hybrid_from_huggingface(cls, source, **kwargs)

    @classmethod
    def from_torchvision(cls, model: nn.Module, **kwargs):
        raise ValueError(
            "from_torchvision: torchvision has no hybrid Vision Transformer; put one of its CNNs "
            "in front with FusedHybridViT(backbone=module)"
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs):
        """From a local .safetensors, .pth, .pt, .bin or .npz file, or a folder with config.json.

        The names in it tell whether timm, transformers or JAX wrote it, its shapes the ResNet.
        What shapes do not tell is as in FusedViT.from_pretrained. With backbone=module (a copy is
        taken) the file may hold the weights of any backbone.
        """
        from ..checkpoints.hybrid_pretrained import hybrid_from_pretrained

        return hybrid_from_pretrained(cls, path, **kwargs)

    @classmethod
    def named(cls, name: str, **kwargs):
        """With fresh weights, by timm's name: `FusedHybridViT.named("vit_base_r50_s16_224")`."""
        return cls(**{**hybrid_settings(name), **kwargs})
