"""Regimes: the classes of calls that one hardware record speaks for.

A regime is an operator, a direction, a dtype class, size classes and a variant, written as words:
"forward 16-bit N<=272 D<=64 bias". `choose` names the regime of a call by the same function that
names the regime of a measured case, so a kernel is taken only for what was measured.
"""

from __future__ import annotations

import torch

FORWARD, BOTH = "forward", "forward+backward"
SIXTEEN_BIT = (torch.bfloat16, torch.float16)

_ROWS = (("C", (256, 1024, 2048)),)  # channels of a row
_TOKENS = (("N", (64, 272, 640)), ("D", (32, 64, 128)))  # keys, head dim
_PRODUCT = (("K", (256, 1024)),)  # the length of the sums

# operator -> its sizes, in the order of `choose(sizes=...)`, and the upper ends of their classes.
SIZES: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "add_layer_norm": _ROWS,
    "layer_norm_add": _ROWS,
    "patch_merge_layer_norm": _ROWS,
    "attention": _TOKENS,
    "attention_qkvpacked": _TOKENS,
    "window_attention": (("N", (64, 144, 256)), ("D", (32, 64))),  # tokens of a window
    "patch_embed": (("K", (64, 256)),),
    "linear_gelu": _PRODUCT,
    "linear": _PRODUCT,
    "distillation_loss": (("K", (1024, 16384)),),  # classes
}


def regime(
    op: str,
    dtypes: tuple[torch.dtype, ...],
    training: bool,
    sizes: tuple[int, ...],
    variant: str = "",
) -> str:
    """ "forward+backward 16-bit N<=272 D<=64": what the records call a call like this."""
    words = [BOTH if training else FORWARD]
    words.append("16-bit" if any(dtype in SIXTEEN_BIT for dtype in dtypes) else "fp32")
    for (name, ends), size in zip(SIZES[op], sizes, strict=True):
        words.append(_size_class(name, ends, size))
    if variant:
        words.append(variant)
    return " ".join(words)


def _size_class(name: str, ends: tuple[int, ...], size: int) -> str:
    for end in ends:
        if size <= end:
            return f"{name}<={end}"
    return f"{name}>{ends[-1]}"
