"""timm's hybrid VisionTransformer -> FusedHybridViT: settings off the modules, copies."""

from __future__ import annotations

import copy

from torch import nn

from ..nn import ResNetStem, ResNetV2
from . import timm

NAME = "FusedHybridViT"


def hybrid_from_timm(cls, source: str | nn.Module, pretrained: bool = False, **kwargs):
    """A FusedHybridViT with the settings, and copies of the parameters, of a timm model."""
    source = timm.source_model(source, pretrained, kwargs)
    timm.expect(NAME, source, "VisionTransformer", "model")
    settings = timm.vit_settings(source, NAME, "HybridEmbed")
    embed = source.patch_embed
    backbone = _resnet(embed.backbone) or copy.deepcopy(embed.backbone)
    model = cls(
        backbone,
        proj=not isinstance(embed.proj, nn.Identity),
        weight_init="skip",
        device="meta",
        **settings,
    )
    timm.copy_parameters(source, model)
    for block, theirs in zip(model.blocks, source.blocks, strict=True):
        timm.copy_drop_paths(block, theirs)
    model.grad_checkpointing = source.grad_checkpointing
    timm.copy_configuration(source, model)
    _copy_stages(embed.backbone, model.patch_embed.backbone)
    return model


def _resnet(backbone: nn.Module) -> nn.Module | None:
    """A ResNetV2 or stem of ours without weights, of the same structure; None for another CNN."""
    stem = getattr(backbone, "stem", backbone)
    if not isinstance(stem, nn.Sequential) or [n for n, _ in stem.named_children()] != [
        "conv", "norm", "pool",
    ]:  # fmt: skip
        return None
    padding = "same" if getattr(stem.conv, "same_pad", False) else "symmetric"
    where = {"padding": padding, "device": "meta"}
    in_chans, width = stem.conv.weight.shape[1], stem.conv.weight.shape[0]
    try:
        if stem is backbone:
            ours: nn.Module = ResNetStem(in_chans, width, **where)
        else:
            layers = tuple(len(stage.blocks) for stage in backbone.stages)
            widths = tuple(info["num_chs"] for info in backbone.feature_info[1:])
            ours = ResNetV2(layers, widths, in_chans, width, **where)
    except (AttributeError, TypeError, ValueError):
        return None
    return ours if _structure(ours) == _structure(backbone) else None


def _structure(backbone: nn.Module) -> dict[str, tuple]:
    """What each module computes, by name, without those that do nothing; each eps is copied."""
    return {
        name: _told(module)
        for name, module in backbone.named_modules()
        if name and not isinstance(module, nn.Identity) and _KINDS.get(type(module).__name__) != ""
    }


# timm's and our classes; "": computes nothing here, or what its children do
_KINDS = {
    "StdConv2dSame": "StdConv2d", "MaxPool2dSame": "MaxPool2d", "DropPath": "",
    "ClassifierHead": "", "SelectAdaptivePool2d": "", "Dropout": "", "ResNetStem": "Sequential",
}  # fmt: skip


def _told(module: nn.Module) -> tuple:
    kind = _KINDS.get(type(module).__name__, type(module).__name__)
    if isinstance(module, nn.Conv2d):
        same = getattr(module, "same_pad", False)
        margin = module.padding
        return (
            kind, tuple(module.weight.shape), module.stride, margin, module.dilation,
            module.groups, same, hasattr(module, "eps"), module.bias is None,
        )  # fmt: skip
    if isinstance(module, nn.GroupNorm):
        return kind, module.num_channels, module.num_groups, module.affine
    if isinstance(module, nn.MaxPool2d):
        same = type(module).__name__ == "MaxPool2dSame"
        geometry = (module.kernel_size, module.stride, module.padding)
        return (kind, same, *(v if isinstance(v, tuple) else (v, v) for v in geometry))
    return (kind,)


def _copy_stages(source: nn.Module, ours: nn.Module) -> None:
    """Gradient checkpointing and the rate of each DropPath."""
    if not isinstance(ours, ResNetV2):
        return
    for stage, theirs in zip(ours.stages, source.stages, strict=True):
        stage.grad_checkpointing = theirs.grad_checkpointing
        for block, their_block in zip(stage.blocks, theirs.blocks, strict=True):
            block.drop_path.drop_prob = getattr(their_block.drop_path, "drop_prob", 0.0)
