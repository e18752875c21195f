"""transformers' Swin and Swin V2 -> FusedSwin. transformers itself is never imported.

Names of version 4 (on disk) and of version 5 (Swin in memory). Patch merging ends a stage there.
"""

from __future__ import annotations

import functools
import os
import re

from torch import Tensor, nn

from ..nn import LayerNorm
from .build import State, build, one_sentence, warn_of_ignored
from .huggingface import SWIN_MODELS, check_kind, from_source, joined, shared_hints
from .swin_shapes import NAME, SWIN, without_buffers

_BASE = re.compile(r"^(swin|swinv2)\.")
_BLOCK = re.compile(r"^encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
_DOWNSAMPLE = re.compile(r"^encoder\.layers\.(\d+)\.(downsample\..+)$")
_STAGE_NORM = re.compile(r"^hidden_states_norms\.stage(\d+)\.(weight|bias)$")
_OUTSIDE = {
    "embeddings.position_embeddings": "absolute_pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.norm.weight": "patch_embed.norm.weight",
    "embeddings.norm.bias": "patch_embed.norm.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.fc.weight",
    "classifier.bias": "head.fc.bias",
}
_INSIDE = {
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "attention.self.continuous_position_bias_mlp.": "attn.cpb_mlp.",
    "attention.self.": "attn.",  # bias table, logit_scale
    "attention.relative_position_bias.": "attn.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
# Parts of one matrix of ours: which part.
_PARTS = {
    "attention.self.query": 0,
    "attention.self.key": 1,
    "attention.self.value": 2,
    "attention.q_proj": 0,
    "attention.k_proj": 1,
    "attention.v_proj": 2,
}
EPS = 1e-5  # transformers' eps of the patch and merging norms, whatever the configuration says


def swin_from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
    """A FusedSwin with the settings, and copies of the parameters, of transformers' model."""
    return from_source(from_state, cls, source, "Swin or Swin V2", kwargs)


def from_state(
    cls, loader: str, origin: str, config: dict, tensors: dict[str, Tensor], overrides: dict,
    *, keep_requires_grad: bool = False,
):  # fmt: skip
    """From transformers' configuration (empty: a file alone) and names."""
    with one_sentence(loader, origin, NAME):
        state, ignored = timm_state(loader, origin, tensors)
    version = 2 if any(".attn.logit_scale" in key for key in state) else 1
    hints = _hints(loader, origin, config, overrides) if config else {}
    if version == 2:  # window and shift as constructed
        hints |= {"window_clamp": "axis", "strict_img_size": False}
    else:  # shifted where the map at hand is larger than a window
        hints |= {"window_clamp": "min", "strict_img_size": False}
    if any(key.startswith("hidden_states_norms.") for key in tensors):  # SwinBackbone
        hints |= {"always_partition": True, "window_clamp": "axis"}
    model = build(
        SWIN, cls, loader, origin, state, hints, overrides, keep_requires_grad=keep_requires_grad
    )
    if version == 2 and config and not overrides.keys() & {"img_size", "window_size"}:
        _check_windows(loader, origin, model, config)
    warn_of_ignored(loader, ignored, "norm after the earlier stages", NAME)
    _as_transformers(model, config, overrides)
    return model


def _as_transformers(model: nn.Module, config: dict, overrides: dict) -> None:
    """What no constructor argument says."""
    model.patch_embed.dynamic_img_pad = True
    if "norm_layer" not in overrides:
        for norm in (model.patch_embed.norm, *(s.downsample.norm for s in model.layers[1:])):
            norm.eps = EPS
    if model.version == 2 and "proj_drop_rate" not in overrides:  # Swinv2SelfOutput
        for stage in model.layers:
            for block in stage.blocks:
                block.attn.proj_drop.p = config.get("attention_probs_dropout_prob", 0.0)


def timm_state(loader: str, origin: str, tensors: State) -> tuple[State, list[str]]:
    """(timm's names with q, k and v in one matrix, names of norms that FusedSwin has not).

    A SwinBackbone's norm of the last stage replaces the classifier's, which it never applies.
    """
    tensors = {_BASE.sub("", key): tensor for key, tensor in without_buffers(tensors).items()}
    version2 = any(key.endswith(".logit_scale") for key in tensors)
    last = max((int(m[1]) for key in tensors if (m := _BLOCK.match(key))), default=0) + 1
    state: State = {}
    ignored = []
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        block, inside = _block(key)
        if key == "embeddings.mask_token":
            continue
        if norm := _STAGE_NORM.match(key):
            if int(norm[1]) != last:
                ignored.append(key)
        elif (part := _PARTS.get((named := inside.rpartition("."))[0])) is not None:
            leaf = named[2]
            if version2 and leaf == "bias":  # k has none
                state[f"{block}attn.{'qkv'[part]}_bias"] = tensor
            else:
                parts.setdefault((f"{block}attn.qkv.{leaf}", 3), {})[part] = tensor
        else:
            state[_rename(key)] = tensor
    for leaf in ("weight", "bias"):
        if (norm := tensors.get(f"hidden_states_norms.stage{last}.{leaf}")) is not None:
            state[f"norm.{leaf}"] = norm
    return {**state, **joined(loader, origin, parts)}, ignored


def _block(key: str) -> tuple[str, str]:
    match = _BLOCK.match(key)
    return (f"layers.{match[1]}.blocks.{match[2]}.", match[3]) if match else ("", key)


def _rename(key: str) -> str:
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    if match := _DOWNSAMPLE.match(key):
        return f"layers.{int(match[1]) + 1}.{match[2]}"
    block, inside = _block(key)
    for start, ours in _INSIDE.items():
        if block and inside.startswith(start):
            return block + ours + inside.removeprefix(start)
    return block + inside


def _hints(loader: str, origin: str, config: dict, overrides: dict) -> dict:
    """What the configuration says beside shapes."""
    check_kind(loader, origin, config, SWIN_MODELS, NAME)
    hints = shared_hints(loader, origin, config, ("depths", "num_heads", "window_size"))
    if config.get("hidden_dropout_prob", 0.0) and "proj_drop_rate" not in overrides:
        raise ValueError(
            f"{loader}: {origin}: hidden_dropout_prob {config['hidden_dropout_prob']} drops patch"
            " embeddings too, which FusedSwin does not support: name proj_drop_rate instead"
        )
    dropout = config.get("attention_probs_dropout_prob", 0.0)
    hints |= {
        "depths": tuple(config["depths"]),
        "num_heads": tuple(config["num_heads"]),
        "window_size": config["window_size"],
        "norm_layer": functools.partial(LayerNorm, eps=config.get("layer_norm_eps", 1e-5)),
        "attn_drop_rate": dropout,
        "drop_path_rate": config.get("drop_path_rate", 0.1),
    }
    if config["model_type"] == "swinv2":
        hints["pretrained_window_sizes"] = tuple(
            config.get("pretrained_window_sizes") or (0,) * len(hints["depths"])
        )
    return hints


def _check_windows(loader: str, origin: str, model: nn.Module, config: dict) -> None:
    """Swin V2 sets window and shift of both axes by the rows of floor(image / patch / 2^stage)."""
    rows = model.patch_embed.grid_size[0]
    for s, stage in enumerate(model.layers):
        here = rows // 2**s
        window = min(here, config["window_size"])
        for i, block in enumerate(stage.blocks):
            shift = 0 if i % 2 == 0 or here <= window else config["window_size"] // 2
            got = tuple(block.window_size), tuple(block.shift_size)
            if got != ((window, window), (shift, shift)):
                raise ValueError(
                    f"{loader}: {origin}: image_size {config.get('image_size')} gives window"
                    f" {window} and shift {shift} in stage {s + 1}, where FusedSwin has"
                    f" {got[0]} and {got[1]}: name img_size"
                )
