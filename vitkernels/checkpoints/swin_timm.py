"""timm's SwinTransformer and SwinTransformerV2 -> FusedSwin: settings off the modules, copies."""

from __future__ import annotations

from torch import nn

from . import timm
from .swin_shapes import NAME, mlp_ratio

# timm rolls the map, then pads it, and fixes window and shift when it is made.
RULES = {"pad_mode": "timm", "window_clamp": "axis"}
VERSIONS = {"SwinTransformer": 1, "SwinTransformerV2": 2}


def swin_from_timm(cls, source: str | nn.Module, pretrained: bool = False, **kwargs):
    """A FusedSwin with the settings, and copies of the parameters, of a timm model."""
    source = timm.source_model(source, pretrained, kwargs)
    model = cls(**swin_settings(source), weight_init="skip", device="meta")
    timm.copy_parameters(source, model)
    for stage, their_stage in zip(model.layers, source.layers, strict=True):
        for block, theirs in zip(stage.blocks, their_stage.blocks, strict=True):
            _check_block(block, theirs)
            block.target_shift_size = theirs.target_shift_size  # what set_input_size may restore
            timm.copy_drop_paths(block, theirs)
        stage.grad_checkpointing = their_stage.grad_checkpointing
    for name in ("_ref_window_sizes", "_ref_grid_size"):  # what set_input_size scales
        setattr(model, name, getattr(source, name))
    timm.copy_configuration(source, model)
    return model


def swin_settings(source: nn.Module) -> dict:
    """Constructor arguments that rebuild `source`; one sentence names what is not supported."""
    timm.expect(NAME, source, "SwinTransformer", "model", "SwinTransformerV2")
    timm.expect(NAME, source.patch_embed, "PatchEmbed", "patch_embed")
    version = VERSIONS[type(source).__name__]
    blocks = [block for stage in source.layers for block in stage.blocks]
    for block in blocks:
        timm.expect(NAME, block, f"SwinTransformer{'V2' * (version == 2)}Block", "block")
        timm.expect(NAME, block.attn, "WindowAttention", "attention")
        timm.expect(NAME, block.mlp, "Mlp", "MLP")
    for stage in source.layers:
        timm.expect(NAME, stage.downsample, "PatchMerging", "downsample", "Identity")
    if len({_shared_settings(block) for block in blocks}) > 1:
        timm.refuse(NAME, "a model whose blocks differ in activation or partition")
    block, embed = blocks[0], source.patch_embed
    first = [stage.blocks[0] for stage in source.layers]
    widths = tuple(b.mlp.fc1.in_features for b in first)
    heads = tuple(b.attn.num_heads for b in first)
    settings = {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": source.num_classes,
        "global_pool": source.global_pool,
        "embed_dim": widths if source.embed_dim != widths[0] else widths[0],
        "depths": tuple(len(stage.blocks) for stage in source.layers),
        "num_heads": heads,
        "window_size": tuple(tuple(b.window_size) for b in first),
        "always_partition": block.always_partition,
        "strict_img_size": embed.strict_img_size,
        "mlp_ratio": mlp_ratio([b.mlp.fc1.out_features for b in first], widths),
        "drop_rate": source.head.drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "norm_layer": timm.norm_layer(source.norm, NAME),
        "act_layer": timm.activation(block.mlp.act),
        "version": version,
        **RULES,
        **timm.normalization(source),
    }
    if version == 2:
        settings["qkv_bias"] = block.attn.q_bias is not None
        settings["pretrained_window_sizes"] = tuple(b.attn.pretrained_window_size for b in first)
    else:
        settings["qkv_bias"] = block.attn.qkv.bias is not None
        inner = [b.attn.proj.in_features for b in first]
        if inner != list(widths):
            settings["head_dim"] = tuple(i // h for i, h in zip(inner, heads, strict=True))
    return settings


def _shared_settings(block: nn.Module) -> tuple:
    act = block.mlp.act
    return type(act), getattr(act, "approximate", None), block.always_partition


def _check_block(block: nn.Module, theirs: nn.Module) -> None:
    for name in ("window_size", "shift_size"):
        if tuple(getattr(block, name)) != tuple(getattr(theirs, name)):
            timm.refuse(
                NAME, f"a block with {name} {getattr(theirs, name)} (not {getattr(block, name)})"
            )
