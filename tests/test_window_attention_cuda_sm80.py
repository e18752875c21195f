"""window_attention's sm_80 kernels, forced: values, refusals, and what nvcc made of them."""

import pytest
from compiled_code import counts, disassembler, sass
from native_build import NVCC, ROOT
from problems import DTYPE_IDS, check, check_repeats
from window_attention_problems import window_problem

from vitkernels import testing
from vitkernels.testing import available_for

FP32, BF16, FP16 = DTYPE_IDS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        "cuda" not in available_for("window_attention", D=32, N=49), reason="no CUDA kernels here"
    ),
]


@pytest.fixture(autouse=True)
def sm80():
    with testing.cuda_path("sm80"):
        yield


CASES = [  # window, shift, dtype, options
    (7, 0, BF16, {}),
    (7, 3, BF16, {"windows": (2, 3)}),
    (8, 4, FP16, {"table_dtype": FP16}),
    (8, 4, BF16, {"cosine": True, "windows": (1, 2), "heads": 2}),
    (7, 3, FP16, {"cosine": "timm", "B": 1, "heads": 3, "scale_dtype": FP16}),
    ((2, 3), (1, 2), BF16, {"windows": (3, 2), "B": 3, "heads": 3}),
    ((4, 16), (0, 5), FP16, {"windows": (2, 1), "scale": -0.3}),
    ((5, 1), (2, 0), BF16, {"windows": (1, 3), "table_dtype": BF16}),
    (1, 0, FP16, {"windows": (3, 3)}),
    ((3, 4), (1, 1), BF16, {"cosine": True, "magnitude": 30.0, "B": 1}),
]


def name(window, shift, options):
    return " ".join([f"window {window} shift {shift}", *(f"{k} {v}" for k, v in options.items())])


@pytest.mark.parametrize(("window", "shift", "dtype", "options"), CASES, ids=str)
def test_windows(window, shift, dtype, options):
    problem = window_problem(window, shift, dtype, D=32, **({"B": 2} | options))
    factor = 0.9 if window in (7, 8) else None  # scores and probabilities stay in fp32
    check(problem, "cuda", shape_class=name(window, shift, options), rmse_factor=factor)


def test_repeats_are_bitwise_equal_and_unwanted_gradients_change_nothing():
    check_repeats(window_problem(7, 3, BF16, D=32, B=1), "cuda")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": FP32}, "bf16 and fp16"),
        ({"D": 64}, "head dim 32"),
        ({"window": 17}, "256 tokens"),
        ({"dropout_p": 0.5}, "dropout"),
    ],
    ids=str,
)
def test_refusals(options, why):
    options = {"window": 2, "dtype": BF16, "D": 32} | options
    problem = window_problem(options.pop("window"), 0, options.pop("dtype"), B=1, **options)
    with pytest.raises(RuntimeError, match=why):
        problem.ours("cuda")(*problem.inputs.values())


# Each product is 16 mma of a warp: two forward, five backward. Chunks of 16 bytes: two of each tile
# a thread, before the loop and in it; the backward's lse besides.
PLANS = {"": ("forward", 32, 12), "_backward": ("backward", 80, 18)}


@pytest.mark.skipif(NVCC is None or disassembler() is None, reason="no nvcc or cuobjdump here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("part", PLANS)
def test_instructions_are_those_of_the_plan(part, arch):
    kernel, products, copies = PLANS[part]
    name = f"window_attention_window_attention_sm80{part}.cu.cuda.o"
    code = sass(ROOT / "build/native/inplace/obj" / name, arch)
    for variant in ("1,32,0", "1,32,1", "2,32,0", "2,32,1"):  # bf16, fp16; without, with cosines
        lines = code[f"{kernel}_kernel<{variant}>"]
        planned = {"HMMA": products, "LDGSTS": copies, "LDL": 0}
        assert counts(lines, planned) == planned
