"""What FusedSwin's constructor refuses, each in one sentence."""

from __future__ import annotations

from math import inf

from .._checks import count, describe, dropout_p, fail, number, positive_int
from ..nn.classifier_head import POOLS
from ..nn.windows import PAD_MODES, WINDOW_CLAMPS
from .init import SCHEMES
from .swin_windows import check_square

OWNER = "FusedSwin"


def per_stage(name: str, value, stages: int, doubling: bool = False) -> tuple:
    """One value for each stage; a single one repeats, or doubles from stage to stage."""
    if not isinstance(value, (tuple, list)):
        if doubling:
            positive_int(OWNER, name, value)
        return tuple(value * 2**i if doubling else value for i in range(stages))
    if len(value) != stages:
        fail(OWNER, name, f"one value or one for each of {stages} stages", describe(value))
    return tuple(value)


def number_of_stages(depths) -> int:
    if not isinstance(depths, (tuple, list)) or len(depths) == 0:
        fail(OWNER, "depths", "one number of blocks for each stage", describe(depths))
    return len(depths)


def check_pool(owner: str, global_pool: str) -> None:
    _one_of(owner, "global_pool", global_pool, POOLS)


def check_swin(
    version, in_chans, num_classes, widths, depths, num_heads, head_dims, windows, mlp_ratios,
    global_pool, weight_init, pad_mode, window_clamp, pretrained_window_sizes, **rates,
) -> None:  # fmt: skip
    stages = len(depths)
    positive_int(OWNER, "in_chans", in_chans)
    count(OWNER, "num_classes", num_classes)
    _one_of(OWNER, "version", version, (1, 2))
    check_pool(OWNER, global_pool)
    _one_of(OWNER, "weight_init", weight_init, (*SCHEMES, "skip"))
    if version == 2 and weight_init not in ("", "skip"):
        fail(OWNER, "weight_init", "'' or 'skip' with version=2", repr(weight_init))
    _one_of(OWNER, "pad_mode", pad_mode, PAD_MODES)
    _one_of(OWNER, "window_clamp", window_clamp, WINDOW_CLAMPS)
    for name, values in (
        ("num_heads", num_heads),
        ("pretrained_window_sizes", pretrained_window_sizes),
    ):
        if not isinstance(values, (tuple, list)) or len(values) < stages:
            fail(OWNER, name, f"one for each of {stages} stages", describe(values))
    for name, values in (("embed_dim", widths), ("depths", depths), ("num_heads", num_heads)):
        for value in values:
            positive_int(OWNER, name, value)
    for width, heads, head_dim in zip(widths, num_heads, head_dims, strict=False):
        if head_dim is None and width % heads != 0:
            fail(OWNER, "embed_dim", "a multiple of num_heads in each stage", f"{width}, {heads}")
        if head_dim is not None:
            positive_int(OWNER, "head_dim", head_dim)
            if version == 2:
                fail(OWNER, "head_dim", "None with version=2", head_dim)
    for window in pretrained_window_sizes:
        for side in window if isinstance(window, (tuple, list)) else (window,):
            count(OWNER, "pretrained_window_sizes", side)
    for ratio in mlp_ratios:
        number(
            OWNER, "mlp_ratio", ratio, low=0.0, high=inf, low_open=True,
            expected="a positive number",
        )  # fmt: skip
    check_square(OWNER, windows, window_clamp)
    for name, rate in rates.items():
        dropout_p(OWNER, rate, name)


def _one_of(owner: str, name: str, value, choices: tuple) -> None:
    if value not in choices:
        fail(owner, name, f"one of {', '.join(map(repr, choices))}", repr(value))
