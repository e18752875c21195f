"""torch's Transformer encoders with weights that make every parameter matter; their results."""

import torch
import torch.nn.functional as F
from torch import nn
from vit_pairs import randomised, relative_errors

B, N, C, HEADS = 3, 13, 48, 4
SETTINGS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "gelu_pre_norm": {"activation": F.gelu, "norm_first": True, "layer_norm_eps": 1e-3},
    "tanh": {"activation": nn.GELU("tanh")},
    "no_bias": {"bias": False},
    "no_bias_pre_norm": {"bias": False, "norm_first": True, "activation": nn.ReLU()},
}
MASKS = ("none", "padding", "float_padding", "bool", "float", "of_each_head", "causal", "both")


def torch_layer(name="post_norm", **more) -> nn.TransformerEncoderLayer:
    settings = {"dim_feedforward": 100, "dropout": 0.0, **SETTINGS[name], **more}
    layer = nn.TransformerEncoderLayer(C, HEADS, batch_first=True, **settings)
    return randomised(layer.eval())


def torch_encoder(name="post_norm", norm=True, layers=3, **more) -> nn.TransformerEncoder:
    last = nn.LayerNorm(C, eps=1e-4) if norm else None
    made = nn.TransformerEncoder(
        torch_layer(name, **more), layers, last, enable_nested_tensor=False
    )
    return randomised(made.eval())


def masks(name: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Keyword arguments of torch's layer; no row is fully masked."""
    padding = torch.arange(N) >= torch.tensor([N, 5, 9])[:, None]
    seen = torch.rand(N, N) > 0.3
    seen[:, 0] = True
    per_head = torch.randn(B * HEADS, N, N, dtype=dtype)
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "float_padding": {"src_key_padding_mask": torch.randn(B, N, dtype=dtype)},
        "bool": {"src_mask": ~seen},
        "float": {"src_mask": torch.randn(N, N, dtype=dtype)},
        "of_each_head": {"src_mask": per_head.masked_fill(~seen, float("-inf"))},
        "causal": {
            "src_mask": nn.Transformer.generate_square_subsequent_mask(N, dtype=dtype),
            "is_causal": True,
        },
        "both": {"src_mask": ~seen, "src_key_padding_mask": padding},
    }[name]


def results(model, x, **options) -> dict[str, torch.Tensor]:
    """Output, the input's gradient and every parameter's."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = model(x, **options)
    # Not a regular pattern: its sums over tokens would cancel, and leave rounding only.
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(8))
    out.backward(direction.to(out.dtype))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "input": x.grad, **grads}


def within(got: dict, base: dict, truth: dict) -> None:
    """fp32: each error within twice torch's own, floor 1e-6."""
    errors, base = relative_errors(got, truth), relative_errors(base, truth)
    for key, error in errors.items():
        assert error <= max(2 * base[key], 1e-6), f"{key}: {error:.3g}, torch's {base[key]:.3g}"
