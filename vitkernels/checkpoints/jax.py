"""Google's JAX checkpoints (.npz: original, augreg, big_vision) -> timm's names."""

from __future__ import annotations

import torch
from torch import Tensor

from .build import warn_of_ignored

PREFIXES = ("", "opt/target/", "params/", "params/img/")
PATCH_KERNEL = "embedding/kernel"


def jax_prefix(keys) -> str | None:
    """What stands before the names of a ViT, None where these are no names of one."""
    return next((prefix for prefix in PREFIXES if f"{prefix}{PATCH_KERNEL}" in keys), None)


def timm_state(
    loader: str, origin: str, arrays: dict[str, Tensor], name: str = "FusedViT"
) -> tuple[dict, dict]:
    """(state with timm's names, hints): kernels are (in, out), convolutions HWIO, heads apart."""
    prefix = jax_prefix(arrays) or ""
    arrays = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    for part, what in (("MAPHead_0/probe", "attention pooling"), ("conv_root/kernel", "a hybrid")):
        if part in arrays:
            raise ValueError(f"{loader}: {origin} has {what}, which {name} does not support")
    scanned = "Transformer/encoderblock/LayerNorm_0/scale" in arrays
    big_vision = scanned or prefix.startswith("params/") or "pos_embedding" in arrays
    positions = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"

    unread = set(arrays)

    def get(key: str) -> Tensor:
        if key not in arrays:
            raise ValueError(f"{loader}: {origin} does not fit {name}: missing {key}")
        unread.discard(key)
        return arrays[key]

    kernel = get(PATCH_KERNEL)
    if kernel.ndim != 4:
        raise ValueError(
            f"{loader}: {origin}: {PATCH_KERNEL} must have 4 dimensions (HWIO), got {kernel.ndim}"
        )
    state = {
        "pos_embed": get(positions),
        "patch_embed.proj.weight": kernel.permute(3, 2, 0, 1),
        "patch_embed.proj.bias": get("embedding/bias"),
        "norm.weight": get("Transformer/encoder_norm/scale"),
        "norm.bias": get("Transformer/encoder_norm/bias"),
    }
    if "cls" in arrays:
        state["cls_token"] = get("cls")
    if "head/kernel" in arrays:
        state["head.weight"], state["head.bias"] = get("head/kernel").t(), get("head/bias")
    depth = _depth(arrays, scanned)
    for i in range(depth):
        block = f"Transformer/encoderblock{'' if scanned else f'_{i}'}/"
        one = (lambda key, i=i, block=block: get(block + key)[i]) if scanned else (
            lambda key, block=block: get(block + key))  # fmt: skip
        state |= {f"blocks.{i}.{key}": tensor for key, tensor in _block(one, big_vision).items()}
    heads = {} if depth == 0 else {"num_heads": get(_any_query(arrays)).shape[-2]}
    layers = sorted(key for key in unread if key.startswith("pre_logits/"))
    warn_of_ignored(loader, layers, "layer before the head", name)  # as timm
    if others := sorted(unread.difference(layers)):
        some = f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
        raise ValueError(f"{loader}: {origin} does not fit {name}: not expected: {some}")
    return state, heads


def _block(get, big_vision: bool) -> dict[str, Tensor]:
    """One encoder block; query, key and value kernels are (C, heads, D), out is (heads, D, C)."""
    attention, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    mha, mlp = f"MultiHeadDotProductAttention_{attention}/", f"MlpBlock_{mlp}/"
    qkv = ("query", "key", "value")
    return {
        "norm1.weight": get("LayerNorm_0/scale"),
        "norm1.bias": get("LayerNorm_0/bias"),
        "attn.qkv.weight": torch.cat([get(f"{mha}{n}/kernel").flatten(1).t() for n in qkv]),
        "attn.qkv.bias": torch.cat([get(f"{mha}{n}/bias").flatten() for n in qkv]),
        "attn.proj.weight": get(f"{mha}out/kernel").flatten(0, 1).t(),
        "attn.proj.bias": get(f"{mha}out/bias"),
        "norm2.weight": get(f"LayerNorm_{norm2}/scale"),
        "norm2.bias": get(f"LayerNorm_{norm2}/bias"),
        "mlp.fc1.weight": get(f"{mlp}Dense_0/kernel").t(),
        "mlp.fc1.bias": get(f"{mlp}Dense_0/bias"),
        "mlp.fc2.weight": get(f"{mlp}Dense_1/kernel").t(),
        "mlp.fc2.bias": get(f"{mlp}Dense_1/bias"),
    }


def _depth(arrays: dict[str, Tensor], scanned: bool) -> int:
    if scanned:
        return arrays["Transformer/encoderblock/LayerNorm_0/scale"].shape[0]
    start = "Transformer/encoderblock_"
    blocks = {key.removeprefix(start).split("/")[0] for key in arrays if key.startswith(start)}
    return 1 + max((int(block) for block in blocks), default=-1)


def _any_query(arrays: dict[str, Tensor]) -> str:
    return next(key for key in arrays if key.endswith("/query/kernel"))
