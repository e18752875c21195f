"""The specification of patch_embed: plain PyTorch, obvious, correct in float64.

Corner cases that every backend follows: uint8 images are scaled to [0, 1] before mean and std;
a position embedding of N rows leaves the prefix tokens alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def patch_embed(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype):
    """Normalise, project each patch, add position, put the prefix tokens in front; all wide."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    x = unfold(normalize(images, mean, std, wide).to(operand_dtype(images, out_dtype)).to(wide),
               weight.shape[-2:])  # fmt: skip
    w = weight.to(out_dtype).to(wide)
    tokens = x @ w.reshape(w.shape[0], -1).T
    tokens = tokens if bias is None else tokens + bias.to(wide)
    B, N, D = tokens.shape
    prefix = prefix_tokens
    prefix = tokens.new_zeros(1, 0, D) if prefix is None else prefix.to(wide)
    if pos_embed is not None:
        pos = pos_embed.to(wide)
        of_prefix, of_patches = pos[:, : pos.shape[1] - N], pos[:, pos.shape[1] - N :]
        tokens = tokens + of_patches
        prefix = prefix + of_prefix if of_prefix.shape[1] else prefix
    return torch.cat([prefix.expand(B, -1, -1), tokens], dim=1)


def operand_dtype(images: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """uint8 pixels enter the product exactly (centred integers); float ones are rounded once."""
    if images.dtype != torch.uint8:
        return out_dtype
    return torch.float64 if out_dtype == torch.float64 else torch.float32


def normalize(images: Tensor, mean, std, dtype: torch.dtype) -> Tensor:
    """(images - mean) / std for each channel, uint8 scaled to [0, 1] first."""
    x = images.to(dtype)
    x = x / 255 if images.dtype == torch.uint8 else x
    x = x if mean is None else x - mean.to(dtype).view(-1, 1, 1)
    return x if std is None else x / std.to(dtype).view(-1, 1, 1)


def unfold(images: Tensor, patch_size) -> Tensor:
    """(B, Cin, H, W) -> (B, N, Cin ph pw), patches in row-major order."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


# --- raw operators --------------------------------------------------------------------------------


def patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype):
    tokens = patch_embed(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype)
    return tokens.to(out_dtype).contiguous()


def patch_embed_bwd(
    dtokens, images, weight, bias, pos_embed, prefix_tokens, mean, std, output_mask
):
    wide = torch.float64 if dtokens.dtype == torch.float64 else torch.float32
    P = 0 if prefix_tokens is None else prefix_tokens.shape[1]
    dtokens = dtokens.to(wide)
    dpatches = dtokens[:, P:]
    D, _, *patch_size = weight.shape
    dimages = dweight = dbias = dpos = dprefix = None
    if output_mask[0]:
        w = weight.to(wide).reshape(D, -1)
        columns = (dpatches @ w).transpose(1, 2)
        dimages = F.fold(columns, images.shape[-2:], patch_size, stride=patch_size)
        dimages = dimages if std is None else dimages / std.to(wide).view(-1, 1, 1)
        dimages = dimages.to(images.dtype).contiguous()
    if output_mask[1]:
        x = unfold(normalize(images, mean, std, wide), patch_size).reshape(-1, weight[0].numel())
        dweight = (dpatches.reshape(-1, D).T @ x).reshape(weight.shape).to(weight.dtype)
    if output_mask[2]:
        dbias = dpatches.sum((0, 1)).to(bias.dtype)
    if output_mask[3]:
        with_prefix = pos_embed.shape[1] == dtokens.shape[1]
        dpos = (dtokens if with_prefix else dpatches).sum(0, keepdim=True).to(pos_embed.dtype)
    if output_mask[4]:
        dprefix = dtokens[:, :P].sum(0, keepdim=True).to(prefix_tokens.dtype)
    return dimages, dweight, dbias, dpos, dprefix


# --- what tests, benchmarks and profilers share ---------------------------------------------------


def sample_inputs():
    """(name, (B, Cin, H, W, patch, D)) of models people meet."""
    return [
        ("vit_tiny", (8, 3, 224, 224, 16, 192)),
        ("vit_small", (8, 3, 224, 224, 16, 384)),
        ("vit_base", (8, 3, 224, 224, 16, 768)),
        ("vit_base_patch32", (8, 3, 224, 224, 32, 768)),
        ("dinov2_base", (4, 3, 518, 518, 14, 768)),
        ("vit_tiny_patch8", (4, 3, 224, 224, 8, 192)),
        ("swin_tiny", (4, 3, 224, 224, 4, 96)),
    ]


def cost(shape, image_bytes=1, item_bytes=2, *, backward=False):
    """(FLOPs, least bytes) of one call; backward: weight, bias, position and token gradients."""
    B, Cin, H, W, patch, D = shape
    tokens = B * (H // patch) * (W // patch)
    products = 2 * tokens * Cin * patch * patch * D
    image, weight = B * Cin * H * W * image_bytes, Cin * patch * patch * D * item_bytes
    return products, image + weight + tokens * D * item_bytes
