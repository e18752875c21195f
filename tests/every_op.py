"""One small problem of each public operator, and the calls of raw operators that it makes."""

from __future__ import annotations

import torch
from attention_problems import attention_problem, packed_problem
from distillation_problems import distillation_problem
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from linear_gelu_problems import linear_gelu_problem, linear_problem
from patch_embed_problems import patch_embed_problem
from patch_merge_problems import patch_merge_problem
from problems import Problem
from torch.utils._python_dispatch import TorchDispatchMode
from window_attention_problems import window_problem

from vitkernels.testing import available_for

OPS = (
    "add_layer_norm",
    "layer_norm_add",
    "attention",
    "attention_qkvpacked",
    "patch_embed",
    "patch_merge_layer_norm",
    "linear_gelu",
    "linear",
    "window_attention",
    "distillation_loss",
)
RAW = {op: op for op in OPS} | {"linear": "linear_gelu"}  # the raw operators' name
FACTS = {"attention": {"D": 16}, "attention_qkvpacked": {"D": 16}}
FACTS |= {"window_attention": {"D": 16, "N": 6}}
OPS_AND_BACKENDS = [
    (op, backend) for op in OPS for backend in available_for(op, **FACTS.get(op, {}))
]
KERNELS = [pair for pair in OPS_AND_BACKENDS if pair[1] != "torch"]


def small_problem(op: str, dtype=torch.float32, *, batch=2, dropout_p=0.0) -> Problem:
    """Every option in use; `batch` is the only size that changes."""
    if op == "add_layer_norm":
        problem = layer_norm_problem((batch, 5, 24), dtype, dropout_p=dropout_p)
        problem.options["out_dtype"] = None
    elif op == "layer_norm_add":
        problem = layer_norm_add_problem((batch, 5, 24), dtype)
    elif op == "attention":
        problem = attention_problem(
            batch, 9, 2, 16, dtype, Nk=11, bias=(1, 2, 9, 11), dropout_p=dropout_p,
            key_padding_mask=(batch, 11),
        )  # fmt: skip
    elif op == "patch_embed":
        # Two channels and float images: nothing else is as long as a batch, and all get gradients.
        statistics = {"mean": torch.tensor([0.4, 0.5]), "std": torch.tensor([0.2, 0.3])}
        problem = patch_embed_problem((2, 3), 4, 24, dtype, dtype, B=batch, Cin=2, **statistics)
    elif op == "patch_merge_layer_norm":
        problem = patch_merge_problem((batch, 5, 4, 6), dtype)
    elif op == "linear_gelu":
        problem = linear_gelu_problem((batch, 5, 24), 40, dtype)
    elif op == "linear":
        problem = linear_problem((batch, 5, 24), 40, dtype)
    elif op == "distillation_loss":
        options = {"temperature": 3.0, "label_smoothing": 0.1, "soft_targets": torch.float32}
        problem = distillation_problem((batch, 24), dtype, **options)
    elif op == "window_attention":
        problem = window_problem(
            (2, 3), (1, 2), dtype, B=batch, heads=2, cosine="timm", dropout_p=dropout_p
        )
    else:
        problem = packed_problem(
            batch, 9, 2, 16, dtype, bias=(1, 2, 9, 9), dropout_p=dropout_p,
            key_padding_mask=(batch, 9),
        )  # fmt: skip
    return problem


class RawCalls(TorchDispatchMode):
    """Records each call of a raw vitkernels operator: (overload, arguments, results)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "vitkernels":
            self.calls.append((func, args, result))
        return result
