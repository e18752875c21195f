"""timm's names of Swin Transformers, and the constructor arguments that they stand for."""

from __future__ import annotations

import re

# size: (embed_dim, depths, num_heads)
SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
# Found by architecture search (Chen et al. 2021): size: (depths, windows of the stages)
S3_SIZES = {
    "tiny": ((2, 2, 6, 2), (7, 7, 14, 7)),
    "small": ((2, 2, 18, 2), (14, 14, 14, 7)),
    "base": ((2, 2, 30, 2), (7, 7, 14, 7)),
}
PATCH = 4  # of Swin V2, whose names do not say it

_V1 = re.compile(r"swin_([a-z]+)_patch(\d+)_window(\d+)_(\d+)")
_S3 = re.compile(r"swin_s3_([a-z]+)_(\d+)")
_V2 = re.compile(r"swinv2_([a-z]+)_window(?:(\d+)to)?(\d+)_(?:(\d+)to)?(\d+)")


def swin_settings(name: str) -> dict:
    """Arguments of FusedSwin for a name such as swin_tiny_patch4_window7_224, swin_s3_tiny_224,
    swinv2_tiny_window8_256 or swinv2_base_window12to24_192to384."""
    if (match := _V1.fullmatch(name)) and match[1] in SWIN_SIZES:
        patch, window, pixels = map(int, match.groups()[1:])
        if 0 < patch <= pixels and window > 0:
            sizes = {"img_size": pixels, "patch_size": patch, "window_size": window}
            return sizes | _size(*SWIN_SIZES[match[1]])
    if (match := _S3.fullmatch(name)) and match[1] in S3_SIZES and int(match[2]) >= PATCH:
        (depths, windows), (C, _, heads) = S3_SIZES[match[1]], SWIN_SIZES["tiny"]
        sizes = {"img_size": int(match[2]), "patch_size": PATCH, "window_size": windows}
        return sizes | _size(C, depths, heads)
    if (match := _V2.fullmatch(name)) and match[1] in SWIN_SIZES:
        before, window, pixels_before, pixels = (n and int(n) for n in match.groups()[1:])
        if (before is None) == (pixels_before is None) and window > 0 and pixels >= PATCH:
            sizes = {"img_size": pixels, "patch_size": PATCH, "window_size": window, "version": 2}
            if before is not None:  # fine-tuned from this window, which a stage's map may not reach
                maps = [pixels_before // (PATCH << stage) for stage in range(4)]
                sizes["pretrained_window_sizes"] = tuple(min(before, side) for side in maps)
            return sizes | _size(*SWIN_SIZES[match[1]])
    raise ValueError(
        "FusedSwin.named: name must be swin_SIZE_patchP_windowW_PIXELS, swin_s3_SIZE_PIXELS or "
        f"swinv2_SIZE_windowW_PIXELS with SIZE one of {', '.join(SWIN_SIZES)}, got {name!r}"
    )


def _size(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> dict:
    return {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads}
