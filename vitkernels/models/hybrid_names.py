"""timm's names of hybrid Vision Transformers, and the constructor arguments that they stand for."""

from __future__ import annotations

import re

from .loaders import SIZES

# (ResNet, stride): blocks of its stages; "r" is the stem alone
STAGES = {
    ("r", "16"): (),
    ("r26", "32"): (2, 2, 2, 2),
    ("r50", "16"): (3, 4, 9),
    ("r50", "32"): (3, 4, 6, 3),
}
COMMON = (
    "vit_tiny_r_s16_p8_224", "vit_tiny_r_s16_p8_384", "vit_small_r26_s32_224",
    "vit_small_r26_s32_384", "vit_base_r26_s32_224", "vit_base_r50_s16_224",
    "vit_base_r50_s16_384", "vit_large_r50_s32_224", "vit_large_r50_s32_384",
)  # fmt: skip

_NAME = re.compile(r"vit_([a-z]+)_(r\d*)_s(\d+)(?:_p(\d+))?_(\d+)")
_OLD = re.compile(r"vit_base_resnet50_(\d+)(?:_in21k)?")  # timm's name before 0.5


def hybrid_settings(name: str) -> dict:
    """Arguments of FusedHybridViT for a name such as vit_base_r50_s16_384."""
    name = _OLD.sub(r"vit_base_r50_s16_\1", name)
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in SIZES or (match[2], match[3]) not in STAGES:
        stages = ", ".join(f"{resnet}_s{stride}" for resnet, stride in STAGES)
        raise ValueError(
            "FusedHybridViT.named: name must be vit_SIZE_RESNET_PIXELS or "
            f"vit_SIZE_RESNET_pPATCH_PIXELS with RESNET one of {stages} and SIZE one of "
            f"{', '.join(SIZES)}, got {name!r}"
        )
    size = dict(zip(("embed_dim", "depth", "num_heads", "mlp_ratio"), SIZES[match[1]], strict=True))
    return {
        "backbone": STAGES[match[2], match[3]],
        "img_size": int(match[5]),
        "patch_size": int(match[4] or 1),
        **size,
    }
