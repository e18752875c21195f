"""Good arguments of every operator, and bad ones to put in their place."""

import math

import torch

B, N, C, H, D = 2, 5, 24, 2, 8
NAN, INF = math.nan, math.inf


def good_arguments(op):
    shape = (B, N, C)
    if op in ("add_layer_norm", "layer_norm_add"):
        arguments = {
            "x": torch.randn(shape),
            "residual": torch.randn(shape),
            "weight": torch.randn(C),
            "bias": torch.randn(C),
            "eps": 1e-6,
            "row_scale": torch.ones(B),
        }
        if op == "add_layer_norm":
            arguments |= {"gamma": torch.randn(C), "dropout_p": 0.1, "out_dtype": torch.float32}
        return arguments
    if op == "patch_embed":
        return {
            "images": torch.randint(0, 256, (B, 3, 8, 12), dtype=torch.uint8),
            "weight": torch.randn(C, 3, 4, 4),
            "bias": torch.randn(C),
            "pos_embed": torch.randn(1, 8, C),
            "prefix_tokens": torch.randn(1, 2, C),
            "mean": torch.rand(3),
            "std": torch.rand(3),
        }
    if op == "patch_merge_layer_norm":
        parameters = {"weight": torch.randn(4 * C), "bias": torch.randn(4 * C)}
        return {"x": torch.randn(B, N, 4, C), **parameters, "eps": 1e-5}
    if op == "distillation_loss":
        return {
            "logits": torch.randn(B, C),
            "distill_logits": torch.randn(B, C),
            "teacher_logits": torch.randn(B, C),
            "targets": torch.rand(B, C),
            "alpha": 0.3,
            "temperature": 2.0,
            "kind": "soft",
            "label_smoothing": 0.1,
            "reduction": "deit",
        }
    if op == "window_attention":
        return {
            "qkv": torch.randn(B, 4, 6, 3 * H * D),
            "bias_table": torch.randn(15, H),
            "window_size": (2, 3),
            "shift_size": (1, 2),
            "num_heads": H,
            "logit_scale": torch.randn(H),
            "dropout_p": 0.1,
        }
    if op in ("linear", "linear_gelu"):
        arguments = {"x": torch.randn(shape), "weight": torch.randn(D, C), "bias": torch.randn(D)}
        if op == "linear_gelu":
            arguments |= {"approximate": "tanh", "save_preactivation": False}
        return arguments
    arguments = {name: torch.randn(B, N, H, D) for name in ("q", "k", "v")}
    if op == "attention_qkvpacked":
        arguments = {"qkv": torch.randn(B, N, 3 * H * D), "num_heads": H}
    if op == "attention_weights":
        del arguments["v"]
        return arguments | {"bias": torch.randn(B, H, N, N), "scale": 0.5, "rows": [0, 1]}
    return arguments | {
        "bias": torch.randn(B, H, N, N),
        "key_padding_mask": torch.zeros(B, N, dtype=torch.bool),
        "scale": 0.5,
        "dropout_p": 0.1,
    }


def not_a_float_tensor(good):
    """Everything that is no dense float tensor on the device of the others, with its name."""
    yield "str", "text"
    yield "number", 1.0
    yield "list", [1.0, 2.0]
    yield "numpy", good.numpy()
    yield "module", torch.nn.Identity()
    for dtype in (torch.int64, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        yield str(dtype), good.to(dtype)
    yield "sparse", good.to_sparse()
    yield "quantized", torch.quantize_per_tensor(good, 0.1, 0, torch.qint8)
    yield "mkldnn", good.to_mkldnn()
    yield "other device", good.to("meta")


def wrong_shapes(good, sizes):
    """Other ranks, and each dimension among `sizes` longer, shorter and empty."""
    yield "rank + 1", good.unsqueeze(0)
    if good.dim() > 1:
        yield "rank - 1", good.flatten(0, 1)
    for dim in sizes:
        yield f"dim {dim} longer", torch.cat([good, good], dim)
        yield f"dim {dim} shorter", good.narrow(dim, 0, good.shape[dim] - 1)
        yield f"dim {dim} empty", good.narrow(dim, 0, 0)


def bad_numbers(*values):
    for value in (*values, NAN, INF, -INF, "0.5", None, True, [0.1], 1j, torch.tensor(0.1)):
        yield str(value), value


LAYER_NORM_TENSORS = {
    "residual": range(3),
    "weight": range(1),
    "bias": range(1),
    "row_scale": range(1),
}
ATTENTION_TENSORS = {"k": (0, 2, 3), "v": (0, 1, 2, 3), "key_padding_mask": range(2)}
PATCH_EMBED_TENSORS = {
    "weight": (1,),
    "bias": range(1),
    "pos_embed": range(3),
    "prefix_tokens": (0, 2),
    "mean": range(1),
    "std": range(1),
}
LINEAR_TENSORS = {"weight": (1,), "bias": range(1)}
PATCH_MERGE_TENSORS = {"weight": range(1), "bias": range(1)}
DISTILLATION_TENSORS = dict.fromkeys(("distill_logits", "teacher_logits", "targets"), range(2))
WINDOW_TENSORS = {"bias_table": range(2), "logit_scale": range(1)}


def fixed_sizes(op):
    """The tensors that the first argument determines, and in which dimensions."""
    if op in ("add_layer_norm", "layer_norm_add"):
        return LAYER_NORM_TENSORS
    if op in ("linear", "linear_gelu"):
        return LINEAR_TENSORS
    if op == "patch_merge_layer_norm":
        return PATCH_MERGE_TENSORS
    if op == "window_attention":
        return WINDOW_TENSORS
    if op == "distillation_loss":
        return DISTILLATION_TENSORS
    return PATCH_EMBED_TENSORS if op == "patch_embed" else ATTENTION_TENSORS


NO_PAIRS = (None, 2.0, "2", True, [], (2,), (2, 3, 1), (2, 3.0), (1, None), (True, 2), {2: 3}, 1j)
OPTIONAL_SCALE = [pair for pair in bad_numbers() if pair[1] is not None]


def bad_arguments(op):
    """(name of the argument, what is wrong with it, the bad value)."""
    good = good_arguments(op)
    numbers = {
        "eps": bad_numbers(0.0, -1e-6, 0, -1),
        "dropout_p": bad_numbers(-0.1, 1.0, 1.5, 1, -1),
        "scale": OPTIONAL_SCALE,
        "num_heads": [(str(v), v) for v in (0, -1, 5, 2.0, "2", None, True, NAN, [2], 10**6)],
        "window_size": [(str(v), v) for v in (*NO_PAIRS, 0, (2, 0), (-2, 3), 3, (3, 2), (5, 3), 7)],
        "shift_size": [(str(v), v) for v in (*NO_PAIRS, -1, (0, -1), 2, (2, 0), (0, 3), (1, 3))],
        "out_dtype": [(str(v), v) for v in (torch.int32, torch.complex64, "bf16", 16, float)],
        "rows": [(str(v), v) for v in (N, -N - 1, 1.0, "0", [0, N], [0.5], [True], {"a": 1})],
        "approximate": [(str(v), v) for v in ("erf", "None", "", None, 1, True, b"none", ["none"])],
        "save_preactivation": [(str(v), v) for v in (None, 0, 1, "yes", torch.tensor(True))],
        "alpha": bad_numbers(-0.1, 1.1, 2, -1),
        "label_smoothing": bad_numbers(-0.1, 1.1, 2),
        "temperature": bad_numbers(0.0, -1.0, 0),
        "kind": [(str(v), v) for v in ("", "Soft", "none", None, 1, True, ["hard"], b"soft")],
        "reduction": [(str(v), v) for v in ("", "mean", "sum", "none", None, 1, ["deit"])],
        "backend": [(str(v), v) for v in ("", "gpu", "CPU", 3, torch.float32)],
    }
    for name in (*good, "backend"):
        if name in numbers:
            yield from ((name, what, value) for what, value in numbers[name])
            continue
        first = name in ("x", "q", "qkv", "images", "logits")
        for what, value in not_a_float_tensor(good[name].float()):
            if is_fine(name, what):
                continue
            if (name, what) == ("key_padding_mask", "other device"):
                value = value.bool()
            if not (first and what == "other device"):  # meta tensors alone are fine: shapes only
                yield name, what, value
        fixed = fixed_sizes(op).get(name)
        if fixed is not None:
            yield from ((name, what, value) for what, value in wrong_shapes(good[name], fixed))
    yield from special_cases(op, good)


def is_fine(name, what):
    """Images are uint8 more often than not; mean and std may be numbers."""
    return (name, what) in {("images", "torch.uint8"), ("mean", "number"), ("std", "number")}


def special_cases(op, good):
    if op in ("linear", "linear_gelu"):
        yield from linear_cases(good)
        return
    if op == "patch_embed":
        yield from patch_embed_cases(good)
        return
    if op == "patch_merge_layer_norm":
        yield from patch_merge_cases(good)
        return
    if op == "window_attention":
        yield from window_attention_cases(good)
        return
    if op == "distillation_loss":
        yield from distillation_cases(good)
        return
    if op in ("add_layer_norm", "layer_norm_add"):
        yield "x", "None", None
        yield "x", "no dimension", torch.tensor(1.0)
        yield "x", "C = 0", torch.randn(B, N, 0)
        yield "x", "one dimension with row_scale", torch.randn(C)
        yield "row_scale", "requires_grad", torch.ones(B, requires_grad=True)
        yield "weight", "a matrix", torch.randn(C, 1)
        yield "weight", "one number", torch.randn(1)
        yield "residual", "None beside options" if op == "add_layer_norm" else "None", None
        return
    first = "qkv" if op == "attention_qkvpacked" else "q"
    yield first, "None", None
    yield first, "no dimension", torch.tensor(1.0)
    yield first, "rank + 1", good[first].unsqueeze(0)
    yield first, "rank - 1", good[first][0]
    yield first, "no tokens", good[first][:, :0]
    yield "bias", "5 dimensions", good["bias"].unsqueeze(0)
    for dim in range(4):
        yield (
            "bias",
            f"dim {dim} longer",
            torch.cat([good["bias"], good["bias"][:1]], 0).transpose(0, dim),
        )
    yield "bias", "float64", good["bias"].double()
    if op == "attention_qkvpacked":
        yield "qkv", "width not 3 * H * D", torch.randn(B, N, 3 * H * D + 1)
        yield "qkv", "width 0", torch.randn(B, N, 0)
        return
    yield "k", "None", None
    yield "k", "another dtype", good["k"].bfloat16()
    yield "k", "no tokens", good["k"][:, :0]
    if op == "attention":
        yield "v", "None", None
        yield "v", "another dtype", good["v"].half()


def linear_cases(good):
    yield "x", "None", None
    yield "x", "no dimension", torch.tensor(1.0)
    yield "x", "K = 0", torch.randn(B, N, 0)
    yield "weight", "None", None
    yield "weight", "transposed", good["weight"].T
    yield "weight", "N = 0", good["weight"][:0]
    yield "weight", "a vector", torch.randn(C)
    yield "bias", "of K values", torch.randn(C)
    yield "bias", "one number", torch.randn(1)
    yield "bias", "a number", 0.0


def patch_merge_cases(good):
    x = good["x"]
    yield "x", "None", None
    yield "x", "no dimension", torch.tensor(1.0)
    yield "x", "tokens (B, N, C)", x.flatten(1, 2)
    yield "x", "five dimensions", x[None]
    yield "x", "H = 0", x[:, :0]
    yield "x", "W = 0", x[:, :, :0]
    yield "x", "C = 0", x[..., :0]
    for name in ("weight", "bias"):
        yield name, "of C values", torch.randn(C)
        yield name, "of 2 * C values", torch.randn(2 * C)
        yield name, "one number", torch.randn(1)
        yield name, "a number", 1.0
        yield name, "a row", torch.randn(1, 4 * C)
        yield name, "of four rows", torch.randn(4, C)


def window_attention_cases(good):
    qkv = good["qkv"]
    yield "qkv", "None", None
    yield "qkv", "no dimension", torch.tensor(1.0)
    yield "qkv", "tokens (B, N, 3 * C)", qkv.flatten(1, 2)
    yield "qkv", "windows apart", qkv[None]
    yield "qkv", "H not of the windows", qkv[:, :3]
    yield "qkv", "W not of the windows", qkv[:, :, :5]
    yield "qkv", "H = 0", qkv[:, :0]
    yield "qkv", "W = 0", qkv[:, :, :0]
    yield "qkv", "C = 0", qkv[..., :0]
    yield "qkv", "width not 3 * C", qkv[..., :-1]
    yield "qkv", "width not of the heads", qkv[..., :-3]
    yield "bias_table", "None", None
    yield "bias_table", "of the transposed window, squared", torch.randn(25, H)
    yield "bias_table", "already gathered", torch.randn(H, 6, 6)
    yield "bias_table", "for each sample", torch.randn(B, 15, H)
    yield "bias_table", "heads first", good["bias_table"].T
    yield "logit_scale", "a number", 2.3
    yield "logit_scale", "no dimension", torch.tensor(2.3)
    yield "logit_scale", "(heads, 1)", torch.randn(H, 1)
    yield "logit_scale", "(1, heads, 1, 1)", torch.randn(1, H, 1, 1)
    yield "logit_scale", "of one number", torch.randn(1, 1, 1)
    yield "scale", "beside logit_scale", 0.25


def distillation_cases(good):
    logits = good["logits"]
    yield "logits", "None", None
    yield "logits", "no dimension", torch.tensor(1.0)
    yield "logits", "of one sample", logits[0]
    yield "logits", "of a map", logits[..., None]
    yield "logits", "no rows", logits[:0]
    yield "logits", "no classes", logits[:, :0]
    for name in ("distill_logits", "teacher_logits", "targets"):
        yield name, "None", None
    yield "distill_logits", "another dtype", logits.bfloat16()
    yield "distill_logits", "both heads", torch.stack((logits, logits))
    yield "teacher_logits", "requires_grad", torch.randn(B, C, requires_grad=True)
    yield "targets", "requires_grad", torch.rand(B, C, requires_grad=True)
    yield "targets", "floats of a class each", torch.zeros(B)
    yield "targets", "class ids of another batch", torch.zeros(B + 1, dtype=torch.int64)
    yield "targets", "class ids in a column", torch.zeros(B, 1, dtype=torch.int64)
    yield "targets", "one-hot integers", torch.zeros(B, C, dtype=torch.int64)
    yield "targets", "uint8 class ids", torch.zeros(B, dtype=torch.uint8)
    yield "targets", "a list", [0, 1]


def patch_embed_cases(good):
    images, weight = good["images"], good["weight"]
    yield "images", "None", None
    yield "images", "one image without batch", images[0]
    yield "images", "video", images[:, None]
    yield "images", "height 9", torch.zeros(B, 3, 9, 12, dtype=torch.uint8)
    yield "images", "width 10", torch.zeros(B, 3, 8, 10)
    yield "images", "height 0", images[:, :, :0]
    yield "images", "width 0", images[..., :0]
    yield "images", "smaller than a patch", images[:, :, :3, :3]
    yield "weight", "other channels", weight[:, :1]
    yield "weight", "no channels", weight[:, :0]
    yield "weight", "no filters", weight[:0]
    yield "weight", "patch of 0", weight[..., :0]
    yield "weight", "flat", weight.flatten(1)
    yield "weight", "None", None
    yield "bias", "a row", torch.randn(1, C)
    yield "pos_embed", "a position for each sample", torch.randn(B, 8, C)
    yield "pos_embed", "without batch", torch.randn(8, C)
    yield "pos_embed", "one position less", torch.randn(1, 7, C)
    yield "prefix_tokens", "without batch", torch.randn(2, C)
    for name in ("mean", "std"):
        yield name, "two floats", [0.5, 0.5]
        yield name, "four floats", (0.5,) * 4
        yield name, "no floats", []
        yield name, "a dict", {"mean": 0.5}
        yield name, "requires_grad", torch.rand(3, requires_grad=True)
        yield name, "of two dimensions", torch.rand(3, 1)
        for value in (NAN, INF, -INF, "0.5", True, 1j):
            yield name, f"a list with {value}", [0.5, value, 0.5]
            yield name, str(value), value
    for value in (0.0, -1.0, 0):
        yield "std", str(value), value
        yield "std", f"a list with {value}", (0.5, 0.5, value)
