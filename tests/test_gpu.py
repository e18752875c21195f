"""The kernels on an NVIDIA GPU itself: `make test-gpu`. Nothing here runs in `make test`.

Shapes are the real ones, 16-bit dtypes come first, and what a CPU cannot show is here: side
streams, CUDA graphs, addresses beyond 2^31 elements, repeats.
"""

import os

import pytest
import torch
from attention_problems import attention_problem, packed_problem
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from linear_gelu_problems import linear_gelu_problem, linear_problem
from patch_embed_problems import IMAGE_LAYOUTS, UINT8, patch_embed_problem
from problems import DTYPE_IDS, check
from window_attention_problems import MAP_LAYOUTS, window_problem

from vitkernels import ops
from vitkernels.testing import assert_bitwise_equal, available_for

DEVICE = os.environ.get("VITKERNELS_TEST_DEVICE", "cuda")
KERNELS = ("cuda", "triton")
SMALL_CALLS = ("add_layer_norm", "attention_qkvpacked", "patch_embed", "linear_gelu")
SMALL_CALLS += ("window_attention",)
DTYPES = [pytest.param(dtype, id=name) for dtype, name in DTYPE_IDS.items()]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"
    ),
]


def kernels(op):
    """Those of this operator: what is missing on a GPU machine is a failure, not a skip."""
    in_cuda = op.endswith(("norm", "norm_add")) or "attention" in op
    return [b for b in KERNELS if b != "cuda" or in_cuda]


def needs(backend, op):
    facts = {"D": 64} if op.startswith("attention") else {}
    if op == "window_attention":
        facts = {"D": 32, "N": 49}
    assert backend in available_for(op, DEVICE, **facts), f"{op}: {backend} cannot run on {DEVICE}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", (1, 3, 96, 192, 384, 768, 1000, 1024, 1280, 1536, 4096, 8192))
@pytest.mark.parametrize("backend", kernels("add_layer_norm"))
def test_add_layer_norm(backend, channels, dtype):
    needs(backend, "add_layer_norm")
    problem = layer_norm_problem((3, 197, channels), dtype).to(DEVICE)
    check(problem, backend, shape_class=f"C{channels}")


@pytest.mark.parametrize("layout", ("transposed", "sliced", "expanded", "misaligned_1"))
@pytest.mark.parametrize("backend", kernels("add_layer_norm"))
def test_add_layer_norm_layouts(backend, layout):
    needs(backend, "add_layer_norm")
    problem = layer_norm_problem((4, 50, 384), torch.bfloat16).to(DEVICE)
    check(problem, backend, shape_class="C384", layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", (96, 768, 1536))
@pytest.mark.parametrize("backend", kernels("layer_norm_add"))
def test_layer_norm_add(backend, channels, dtype):
    needs(backend, "layer_norm_add")
    problem = layer_norm_add_problem((3, 196, channels), dtype).to(DEVICE)
    check(problem, backend, shape_class=f"C{channels}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (16, 32, 48, 64, 72, 80, 88, 96, 128))
@pytest.mark.parametrize("N", (1, 49, 50, 64, 197, 257, 577, 1025))
@pytest.mark.parametrize("backend", kernels("attention"))
def test_attention(backend, N, D, dtype):
    needs(backend, "attention")
    problem = packed_problem(2, N, 3, D, dtype).to(DEVICE)
    factor = 0.9 if dtype != torch.float32 and N >= 49 else None
    check(problem, backend, shape_class=f"N{N} D{D}", rmse_factor=factor)


@pytest.mark.parametrize("bias", ((2, 3, 197, 197), (1, 3, 197, 197), (1, 1, 197, 197)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", kernels("attention"))
def test_attention_with_bias(backend, dtype, bias):
    needs(backend, "attention")
    problem = attention_problem(2, 197, 3, 64, dtype, bias=bias).to(DEVICE)
    check(problem, backend, shape_class=f"N197 bias{bias}")


@pytest.mark.parametrize("cosine", (False, True), ids=("plain", "cosine"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", (False, True), ids=("", "shifted"))
@pytest.mark.parametrize("window", (1, 2, 4, 6, 7, 8, 10, 12, 14, 16, 24, (7, 8), (4, 16), (24, 3)))
@pytest.mark.parametrize("backend", kernels("window_attention"))
def test_window_attention(backend, window, shifted, dtype, cosine):
    needs(backend, "window_attention")
    Wh, Ww = (window, window) if isinstance(window, int) else window
    shift, D = (Wh // 2, Ww // 2) if shifted else 0, 32 if Wh * Ww <= 256 else 16
    problem = window_problem(window, shift, dtype, windows=(3, 4), heads=6, D=D, cosine=cosine)
    factor = 0.9 if dtype != torch.float32 and Wh * Ww >= 49 else None
    name = f"window {window} shift {shift} cosine {cosine}"
    check(problem.to(DEVICE), backend, shape_class=name, rmse_factor=factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", (8, 16, 24, 32, 48, 64, 80, 128))
@pytest.mark.parametrize("backend", kernels("window_attention"))
def test_window_attention_head_dims(backend, D, dtype):
    needs(backend, "window_attention")
    problem = window_problem(7, 3, dtype, windows=(8, 8), heads=3, D=D, dropout_p=0.1)
    check(problem.to(DEVICE), backend, shape_class=f"window 7 D{D} dropout")


@pytest.mark.parametrize("layout", (*MAP_LAYOUTS, "misaligned_1", "expanded", "nan_border"))
@pytest.mark.parametrize("backend", kernels("window_attention"))
def test_window_attention_layouts(backend, layout):
    needs(backend, "window_attention")
    problem = window_problem(7, (3, 0), torch.bfloat16, heads=3, D=32).to(DEVICE)
    check(problem, backend, shape_class="window 7", layout=layout, grad_layout="contiguous")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("patch", "grid", "D"),
    ((16, 14, 384), (16, 14, 768), (32, 7, 768), (14, 16, 384), (8, 14, 192), (4, 28, 96),
     (16, (3, 5), 97)),
)  # fmt: skip
@pytest.mark.parametrize("backend", kernels("patch_embed"))
def test_patch_embed(backend, patch, grid, D, dtype):
    needs(backend, "patch_embed")
    for images in (UINT8, dtype):
        problem = patch_embed_problem(grid, patch, D, images, dtype).to(DEVICE)
        check(problem, backend, shape_class=f"patch {patch} grid {grid} D{D}")


@pytest.mark.parametrize("layout", (*IMAGE_LAYOUTS, "misaligned_1", "nan_border"))
@pytest.mark.parametrize("images", (UINT8, torch.bfloat16))
@pytest.mark.parametrize("backend", kernels("patch_embed"))
def test_patch_embed_layouts(backend, images, layout):
    needs(backend, "patch_embed")
    problem = patch_embed_problem(7, 16, 192, images, torch.bfloat16, prefix=5).to(DEVICE)
    check(problem, backend, shape_class="patch 16 D192", layout=layout, grad_layout="contiguous")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", (True, False))
@pytest.mark.parametrize("approximate", ("none", "tanh", "quick"))
@pytest.mark.parametrize("backend", kernels("linear_gelu"))
def test_linear_gelu(backend, approximate, save, dtype):
    needs(backend, "linear_gelu")
    for rows, K, N in ((394, 384, 1536), (197, 97, 129), (1, 768, 1000)):
        problem = linear_gelu_problem(
            (rows, K), N, dtype, approximate=approximate, save_preactivation=save
        ).to(DEVICE)
        slack = 1.1 if rows == 1 else 1.0  # an outer product's errors have a mean
        check(problem, backend, shape_class=f"M{rows} K{K} N{N} {approximate}", slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", ("contiguous", "transposed", "sliced", "expanded", "misaligned_3")
)
@pytest.mark.parametrize("backend", kernels("linear"))
def test_linear(backend, layout, dtype):
    needs(backend, "linear")
    problem = linear_problem((2, 197, 384), 320, dtype).to(DEVICE)
    check(problem, backend, shape_class="M394 K384 N320", layout=layout)


@pytest.mark.parametrize("op", SMALL_CALLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_repeats_are_bitwise_equal(backend, op):
    if backend not in kernels(op):
        return
    call, leaf = _small_call(op, backend)
    first = torch.autograd.grad(call().float().square().sum(), leaf)[0]
    for _ in range(250):
        again = torch.autograd.grad(call().float().square().sum(), leaf)[0]
        assert_bitwise_equal(first, again, f"{op} {backend}")


@pytest.mark.parametrize("op", SMALL_CALLS)
@pytest.mark.parametrize("backend", KERNELS)
def test_side_stream_and_graph_capture(backend, op):
    if backend not in kernels(op) or DEVICE != "cuda":
        return
    call, _ = _small_call(op, backend)
    with torch.no_grad():
        expected = call()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_the_side = call()
        torch.cuda.current_stream().wait_stream(stream)
        assert_bitwise_equal(expected, on_the_side, f"{op} {backend} on a side stream")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise_equal(expected, captured, f"{op} {backend} from a CUDA graph")


@pytest.mark.parametrize("backend", kernels("add_layer_norm"))
def test_more_than_2_31_elements(backend):
    if DEVICE != "cuda":
        return
    x = torch.zeros(2**31 // 1024 + 8, 1024, device=DEVICE, dtype=torch.bfloat16)
    x[-4:] = torch.randn(4, 1024, device=DEVICE)
    y, _ = ops.add_layer_norm(x, None, None, None, backend=backend)
    assert_bitwise_equal(
        y[-4:], ops.add_layer_norm(x[-4:], None, None, None, backend=backend)[0], backend
    )


def _small_call(op, backend):
    needs(backend, op)
    if op == "add_layer_norm":
        x = torch.randn(8, 197, 384, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        gamma = torch.randn(384, device=DEVICE)
        return lambda: ops.add_layer_norm(x, x, gamma, None, gamma=gamma, backend=backend)[0], x
    if op == "patch_embed":
        images = torch.randint(0, 256, (8, 3, 224, 224), device=DEVICE, dtype=torch.uint8)
        weight = torch.randn(192, 3, 16, 16, device=DEVICE, requires_grad=True)
        return lambda: ops.patch_embed(images, weight, mean=0.5, std=0.5, backend=backend), weight
    if op == "linear_gelu":
        x = torch.randn(8, 197, 384, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(1536, 384, device=DEVICE)
        return lambda: ops.linear_gelu(x, weight, backend=backend), x
    if op == "window_attention":
        qkv = torch.randn(8, 56, 56, 288, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        table, options = torch.randn(169, 3, device=DEVICE), {"num_heads": 3, "backend": backend}
        return lambda: ops.window_attention(qkv, table, window_size=7, shift_size=3, **options), qkv
    qkv = torch.randn(4, 197, 3 * 6 * 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    return lambda: ops.attention_qkvpacked(qkv, 6, backend=backend), qkv
