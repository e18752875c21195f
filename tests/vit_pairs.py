"""Small timm VisionTransformers and our copies, with weights that make every parameter matter."""

import functools

import torch
from timm_stub import timm
from torch import nn

from vitkernels import FusedViT

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}

# name: (timm's constructor arguments, image size)
CONFIGS = {
    "class_token": ({}, (32, 32)),
    "average_pool": ({"global_pool": "avg", "class_token": False}, (32, 32)),
    "average_max_pool": ({"global_pool": "avgmax", "fc_norm": False}, (32, 32)),
    "registers_layer_scale": ({"reg_tokens": 4, "init_values": 0.3}, (32, 32)),  # DINOv2
    "no_embed_class": ({"no_embed_class": True, "init_values": 1e-4}, (32, 32)),  # DeiT-3
    "clip": ({"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"}, (32, 32)),
    "siglip": (
        {
            "global_pool": "avg",
            "class_token": False,
            "act_layer": functools.partial(nn.GELU, approximate="tanh"),
        },
        (32, 32),
    ),
    "no_biases": ({"qkv_bias": False, "proj_bias": False}, (32, 32)),
    "qk_norm": ({"qk_norm": True, "init_values": 1e-1, "pool_include_prefix": True}, (32, 32)),
    "sub_norms": ({"scale_attn_norm": True, "scale_mlp_norm": True, "mlp_ratio": 2.5}, (32, 32)),
    "dynamic_size": ({"dynamic_img_size": True, "reg_tokens": 1}, (40, 24)),
    "dynamic_pad": ({"dynamic_img_size": True, "dynamic_img_pad": True}, (37, 29)),
    "gray_not_square": ({"img_size": (24, 56), "patch_size": (8, 7), "in_chans": 1}, (24, 56)),
    "no_final_norm": (
        {"final_norm": False, "global_pool": "", "pos_embed": "none", "num_classes": 0},
        (32, 32),
    ),
    "res_post_norm": (
        {"block_fn": "ResPostBlock", "init_values": 0.3, "scale_mlp_norm": True},
        (32, 32),
    ),
    "swiglu": (  # DINOv2 giant
        {"mlp_layer": "SwiGLUPacked", "act_layer": nn.SiLU, "init_values": 0.5, "mlp_ratio": 5.5},
        (32, 32),
    ),
    "wide_heads": (
        {"embed_dim": 160, "num_heads": 2, "depth": 2, "embed_norm_layer": nn.LayerNorm},
        (32, 32),
    ),
}


def timm_vit(name="class_token", **more) -> nn.Module:
    """timm's model of a configuration, evaluating; no parameter keeps its initial 0, 1 or 1e-4."""
    from timm.models import vision_transformer

    settings = {"num_classes": 10, **TINY, **CONFIGS[name][0], **more}
    for key in ("block_fn", "mlp_layer"):
        if isinstance(settings.get(key), str):
            settings[key] = getattr(vision_transformer, settings[key])
    return randomised(vision_transformer.VisionTransformer(**settings).eval())


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def pair(name="class_token", **more) -> tuple[nn.Module, FusedViT]:
    theirs = timm_vit(name, **more)
    return theirs, FusedViT.from_timm(theirs)


def images(name="class_token", batch=2) -> torch.Tensor:
    in_chans = CONFIGS[name][0].get("in_chans", 3)
    return torch.randn(batch, in_chans, *CONFIGS[name][1])


def logits_and_grads(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, the images' gradient and every parameter's, for one fixed incoming gradient."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = model(x)
    direction = torch.sin(torch.arange(out.numel(), dtype=torch.float64) + 1).reshape(out.shape)
    out.backward(direction.to(out.dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": out.detach(), "images": x.grad, **grads}


def relative_errors(got: dict, truth: dict) -> dict[str, float]:
    """Norm-relative error of each entry.

    A gradient far below the largest one (the key bias has none in exact arithmetic) counts against
    1e-3 of the largest.
    """
    norms = {name: value.double().norm().item() for name, value in truth.items()}
    floor = 1e-3 * max(norms.values())
    return {
        name: (got[name].double() - value.double()).norm().item() / max(norms[name], floor)
        for name, value in truth.items()
    }


ROUNDING = 5e-6  # of two fp32 runs of one model, norm-relative


def same(got: dict, expected: dict, limit=ROUNDING) -> None:
    assert got.keys() == expected.keys()
    errors = relative_errors(got, expected)
    assert max(errors.values()) <= limit, sorted(errors.items(), key=lambda e: -e[1])[:3]


needs_timm = {"condition": timm is None, "reason": "timm is not installed"}
