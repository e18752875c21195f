"""timm's names of DeiT and DeiT-III, and what they mean."""

from __future__ import annotations

import re

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# name: (embed_dim, depth, num_heads)
DEIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
DEIT_NAMES = (
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
    *("deit_base_patch16_384", "deit_base_distilled_patch16_384"),
    *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
    *(f"deit3_{size}_patch16_384" for size in ("small", "base", "large")),
    "deit3_huge_patch14_224",
)
_NAME = re.compile(r"deit(3?)_([a-z]+)_(distilled_)?patch(\d+)_(\d+)")


def deit_settings(name: str) -> dict:
    """Constructor arguments of FusedDeiT."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in DEIT_SIZES or (match[1] and match[3]):
        raise ValueError(
            "FusedDeiT.named: name must be deit_SIZE_patchP_PIXELS,"
            " deit_SIZE_distilled_patchP_PIXELS or deit3_SIZE_patchP_PIXELS with SIZE one of"
            f" {', '.join(DEIT_SIZES)}, got {name!r}"
        )
    sizes = zip(("embed_dim", "depth", "num_heads"), DEIT_SIZES[match[2]], strict=True)
    settings = {"img_size": int(match[5]), "patch_size": int(match[4]), **dict(sizes)}
    settings["distilled"] = bool(match[3])
    if match[1]:  # DeiT-III: LayerScale, and no position for the class token
        settings |= {"no_embed_class": True, "init_values": 1e-6}
    return settings
