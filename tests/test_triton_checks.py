"""Raw calls of the Triton backend, as from an exported graph: no public function checked before."""

import os

import pytest
import torch

import vitkernels  # noqa: F401 (registers the operators)

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)


def raw_arguments():
    """Arguments by name of a small valid call of each raw operator."""
    x, C = torch.randn(2, 3, 8), torch.randn(8)
    stats, q = torch.rand(2, 3), torch.randn(2, 3, 2, 4)
    parameters = {"weight": C, "bias": C}
    branch = {"gamma": C, "row_scale": torch.ones(2), "seed": None, "dropout_p": 0.0}
    saved = {"mean": stats, "rstd": stats}
    heads = {"q": q, "k": torch.randn(2, 5, 2, 4), "v": torch.randn(2, 5, 2, 4)}
    mask = torch.zeros(2, 5, dtype=torch.bool)
    bias = torch.randn(1, 2, 3, 5)
    options = {"bias": bias, "key_padding_mask": mask, "seed": None, "scale": 0.5, "dropout_p": 0.0}
    packed = {"qkv": torch.randn(2, 3, 24), "num_heads": 2}
    square = {**options, "bias": bias[..., :3], "key_padding_mask": mask[:, :3]}
    lse = torch.randn(2, 2, 3)
    weight = torch.randn(6, 8)
    product = {"x": x, "weight": weight, "bias": torch.randn(6), "activation": 1}
    linear_saved = {"preactivation": torch.randn(2, 3, 6), "activation": 1}
    tokens = torch.randn(2, 7, 6)
    merge = {
        "x": torch.randn(2, 3, 4, 2),
        "mean": torch.rand(2, 2, 2),
        "rstd": torch.rand(2, 2, 2),
        **parameters,
    }
    patches = {
        "images": torch.rand(2, 3, 4, 6),
        "weight": torch.randn(6, 3, 2, 2),
        "bias": torch.randn(6),
        "pos_embed": torch.randn(1, 7, 6),
        "prefix_tokens": torch.randn(1, 1, 6),
        "mean": torch.rand(3),
        "std": torch.ones(3),
    }
    maps = {"qkv": torch.randn(2, 4, 6, 24)}
    windows = {
        "bias_table": torch.randn(15, 2), "logit_scale": torch.randn(2), "seed": None,
        "window_h": 2, "window_w": 3, "shift_h": 1, "shift_w": 1, "num_heads": 2, "scale": 0.5,
        "dropout_p": 0.0,
    }  # fmt: skip
    merged = torch.randn(2, 4, 6, 8)
    window_saved = {"out": merged, "lse": torch.randn(2, 4, 2, 6)}
    rows = torch.randn(2, 8)
    loss = {"logits": rows, "distill_logits": torch.randn(2, 8), "teacher_logits": -rows}
    loss |= {"targets": torch.tensor([1, 7]), "alpha": 0.5, "temperature": 2.0, "hard": False,
             "label_smoothing": 0.1, "per_class": True, "grad_mask": [True] * 2}  # fmt: skip
    return {
        "distillation_loss_fwd": loss,
        "distillation_loss_bwd": {"dloss": torch.tensor(0.5), "dlogits": rows, "ddistill": -rows,
                                  "per_class": True, "output_mask": [True] * 2},
        "window_attention_fwd": {**maps, **windows},
        "window_attention_bwd": {"dout": merged, **maps, **window_saved, **windows,
                                 "output_mask": [True] * 3},
        "add_layer_norm_fwd": {"x": x, "residual": x, **parameters, **branch, "eps": 1e-6,
                               "out_dtype": torch.float32},
        "add_layer_norm_bwd": {"dy": x, "dnew_residual": x, "z": x, **saved, "x": x, **parameters,
                               **branch, "x_dtype": torch.float32, "output_mask": [True] * 5},
        "layer_norm_add_fwd": {"x": x, "residual": x, **parameters, "row_scale": torch.ones(2),
                               "eps": 1e-6},
        "layer_norm_add_bwd": {"dout": x, "x": x, **saved, **parameters,
                               "row_scale": torch.ones(2), "output_mask": [True] * 3},
        "attention_fwd": {**heads, **options},
        "attention_bwd": {"dout": q, **heads, "out": q, "lse": lse, **options,
                          "output_mask": [True] * 4},
        "attention_qkvpacked_fwd": {**packed, **square},
        "linear_gelu_fwd": {**product, "save_preactivation": True, "out_dtype": torch.float32},
        "linear_gelu_bwd": {"dy": torch.randn(2, 3, 6), "x": x, "weight": weight,
                            "bias": torch.randn(6), **linear_saved, "output_mask": [True] * 3},
        "patch_embed_fwd": {**patches, "out_dtype": torch.float32},
        "patch_embed_bwd": {"dtokens": tokens, **patches, "output_mask": [True] * 5},
        "patch_merge_layer_norm_fwd": {"x": merge["x"], **parameters, "eps": 1e-6,
                                       "out_dtype": torch.float32},
        "patch_merge_layer_norm_bwd": {"dy": torch.randn(2, 2, 2, 8), **merge,
                                       "output_mask": [True] * 3},
        "attention_qkvpacked_bwd": {"dout": x, **packed, "out": x, "lse": lse, **square,
                                    "output_mask": [True] * 2},
    }  # fmt: skip


def raw_call(op, arguments):
    return getattr(torch.ops.vitkernels, op).triton(*arguments.values())


@pytest.mark.parametrize("op", raw_arguments())
def test_raw_calls_refuse_what_a_kernel_would_misread(op):
    good = raw_arguments()[op]
    raw_call(op, good)
    for name, value in good.items():
        bad = {
            "dropout_p": [0.5, -0.5, 1.0], "num_heads": [0, 5], "activation": [-1, 4],
            "window_h": [0, 3], "window_w": [0, 4], "shift_h": [-1, 2], "shift_w": [-1, 3],
            "out_dtype": [torch.float64, torch.int32], "alpha": [-0.1, 1.5],
            "temperature": [0.0, -1.0, float("inf")], "label_smoothing": [-0.1, 1.5],
        }.get(name, [])  # fmt: skip
        if isinstance(value, torch.Tensor):
            short = value.repeat(2) if value.ndim == 0 else value[..., :-1]
            short = short if name != "bias" or value.ndim == 1 else value[..., :2]
            bad = [short, value.double(), value.int()]
            bad += [] if (op, name) == ("linear_gelu_fwd", "x") else [value[None]]
            bad += [] if name in ("bias", "key_padding_mask") else [value.bool()]
        for wrong in bad:
            with pytest.raises((ValueError, RuntimeError), match=f"vitkernels::{op}: .* must be "):
                raw_call(op, {**good, name: wrong})


@pytest.mark.parametrize("op", [op for op in raw_arguments() if op.endswith("bwd")])
def test_saved_statistics_of_any_strides(op):
    good = raw_arguments()[op]
    saved = ("mean", "rstd", "lse", "preactivation")
    strided = {
        name: good[name].mT.contiguous().mT
        for name in saved
        if name in good and good[name].ndim > 1
    }
    for a, b in zip(raw_call(op, good), raw_call(op, {**good, **strided}), strict=True):
        assert torch.equal(a, b)
