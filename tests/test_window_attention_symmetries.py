"""window_attention: symmetries, and plain attention on gathered tokens as the same thing."""

import math

import pytest
import torch
from problems import DTYPE_IDS, backend_and_dtype
from window_attention_problems import relative_position_index, shift_mask, small_windows

from vitkernels import testing
from vitkernels.ops import attention
from vitkernels.testing import assert_bitwise_equal, available_for, grads_of

BACKENDS = available_for("window_attention", D=32, N=49)
KERNELS = [name for name in BACKENDS if name not in ("torch", "reference")]
FP32, BF16, FP16 = DTYPE_IDS
INF = math.inf
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_pair = backend_and_dtype(BACKENDS, DTYPE_IDS)
each_kernel_pair = backend_and_dtype(KERNELS, DTYPE_IDS)
COSINE = pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])


# ---- Plain attention in disguise


@pytest.mark.parametrize(
    ("window", "shift"), [((2, 3), 0), ((2, 3), (1, 2)), (4, (0, 3)), (7, 3), ((5, 2), (4, 1))],
    ids=str,
)  # fmt: skip
@COSINE
@each_backend
def test_it_is_attention_on_the_gathered_tokens(backend, window, shift, cosine):
    """A window each as a sample of ops.attention, with the bias and the mask written out."""
    if backend == "triton" and window == 7:
        window, shift = 3, 1
    problem = small_windows(backend, window, shift, cosine=cosine, heads=2)
    qkv, table, *logit_scale = problem.inputs.values()
    window, shift = problem.options["window_size"], problem.options["shift_size"]
    (Wh, Ww), (B, H, W, _) = window, qkv.shape
    windows = (H // Wh) * (W // Ww)

    x = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, Ww)).unflatten(1, (-1, Wh)).transpose(2, 3).reshape(-1, Wh * Ww, 96)
    q, k, v = x.unflatten(-1, (3, 2, 16)).unbind(2)
    scale = None
    if cosine:
        q = torch.nn.functional.normalize(q, dim=-1) * logit_scale[0].exp()[:, None]
        k, scale = torch.nn.functional.normalize(k, dim=-1), 1.0
    bias = table[relative_position_index(window)].permute(2, 0, 1)
    bias = bias.expand(windows, 2, Wh * Ww, Wh * Ww)
    if any(shift):
        seam = shift_mask((H, W), window, shift)
        assert seam.any() and not seam.diagonal(dim1=1, dim2=2).any()
        bias = bias.masked_fill(seam[:, None], -INF)
    expected = attention(q, k, v, bias=bias.repeat(B, 1, 1, 1), scale=scale, backend="reference")

    out = torch.roll(
        problem.ours(backend)(*problem.inputs.values()), (-shift[0], -shift[1]), (1, 2)
    )
    out = out.unflatten(2, (-1, Ww)).unflatten(1, (-1, Wh)).transpose(2, 3)
    torch.testing.assert_close(out.reshape(-1, Wh * Ww, 2, 16), expected, **CLOSE)
    shape_class = f"window {window} shift {shift} cosine {cosine} as attention"
    testing.cases.record("window_attention", backend, FP32, shape_class)


# ---- Symmetries


def by_windows(x, window, order):
    """The map with its windows in another order, row-major."""
    (Wh, Ww), (H, W) = window, x.shape[1:3]
    tiles = x.unflatten(2, (-1, Ww)).unflatten(1, (-1, Wh)).transpose(2, 3).flatten(1, 2)[:, order]
    return tiles.unflatten(1, (H // Wh, W // Ww)).transpose(2, 3).reshape(x.shape)


@COSINE
@each_kernel_pair
def test_permuting_windows_permutes_the_results(backend, dtype, cosine):
    problem = small_windows(backend, shift=0, dtype=dtype, cosine=cosine)
    qkv, *parameters = problem.inputs.values()
    order = torch.tensor([3, 0, 2, 1] if backend == "triton" else [4, 2, 0, 5, 1, 3])

    def gradient_of(x):
        return grads_of(lambda t: problem.ours(backend)(t, *parameters), [x])

    (out,), (dqkv,) = gradient_of(qkv)
    (mine,), (grad,) = gradient_of(by_windows(qkv, (2, 3), order))
    assert_bitwise_equal(mine, by_windows(out, (2, 3), order))
    assert_bitwise_equal(grad, by_windows(dqkv, (2, 3), order))


@each_kernel_pair
def test_permuting_batch_and_heads_permutes_the_results(backend, dtype):
    problem = small_windows(backend, dtype=dtype, heads=3, B=3, windows=(1, 2), cosine=True)
    batch = torch.arange(problem.inputs["qkv"].shape[0]).flip(0)
    heads = torch.tensor([2, 0, 1])

    def permuted(qkv, table, logit_scale):
        qkv = qkv[batch].unflatten(-1, (-1, 3, 16))[..., heads, :].flatten(3)
        return [qkv, table[:, heads], logit_scale[heads]]

    tensors = list(problem.inputs.values())
    (out,), plain = grads_of(problem.ours(backend), tensors)
    (mine,), shuffled = grads_of(problem.ours(backend), permuted(*tensors))
    assert_bitwise_equal(mine, out[batch].unflatten(-1, (3, 16))[..., heads, :].flatten(3))
    expected = permuted(*plain)
    assert_bitwise_equal(shuffled[0], expected[0])
    # The parameters' sums over samples are taken in another order.
    torch.testing.assert_close(list(shuffled[1:]), expected[1:], rtol=1e-4, atol=1e-4)


@COSINE
@each_kernel_pair
def test_a_split_batch_gives_the_same_bits(backend, dtype, cosine):
    problem = small_windows(backend, dtype=dtype, B=3, windows=(1, 2), cosine=cosine)
    qkv, *parameters = problem.inputs.values()

    def both(x):
        (out,), grads = grads_of(problem.ours(backend), [x, *parameters])
        return out, *grads

    whole = both(qkv)
    parts = [both(qkv[:1]), both(qkv[1:])]
    for i in range(2):
        assert_bitwise_equal(torch.cat([part[i] for part in parts]), whole[i])
    if dtype == FP32:
        total = [sum(pair) for pair in zip(*parts, strict=True) if pair[0].dim() < 4]
        torch.testing.assert_close(total, list(whole[2:]), rtol=1e-4, atol=1e-4)


@COSINE
@each_backend
def test_a_constant_added_to_the_table_changes_nothing(backend, cosine):
    problem = small_windows(backend, cosine=cosine)
    qkv, table, *others = problem.inputs.values()
    (out,), grads = grads_of(problem.ours(backend), [qkv, table, *others])
    shifted = grads_of(problem.ours(backend), [qkv, table + torch.randn(table.shape[1]), *others])
    torch.testing.assert_close(shifted[0][0], out, **CLOSE)
    torch.testing.assert_close(shifted[1], grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [(1, 2), (1, 0), (0, 1)], ids=str)
@each_pair
def test_a_window_far_from_a_seam_is_unshifted(backend, dtype, shift):
    """Window (0, 0) of the shifted map is the crop at the shift, bit for bit."""
    problem = small_windows(backend, shift=shift, dtype=dtype)
    qkv, table = problem.inputs.values()
    out = problem.ours(backend)(qkv, table)[:, shift[0] : shift[0] + 2, shift[1] : shift[1] + 3]
    crop = qkv[:, shift[0] : shift[0] + 2, shift[1] : shift[1] + 3]
    mine = problem.ours(backend, shift_size=0)(crop, table)
    eps = 2 * torch.finfo(dtype).eps  # a window with a mask may sum in another order
    torch.testing.assert_close(mine, out, rtol=eps, atol=eps)


@each_backend
def test_the_shift_is_a_roll_and_a_mask(backend):
    """Shifting and rolling back: without a seam in between, the same as no shift."""
    problem = small_windows(backend, window=(2, 4), shift=0, windows=(2, 2), B=1)
    qkv, table = problem.inputs.values()
    plain = problem.ours(backend)(qkv, table)
    shifted = problem.ours(backend, shift_size=(1, 2))(torch.roll(qkv, (1, 2), (1, 2)), table)
    shifted = torch.roll(shifted, (-1, -2), (1, 2))
    assert not torch.allclose(shifted, plain), "the windows at the seam lost keys"
    torch.testing.assert_close(shifted[:, :2, :4], plain[:, :2, :4], **CLOSE)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 2)], ids=str)
@each_backend
def test_nothing_passes_a_seam(backend, shift):
    """The map's last rows and columns, on the other side, have no influence on the first."""
    problem = small_windows(backend, window=(2, 3), shift=shift, windows=(1, 1), B=1)
    qkv, table = problem.inputs.values()
    leaf = qkv.clone().requires_grad_()
    out = problem.ours(backend)(leaf, table)
    for y in range(2):
        for x in range(3):
            (grad,) = torch.autograd.grad(out[0, y, x].sum(), leaf, retain_graph=True)
            reached = grad[0].abs().sum(-1) > 0
            rows, columns = torch.arange(2) >= shift[0], torch.arange(3) >= shift[1]
            same = (rows == rows[y])[:, None] & (columns == columns[x])
            assert torch.equal(reached, same), (y, x)
