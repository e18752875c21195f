"""The tests can fail: each planted fault of a raw operator is caught by problems.check."""

import importlib

import pytest
import torch
from every_op import small_problem
from problems import check

from vitkernels.testing import as_tuple

SLICES = {"add_layer_norm": "add_layer_norm", "layer_norm_add": "add_layer_norm"}
SLICES |= {"attention": "attention", "attention_qkvpacked": "attention"}
SLICES |= {"patch_merge_layer_norm": "patch_merge", "window_attention": "window_attention"}
SLICES |= {"patch_embed": "patch_embed", "linear_gelu": "linear_gelu", "linear": "linear_gelu"}

SLICES |= {"distillation_loss": "distillation_loss"}


def change(index, function):
    """Replace output `index` of the raw operator by `function` of it."""

    def apply(_args, outputs):
        outputs[index] = function(outputs[index])

    return apply


def add_to_one(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] += 0.05 * tensor.abs().max()
    return tensor


def truncate(tensor):
    """To bf16 precision by dropping bits, kept in the tensor's dtype."""
    bits = tensor.float().contiguous().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).to(tensor.dtype)


def zero_last_column(tensor):
    tensor = tensor.clone()
    tensor[..., -1] = 0
    return tensor


def nothing(_tensor):
    return None


def kept(fault):
    """Of a gradient that the forward makes only where it is wanted."""
    return lambda tensor: None if tensor is None else fault(tensor)


def gelu_of_saved(tensor):
    return None if tensor is None else torch.nn.functional.gelu(tensor)


def write_into_input(args, _outputs):
    next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()).view(-1)[0] += 1


FAULTS = {
    "y: one value": ("add_layer_norm_fwd", change(0, add_to_one)),
    "y: bf16 inside": ("add_layer_norm_fwd", change(0, truncate)),
    "new_residual: last column": ("add_layer_norm_fwd", change(1, zero_last_column)),
    "rstd: wrong eps": ("add_layer_norm_fwd", change(3, lambda t: t * 1.0001)),
    "input written": ("add_layer_norm_fwd", write_into_input),
    "dx: one value": ("add_layer_norm_bwd", change(0, add_to_one)),
    "dx: not dropped": ("add_layer_norm_bwd", change(0, lambda t: t + 1e-3)),
    "dresidual: bf16 inside": ("add_layer_norm_bwd", change(1, truncate)),
    "dweight: last column": ("add_layer_norm_bwd", change(2, zero_last_column)),
    "dbias: wrong factor": ("add_layer_norm_bwd", change(3, lambda t: t * 0.999)),
    "dgamma: missing": ("add_layer_norm_bwd", change(4, nothing)),
    "out: bf16 inside": ("layer_norm_add_fwd", change(0, truncate)),
    "post-norm dx: sign": ("layer_norm_add_bwd", change(0, torch.neg)),
    "post-norm dweight: missing": ("layer_norm_add_bwd", change(1, nothing)),
    "attention: one value": ("attention_fwd", change(0, add_to_one)),
    "attention: bf16 inside": ("attention_fwd", change(0, truncate)),
    "lse: off": ("attention_fwd", change(1, lambda t: t + 1e-3)),
    "dq: without scale": ("attention_bwd", change(0, lambda t: t * 4.0)),
    "dk: missing": ("attention_bwd", change(1, nothing)),
    "dv: last column": ("attention_bwd", change(2, zero_last_column)),
    "dbias: of one sample": ("attention_bwd", change(3, lambda t: t / 2)),
    "packed: one value": ("attention_qkvpacked_fwd", change(0, add_to_one)),
    "packed: dq and dv swapped": (
        "attention_qkvpacked_bwd",
        change(0, lambda t: t.unflatten(2, (3, -1)).flip(2).flatten(2)),
    ),
    "packed: bias frozen": ("attention_qkvpacked_bwd", change(1, torch.zeros_like)),
    "tokens: one value": ("patch_embed_fwd", change(0, add_to_one)),
    "tokens: bf16 inside": ("patch_embed_fwd", change(0, truncate)),
    "tokens: no position": ("patch_embed_fwd", change(0, lambda t: t - 0.01)),
    "tokens: rows swapped": ("patch_embed_fwd", change(0, lambda t: t.flip(1))),
    "patch_embed: input written": ("patch_embed_fwd", write_into_input),
    "dimages: columns swapped": ("patch_embed_bwd", change(0, lambda t: t.flip(3))),
    "dimages: bf16 inside": ("patch_embed_bwd", change(0, truncate)),
    "dweight: channels swapped": ("patch_embed_bwd", change(1, lambda t: t.flip(1))),
    "dweight: wrong std": ("patch_embed_bwd", change(1, lambda t: t * 1.0001)),
    "dbias: with the prefix": ("patch_embed_bwd", change(2, lambda t: t + 0.1)),
    "dpos: of one sample": ("patch_embed_bwd", change(3, lambda t: t / 2)),
    "dprefix: missing": ("patch_embed_bwd", change(4, nothing)),
    "merge: one value": ("patch_merge_layer_norm_fwd", change(0, add_to_one)),
    "merge: bf16 inside": ("patch_merge_layer_norm_fwd", change(0, truncate)),
    "merge: pixels in row order": (
        "patch_merge_layer_norm_fwd",
        change(0, lambda t: t.unflatten(3, (2, 2, -1)).transpose(3, 4).flatten(3)),
    ),
    "merge: input written": ("patch_merge_layer_norm_fwd", write_into_input),
    "merge: rstd: wrong eps": ("patch_merge_layer_norm_fwd", change(2, lambda t: t * 1.0001)),
    "merge: dx: columns swapped": ("patch_merge_layer_norm_bwd", change(0, lambda t: t.flip(2))),
    "merge: dx: bf16 inside": ("patch_merge_layer_norm_bwd", change(0, truncate)),
    "merge: dweight: missing": ("patch_merge_layer_norm_bwd", change(1, nothing)),
    "merge: dbias: without the edge": (
        "patch_merge_layer_norm_bwd",
        change(2, lambda t: t * 0.9),
    ),
    "windows: one value": ("window_attention_fwd", change(0, add_to_one)),
    "windows: bf16 inside": ("window_attention_fwd", change(0, truncate)),
    "windows: rows swapped": ("window_attention_fwd", change(0, lambda t: t.flip(1))),
    "windows: turned": ("window_attention_fwd", change(0, lambda t: t.flip(1, 2))),
    "windows: lse off": ("window_attention_fwd", change(1, lambda t: t + 1e-3)),
    "windows: input written": ("window_attention_fwd", write_into_input),
    "windows: dqkv: one value": ("window_attention_bwd", change(0, add_to_one)),
    "windows: dqkv: bf16 inside": ("window_attention_bwd", change(0, truncate)),
    "windows: dqkv: dq and dv swapped": (
        "window_attention_bwd",
        change(0, lambda t: t.unflatten(3, (3, -1)).flip(3).flatten(3)),
    ),
    "windows: dtable: turned": ("window_attention_bwd", change(1, lambda t: t.flip(0))),
    "windows: dtable: of one sample": ("window_attention_bwd", change(1, lambda t: t / 2)),
    "windows: dtable: missing": ("window_attention_bwd", change(1, nothing)),
    "windows: dlogit_scale: heads": ("window_attention_bwd", change(2, lambda t: t.flip(0))),
    "windows: dlogit_scale: frozen": ("window_attention_bwd", change(2, torch.zeros_like)),
    "loss: off": ("distillation_loss_fwd", change(0, lambda t: t * 1.00001)),
    "loss: of one sample": ("distillation_loss_fwd", change(0, lambda t: t / 2)),
    "loss: input written": ("distillation_loss_fwd", write_into_input),
    "kept dlogits: one value": ("distillation_loss_fwd", change(1, kept(add_to_one))),
    "kept dlogits: bf16 inside": ("distillation_loss_fwd", change(1, kept(truncate))),
    "kept ddistill: frozen": ("distillation_loss_fwd", change(2, kept(torch.zeros_like))),
    "kept ddistill: without temperature": (
        "distillation_loss_fwd",
        change(2, kept(lambda t: t / 3)),
    ),
    "loss dlogits: last column": ("distillation_loss_bwd", change(0, zero_last_column)),
    "loss ddistill: sign": ("distillation_loss_bwd", change(1, torch.neg)),
    "loss ddistill: missing": ("distillation_loss_bwd", change(1, nothing)),
    "gelu: one value": ("linear_gelu_fwd", change(0, add_to_one)),
    "gelu: bf16 inside": ("linear_gelu_fwd", change(0, truncate)),
    "gelu: another kind": ("linear_gelu_fwd", change(0, lambda t: t + 4e-4 * t.sign())),
    "preactivation: after GELU": ("linear_gelu_fwd", change(1, gelu_of_saved)),
    "linear dx: last column": ("linear_gelu_bwd", change(0, zero_last_column)),
    "linear dweight: bf16 inside": ("linear_gelu_bwd", change(1, truncate)),
    "linear dbias: missing": ("linear_gelu_bwd", change(2, nothing)),
    "linear dbias: one row less": ("linear_gelu_bwd", change(2, lambda t: t * 0.9)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    raw, fault = FAULTS[name]
    op = raw.rsplit("_", 1)[0]
    module = importlib.import_module(f"vitkernels.ops.{SLICES[op]}.op")
    original = module.overload

    def faulty(called, backend):
        function = original(called, backend)
        if called != raw:
            return function

        def call(*args):
            results = function(*args)
            outputs = list(as_tuple(results))
            fault(args, outputs)
            return tuple(outputs) if isinstance(results, tuple) else outputs[0]

        return call

    backend = "reference"
    if "lse" in name:  # the reference's backward makes the softmax anew, others do it from lse
        backend = "triton"
        pytest.importorskip("triton")
    problem = small_problem(op)
    problem.options.pop("out_dtype", None)
    if op == "add_layer_norm":
        problem.options["out_dtype"] = torch.float32
    # A loss is a scalar, whose incoming gradient has no layout.
    scalar = {"grad_layout": "contiguous"} if op == "distillation_loss" else {}
    check(problem, backend, shape_class="planted faults, none", **scalar)
    monkeypatch.setattr(module, "overload", faulty)
    with pytest.raises((AssertionError, RuntimeError)):
        check(problem, backend, shape_class="planted faults", **scalar)
