"""torch.nn's Transformer encoder modules -> ours: settings off the modules, copied parameters."""

from __future__ import annotations

from torch import nn

from .layer_norm import LayerNorm


def block_from_torch(cls, layer: nn.TransformerEncoderLayer):
    if type(layer) is not nn.TransformerEncoderLayer:
        _refuse(f"the layer must be a torch.nn.TransformerEncoderLayer, got {type(layer).__name__}")
    attention = layer.self_attn
    if not attention.batch_first:
        _refuse("the layer must have batch_first=True (its inputs are (B, N, d_model)), got False")
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        _refuse("an attention with kdim, vdim, add_bias_kv or add_zero_attn is not supported")
    block = cls(
        attention.embed_dim,
        attention.num_heads,
        layer.linear1.out_features,
        activation=layer.activation,
        norm_first=layer.norm_first,
        bias=layer.linear1.bias is not None,
        device="meta",
    )
    block.self_attn.dropout = attention.dropout
    _copy(layer, block)
    return block


def encoder_from_torch(cls, encoder: nn.TransformerEncoder):
    if type(encoder) is not nn.TransformerEncoder:
        _refuse(f"the encoder must be a torch.nn.TransformerEncoder, got {type(encoder).__name__}")
    from .encoder_block import EncoderBlock

    blocks = [EncoderBlock.from_torch(layer) for layer in encoder.layers]
    made = cls(blocks[0], 1, _norm_from_torch(encoder.norm))
    made.layers, made.num_layers = nn.ModuleList(blocks), len(blocks)
    made.training = encoder.training
    return made


def _norm_from_torch(norm: nn.Module | None) -> nn.Module | None:
    if norm is None:
        return None
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
        _refuse(f"the last norm must be a LayerNorm of the features, got {norm}")
    affine, bias = norm.elementwise_affine, norm.bias is not None
    ours = LayerNorm(norm.normalized_shape[0], affine=affine, bias=bias, device="meta")
    _copy(norm, ours)
    return ours


def _copy(source: nn.Module, made: nn.Module) -> None:
    """Parameters under the same names; dtype, device, requires_grad, mode, eps and dropouts."""
    state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    made.load_state_dict(state, strict=True, assign=True)
    theirs = dict(source.named_parameters())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(theirs[name].requires_grad)
    modules = dict(source.named_modules())
    for name, module in made.named_modules():
        same = modules.get(name, source)
        module.training = same.training
        for setting in ("eps", "p"):
            if hasattr(module, setting) and hasattr(same, setting):
                setattr(module, setting, getattr(same, setting))


def _refuse(sentence: str) -> None:
    raise ValueError(f"from_torch: {sentence}")
