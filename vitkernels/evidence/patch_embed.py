"""patch_embed from uint8 images, and the chain of stock operators that does the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import ops
from ..ops.patch_embed import reference
from .subject import Subject, normal, uint8

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def subject(op, shape, device="cpu") -> Subject:
    """shape: (B, Cin, H, W, patch, D), one class token and a position for every token."""
    B, Cin, H, W, patch, D = shape
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    def ours(backend):
        def call(images, weight, bias, pos_embed, prefix_tokens):
            return ops.patch_embed(
                images, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens, mean=mean,
                std=std, backend=backend,
            )  # fmt: skip

        return call

    def eager(images, weight, bias, pos_embed, prefix_tokens):
        """ToTensor and Normalize, then what timm's PatchEmbed and _pos_embed do."""
        x = (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        x = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed

    def truth(images, weight, bias, pos_embed, prefix_tokens):
        return reference.patch_embed(
            images, weight, bias, pos_embed, prefix_tokens, mean, std, torch.float64
        )

    def make(seed, dtype, device="cpu"):
        random, tokens = normal(seed, device), 1 + (H // patch) * (W // patch)
        weight = random(D, Cin, patch, patch) * (Cin * patch * patch) ** -0.5
        rest = (weight, random(D) / 2, random(1, tokens, D) / 2, random(1, 1, D))
        return [uint8(seed, device, (B, Cin, H, W)), *(t.to(dtype) for t in rest)]

    def cost(size, backward):
        return reference.cost(shape, 1, size, backward=backward)

    sizes = (Cin * patch * patch,)
    return Subject(op, tuple(shape), make, ours, eager, truth, cost, sizes)
