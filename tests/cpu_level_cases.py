"""Every CPU operator at the instruction-set level that VITKERNELS_CPU_ISA asks for.

The native library reads the variable once per process, so tests/test_cpu_levels.py runs this file
in one process per level. The last line printed is JSON: the level, and the compared cases.
"""

import json

import torch
from attention_problems import attention_problem, packed_problem
from distillation_problems import distillation_problem
from every_op import OPS_AND_BACKENDS
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from linear_gelu_problems import APPROXIMATIONS, linear_gelu_problem, linear_problem
from patch_embed_problems import UINT8, patch_embed_problem
from patch_merge_problems import patch_merge_problem
from problems import DTYPE_IDS, check
from window_attention_problems import window_problem

from vitkernels import _native, testing

CHANNELS = (1, 17, 384, 1000)  # below, across and at multiples of every vector width
LENGTHS = [(N, D) for N in (5, 50, 197) for D in (16, 64, 72)] + [(300, 64)]
DROPOUT = 0.2
# (rows, K, N): below, across and at multiples of every block of the products.
PRODUCTS = [(M, K, N) for M in (1, 13, 50) for K, N in ((7, 97), (96, 96), (160, 33), (385, 47))]
# (grid, patch, D, Cin): patch rows of 4 to 32 pixels, with and without tails.
EMBEDDINGS = (
    (3, 4, 96, 3), (2, 8, 33, 3), ((1, 3), 14, 40, 3), (2, 16, 96, 3), ((2, 1), 32, 24, 3),
    (2, (3, 5), 17, 4), (5, 16, 64, 1),
)  # fmt: skip
# (window, shift, D): keys and head dims below, across and at multiples of every vector width.
WINDOWS = (
    ((7, 7), 3, 32), ((3, 5), (1, 2), 24), ((12, 12), (6, 0), 16), ((2, 20), (0, 7), 33),
    ((8, 8), 4, 7), ((4, 4), 1, 64),
)  # fmt: skip


def problems(dtype):
    """(shape class, problem): with everything, so that each option meets each tail, and bare."""
    fp32 = torch.float32
    for C in CHANNELS:
        shape = (3, 21, C)
        yield f"C{C} every option", layer_norm_problem(shape, dtype, dropout_p=DROPOUT)
        yield f"C{C} bare", layer_norm_problem(shape, dtype, gamma=False, row_scale=False)
        yield f"C{C} row_scale", layer_norm_add_problem(shape, dtype)
        if dtype != fp32:
            wide = {"residual_dtype": fp32, "param_dtype": fp32}
            yield f"C{C} fp32 stream", layer_norm_problem(shape, dtype, **wide)
            yield f"C{C} fp32 stream", layer_norm_add_problem(shape, dtype, **wide)
    for N, D in LENGTHS:
        masked = {"bias": (2, N, N), "key_padding_mask": (2, N), "dropout_p": DROPOUT}
        for make in (attention_problem, packed_problem):
            yield f"N{N} D{D} bias mask dropout", make(2, N, 2, D, dtype, **masked)
            yield f"N{N} D{D} bare", make(2, N, 2, D, dtype)
    yield "N50 Nk197 D64 bare", attention_problem(2, 50, 2, 64, dtype, Nk=197)
    yield from windows(dtype)
    yield from merges(dtype)
    yield from products(dtype)
    yield from embeddings(dtype)
    yield from losses(dtype)


def windows(dtype):
    for window, shift, D in WINDOWS:
        name, common = f"{window} shift {shift} D{D}", {"B": 1, "windows": (2, 3), "D": D}
        yield name, window_problem(window, shift, dtype, **common)
        table = {"table_dtype": dtype, "scale_dtype": dtype, "dropout_p": DROPOUT}
        yield (
            f"{name} cosine",
            window_problem(window, shift, dtype, cosine="timm", **common, **table),
        )


def merges(dtype):
    for C in (1, 7, 24, 96, 250):
        yield f"5x6 C{C}", patch_merge_problem((2, 5, 6, C), dtype)
        yield f"4x7 C{C} bare", patch_merge_problem((1, 4, 7, C), dtype, affine=())
    if dtype == torch.float32:  # thousands of equal terms, of pixels beyond the edges
        yield "3x3 C1536", patch_merge_problem((1, 3, 3, 1536), dtype)
    else:
        wide = {"weight_dtype": torch.float32, "bias_dtype": torch.float32}
        yield "3x4 C40 fp32 parameters", patch_merge_problem((2, 3, 4, 40), dtype, **wide)


def losses(dtype):
    mixup = {"soft_targets": dtype, "label_smoothing": 0.1}
    for K in (3, 37, 1000, 2500):
        yield f"K{K} soft", distillation_problem((7, K), dtype, temperature=2.0, **mixup)
        yield f"K{K} hard", distillation_problem((7, K), dtype, kind="hard")
    yield "K70 fp32 teacher", distillation_problem((7, 70), dtype, teacher_dtype=torch.float32)


def products(dtype):
    fp32 = torch.float32
    for i, (M, K, N) in enumerate(PRODUCTS):
        name, approximate = f"M{M} K{K} N{N}", APPROXIMATIONS[i % 3]
        yield name, linear_gelu_problem((M, K), N, dtype, approximate=approximate)
        yield name, linear_problem((M, K), N, dtype)
    for approximate in APPROXIMATIONS:
        options = {"approximate": approximate, "save_preactivation": False, "bias": False}
        yield f"M21 {approximate} bare", linear_gelu_problem((21, 64), 48, dtype, **options)
    if dtype != fp32:
        wide = {"weight_dtype": fp32, "bias_dtype": fp32}
        for make in (linear_gelu_problem, linear_problem):
            yield "M21 fp32 parameters", make((21, 64), 48, dtype, **wide)
            yield "M21 autocast", make((21, 64), 48, fp32, autocast=dtype)


def embeddings(dtype):
    fp32 = torch.float32
    for grid, patch, D, Cin in EMBEDDINGS:
        name = f"patch {patch} grid {grid} D{D} Cin {Cin}"
        for images in (UINT8, dtype):
            yield name, patch_embed_problem(grid, patch, D, images, dtype, Cin=Cin)
    bare = {"bias": False, "pos": None, "prefix": None, "mean": None, "std": None}
    for images in (UINT8, dtype):
        yield "patch 4 bare", patch_embed_problem(3, 4, 40, images, dtype, **bare)
    if dtype != fp32:
        for images in (UINT8, dtype):
            problem = patch_embed_problem(3, 4, 40, images, fp32, autocast=dtype)
            yield "patch 4 autocast", problem


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN: what nobody wrote shows
    level = _native.build_facts().cpu_isa()
    for dtype in DTYPE_IDS:
        for shape_class, problem in problems(dtype):
            if (problem.op, "cpu") in OPS_AND_BACKENDS:
                # Gradients of a single row are an outer product: their errors have a mean.
                slack = 1.1 if "M1 " in shape_class else 1.0
                scalar = {"grad_layout": "contiguous"} if problem.outputs == ("loss",) else {}
                name = f"{level} {shape_class}"
                check(problem, "cpu", shape_class=name, slack=slack, **scalar)
    print(json.dumps({"level": level, "cases": sorted(testing.cases.seen)}))


if __name__ == "__main__":
    main()
