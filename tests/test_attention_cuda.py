"""attention's CUDA paths, each by name: every case that a path serves, and its words on others."""

import pytest
from attention_problems import attention_problem, packed_problem
from problems import DTYPE_IDS, check

from vitkernels.testing import available_for, cuda_path

FP32, BF16, FP16 = DTYPE_IDS
CASES = [
    (packed_problem, (1, 1, 1, 64), BF16, {}),
    (packed_problem, (1, 17, 2, 16), FP16, {}),
    (packed_problem, (1, 49, 1, 32), BF16, {"bias": (1, 1, 49, 49), "bias_dtype": FP32}),
    (packed_problem, (1, 65, 1, 64), BF16, {}),
    (packed_problem, (1, 197, 1, 64), BF16, {}),
    (packed_problem, (1, 65, 1, 72), FP16, {"dropout_p": 0.2}),
    (attention_problem, (1, 65, 1, 80), BF16, {"bool_bias": (1, 1, 65, 65)}),
    (attention_problem, (2, 17, 1, 64), FP16, {"Nk": 70, "key_padding_mask": (2, 70)}),
    (attention_problem, (2, 17, 2, 64), BF16, {"bias": (1, 2, 1, 17)}),
    (attention_problem, (1, 66, 1, 64), FP32, {"bias": (1, 1, 66, 66)}),
]

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        "cuda" not in available_for("attention", D=64), reason="no CUDA kernels and no emulator"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[1]}-{DTYPE_IDS[c[2]]}-{sorted(c[3])}")
@pytest.mark.parametrize("path", ["simt", "sm80", "sm90"])
def test_each_path(path, case):
    make, shape, dtype, options = case
    problem = make(*shape, dtype, **options)
    with cuda_path(path):
        try:
            check(problem, "cuda", shape_class=f"{path} {shape} {sorted(options)}")
        except RuntimeError as error:
            if path == "simt" or f"path {path} cannot serve this call: " not in str(error):
                raise
            pytest.skip(str(error).splitlines()[0])
