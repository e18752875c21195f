"""transformers' ViTHybrid (version 4; gone since 5) -> FusedHybridViT."""

from __future__ import annotations

import functools
import os
import re

from torch import Tensor, nn

from ..nn import LayerNorm
from . import huggingface
from .build import build, one_sentence
from .hybrid_shapes import BACKBONE, HYBRID, NAME

MODELS = ("vit-hybrid",)
EPS = 1e-12  # of transformers' ViT and ViTHybrid

_BACKBONE = re.compile(r"^(?:vit\.)?embeddings\.patch_embeddings\.backbone\.(?:bit\.)?(.+)$")
_STAGE = re.compile(r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.")


def is_huggingface(tensors) -> bool:
    return any(_BACKBONE.match(key) for key in tensors)


def hybrid_from_huggingface(cls, source: str | os.PathLike | nn.Module, **kwargs):
    """A FusedHybridViT with the settings, and copies of the parameters, of transformers' model."""
    return huggingface.from_source(from_state, cls, source, "ViTHybrid", kwargs)


def from_state(
    cls, loader: str, origin: str, config: dict, tensors: dict[str, Tensor], overrides: dict,
    *, keep_requires_grad: bool = False,
):  # fmt: skip
    """From transformers' configuration (empty: what a ViTHybrid has by default) and names."""
    hints = _hints(loader, origin, config) if config else {"norm_layer": _norm_layer(EPS)}
    with one_sentence(loader, origin, NAME):
        state = timm_state(loader, origin, tensors)
    dropout = hints.pop("hidden_dropout_prob", 0.0)
    model = build(
        HYBRID, cls, loader, origin, state, {**hints, "global_pool": "token"}, overrides,
        keep_requires_grad=keep_requires_grad,
    )  # fmt: skip
    if dropout and "proj_drop_rate" not in overrides:
        for block in model.blocks:  # transformers drops the outputs of the two branches only
            block.attn.proj_drop.p = block.mlp.drop2.p = dropout
    return model


def timm_state(loader: str, origin: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ResNet's names here, the encoder's as those of any ViT of transformers."""
    matches = {key: _BACKBONE.match(key) for key in tensors}
    encoder = {key: tensors[key] for key, match in matches.items() if match is None}
    resnet = {
        BACKBONE + _rename(match[1]): tensors[key]
        for key, match in matches.items()
        if match is not None
    }
    return {**resnet, **huggingface.timm_state(loader, origin, encoder)}


def _rename(key: str) -> str:
    key = key.replace("embedder.convolution.", "stem.conv.").replace("embedder.norm.", "stem.norm.")
    return _STAGE.sub(r"stages.\1.blocks.\2.", key)


def _norm_layer(eps: float):
    return functools.partial(LayerNorm, eps=eps)


def _hints(loader: str, origin: str, config: dict) -> dict:
    """What the configuration says beside shapes."""
    huggingface.check_kind(loader, origin, config, MODELS, NAME)
    needed = ("num_attention_heads", "num_hidden_layers")
    hints = huggingface.shared_hints(loader, origin, config, needed)
    resnet = config.get("backbone_config") or {}
    padding = str(resnet.get("global_padding", "same")).lower()
    for key, got, expected in (
        ("backbone_config.model_type", resnet.get("model_type", "bit"), "bit"),
        ("backbone_config.layer_type", resnet.get("layer_type", "bottleneck"), "bottleneck"),
        ("backbone_config.global_padding", padding, "same"),
    ):
        if got != expected:
            raise ValueError(f"{loader}: {origin}: {key} must be {expected!r}, got {got!r}")
    return {
        **hints,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_hidden_layers"],
        "norm_layer": _norm_layer(config.get("layer_norm_eps", EPS)),
        "pos_drop_rate": config.get("hidden_dropout_prob", 0.0),
        "hidden_dropout_prob": config.get("hidden_dropout_prob", 0.0),
        "attn_drop_rate": config.get("attention_probs_dropout_prob", 0.0),
    }
