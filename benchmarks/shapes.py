"""What is measured and what is aimed at: ratios to a peer of the same run, one core.

Shapes come from each operator's sample_inputs(). A target is (must, stretch); "best" is the fastest
of all peers. They were set from one core of a Zen 4 machine (AVX512-BF16).
"""

from __future__ import annotations

import torch

from .harness import BOTH, FORWARD

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = (BF16, FP32)

# (name in sample_inputs(), dtype, direction) -> {peer: (must, stretch)}
ATTENTION_TARGETS = {
    ("vit_small_224", BF16, FORWARD): {"best": (1.15, 1.5)},
    ("vit_small_224", BF16, BOTH): {"best": (1.1, 1.4)},
    ("vit_small_224", FP32, FORWARD): {"best": (1.05, 1.2)},
}
# model -> (dtype, direction of `vitkernels bench`) -> the same, of whole models at batch 8
_COMPILED = "torch.compile(timm)"
MODEL_TARGETS = {
    "vit_small_patch16_224": {
        (BF16, "forward"): {_COMPILED: (1.1, 1.4), "timm": (1.25, 1.6)},
        (FP32, "forward"): {_COMPILED: (1.0, 1.0), "timm": (1.15, 1.15)},
        (BF16, "train"): {"timm": (1.1, 1.1)},
        (FP32, "train"): {"timm": (1.1, 1.1)},
    },
    "swin_tiny_patch4_window7_224": {
        (BF16, "forward"): {_COMPILED: (1.2, 1.45), "timm": (1.35, 1.6)},
        (FP32, "forward"): {_COMPILED: (1.05, 1.05), "timm": (1.2, 1.2)},
        (BF16, "train"): {"timm": (1.3, 1.3)},
        (FP32, "train"): {"timm": (1.3, 1.3)},
    },
}
# What timm's attention keeps for the backward over what ours keeps, of the same models.
ATTENTION_MEMORY_TARGETS = {"swin_tiny_patch4_window7_224": {"timm": (2.0, 2.0)}}
LAYER_NORM_TARGETS = {
    ("vit_small", BF16, FORWARD): {"compile eager": (2.0, 2.0), "eager": (4.0, 4.0)},
    ("vit_small", BF16, BOTH): {"compile eager": (1.8, 1.8), "eager": (3.0, 3.0)},
    ("vit_small", FP32, FORWARD): {"compile eager": (1.8, 1.8), "eager": (2.5, 2.5)},
}
PATCH_MERGE_TARGETS = {
    ("swin_tiny_stage1", BF16, FORWARD): {"best": (2.0, 2.5)},
    ("swin_tiny_stage1", BF16, BOTH): {"best": (2.0, 2.5)},
    ("swin_tiny_stage1", FP32, FORWARD): {"best": (1.5, 1.8)},  # 94% of the memory limit
    ("swin_tiny_stage1", FP32, BOTH): {"best": (1.5, 2.0)},
    ("swin_tiny_stage2", BF16, FORWARD): {"best": (2.0, 2.5)},
}
DISTILLATION_TARGETS = {
    (name, FP32, BOTH): {"eager": (2.0, 2.0), "compile eager": (1.2, 1.2)}
    for name in ("imagenet", "imagenet21k")
}
# Of 7x7 windows, the best of timm's composition, SDPA with the mask, and torch.compile of either.
WINDOW_ATTENTION_TARGETS = {
    (name, dtype, direction): {"best": aim}
    for name in ("swin_tiny_stage1", "swin_tiny_stage1_shifted", "swin_tiny_stage3_shifted")
    for dtype, direction, aim in (
        (BF16, FORWARD, (2.0, 3.0)),
        (FP32, FORWARD, (1.5, 2.0)),
        (BF16, BOTH, (1.6, 2.2)),
        (FP32, BOTH, (1.6, 2.2)),
    )
}
# The peers of a Linear are GEMM libraries; "best" is the faster of oneDNN's and MKL's.
PATCH_EMBED_TARGETS = {
    (name, dtype, FORWARD): {"eager": (1.5, 1.5), "compile eager": (1.2, 1.2)}
    for name in ("vit_small", "vit_base", "vit_base_patch32", "swin_tiny")
    for dtype in DTYPES
} | {("vit_small", dtype, BOTH): {"eager": (1.0, 1.5)} for dtype in DTYPES}
LINEAR_GELU_TARGETS = {
    ("vit_small", BF16, FORWARD): {"eager": (1.1, 1.1), "compile eager": (1.0, 1.0)},
    ("vit_small", BF16, BOTH): {"eager": (1.0, 1.1)},
    ("vit_small", FP32, FORWARD): {"eager": (1.0, 2.0), "oneDNN": (1.0, 1.0)},
    ("vit_small", FP32, BOTH): {"eager": (1.0, 1.5)},
}
LINEAR_TARGETS = {
    ("vit_small", BF16, FORWARD): {"eager": (1.0, 1.0)},
    ("vit_small", FP32, FORWARD): {"eager": (1.0, 2.0), "oneDNN": (1.0, 1.0)},
}
