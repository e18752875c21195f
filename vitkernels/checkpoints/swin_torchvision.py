"""torchvision's swin_t ... swin_v2_b -> FusedSwin. torchvision itself is never imported."""

from __future__ import annotations

import functools
import re

from torch import Tensor, nn

from ..nn import LayerNorm
from .build import State, build
from .swin_shapes import COORDS, SWIN, without_buffers

# The window is kept and the map padded up to it, whatever its size; any image size is taken.
RULES = {"window_clamp": "pad", "strict_img_size": False}
_OUTSIDE = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm.",
            "head.": "head.fc."}  # fmt: skip
_INSIDE = {"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}
_BLOCK = re.compile(r"^features\.(\d+)\.(\d+)\.(.+)$")
_DOWNSAMPLE = re.compile(r"^features\.(\d+)\.(norm|reduction)\.")


def swin_from_torchvision(cls, source: nn.Module, **kwargs):
    """A FusedSwin with the settings, and copies of the parameters, of swin_t and the others."""
    loader = "from_torchvision"
    name = type(source).__name__
    if name != "SwinTransformer" or not hasattr(source, "features"):
        raise ValueError(f"{loader}: the model must be torchvision's SwinTransformer, got {name}")
    stages = list(source.features)[1::2]
    blocks = [block for stage in stages for block in stage]
    attentions = {tuple(block.attn.window_size) for block in blocks}
    if len(attentions) != 1:
        raise ValueError(f"{loader}: a model whose blocks differ in window_size is not supported")
    attention = blocks[0].attn
    windows = next(iter(attentions))
    patch = source.features[0][0].kernel_size
    hints = {
        **RULES,
        "window_size": (windows,) * len(stages),
        "img_size": tuple(
            w * p * 2 ** (len(stages) - 1) for w, p in zip(windows, patch, strict=True)
        ),
        "norm_layer": functools.partial(LayerNorm, eps=source.norm.eps),
        "proj_drop_rate": attention.dropout,
        "attn_drop_rate": attention.attention_dropout,
        "drop_path_rate": blocks[-1].stochastic_depth.p,
    }
    state = timm_state(source.state_dict(keep_vars=True))
    model = build(SWIN, cls, loader, "the model", state, hints, kwargs, keep_requires_grad=True)
    return of_any_size(model).train(source.training)


def of_any_size(model: nn.Module) -> nn.Module:
    """A convolution leaves out the pixels beyond whole patches, and torchvision lets it."""
    model.patch_embed.dynamic_img_crop = True
    return model


def hints_from_names(tensors: State) -> dict:
    """Windows of version 2 from its stored coordinates; they never are of a pre-training."""
    coords = next((t for key, t in tensors.items() if key.endswith(COORDS)), None)
    if coords is None or coords.ndim != 4:
        return {}
    window = tuple((side + 1) // 2 for side in coords.shape[1:3])
    stages = len({match[1] for key in tensors if (match := _BLOCK.match(key))}) - 1
    return {"window_size": (window,) * stages}


def timm_state(tensors: dict[str, Tensor]) -> State:
    """Version 2 has one bias of q, k and v there, of which k's part is never used."""
    tensors = without_buffers(tensors)
    version2 = any(key.endswith(".logit_scale") for key in tensors)
    state = {}
    for key, tensor in tensors.items():
        name = _rename(key)
        if version2 and name.endswith(".attn.qkv.bias") and tensor.shape[0] % 3 == 0:
            q_bias, _, v_bias = tensor.chunk(3)
            block = name.removesuffix("qkv.bias")
            state |= {block + "q_bias": q_bias, block + "v_bias": v_bias}
        else:
            state[name] = tensor
    return state


def _rename(key: str) -> str:
    for start, ours in _OUTSIDE.items():
        if key.startswith(start):
            return ours + key.removeprefix(start)
    if match := _DOWNSAMPLE.match(key):
        return f"layers.{int(match[1]) // 2}.downsample.{match[2]}.{key[match.end() :]}"
    if match := _BLOCK.match(key):
        inside = match[3]
        for start, ours in _INSIDE.items():
            if inside.startswith(start):
                inside = ours + inside.removeprefix(start)
        return f"layers.{int(match[1]) // 2}.blocks.{match[2]}.{inside}"
    return key
