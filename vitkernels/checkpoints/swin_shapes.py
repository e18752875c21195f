"""What the shapes of a Swin Transformer's state dict say, and their fit to other sizes."""

from __future__ import annotations

import functools
import math
import re

from torch import Tensor, nn

from ..nn.resample import resample_bias_table, resample_patch_embed
from .build import Family, State, channels, need

NAME = "FusedSwin"
TABLE = "attn.relative_position_bias_table"
COORDS = "attn.relative_coords_table"
MASK = "attn_mask"

# What several sources store and FusedSwin computes: window indices, log-spaced coordinates, masks.
BUFFER = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$")


def without_buffers(tensors: State) -> State:
    return {key: tensor for key, tensor in tensors.items() if not BUFFER.search(key)}


def settings_from_shapes(loader: str, origin: str, state: State, known: dict) -> dict:
    """Constructor arguments that shapes and names tell; `known` ones need not be told."""
    want = functools.partial(need, loader, origin, state, name=NAME)
    _refuse_positions(loader, origin, state)
    width, in_chans, *patch = want("patch_embed.proj.weight", 4).shape
    depths = _depths(state)
    blocks = [f"layers.{s}.blocks.0." for s in range(len(depths))]
    widths, hidden = [], []
    for block in blocks:
        fc1 = want(block + "mlp.fc1.weight", 2)
        hidden.append(fc1.shape[0])
        widths.append(fc1.shape[1])
    version = 2 if any(".attn.cpb_mlp." in k or ".attn.logit_scale" in k for k in state) else 1
    if version == 2:
        heads = [want(block + "attn.logit_scale", 3).shape[0] for block in blocks]
        qkv_bias = "layers.0.blocks.0.attn.q_bias" in state
    else:
        heads = [want(block + TABLE, 2).shape[1] for block in blocks]
        qkv_bias = "layers.0.blocks.0.attn.qkv.bias" in state
    doubling = all(w == width * 2**s for s, w in enumerate(widths))
    head = state.get("head.fc.weight")
    settings = {
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": width if doubling else tuple(widths),
        "depths": depths,
        "num_heads": tuple(heads),
        "mlp_ratio": mlp_ratio(hidden, widths),
        "qkv_bias": qkv_bias,
        "version": version,
    }
    if version == 1:
        inner = [want(block + "attn.proj.weight", 2).shape[1] for block in blocks]
        if inner != widths:
            settings["head_dim"] = tuple(i // h for i, h in zip(inner, heads, strict=True))
    return settings | _sizes(loader, origin, state, known, blocks, patch, version)


def mlp_ratio(hidden: list[int], widths) -> float | tuple[float, ...]:
    """One where it is one, else one for each stage; each survives int(width * ratio)."""
    ratios = tuple((h + 0.5) / w for h, w in zip(hidden, widths, strict=True))
    same = all(h == int(w * ratios[-1]) for h, w in zip(hidden, widths, strict=True))
    return ratios[-1] if same else ratios


def _refuse_positions(loader: str, origin: str, state: State) -> None:
    if "absolute_pos_embed" in state:
        raise ValueError(
            f"{loader}: {origin} has absolute position embeddings, which FusedSwin does not support"
        )


def _depths(state: State) -> tuple[int, ...]:
    found: dict[int, int] = {0: 1}
    for key in state:
        if match := re.match(r"layers\.(\d{1,3})\.blocks\.(\d{1,4})\.", key):
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 1), block + 1)
    return tuple(found.get(stage, 1) for stage in range(1 + max(found)))


def _sizes(loader, origin, state, known, blocks, patch, version) -> dict:
    """Windows from the bias tables (square), and the image whose last map is one window."""
    settings: dict = {}
    windows = known.get("window_size")
    if version == 1:
        tables = [table_window(state[block + TABLE]) for block in blocks]
        if None not in tables:
            settings["window_size"] = windows = tuple((w, w) for w in tables)
        elif windows is None:
            rows = state[blocks[tables.index(None)] + TABLE].shape[0]
            raise ValueError(
                f"{loader}: {origin}: {rows} biases are no square window's: name window_size"
                " and img_size"
            )
    if "img_size" not in known and isinstance(windows, tuple) and isinstance(windows[-1], tuple):
        scale = 2 ** (len(blocks) - 1)
        settings["img_size"] = tuple(w * p * scale for w, p in zip(windows[-1], patch, strict=True))
    elif version == 2 and not {"img_size", "window_size"} <= known.keys():
        raise ValueError(
            f"{loader}: {origin}: Swin V2's windows and image size do not show in its shapes: name"
            " window_size and img_size"
        )
    return settings


def table_window(table: Tensor | None) -> int | None:
    """The square window of a bias table's rows, None where they are no square window's."""
    side = 0 if table is None else math.isqrt(table.shape[0])
    return (side + 1) // 2 if side % 2 and side * side == table.shape[0] else None


def hints_from_buffers(tensors: State, blocks: str = "layers.{}.blocks.0.") -> dict:
    """Version 2's windows and pre-training windows from its stored coordinates.

    The largest coordinate is log2(1 + 8 (w - 1) / (p - 1)) / 3 of window w, pre-trained with p.
    """
    windows, pretrained = [], []
    while (coords := tensors.get(blocks.format(len(windows)) + COORDS)) is not None:
        if coords.ndim != 4 or coords.shape[1] != coords.shape[2]:
            return {}
        window = (coords.shape[1] + 1) // 2
        largest = float(coords.abs().max()) if coords.numel() else 0.0
        before = 1 + 8 * (window - 1) / (2 ** (3 * largest) - 1) if largest > 0 else 0.0
        windows.append((window, window))
        pretrained.append(0 if round(before) == window else round(before))
    if not windows:
        return {}
    return {"window_size": tuple(windows), "pretrained_window_sizes": tuple(pretrained)}


def fit_sizes(
    loader: str, origin: str, model: nn.Module, state: State, overrides: dict, resampling: dict
) -> State:
    """The image size, windows, patch size and channels that the caller named, as timm fits them."""
    state = dict(state)
    conv = model.patch_embed.proj
    weight = state["patch_embed.proj.weight"]
    if "in_chans" in overrides:
        weight = channels(weight, conv.in_channels)
    if "patch_size" in overrides:
        weight = resample_patch_embed(weight, conv.kernel_size, **resampling)
    state["patch_embed.proj.weight"] = weight
    if not overrides.keys() & {"img_size", "window_size", "patch_size"}:
        return state
    for name, module in model.named_modules():
        table = state.get(f"{name}.relative_position_bias_table")
        old = table_window(table) if table is not None and table.ndim == 2 else None
        if old is not None and getattr(module, "relative_position_bias_table", None) is not None:
            state[f"{name}.relative_position_bias_table"] = resample_bias_table(
                table, module.window_size, (old, old)
            )
    return state


SWIN = Family(NAME, "head.", settings_from_shapes, fit_sizes)
