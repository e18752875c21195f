"""window_attention's sm_90 kernels, forced: values, refusals, and what nvcc made of them."""

import pytest
import torch
from problems import DTYPE_IDS, check
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
def sm90():
    with testing.cuda_path("sm90"):
        yield


CASES = [  # window, shift, dtype, options
    (7, 0, BF16, {}),
    (7, 3, BF16, {"windows": (2, 3)}),
    (8, 4, FP16, {"table_dtype": FP16}),
    (8, 4, BF16, {"cosine": True, "windows": (1, 2), "heads": 2}),
    (7, 3, FP16, {"cosine": "timm", "B": 1, "heads": 3, "scale_dtype": FP16}),
    ((2, 3), (1, 2), BF16, {"windows": (3, 2), "B": 3, "heads": 3}),
    ((4, 16), (0, 8), FP16, {"windows": (2, 1), "scale": -0.3}),
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
