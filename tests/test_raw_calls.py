"""Raw operators called directly, as exported graphs do: launchers refuse bad calls."""

import pytest
import torch

from vitkernels import ops
from vitkernels.testing import available_for

V = torch.ops.vitkernels
X = torch.randn(2, 5, 16)
W = torch.randn(16)
STAT = torch.zeros(2, 5)
FORWARD = {
    "x": X,
    "residual": X,
    "weight": W,
    "bias": W,
    "gamma": W,
    "row_scale": torch.ones(2),
    "seed": None,
    "dropout_p": 0.0,
    "eps": 1e-6,
    "out_dtype": torch.float32,
}
BACKWARD = {
    "dy": X,
    "dnew_residual": X,
    "z": X,
    "mean": STAT,
    "rstd": STAT,
    "x": X,
    "weight": W,
    "bias": W,
    "gamma": W,
    "row_scale": torch.ones(2),
    "seed": None,
    "dropout_p": 0.0,
    "x_dtype": torch.float32,
    "output_mask": [True] * 5,
}
POST_BACKWARD = {
    "dout": X,
    "x": X,
    "mean": STAT,
    "rstd": STAT,
    "weight": W,
    "bias": W,
    "row_scale": None,
    "output_mask": [True] * 3,
}

BAD_FORWARD = {
    "residual of another shape": {"residual": X[:1]},
    "short weight": {"weight": W[:8]},
    "weight of two dimensions": {"weight": W.view(16, 1)},
    "short gamma": {"gamma": W[:8]},
    "row_scale of another batch": {"row_scale": torch.ones(3)},
    "bool x": {"x": X > 0},
    "int residual": {"residual": X.long()},
    "bool out_dtype": {"out_dtype": torch.bool},
    "dropout without a seed": {"dropout_p": 0.5},
    "empty seed": {"dropout_p": 0.5, "seed": torch.empty(0, dtype=torch.int64)},
    "int32 seed": {"dropout_p": 0.5, "seed": torch.ones(1, dtype=torch.int32)},
    "probability of 1.5": {"dropout_p": 1.5, "seed": torch.ones(1, dtype=torch.int64)},
    "no columns": {
        "x": X[..., :0],
        "residual": X[..., :0],
        "weight": None,
        "bias": None,
        "gamma": None,
    },
    "gamma without residual": {"residual": None},
}
BAD_BACKWARD = {
    "dy of another shape": {"dy": X[:1]},
    "short mean": {"mean": STAT[:1]},
    "fp16 rstd": {"rstd": STAT.half()},
    "x of another shape": {"x": X[:1]},
    "bias of one value": {"bias": W[:1]},
    "weight absent": {"weight": None},
    "gamma absent": {"gamma": None},
    "mask of two entries": {"output_mask": [True, True]},
    "bool x_dtype": {"x_dtype": torch.bool},
}


@pytest.mark.parametrize("name", BAD_FORWARD)
def test_add_layer_norm_forward_refuses(name):
    with pytest.raises(RuntimeError, match="add_layer_norm_fwd"):
        V.add_layer_norm_fwd.cpu(**{**FORWARD, **BAD_FORWARD[name]})


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_add_layer_norm_backward_refuses(name):
    with pytest.raises(RuntimeError, match="add_layer_norm_bwd"):
        V.add_layer_norm_bwd.cpu(**{**BACKWARD, **BAD_BACKWARD[name]})


@pytest.mark.parametrize(
    "bad", ({"weight": None}, {"bias": W[:1]}, {"mean": STAT[:1]}, {"dout": X[:1]})
)
def test_layer_norm_add_backward_refuses(bad):
    with pytest.raises(RuntimeError, match="layer_norm_add_bwd"):
        V.layer_norm_add_bwd.cpu(**{**POST_BACKWARD, **bad})


def test_attention_refuses_bool():
    q = torch.ones(1, 4, 2, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="attention_fwd"):
        V.attention_fwd.cpu(q, q, q, None, None, None, 1.0, 0.0)


def test_strided_statistics_are_read_as_they_are():
    mean, rstd = torch.randn(2, 5), torch.rand(2, 5) + 0.5
    strided = [torch.stack((t, t + 9), -1)[..., 0] for t in (mean, rstd)]
    dense = V.add_layer_norm_bwd.cpu(**{**BACKWARD, "mean": mean, "rstd": rstd})
    other = V.add_layer_norm_bwd.cpu(**{**BACKWARD, "mean": strided[0], "rstd": strided[1]})
    for a, b in zip(dense, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_forward_mode_is_refused_not_dropped(backend):
    """A raw operator would lose the tangent without a word."""
    calls = [
        lambda x: ops.add_layer_norm(x, None, None, None, backend=backend)[0],
        lambda x: ops.layer_norm_add(x, x, None, None, backend=backend),
        lambda x: ops.attention_qkvpacked(x.repeat(1, 1, 3), 2, backend=backend),
    ]
    if backend in available_for("linear_gelu"):
        calls.append(lambda x: ops.linear_gelu(x, X[0], backend=backend))
        calls.append(lambda x: ops.linear(x, X[0], backend=backend))
    if backend in available_for("patch_merge_layer_norm"):
        calls.append(lambda x: ops.patch_merge_layer_norm(x[:, None], None, None, backend=backend))
    if backend in available_for("distillation_loss"):
        ids = torch.zeros(2, dtype=torch.int64)
        calls.append(lambda x: ops.distillation_loss(*[x[:, 0]] * 2, X[:, 1], ids, backend=backend))
    if backend in available_for("patch_embed"):
        weight = X[0, :2].view(2, 1, 4, 4)
        calls.append(lambda x: ops.patch_embed(x[:, None, :4], weight, backend=backend))
    for call in calls:
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.func.jvp(call, (X,), (torch.ones_like(X),))
