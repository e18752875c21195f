"""What the shapes of a Vision Transformer's state dict say, and their fit to other sizes."""

from __future__ import annotations

import functools
import math
import re

from torch import nn

from ..nn import GluMlp, LayerNorm
from ..nn.patch_embed import pair
from ..nn.resample import resample_patch_embed, resample_pos_embed
from .build import Family, State, channels, need

# Heads do not show in the shapes. Width / 64, but for timm's models that are known to differ
# (SO400M, huge, giant, SigLIP's giant, gigantic).
HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}


def settings_from_shapes(loader: str, origin: str, state: State, known: dict) -> dict:
    """Constructor arguments that shapes and names tell; `known` ones need not be told."""
    weight = need(loader, origin, state, "patch_embed.proj.weight", 4)
    width, in_chans, *patch = weight.shape
    fc1 = need(loader, origin, state, "blocks.0.mlp.fc1.weight", 2)
    blocks = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    class_token, reg_token = state.get("cls_token"), state.get("reg_token")
    reg_tokens = 0 if reg_token is None else reg_token.shape[1]
    fc_norm, norm = "fc_norm.weight" in state, "norm.weight" in state
    head = state.get("head.weight")
    settings = {
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "embed_dim": width,
        "depth": 1 + max(blocks),
        "mlp_ratio": (fc1.shape[0] + 0.5) / width,  # survives int(width * ratio)
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token is not None,
        "reg_tokens": reg_tokens,
        "pre_norm": "norm_pre.weight" in state,
        "embed_norm_layer": "layernorm" if "patch_embed.norm.weight" in state else None,
        "final_norm": norm or fc_norm,
        "fc_norm": fc_norm,
        "global_pool": "token" if class_token is not None and not fc_norm else "avg",
        "pos_embed": "learn" if "pos_embed" in state else "none",
    }
    if _gated(state):  # SwiGLU
        settings["mlp_layer"] = functools.partial(GluMlp, gate_last=False)
        settings["act_layer"] = nn.SiLU
    if settings["pre_norm"]:  # CLIP
        settings["norm_layer"] = functools.partial(LayerNorm, eps=1e-5)
    if "num_heads" not in known:
        settings["num_heads"] = _heads(loader, origin, state, width)
    prefix = int(class_token is not None) + reg_tokens + int("dist_token" in state)
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    class_positions = _class_positions(positions, prefix, tuple(patch), known)
    if positions and "img_size" not in known:
        patches = max(0, positions - prefix * class_positions)
        side = math.isqrt(patches)
        if side == 0 or side * side != patches:
            raise ValueError(
                f"{loader}: {origin}: {positions} positions are no square grid: name img_size"
            )
        settings["img_size"] = (side * patch[0], side * patch[1])
    settings["no_embed_class"] = prefix > 0 and not class_positions
    return settings


def _class_positions(positions: int, prefix: int, patch: tuple[int, int], known: dict) -> bool:
    """Whether prefix tokens have positions too: where that fits the image size, or a square."""
    if "no_embed_class" in known:
        return not known["no_embed_class"]
    if "img_size" in known:
        patch = pair(known.get("patch_size", patch))
        grid = math.prod(s // p for s, p in zip(pair(known["img_size"]), patch, strict=True))
        if positions in (grid, grid + prefix):
            return positions != grid
    return math.isqrt(positions) ** 2 != positions


def _gated(state: State) -> bool:
    """Whether fc1 holds two products, one the gate of the other."""
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state.get("blocks.0.mlp.fc2.weight")
    return fc2 is not None and fc1.shape[0] == 2 * fc2.shape[-1]


def _heads(loader: str, origin: str, state: State, width: int) -> int:
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    known = width in HEADS and not _gated(state)
    heads, rest = (HEADS[width], 0) if known else divmod(width, 64)
    if q_norm is not None:
        heads, rest = divmod(width, q_norm.shape[0])
    if rest:
        raise ValueError(
            f"{loader}: {origin}: the number of heads does not show in its shapes, and the width"
            f" {width} is no multiple of 64: name num_heads"
        )
    return heads


def fit_sizes(
    loader: str, origin: str, model: nn.Module, state: State, overrides: dict, resampling: dict
) -> State:
    """The image size, patch size and channels that the caller named, resampled as timm does it."""
    state = dict(state)
    conv = model.patch_embed.proj
    if "in_chans" in overrides:
        state["patch_embed.proj.weight"] = channels(
            state["patch_embed.proj.weight"], conv.in_channels
        )
    if "patch_size" in overrides:
        state["patch_embed.proj.weight"] = resample_patch_embed(
            state["patch_embed.proj.weight"], conv.kernel_size, **resampling
        )
    positions = state.get("pos_embed")
    if positions is None or model.pos_embed is None or positions.shape == model.pos_embed.shape:
        return state
    if "img_size" in overrides or "patch_size" in overrides:
        tokens = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = math.isqrt(max(0, positions.shape[1] - tokens))
        if grid * grid != positions.shape[1] - tokens:
            raise ValueError(
                f"{loader}: {origin}: {positions.shape[1]} positions are no square grid to resample"
            )
        state["pos_embed"] = resample_pos_embed(
            positions, model.patch_embed.grid_size, (grid, grid), tokens, **resampling
        )
    return state


VIT = Family("FusedViT", "head.", settings_from_shapes, fit_sizes)
