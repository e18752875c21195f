"""Multiplications, activations and parameters of a model, counted as timm's tables count them."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one image; macs include five for each element of a LayerNorm or GroupNorm, as fvcore
    counts them."""

    macs: int
    activations: int  # elements that Linears, convolutions and matrix products put out
    parameters: int


def cost_of(model: nn.Module) -> Cost:
    """Of a FusedViT, FusedDeiT or FusedSwin, at its own image size."""
    macs, activations = _of_swin(model) if hasattr(model, "layers") else _of_vit(model)
    return Cost(macs, activations, sum(parameter.numel() for parameter in model.parameters()))


def _of_vit(model: nn.Module) -> tuple[int, int]:
    H, W = model.patch_embed.grid_size
    N, C = H * W + model.num_prefix_tokens, model.embed_dim
    macs, activations = _of_embedding(model.patch_embed)
    for block in model.blocks:
        of_block = _of_block(block, N, N)
        macs, activations = macs + of_block[0], activations + of_block[1]
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    of_head = _of_linears((model.head, getattr(model, "head_dist", None)), 1)
    return macs + of_head[0] + 5 * norms * N * C, activations + of_head[1]


def _of_embedding(embed: nn.Module) -> tuple[int, int]:
    """Of the patches' projection, and of the CNN in front of it."""
    weight = getattr(embed.proj, "weight", None)
    macs = activations = 0
    if weight is not None:
        macs, activations = embed.num_patches * weight.numel(), embed.num_patches * weight.shape[0]
    if not hasattr(embed, "backbone"):
        return macs, activations
    counted = {"macs": macs, "activations": activations}

    def count(module: nn.Module, inputs, out: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counted["macs"] += out.numel() * module.weight[0].numel()
            counted["activations"] += out.numel()
        else:
            counted["macs"] += 5 * out.numel()

    backbone = copy.deepcopy(embed.backbone).to("meta").eval()
    for module in backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(count)
    with torch.no_grad():
        backbone(torch.empty(1, embed.in_chans, *embed.img_size, device="meta"))
    return counted["macs"], counted["activations"]


def _of_swin(model: nn.Module) -> tuple[int, int]:
    """Attention on the map as padded to whole windows; the position MLP of Swin V2 once a block."""
    embed = model.patch_embed
    (H, W), C = embed.grid_size, embed.proj.weight.shape[0]
    macs, activations = H * W * embed.proj.weight.numel(), H * W * C
    macs += 5 * H * W * C * isinstance(embed.norm, nn.LayerNorm)
    for layer in model.layers:
        parts = []
        if isinstance(layer.downsample, nn.Module) and hasattr(layer.downsample, "reduction"):
            H, W = (H + 1) // 2, (W + 1) // 2
            parts.append(_of_linears((layer.downsample.reduction,), H * W))
            parts.append((5 * H * W * layer.downsample.norm.weight.numel(), 0))
        for block in layer.blocks:
            (Wh, Ww), C = block.window_size, block.norm1.weight.numel()
            padded = -(-H // Wh) * Wh * (-(-W // Ww) * Ww)
            parts.append(_of_block(block, H * W, Wh * Ww, padded))
            parts.append((2 * 5 * H * W * C, 0))
            if hasattr(block.attn, "cpb_mlp"):
                distances = (2 * Wh - 1) * (2 * Ww - 1)
                linears = [m for m in block.attn.cpb_mlp if isinstance(m, nn.Linear)]
                parts.append(_of_linears(linears, distances))
        macs += sum(part[0] for part in parts)
        activations += sum(part[1] for part in parts)
    of_head = _of_linears((model.head.fc,), 1)
    macs += of_head[0] + 5 * H * W * model.num_features
    return macs, activations + of_head[1]


def _of_block(block: nn.Module, N: int, keys: int, padded: int | None = None) -> tuple[int, int]:
    """(macs, activations) of N tokens, each attending to `keys`, without the norms."""
    attn, mlp = block.attn, block.mlp
    width, n = attn.proj.in_features, N if padded is None else padded
    of_attn = _of_linears((attn.qkv, attn.proj), n)
    of_mlp = _of_linears((mlp.fc1, mlp.fc2), N)
    macs = of_attn[0] + of_mlp[0] + 2 * n * keys * width
    return macs, of_attn[1] + of_mlp[1] + n * (keys * attn.num_heads + width)


def _of_linears(modules, N: int) -> tuple[int, int]:
    """Of the Linears among these, on N tokens."""
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    macs = N * sum(linear.weight.numel() for linear in linears)
    return macs, N * sum(linear.out_features for linear in linears)
