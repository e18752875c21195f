"""A checkpoint file or folder of any known source -> FusedViT. The names tell the source."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from torch import Tensor

from ..nn import GELUTanh, LayerNorm, QuickGELU
from . import huggingface, jax, torchvision
from .build import BICUBIC, BILINEAR, IMAGENET, State, build, one_sentence, warn_of_ignored
from .files import read_file, read_folder
from .vit_shapes import VIT

LOADER = "from_pretrained"

# What a checkpoint of another architecture has, and what it is.
SWIN = (
    r"^(backbone\.|swin\.|swinv2\.)?(encoder\.)?(layers|stages)\.\d+\.blocks\.\d+\.",
    r"^features\.\d+\.\d+\.attn\.relative_position_(index|bias_table)$",
)
DISTILLED = r"(^|\.)(dist_token|distillation_token|head_dist\.weight)"
HYBRID = r"^patch_embed\.backbone\.|conv_root/kernel$|\.patch_embeddings\.backbone\."
HYBRID_VIT = "a hybrid (ResNet stem) Vision Transformer"
RESNET = (r"(^|\.)layer1\.0\.conv1\.weight", "a ResNet")
OTHERS = (
    *((pattern, "a Swin Transformer") for pattern in SWIN),
    RESNET,
    (HYBRID, HYBRID_VIT),
    (DISTILLED, "a distilled DeiT"),
    (r"^attn_pool\.", "a Vision Transformer with attention pooling"),
    (r"^blocks\.\d+\.mlp\.(fc1_g|w1)\.", "a Vision Transformer with SwiGLU in two matrices"),
    (r"^blocks\.\d+\.attns\.", "a Vision Transformer with parallel blocks"),
    (r"^visual\.(class_embedding|trunk\.)", "a CLIP model (its image tower is FusedViT's part)"),
)
_CLASSES = {
    "a Swin Transformer": "FusedSwin",
    "a distilled DeiT": "FusedDeiT",
    HYBRID_VIT: "FusedHybridViT",
}

# What the names of timm's architectures say where shapes do not tell it.
_ARCHITECTURES = (
    (r"quickgelu", {"act_layer": QuickGELU}),
    (r"(base_patch32|giantopt_patch16|so400m_patch16)_siglip_gap_", {"act_layer": GELUTanh}),
    (r"large_patch16_siglip_gap_512", {"act_layer": GELUTanh}),
    (r"_rpn_", {"block_fn": "ResPostBlock"}),
    (r"^beit3_", {"norm_layer": functools.partial(LayerNorm, eps=1e-5)}),
    (r"^vit_base_patch16_gap_", {"num_heads": 16}),
    (r"^vit_giant_patch16_radio_", {"num_heads": 24}),
    (r"^test_vit", {"num_heads": 2}),
)


def vit_from_pretrained(cls, path: str | os.PathLike, **kwargs):
    """A FusedViT from a file, or from a folder as transformers and timm's hub write them."""
    path = Path(path)
    config, tensors = read(path)
    if "model_type" in config:
        return huggingface.from_state(cls, LOADER, path.name, config, tensors, kwargs)
    return _from_tensors(cls, path.name, tensors, timm_hints(config) if config else {}, kwargs)


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """(transformers' or timm's configuration, empty for a file; the tensors by name)."""
    if not path.is_dir():
        return {}, read_file(LOADER, path)
    config, tensors = read_folder(LOADER, path)
    if not {"model_type", "architecture"} & config.keys():
        raise ValueError(
            f"{LOADER}: {path.name}/config.json has neither model_type (transformers) nor"
            " architecture (timm)"
        )
    return config, tensors


def _from_tensors(cls, origin: str, tensors: dict[str, Tensor], hints: dict, overrides: dict):
    source = source_of(origin, tensors)
    if source == "huggingface":
        return huggingface.from_state(cls, LOADER, origin, {}, tensors, overrides)
    resampling = BICUBIC
    with one_sentence(LOADER, origin):
        if source == "jax":
            state, hints = jax.timm_state(LOADER, origin, tensors)
            resampling = BILINEAR
        elif source == "torchvision":
            state, hints = torchvision.timm_state(tensors), IMAGENET
        else:
            state, found = original_names(tensors)
            hints = {**found, **hints}
    return build(VIT, cls, LOADER, origin, state, hints, overrides, resampling=resampling)


def source_of(origin: str, tensors: dict[str, Tensor]) -> str:
    """timm (also the original DeiT's and DINOv2's), huggingface, torchvision or jax."""
    refuse_others(origin, tensors, OTHERS, "FusedViT", _CLASSES)
    if jax.jax_prefix(tensors) is not None:
        return "jax"
    if "conv_proj.weight" in tensors:
        return "torchvision"
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        return "huggingface"
    if "patch_embed.proj.weight" in tensors:
        return "timm"
    some = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{LOADER}: {origin} must have the names of a Vision Transformer of timm, transformers,"
        f" torchvision or JAX, got {some}{' ...' if len(tensors) > 3 else ''}"
    )


def refuse_others(origin: str, tensors, others, name: str, classes: dict[str, str]) -> None:
    """One sentence for a checkpoint of another architecture, with the class that loads it."""
    for pattern, what in others:
        if any(re.search(pattern, key) for key in tensors):
            use = f": use {classes[what]}.{LOADER}" if what in classes else ""
            raise ValueError(f"{LOADER}: {origin} is {what}, which {name} does not load{use}")


_ORIGINAL = re.compile(r"\.gamma_([12])$|\.mlp\.(w12|w3)\.")


def _timm_name(match: re.Match) -> str:
    if match[1]:  # DeiT-3's LayerScale
        return f".ls{match[1]}.gamma"
    return ".mlp.fc1." if match[2] == "w12" else ".mlp.fc2."  # DINOv2's SwiGLU


def original_names(tensors: dict[str, Tensor]) -> tuple[State, dict]:
    """The original DeiT-3's and DINOv2's names as timm's, and what those models normalise with."""
    deit3 = any(key.endswith(".gamma_1") for key in tensors)
    hints = IMAGENET if deit3 or "mask_token" in tensors else {}
    if deit3 or "register_tokens" in tensors:
        hints = {**hints, "no_embed_class": True}
    state = {_ORIGINAL.sub(_timm_name, key): tensor for key, tensor in tensors.items()}
    state.pop("mask_token", None)
    layers = [key for key in state if key.startswith("pre_logits.")]
    warn_of_ignored(LOADER, layers, "layer before the head")  # as timm
    state = {key: tensor for key, tensor in state.items() if key not in layers}
    return huggingface.merge_registers(state), hints


def timm_hints(config: dict) -> dict:
    """timm's config.json: the normalisation and the model's own arguments."""
    hints = timm_normalization(config)
    if config.get("global_pool") in ("token", "avg", "max", "avgmax"):
        hints["global_pool"] = config["global_pool"]
    for pattern, settings in _ARCHITECTURES:
        if re.search(pattern, config["architecture"]):
            hints |= settings
    return {**hints, **config.get("model_args", {})}


def timm_normalization(config: dict) -> dict:
    pretrained = config.get("pretrained_cfg", {})
    names = [name for name in ("mean", "std") if pretrained.get(name) is not None]
    return {name: tuple(pretrained[name]) for name in names}
