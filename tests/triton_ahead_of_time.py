"""Compiles the Triton kernels without a GPU: `python tests/triton_ahead_of_time.py 90 main`.

The launchers run on CPU tensors; where a kernel would be launched it is compiled for the target
with the very arguments, so shapes, alignment and launch settings are the real ones. Prints one JSON
record per kernel: registers, stack (spills), shared memory, and what the PTX contains. It runs in
a process of its own because the interpreter's switch is read when Triton is imported.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vitkernels._triton import reduce
from vitkernels.ops.add_layer_norm import _triton_backward as ln_backward
from vitkernels.ops.add_layer_norm import _triton_forward as ln_forward
from vitkernels.ops.attention import _triton_backward as attention_backward
from vitkernels.ops.attention import _triton_dbias as attention_dbias
from vitkernels.ops.attention import _triton_forward as attention_forward
from vitkernels.ops.distillation_loss import _triton as distillation
from vitkernels.ops.linear_gelu import _triton_backward as linear_backward
from vitkernels.ops.linear_gelu import _triton_forward as linear_forward
from vitkernels.ops.patch_embed import _triton_backward as patch_backward
from vitkernels.ops.patch_embed import _triton_forward as patch_forward
from vitkernels.ops.patch_embed import _triton_tiles as patch_tiles
from vitkernels.ops.patch_merge import _triton as merge
from vitkernels.ops.window_attention import _triton_backward as window_backward
from vitkernels.ops.window_attention import _triton_dbias as window_dbias
from vitkernels.ops.window_attention import _triton_forward as window_forward
from vitkernels.ops.window_attention import _triton_passes as window_passes
from vitkernels.ops.window_attention import _triton_tiles as window_tiles

WINDOWS = (window_forward, window_backward, window_passes, window_dbias)
PRODUCTS = (linear_forward, linear_backward, patch_forward, patch_backward)
MODULES = (
    *(reduce, ln_forward, ln_backward, attention_forward, attention_backward, attention_dbias),
    *(*PRODUCTS, merge, distillation, window_tiles, *WINDOWS),
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def all_kernels() -> set[str]:
    """Every kernel of the package, so that one which no launcher reaches is noticed."""
    return {
        f"{module.__name__.rsplit('.', 2)[1]}.{name}"
        for module in MODULES
        for name, value in inspect.getmembers(module)
        if isinstance(value, JITFunction) and name.endswith("_kernel")
        if value.fn.__module__ == module.__name__
    }


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2]) + int(found[3])}


def compile_instead_of_launching(capability: int, case: dict, records: list) -> None:
    """Replaces the launch of every kernel by its compilation for sm_<capability>."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)

    def run(kernel, *args, grid, warmup, **kwargs):
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        start = time.perf_counter()
        compiled = triton.compile(source, target=target, options=options.__dict__)
        ptx = compiled.asm["ptx"]
        records.append(
            {
                "kernel": f"{kernel.fn.__module__.rsplit('.', 2)[1]}.{kernel.fn.__name__}",
                "case": case["name"],
                "sm": capability,
                **resources(compiled.asm["cubin"]),
                "shared": compiled.metadata.shared,
                "tensor_memory": compiled.metadata.tmem_size or 0,
                "warps": compiled.metadata.num_warps,
                "tf32": "tf32" in ptx,
                "atomics": sorted(set(re.findall(r"\b(?:atom|red)\.[\w.:]+", ptx))),
                "wgmma": "wgmma.mma_async" in ptx,
                "mma": "mma.sync" in ptx or "wgmma.mma_async" in ptx or "tcgen05.mma" in ptx,
                "wide_loads": "ld.global.v4" in ptx,
                "wide_copies": bool(re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", ptx)),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )

    JITFunction.run = run


# --- cases: what the launchers are called with ---------------------------------------------------


def layer_norm(C, x=BF16, stream=BF16, options=False, p=0.0, B=8, N=196):
    branch, residual = torch.empty(B, N, C, dtype=x), torch.empty(B, N, C, dtype=stream)
    weight = torch.empty(C)
    gamma, row_scale = (torch.empty(C), torch.empty(B)) if options else (None, None)
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    mean = torch.empty(B, N)
    masks = [options or bool(p), True, True, True, options]
    ln_forward.add_layer_norm_fwd(
        branch, residual, weight, weight, gamma, row_scale, seed, p, 1e-6, x
    )
    ln_backward.add_layer_norm_bwd(
        branch, residual, residual, mean, mean, branch, weight, weight, gamma, row_scale, seed, p,
        x, masks,
    )  # fmt: skip


def layer_norm_add(C, x=BF16, stream=FP32, B=8, N=196):
    branch, residual = torch.empty(B, N, C, dtype=x), torch.empty(B, N, C, dtype=stream)
    weight, mean, row_scale = torch.empty(C), torch.empty(B, N), torch.empty(B)
    ln_forward.layer_norm_add_fwd(branch, residual, weight, weight, row_scale, 1e-5)
    ln_backward.layer_norm_add_bwd(
        residual, branch, mean, mean, weight, weight, row_scale, [True, True, True]
    )


def attention(N, D, dtype=BF16, bias=None, p=0.0, mask=False, B=64, H=4):
    qkv = torch.empty(B, N, 3 * H * D, dtype=dtype)
    if bias is not None:
        bias = torch.empty(1, H, N, N, dtype=bias)
    ignored = torch.zeros(B, N, dtype=torch.bool) if mask else None
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    options = (bias, ignored, seed, D**-0.5, p)
    out, lse = attention_forward.attention_qkvpacked_fwd(qkv, H, *options)
    wanted = [True, bias is not None and bias.dtype != torch.bool]
    attention_backward.attention_qkvpacked_bwd(out, qkv, H, out, lse, *options, wanted)


def windows(size, window, shift=0, D=32, dtype=BF16, cosine=False, p=0.0, B=8, H=4, table=FP32):
    """One square map; window and shift are ints or pairs."""
    (Wh, Ww), shift = [(s, s) if isinstance(s, int) else s for s in (window, shift)]
    qkv = torch.empty(B, size, size, 3 * H * D, dtype=dtype)
    parameters = (
        torch.empty((2 * Wh - 1) * (2 * Ww - 1), H, dtype=table),
        torch.empty(H, 1, 1, dtype=table) if cosine else None,
        torch.zeros(1, dtype=torch.int64) if p else None,
    )
    options = (*parameters, Wh, Ww, *shift, H, D**-0.5, p)
    out, lse = window_forward.window_attention_fwd(qkv, *options)
    wanted = [True, True, cosine]
    window_backward.window_attention_bwd(out, qkv, out, lse, *options, wanted)


def linear(M, K, N, dtype=BF16, gelu=1, x=None, parameters=None, recompute=False):
    inputs = torch.empty(M, K, dtype=x or dtype)
    weight = torch.empty(N, K, dtype=parameters or dtype)
    bias = torch.empty(N, dtype=weight.dtype)
    y, h = linear_forward.linear_gelu_fwd(inputs, weight, bias, gelu, not recompute, dtype)
    linear_backward.linear_gelu_bwd(y, inputs, weight, bias, h, gelu, [True] * 3)


def patches(B, size, patch, D, dtype=BF16, images=torch.uint8, P=1, channels_last=False):
    pixels = torch.empty(B, 3, size, size, dtype=images)
    if channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    weight, bias = torch.empty(D, 3, patch, patch, dtype=dtype), torch.empty(D, dtype=dtype)
    pos = torch.empty(1, P + (size // patch) ** 2, D, dtype=dtype)
    prefix, mean = torch.empty(1, P, D, dtype=dtype), torch.empty(3)
    tensors = (pixels, weight, bias, pos, prefix, mean, mean)
    tokens = patch_forward.patch_embed_fwd(*tensors, dtype)
    patch_backward.patch_embed_bwd(tokens, *tensors, [images != torch.uint8] + [True] * 4)


def patch_merge(C, dtype=BF16, parameters=None, B=64, size=56):
    x = torch.empty(B, size, size, C, dtype=dtype)
    weight = torch.empty(4 * C, dtype=parameters or dtype)
    y, mean, rstd = merge.patch_merge_layer_norm_fwd(x, weight, weight, 1e-5, dtype)
    merge.patch_merge_layer_norm_bwd(y, x, mean, rstd, weight, weight, [True] * 3)


def loss(K, dtype=BF16, teacher=None, hard=False, soft_targets=None, B=512):
    heads = torch.empty(B, K, dtype=dtype)
    targets = torch.empty(B, dtype=torch.int64)
    if soft_targets is not None:
        targets = torch.empty(B, K, dtype=soft_targets)
    given = (heads, heads, torch.empty(B, K, dtype=teacher or dtype), targets)
    options = (0.5, 3.0, hard, 0.1, True)
    value, *kept = distillation.distillation_loss_fwd(*given, *options, [True, True])
    distillation.distillation_loss_bwd(value, *kept, True, [True, True])
    distillation.distillation_loss_fwd(*given, *options, [False, False])


def case(function, *args, spills=0, **options):
    """spills: the stack bytes a thread may have, None for any."""
    words = [str(a) for a in args]
    words += [f"{k}={str(v).removeprefix('torch.')}" for k, v in options.items()]
    name = f"{function.__name__}({', '.join(words)})"
    return {"name": name, "call": lambda: function(*args, **options), "spills": spills}


MAIN = [
    case(layer_norm, 384),
    case(layer_norm, 768),
    case(layer_norm, 768, stream=FP32, options=True),
    case(layer_norm, 768, options=True, p=0.1),
    case(layer_norm, 1024, options=True),
    case(layer_norm_add, 768),
    case(layer_norm, 9000, options=True),
    case(attention, 197, 64),
    case(attention, 197, 64, bias=BF16),
    case(attention, 197, 64, p=0.1),
    case(attention, 197, 64, FP32),
    case(attention, 577, 64),
    case(attention, 257, 80),
    case(windows, 56, 7, 3),
    case(windows, 56, 7, 3, 32, FP16),
    case(windows, 56, 7),
    case(windows, 64, 8, 4),
    case(windows, 64, 8, 4, cosine=True),
    case(windows, 48, 12, 6),
    case(windows, 64, 16, 8, cosine=True),
    case(windows, 56, 7, 3, 32, FP32),
    case(linear, 50432, 768, 3072),
    case(linear, 50432, 768, 768, gelu=0, parameters=FP32),
    case(linear, 197, 768, 3072),
    case(linear, 1576, 384, 1536, FP32, spills=24),
    case(patches, 256, 224, 16, 768),
    case(patches, 256, 224, 16, 768, images=BF16),
    case(patches, 256, 224, 16, 768, channels_last=True),
    case(patches, 8, 224, 16, 384, FP32),
    case(patch_merge, 96),
    case(patch_merge, 192, size=28),
    case(patch_merge, 384, parameters=FP32, size=14),
    case(patch_merge, 96, FP32),
    case(loss, 1000),
    case(loss, 1000, FP32, hard=True),
    case(loss, 21841, teacher=FP32, soft_targets=FP32),
    case(loss, 65536),
]
EVERY = [
    *[case(layer_norm, C, dtype, dtype) for C in (1, 3, 96, 1000) for dtype in (BF16, FP32)],
    *[case(layer_norm, C, options=True) for C in (96, 1536, 4096, 8192)],
    *[case(layer_norm, C, options=True, p=0.1, spills=8) for C in (96, 1536, 4096, 8192)],
    case(layer_norm, 768, FP16, FP16, options=True),
    case(layer_norm, 768, FP32, FP32, options=True, p=0.1),
    case(layer_norm, 1536, stream=FP32, options=True, p=0.1),
    case(layer_norm_add, 9000),
    case(windows, 64, 8, 4, 32, FP16),
    *[case(windows, 64, 8, shift, 32, FP16, cosine=True) for shift in (0, 4)],
    *[case(windows, 64, 8, cosine=cosine) for cosine in (False, True)],
    *[case(windows, 56, 7, shift, cosine=True) for shift in (0, 3)],
    *[case(windows, 56, 7, 3, D=D, spills=None) for D in (1, 16, 24, 64, 96, 128)],
    *[case(windows, 48, 24, 12, 32, dtype, spills=None) for dtype in (BF16, FP16)],
    *[case(windows, 64, 16, 8, 32, dtype, spills=None) for dtype in (BF16, FP16, FP32)],
    case(windows, 72, 9, (0, 4), spills=None),
    case(windows, 64, (8, 16), (4, 0), spills=None),
    case(windows, 56, 7, 3, p=0.1, spills=None),
    case(windows, 64, 8, 4, 32, FP16, cosine=True, p=0.1, spills=None),
    case(windows, 48, 12, 6, cosine=True, p=0.1, spills=None),
    case(windows, 64, 32, spills=None),
    *[case(windows, 56, window, spills=None) for window in (1, 2, 4)],
    *[case(windows, 64, 8, 4, D, FP32, cosine=True, spills=None) for D in (32, 64, 128)],
    *[case(attention, N, 64, dtype) for N in (1, 50, 144, 196, 198, 256, 257) for dtype in (BF16,)],
    *[case(attention, N, 64, FP16) for N in (197, 577)],
    *[case(attention, N, 64, FP32, spills=None) for N in (50, 257, 1025)],
    case(attention, 197, 64, mask=True),
    case(attention, 197, 64, bias=torch.bool),
    case(attention, 577, 64, bias=BF16, spills=None),
    case(attention, 197, 64, bias=FP32, p=0.1, mask=True, spills=None),
    *[case(attention, 257, D, spills=None) for D in (8, 16, 32, 48, 72, 88, 96, 104, 128)],
    *[case(attention, 1025, D, spills=None) for D in (64, 72, 128)],
    case(attention, 197, 160, spills=None),
    case(attention, 197, 256, spills=None),
    case(attention, 1370, 64, FP32, bias=FP32, p=0.1, mask=True, spills=None),
    *[case(linear, 50432, 768, 3072, gelu=gelu) for gelu in (0, 2, 3)],
    *[case(linear, M, K, N) for M in (64, 1576, 8191) for K, N in ((96, 384), (384, 1536))],
    *[case(linear, 1576, K, N) for K, N in ((75, 131), (1152, 4304), (8, 8), (1024, 1000))],
    case(linear, 1576, 768, 3072, FP16, recompute=True),
    case(linear, 1576, 768, 3072, x=FP32, parameters=FP32),
    case(linear, 1576, 768, 3072, x=FP16),
    case(linear, 50432, 768, 3072, FP32, parameters=BF16, spills=None),
    *[case(patches, 64, 224, p, 768) for p in (4, 8, 14, 28, 32)],
    *[case(patches, 64, 224, p, 96, FP16, images=FP16, spills=8) for p in (4, 14, 16)],
    case(patches, 1, 224, 16, 192),
    case(patches, 64, 518, 14, 1024, P=5),
    case(patches, 64, 224, 16, 768, images=FP32),
    case(patches, 64, 224, 16, 1001, images=BF16, channels_last=True, spills=None),
    case(patches, 64, 224, 16, 768, FP32, images=FP32, spills=None),
    *[case(patch_merge, C, size=15) for C in (1, 3, 31, 128, 256, 512, 768, 1000, 1024)],
    *[case(patch_merge, C, FP32, size=15) for C in (24, 192, 384, 768, 1024)],
    case(patch_merge, 192, FP16, parameters=FP32, size=28),
    *[case(loss, K, dtype) for K in (10, 100, 1000, 21841) for dtype in (BF16, FP16, FP32)],
    *[case(loss, K, hard=True, soft_targets=BF16) for K in (10, 100, 1000, 21841, 65536)],
]
SETS = {"main": MAIN, "every": EVERY}


def compile_cases(capability: int, cases: list[dict]) -> list[dict]:
    records = []
    for one in cases:
        mine = []
        compile_instead_of_launching(capability, one, mine)
        one["call"]()
        records += [record | {"spills_allowed": one["spills"]} for record in mine]
    return records


if __name__ == "__main__":
    capability, chosen = int(sys.argv[1]), SETS[sys.argv[2]]
    plans = (attention_forward, attention_backward, attention_dbias, *WINDOWS, *PRODUCTS)
    for module in plans:
        if "small" in sys.argv[3:] and hasattr(module, "stages"):
            module.stages = lambda device, wanted: 1  # consumer GPUs: 99 KB of shared memory
        if module in (*WINDOWS, *PRODUCTS) and hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: 132  # an H200's, or every product is large
    for module in (attention_backward, linear_forward, patch_tiles):
        module.capability = lambda device: capability
    records = compile_cases(capability, chosen)
    print(json.dumps({"kernels": sorted(all_kernels()), "records": records}))
