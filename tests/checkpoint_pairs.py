"""Small models of transformers and torchvision, and checkpoint files written in their layouts."""

import warnings

import numpy as np
import pytest
import torch
from timm_stub import timm
from vit_pairs import randomised

try:  # after timm_stub: both import torchvision
    import transformers
except ImportError:
    transformers = None

needs_transformers = {
    "condition": transformers is None or timm is None,
    "reason": "transformers is not installed",
}

SIZES = {
    "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

# name: (class, configuration, image size)
HUGGINGFACE = {
    "classifier": ("ViTForImageClassification", {"num_labels": 7}, (32, 32)),
    "model": ("ViTModel", {}, (32, 32)),
    "tanh": ("ViTForImageClassification", {"hidden_act": "gelu_pytorch_tanh"}, (32, 32)),
    "quick": ("ViTForImageClassification", {"hidden_act": "quick_gelu"}, (32, 32)),
    "no_qkv_bias": ("ViTModel", {"qkv_bias": False, "layer_norm_eps": 1e-3}, (32, 32)),
    "gray_not_square": (
        "ViTForImageClassification",
        {"image_size": [24, 56], "patch_size": [8, 7], "num_channels": 1},
        (24, 56),
    ),
    "dropouts": (
        "ViTForImageClassification",
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
        (32, 32),
    ),
    "dinov2": ("Dinov2Model", {"layerscale_value": 0.5}, (32, 32)),
    "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}, (32, 32)),
    "dinov2_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, (32, 32)),
}


def huggingface(name="classifier", **more):
    """transformers' model, evaluating, with stock attention in the model's own precision."""
    kind, settings, _ = HUGGINGFACE[name]
    cls = getattr(transformers, kind)
    settings = {**SIZES, **settings, **more}
    if kind.startswith("ViT"):
        settings.setdefault("intermediate_size", 100)
    config = cls.config_class(**settings)
    config._attn_implementation = "sdpa"
    return randomised(cls(config).eval())


class Plain(torch.nn.Module):
    """transformers' model with a Tensor for output: logits, or the class token."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        out = self.model(x)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0]


def quietly(make, *args, **kwargs):
    """make(...) without its note about the pooler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def torchvision_vit(**more):
    from torchvision.models.vision_transformer import VisionTransformer

    settings = {
        "image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 3, "hidden_dim": 48,
        "mlp_dim": 100, "num_classes": 7,
    }  # fmt: skip
    return randomised(VisionTransformer(**{**settings, **more}).eval())


# --- JAX ------------------------------------------------------------------------------------------


def jax_arrays(state: dict, heads: int, layout: str) -> dict[str, np.ndarray]:
    """The arrays of a JAX checkpoint with the weights of a timm state_dict.

    layout: "original" (opt/target/), "augreg" (no prefix), "big_vision" (params/, _0 indices) or
    "scanned" (params/img/, the blocks stacked).
    """
    big = layout in ("big_vision", "scanned")
    mha, mlp, norm2 = ("0", "0", "1") if big else ("1", "3", "2")
    positions = "pos_embedding" if big else "Transformer/posembed_input/pos_embedding"
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        positions: state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    if "cls_token" in state:
        arrays["cls"] = state["cls_token"]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    blocks = [_jax_block(state, i, heads, mha, mlp, norm2) for i in range(depth)]
    if layout == "scanned":
        for key in blocks[0]:
            arrays[f"Transformer/encoderblock/{key}"] = torch.stack([b[key] for b in blocks])
    else:
        for i, block in enumerate(blocks):
            arrays |= {f"Transformer/encoderblock_{i}/{key}": a for key, a in block.items()}
    prefix = {"original": "opt/target/", "big_vision": "params/", "scanned": "params/img/"}
    start = prefix.get(layout, "")
    return {start + key: a.detach().contiguous().numpy() for key, a in arrays.items()}


def _jax_block(state, i, heads, mha, mlp, norm2):
    get = lambda key: state[f"blocks.{i}.{key}"]  # noqa: E731
    C = get("norm1.weight").shape[0]
    block = {
        "LayerNorm_0/scale": get("norm1.weight"),
        "LayerNorm_0/bias": get("norm1.bias"),
        f"LayerNorm_{norm2}/scale": get("norm2.weight"),
        f"LayerNorm_{norm2}/bias": get("norm2.bias"),
    }
    attention = f"MultiHeadDotProductAttention_{mha}"
    for name, weight, bias in zip(
        ("query", "key", "value"),
        get("attn.qkv.weight").chunk(3),
        get("attn.qkv.bias").chunk(3),
        strict=True,
    ):
        block[f"{attention}/{name}/kernel"] = weight.T.reshape(C, heads, C // heads)
        block[f"{attention}/{name}/bias"] = bias.reshape(heads, C // heads)
    block[f"{attention}/out/kernel"] = get("attn.proj.weight").T.reshape(heads, C // heads, C)
    block[f"{attention}/out/bias"] = get("attn.proj.bias")
    for r, fc in enumerate(("fc1", "fc2")):
        block[f"MlpBlock_{mlp}/Dense_{r}/kernel"] = get(f"mlp.{fc}.weight").T
        block[f"MlpBlock_{mlp}/Dense_{r}/bias"] = get(f"mlp.{fc}.bias")
    return block


# --- refusals -------------------------------------------------------------------------------------


def refused(sentence: str, load, *args, error=ValueError, **kwargs) -> str:
    with pytest.raises(error, match=sentence) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def damaged(tensors: dict, random: np.random.Generator) -> dict:
    """One to three tensors lost, renamed, or of another shape, rank or dtype."""
    tensors = dict(tensors)
    for _ in range(random.integers(1, 4)):
        key = list(tensors)[random.integers(len(tensors))]
        tensor = tensors.pop(key)
        ways = (
            lambda t: {},
            lambda t, key=key: {key + "_": t},
            lambda t, key=key: {key: t[None]},
            lambda t, key=key: {key: t.flatten()},
            lambda t, key=key: {key: t[..., :-1] if t.ndim else t[None]},
            lambda t, key=key: {key: t.sum()},
            lambda t, key=key: {key: t.long()},
        )
        tensors |= ways[random.integers(len(ways))](tensor)
    return tensors
