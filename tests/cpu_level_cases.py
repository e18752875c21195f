"""Every CPU operator at the instruction-set level that VITKERNELS_CPU_ISA asks for.

The native library reads the variable once per process, so tests/test_cpu_levels.py runs this file
in one process per level. The last line printed is JSON: the level, and the compared cases.
"""

import json

import torch
from attention_problems import attention_problem, packed_problem
from layer_norm_problems import layer_norm_add_problem, layer_norm_problem
from problems import DTYPE_IDS, check

from vitkernels import _native, testing

CHANNELS = (1, 17, 384, 1000)  # below, across and at multiples of every vector width
LENGTHS = [(N, D) for N in (5, 50, 197) for D in (16, 64, 72)] + [(300, 64)]
DROPOUT = 0.2


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


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN: what nobody wrote shows
    level = _native.build_facts().cpu_isa()
    for dtype in DTYPE_IDS:
        for shape_class, problem in problems(dtype):
            check(problem, "cpu", shape_class=f"{level} {shape_class}")
    print(json.dumps({"level": level, "cases": sorted(testing.cases.seen)}))


if __name__ == "__main__":
    main()
