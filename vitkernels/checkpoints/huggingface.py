"""transformers' ViT and DINOv2 -> FusedViT. transformers itself is never imported.

Names of version 4 (on disk, also those that version 5 writes) and of version 5 (in memory).
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import GELUTanh, LayerNorm, QuickGELU
from .build import IMAGENET, Family, build, one_sentence, warn_of_ignored
from .files import read_folder
from .vit_shapes import VIT

MODELS = ("vit", "dinov2", "dinov2_with_registers")
DEIT_MODELS = ("deit",)
SWIN_MODELS = ("swin", "swinv2")
KINDS = {
    "FusedViT": MODELS,
    "FusedDeiT": DEIT_MODELS,
    "FusedSwin": SWIN_MODELS,
    "FusedHybridViT": ("vit-hybrid",),
}
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_new": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
}

_BASE = re.compile(r"^(vit|dinov2|dinov2_with_registers|deit)\.")
_BLOCK = re.compile(r"^(?:encoder\.)?layers?\.(\d+)\.(.+)\.(\w+)$")
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "embeddings.distillation_token": "dist_token",
    "cls_classifier.weight": "head.weight",
    "cls_classifier.bias": "head.bias",
    "distillation_classifier.weight": "head_dist.weight",
    "distillation_classifier.bias": "head_dist.bias",
}
_INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
# Parts of one matrix of ours: (its name, which part, of how many).
_PARTS = {
    "attention.attention.query": ("attn.qkv", 0, 3),
    "attention.attention.key": ("attn.qkv", 1, 3),
    "attention.attention.value": ("attn.qkv", 2, 3),
    "attention.q_proj": ("attn.qkv", 0, 3),
    "attention.k_proj": ("attn.qkv", 1, 3),
    "attention.v_proj": ("attn.qkv", 2, 3),
    "mlp.gate_proj": ("mlp.fc1", 0, 2),
    "mlp.up_proj": ("mlp.fc1", 1, 2),
}


def vit_from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
    """A FusedViT with the settings, and copies of the parameters, of transformers' model."""
    return from_source(from_state, cls, source, "ViT or DINOv2", kwargs)


def from_source(from_state, cls, source: str | os.PathLike | nn.Module, what: str, kwargs: dict):
    """from_state(cls, loader, origin, configuration, tensors, kwargs) of a model or a folder."""
    loader = "from_huggingface"
    if isinstance(source, nn.Module):
        if not hasattr(source, "config") or not hasattr(source.config, "to_dict"):
            got = type(source).__name__
            raise ValueError(f"{loader}: the model must be transformers' {what}, got {got}")
        model = from_state(
            cls, loader, type(source).__name__, source.config.to_dict(),
            source.state_dict(keep_vars=True), kwargs, keep_requires_grad=True,
        )  # fmt: skip
        return model.train(source.training)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{loader}: there is no folder {str(source)!r}, and nothing is downloaded: load a name"
            " on the hub with transformers and pass the model"
        )
    config, tensors = read_folder(loader, folder)
    return from_state(cls, loader, folder.name, config, tensors, kwargs)


def from_state(
    cls, loader: str, origin: str, config: dict, tensors: dict[str, Tensor], overrides: dict,
    *, keep_requires_grad: bool = False, family: Family = VIT,
):  # fmt: skip
    """From transformers' configuration (empty: what a ViT has by default) and names."""
    hints = _hints(loader, origin, config, family) if config else _default_hints(tensors)
    with one_sentence(loader, origin):
        state = timm_state(loader, origin, tensors)
    hints["no_embed_class"] = "reg_token" in state
    dropout = hints.pop("hidden_dropout_prob", 0.0)
    model = build(
        family, cls, loader, origin, state, {**hints, "global_pool": "token"}, overrides,
        keep_requires_grad=keep_requires_grad,
    )  # fmt: skip
    if dropout and "proj_drop_rate" not in overrides:
        for block in model.blocks:  # transformers drops the outputs of the two branches only
            block.attn.proj_drop.p = block.mlp.drop2.p = dropout
    return model


def timm_state(loader: str, origin: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> timm's: q, k and v in one matrix, registers without a position."""
    state: dict[str, Tensor] = {}
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        short = _BASE.sub("", key)
        name, *part = _rename(short)
        if short.startswith("pooler.") or short == "embeddings.mask_token":
            ignored.append(key)
        elif part:
            parts.setdefault((name, part[1]), {})[part[0]] = tensor
        else:
            state[name] = tensor
    state |= joined(loader, origin, parts)
    pooler = [key for key in ignored if "pooler." in key]
    warn_of_ignored(loader, pooler, "pooler")
    return merge_registers(state)


def joined(loader: str, origin: str, parts: dict[tuple[str, int], dict[int, Tensor]]) -> dict:
    """{(name, how many): {which: part}} -> {name: matrix}."""
    for (name, count), several in parts.items():
        if len(several) != count:
            raise ValueError(
                f"{loader}: {origin} has {len(several)} of the {count} parts of {name}"
            )
    return {name: torch.cat([several[i] for i in range(count)])
            for (name, count), several in parts.items()}  # fmt: skip


def merge_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 with registers gives them no position: timm's no_embed_class, class position added."""
    if "register_tokens" not in state:
        return state
    state = dict(state)
    positions = state["pos_embed"]
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    return state


def _rename(key: str) -> tuple:
    """(timm's name,), or (timm's name, which part of that matrix, of how many)."""
    if key in _OUTSIDE:
        return (_OUTSIDE[key],)
    match = _BLOCK.match(key)
    if match is None:
        return (key,)
    layer, module, leaf = match.groups()
    if module in _PARTS:
        ours, part, count = _PARTS[module]
        return f"blocks.{layer}.{ours}.{leaf}", part, count
    leaf = "gamma" if leaf == "lambda1" else leaf
    return (f"blocks.{layer}.{_INSIDE.get(module, module)}.{leaf}",)


def _hints(loader: str, origin: str, config: dict, family: Family) -> dict:
    """What the configuration says beside shapes."""
    check_kind(loader, origin, config, KINDS[family.name], family.name)
    hints = {
        **shared_hints(loader, origin, config, ("num_attention_heads", "num_hidden_layers")),
        "num_heads": config["num_attention_heads"],
        "depth": config["num_hidden_layers"],
        "pos_drop_rate": config.get("hidden_dropout_prob", 0.0),
        "hidden_dropout_prob": config.get("hidden_dropout_prob", 0.0),
        "attn_drop_rate": config.get("attention_probs_dropout_prob", 0.0),
    }
    hints = {**_of_kind(config["model_type"], config), **hints}
    if config.get("use_swiglu_ffn"):  # the shapes tell it
        del hints["act_layer"]
    return hints


def check_kind(loader: str, origin: str, config: dict, models: tuple[str, ...], name: str) -> None:
    kind = config.get("model_type")
    if kind not in models:
        other = next((cls for cls, kinds in KINDS.items() if kind in kinds and cls != name), None)
        use = f": use {other}" if other else ""
        raise ValueError(
            f"{loader}: {origin}: model_type must be one of {', '.join(models)}, got {kind!r}{use}"
        )


def shared_hints(loader: str, origin: str, config: dict, needed: tuple[str, ...]) -> dict:
    """What every configuration says beside shapes: activation, image size, normalisation."""
    act = config.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ValueError(
            f"{loader}: {origin}: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {act!r}"
        )
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{loader}: {origin}: config.json does not have {' and '.join(missing)}")
    hints: dict = {"act_layer": ACTIVATIONS[act]}
    size = config.get("image_size", 224)
    hints["img_size"] = tuple(size) if isinstance(size, (list, tuple)) else size
    preprocessor = config.get("preprocessor", {})
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if preprocessor.get(theirs) is not None:
            hints[ours] = tuple(preprocessor[theirs])
    if not preprocessor.get("do_normalize", True):
        hints |= {"mean": 0.0, "std": 1.0}
    return hints


def _default_hints(tensors: dict[str, Tensor]) -> dict:
    """What a file without a configuration most likely is: DINOv2 has LayerScale, DeiT its token."""
    if any(key.endswith("embeddings.distillation_token") for key in tensors):
        return _of_kind("deit", {})
    dinov2 = any(".layer_scale1." in key for key in tensors)
    return _of_kind("dinov2" if dinov2 else "vit", {})


def _of_kind(kind: str, config: dict) -> dict:
    """In what ViT, DeiT and DINOv2 differ beside their shapes."""
    eps = 1e-6 if kind.startswith("dinov2") else 1e-12
    normalization = IMAGENET if kind.startswith("dinov2") else {}
    eps = config.get("layer_norm_eps", eps)
    return {"norm_layer": functools.partial(LayerNorm, eps=eps), **normalization}
