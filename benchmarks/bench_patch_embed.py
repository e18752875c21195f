"""patch_embed from uint8 images, beside the chain of stock operators, eager and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkernels.ops import patch_embed
from vitkernels.ops.patch_embed import reference

from .harness import BOTH, FORWARD, Case
from .shapes import DTYPES, PATCH_EMBED_TARGETS

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def eager(images, weight, bias, pos_embed, prefix_tokens):
    """ToTensor and Normalize, then what timm's PatchEmbed and _pos_embed do."""
    x = (images.float() / 255 - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)
    x = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[-2:])
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed


def ours(images, weight, bias, pos_embed, prefix_tokens):
    return patch_embed(
        images, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens, mean=MEAN, std=STD
    )


def truth(images, weight, bias, pos_embed, prefix_tokens):
    return reference.patch_embed(
        images, weight, bias, pos_embed, prefix_tokens, MEAN, STD, torch.float64
    )


def make_inputs(shape, dtype, seed):
    B, Cin, H, W, patch, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    images = torch.randint(0, 256, (B, Cin, H, W), dtype=torch.uint8, generator=generator)
    tokens = 1 + (H // patch) * (W // patch)
    weight = normal(D, Cin, patch, patch) * (Cin * patch * patch) ** -0.5
    rest = (weight, normal(D) / 2, normal(1, tokens, D) / 2, normal(1, 1, D))
    return [images, *(t.to(dtype) for t in rest)]


def case(name, shape, dtype, direction) -> Case:
    flops, moved = reference.cost(shape, 1, dtype.itemsize)
    if direction == BOTH:
        more_flops, more = reference.cost(shape, 1, dtype.itemsize, backward=True)
        flops, moved = flops + more_flops, moved + more
    return Case(
        "patch_embed",
        name,
        shape,
        dtype,
        direction,
        lambda seed: make_inputs(shape, dtype, seed),
        {"vitkernels": ours, "eager": eager},
        truth,
        (flops, moved),
        PATCH_EMBED_TARGETS.get((name, dtype, direction), {}),
    )


def cases(everything: bool = False) -> list[Case]:
    """The shapes with targets; with `everything` all of sample_inputs()."""
    every = [
        case(name, shape, dtype, direction)
        for name, shape in reference.sample_inputs()
        for dtype in DTYPES
        for direction in (FORWARD, BOTH)
    ]
    return every if everything else [c for c in every if c.targets]
