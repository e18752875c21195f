"""timm's VisionTransformer -> FusedViT: read the settings off the modules, copy the parameters.

timm is imported only to make a model from its name.
"""

from __future__ import annotations

import copy
import functools

from torch import nn

from ..nn import GluMlp, LayerNorm
from ..nn.known import known

NAME = "FusedViT"


def vit_from_timm(cls, source: str | nn.Module, pretrained: bool = False, **kwargs):
    """A FusedViT with the settings, and copies of the parameters, of a timm VisionTransformer."""
    source = source_model(source, pretrained, kwargs)
    expect(NAME, source, "VisionTransformer", "model")
    return copied(cls, source, vit_settings(source))


def copied(cls, source: nn.Module, settings: dict):
    """A model of these settings with all that `source` has."""
    model = cls(**settings, weight_init="skip", device="meta")
    copy_parameters(source, model)
    for block, theirs in zip(model.blocks, source.blocks, strict=True):
        copy_drop_paths(block, theirs)
    model.grad_checkpointing = source.grad_checkpointing
    copy_configuration(source, model)
    return model


def source_model(source: str | nn.Module, pretrained: bool, kwargs: dict) -> nn.Module:
    if isinstance(source, str):
        return create_timm_model(source, pretrained, **kwargs)
    if pretrained or kwargs:
        raise ValueError(
            "from_timm: pretrained and timm's arguments need a model name, got a model"
        )
    return source


def create_timm_model(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"from_timm: a model name needs timm (pip install timm): {error}"
        ) from error
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def vit_settings(source: nn.Module, name: str = NAME, embed_class: str = "PatchEmbed") -> dict:
    """Constructor arguments that rebuild `source`; one sentence names what is not supported."""
    expect(name, source.patch_embed, embed_class, "patch_embed")
    if source.attn_pool is not None:
        refuse(name, "attention pooling (global_pool='map' or 'prr')")
    for block in source.blocks:
        expect(name, block, "Block", "block", "ResPostBlock")
        expect(name, block.attn, "Attention", "attention")
        expect(name, block.mlp, "Mlp", "MLP", "GluMlp")
    block, embed = source.blocks[0], source.patch_embed
    if any(_shared_settings(other) != _shared_settings(block) for other in source.blocks):
        refuse(name, "a model whose blocks differ in heads, activation or class")
    if getattr(block.attn, "gate", None) is not None:
        refuse(name, "gated attention")
    if embed.img_size is None:
        refuse(name, "a patch embedding without img_size")
    pos_embed, after_pool = source.pos_embed, not isinstance(source.fc_norm, nn.Identity)
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": _in_chans(embed),
        "num_classes": source.num_classes,
        "global_pool": source.global_pool,
        "embed_dim": source.embed_dim,
        "depth": len(source.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": (block.mlp.fc1.out_features + 0.5)
        / source.embed_dim,  # survives int(dim * ratio)
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": getattr(getattr(block, "ls1", block), "init_values", None),
        "class_token": source.cls_token is not None,
        "pos_embed": "none" if pos_embed is None else "learn",
        "no_embed_class": source.no_embed_class,
        "reg_tokens": source.num_reg_tokens,
        "pre_norm": not isinstance(source.norm_pre, nn.Identity),
        "final_norm": after_pool or not isinstance(source.norm, nn.Identity),
        "fc_norm": after_pool,
        "pool_include_prefix": source.pool_include_prefix,
        "dynamic_img_size": source.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": source.head_drop.p,
        "pos_drop_rate": source.pos_drop.p,
        "patch_drop_rate": getattr(source.patch_drop, "prob", 0.0),
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "embed_norm_layer": norm_layer(getattr(embed, "norm", nn.Identity()), name),
        "norm_layer": norm_layer(block.norm1, name),
        "act_layer": activation(block.mlp.act),
        "mlp_layer": _mlp_layer(block.mlp),
        "block_fn": type(block).__name__,
        **normalization(source),
    }


def _shared_settings(block: nn.Module) -> tuple:
    """What one constructor argument says for all blocks, and no parameter's shape tells."""
    act = block.mlp.act
    return (
        type(block), block.attn.num_heads, type(block.mlp),
        type(act), getattr(act, "approximate", None),
    )  # fmt: skip


def _in_chans(embed: nn.Module) -> int:
    """Of the images; a projection of a CNN's map has others."""
    return embed.in_chans if hasattr(embed, "backbone") else embed.proj.in_channels


def normalization(source: nn.Module) -> dict:
    """mean and std of timm's configuration of this model, where it has one."""
    config = getattr(source, "pretrained_cfg", None) or getattr(source, "default_cfg", None) or {}
    in_chans = _in_chans(source.patch_embed)
    found = {name: config.get(name) for name in ("mean", "std")}
    return {  # of RGB for other channels: their average
        name: values if len(values) == in_chans else sum(values) / len(values)
        for name, values in found.items()
        if values
    }


def copy_parameters(source: nn.Module, model: nn.Module) -> None:
    """Copies under the same names: dtype, device, requires_grad, each module's mode, the eps of
    each norm, the rate of each dropout and the scale of each attention are kept."""
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(theirs[name].requires_grad)
    modules = dict(source.named_modules())
    for name, module in model.named_modules():
        same = modules.get(name, source)
        module.training = same.training
        for setting in ("eps", "p", "scale"):
            if hasattr(module, setting) and hasattr(same, setting):
                setattr(module, setting, getattr(same, setting))


def norm_layer(norm: nn.Module, model: str = NAME):
    """The class and settings of a LayerNorm, None for no norm."""
    if isinstance(norm, nn.Identity):
        return None
    if not isinstance(norm, nn.LayerNorm) or type(norm).__name__ not in (
        "LayerNorm",
        "LayerNormFp32",
    ):
        refuse(model, f"the norm {type(norm).__name__}")
    return functools.partial(LayerNorm, eps=norm.eps, affine=norm.elementwise_affine)


def _mlp_layer(mlp: nn.Module):
    gated = type(mlp).__name__ == "GluMlp"
    return functools.partial(GluMlp, gate_last=mlp.gate_last) if gated else "Mlp"


def activation(act: nn.Module):
    if type(act) is nn.GELU:
        return functools.partial(nn.GELU, approximate=act.approximate)
    return known("from_timm", "act_layer", type(act))


def copy_drop_paths(block: nn.Module, theirs: nn.Module) -> None:
    """A schedule of its own."""
    for name in ("drop_path1", "drop_path2"):
        getattr(block, name).drop_prob = getattr(getattr(theirs, name), "drop_prob", 0.0)


def copy_configuration(source: nn.Module, model: nn.Module) -> None:
    """What timm.data.resolve_data_config reads."""
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(source, name):
            setattr(model, name, copy.deepcopy(getattr(source, name)))


def expect(model: str, module: nn.Module, name: str, role: str, *others: str) -> None:
    if type(module).__name__ not in (name, *others):
        refuse(model, f"the {role} {type(module).__name__}")


def refuse(model: str, what: str) -> None:
    raise ValueError(f"from_timm: {what} is not supported by {model}")
