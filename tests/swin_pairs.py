"""Small timm Swin Transformers and our copies, with weights that make every parameter matter."""

import functools

import torch
from timm_stub import timm
from torch import nn
from vit_pairs import (  # noqa: F401 (handed on)
    ROUNDING,
    logits_and_grads,
    needs_timm,
    randomised,
    relative_errors,
    same,
)

from vitkernels import FusedSwin

TINY = {"img_size": 64, "embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
V2 = {"version": 2, "window_size": 4}
ONE = {"depths": (2,), "num_heads": (1,)}

# name: timm's constructor arguments; version is not one of them
CONFIGS = {
    "v1": {"window_size": 4},
    "v1_224": {"img_size": 224, "depths": (2, 1, 2, 2), "num_heads": (1, 1, 2, 4)},
    "v1_256_window7": {"img_size": 256, "depths": (2, 2), "num_heads": (1, 2)},  # off the grid
    "v1_384_window12": {"img_size": 384, "window_size": 12, **ONE},
    "v1_not_square": {"img_size": (48, 96), "window_size": (3, 4)},
    "v1_odd_maps": {"img_size": (60, 44), "window_size": 4},  # 15 x 11, 8 x 6, 4 x 3
    "v1_odd_windows": {"img_size": (36, 52), "window_size": (5, 2)},
    "v1_s3": {"window_size": (4, 4, 2)},
    "v1_options": {
        "window_size": 4, "patch_size": (4, 2), "in_chans": 1, "qkv_bias": False, "head_dim": 16,
        "global_pool": "catavgmax", "mlp_ratio": (2.0, 3.0, 2.5),
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    },
    "v1_always_partition": {"img_size": (64, 48), "window_size": 6, "always_partition": True},
    "v1_features": {"window_size": 4, "num_classes": 0, "global_pool": ""},
    "v2": V2,
    "v2_256": {**V2, "img_size": 256, "window_size": 8, "depths": (2, 2), "num_heads": (1, 2)},
    "v2_window16": {**V2, "img_size": 128, "window_size": 16, **ONE},
    "v2_window24": {**V2, "img_size": 192, "window_size": 24, **ONE},
    "v2_not_square": {**V2, "img_size": (48, 96), "window_size": (3, 4)},
    "v2_odd_maps": {**V2, "img_size": (60, 44), "act_layer": "gelu_tanh"},
    "v2_pretrained": {**V2, "pretrained_window_sizes": (3, 2, 6), "qkv_bias": False},
    "v2_always_partition": {**V2, "window_size": 6, "always_partition": True},
}  # fmt: skip
FAST = ("v1", "v1_odd_maps", "v2", "v2_odd_maps")


def classes() -> dict[int, type]:
    """timm's two classes by version."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return {1: SwinTransformer, 2: SwinTransformerV2}


def settings(name="v1", **more) -> dict:
    return {"num_classes": 10, "drop_path_rate": 0.0, **TINY, **CONFIGS[name], **more}


def timm_swin(name="v1", **more) -> nn.Module:
    """timm's model of a configuration, evaluating; no parameter keeps its initial value."""
    arguments = settings(name, **more)
    model = classes()[arguments.pop("version", 1)](**arguments)
    return randomised(model.eval())


def pair(name="v1", **more) -> tuple[nn.Module, FusedSwin]:
    theirs = timm_swin(name, **more)
    ours = FusedSwin(**settings(name, **more), pad_mode="timm").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def images(name="v1", batch=2, **more) -> torch.Tensor:
    arguments = settings(name, **more)
    size = arguments["img_size"]
    size = (size, size) if isinstance(size, int) else size
    if max(size) > 100:
        batch = 1
    return torch.randn(batch, arguments.get("in_chans", 3), *size)


__all__ = ["CONFIGS", "FAST", "ROUNDING", "classes", "images", "needs_timm", "pair", "timm"]
