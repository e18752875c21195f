"""Checkpoints of hybrid ViTs in the layouts of JAX and of transformers 4, made in place."""

import re

import numpy as np
import torch
from checkpoint_pairs import jax_arrays

BACKBONE = "patch_embed.backbone."
_PART = r"(?:(conv|norm)(\d)|downsample\.(conv|norm))"
_IN_STAGE = re.compile(rf"stages\.(\d+)\.blocks\.(\d+)\.{_PART}")


def jax_hybrid(state: dict, heads: int, layout="augreg") -> dict[str, np.ndarray]:
    """The arrays of a JAX checkpoint with the weights of a timm state_dict of a hybrid."""
    encoder = {key: t for key, t in state.items() if not key.startswith(BACKBONE)}
    arrays = jax_arrays(encoder, heads, layout)
    start = {"original": "opt/target/", "augreg": ""}[layout]
    for key, tensor in state.items():
        if key.startswith(BACKBONE):
            name = _jax_name(key.removeprefix(BACKBONE).removeprefix("stem."))
            array = tensor.detach().permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.detach()
            if tensor.ndim == 1 and name.startswith("block"):
                array = array.reshape(1, 1, 1, -1)  # as the original files have them
            arrays[start + name] = array.contiguous().numpy()
    return arrays


def _jax_name(key: str) -> str:
    leaf = "bias" if key.endswith(".bias") else "kernel" if "conv" in key else "scale"
    match = re.match(
        r"stages\.(\d+)\.blocks\.(\d+)\.(?:(conv|norm)(\d)|downsample\.(conv|norm))", key
    )
    if match is None:
        return f"{'conv' if key.startswith('conv') else 'gn'}_root/{leaf}"
    kind = {"conv": "conv", "norm": "gn"}[match[3] or match[5]]
    part = match[4] or "_proj"
    return f"block{int(match[1]) + 1}/unit{int(match[2]) + 1}/{kind}{part}/{leaf}"


def huggingface_hybrid(state: dict, base="vit.") -> dict[str, torch.Tensor]:
    """transformers 4's ViTHybridForImageClassification's names for a timm state_dict."""
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                ours = key.replace(".attn.qkv.", f".attention.attention.{name}.")
                renamed[base + ours.replace("blocks.", "encoder.layer.")] = part.contiguous()
        elif key.startswith("head."):
            renamed[key.replace("head.", "classifier.")] = tensor
        else:
            renamed[base + _huggingface_name(key)] = tensor
    return renamed


def _huggingface_name(key: str) -> str:
    if key.startswith(BACKBONE):
        name = key.removeprefix(BACKBONE)
        name = name.replace("stem.conv.", "embedder.convolution.").replace("stem.", "embedder.")
        name = re.sub(r"stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers.", name)
        return f"embeddings.patch_embeddings.backbone.bit.{name}"
    for ours, theirs in (
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("cls_token", "embeddings.cls_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("blocks.", "encoder.layer."),
        ("attn.proj.", "attention.output.dense."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
    ):
        key = key.replace(ours, theirs)
    return key.replace("norm.", "layernorm.") if key.startswith("norm.") else key


def huggingface_config(**more) -> dict:
    """config.json of google/vit-hybrid-base-bit-384, for the sizes of hybrid_pairs' r8."""
    return {
        "model_type": "vit-hybrid",
        "architectures": ["ViTHybridForImageClassification"],
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "image_size": 64,
        "patch_size": 1,
        "num_channels": 3,
        "qkv_bias": True,
        "backbone_config": {
            "model_type": "bit",
            "layer_type": "bottleneck",
            "global_padding": "same",
            "depths": [2, 1, 1],
            "hidden_sizes": [128, 256, 384],
            "out_features": ["stage3"],
            "embedding_dynamic_padding": True,
        },
        **more,
    }


class LikeTransformers(torch.nn.Module):
    """What from_huggingface asks of a model of transformers: the class itself is gone since 5."""

    def __init__(self, tensors: dict, config: dict):
        super().__init__()
        self.tensors = {key: torch.nn.Parameter(t.detach().clone()) for key, t in tensors.items()}
        self.config = type("Config", (), {"to_dict": lambda self: dict(config)})()

    def state_dict(self, *args, keep_vars=False, **kwargs):
        return {key: t if keep_vars else t.detach() for key, t in self.tensors.items()}
