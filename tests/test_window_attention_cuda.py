"""window_attention's CUDA paths by name, and the launch plans of the one for any call."""

import pytest
import torch
from problems import DTYPE_IDS, check
from window_attention_problems import window_problem

from vitkernels import _native, ops
from vitkernels.testing import available_for, cuda_path

PLANS = _native.build_facts()
HERE = "cuda" in available_for("window_attention", "cpu", D=32, N=49)

needs_cuda = pytest.mark.skipif(not HERE, reason="neither a GPU nor the emulator is here")
needs_plans = pytest.mark.skipif(PLANS is None, reason="vitkernels._C is not built")

# name: (window, shift, options)
CASES = {
    "window 7": (7, 0, {}),
    "window 7 shifted": (7, 3, {"windows": (2, 1)}),
    "window 8 shifted one way": (8, (0, 4), {"windows": (1, 2)}),
    "cosine": (7, 3, {"cosine": True}),
    "dropout": (7, 3, {"dropout_p": 0.2}),
    "D 24": (4, 1, {"D": 24}),
    "not square": ((3, 7), (1, 2), {"D": 16}),
    "window 12": (12, 6, {"windows": (1, 1)}),
}


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPE_IDS, ids=DTYPE_IDS.get)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["simt", "sm80", "sm90"])
def test_a_path_by_name(path, case, dtype):
    """It gives the numbers, or refuses in a sentence that names it; simt refuses nothing."""
    window, shift, options = CASES[case]
    problem = window_problem(
        window, shift, dtype, **({"heads": 2, "windows": (1, 2), "D": 32} | options)
    )
    with cuda_path(path):
        try:
            check(problem, "cuda", shape_class=f"{path} {case}")
        except RuntimeError as error:
            assert f"path {path} cannot serve this call: " in str(error)
            assert path != "simt"


@needs_cuda
def test_a_path_is_given_back():
    with pytest.raises(ZeroDivisionError), cuda_path("simt"):
        assert _native.force_cuda_path("simt") == "simt"
        raise ZeroDivisionError
    assert _native.force_cuda_path("auto") == "auto"
    with pytest.raises(ValueError), cuda_path("sm70"):
        pass


@needs_cuda
@pytest.mark.parametrize("path", ["simt", "auto"])
def test_paths_leave_no_trace_of_each_other(path):
    qkv, table = torch.randn(1, 7, 14, 96), torch.randn(169, 1)
    options = {"window_size": 7, "shift_size": 3, "num_heads": 1}
    expected = ops.window_attention(qkv, table, **options, backend="reference")
    with cuda_path(path):
        got = ops.window_attention(qkv, table, **options, backend="cuda")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_plans
@pytest.mark.parametrize("D", (1, 16, 24, 32, 48, 64, 96, 128))
def test_simt_plans_of_every_window(D):
    """Shared memory fits an A100 (163 KB); each chunk has a window, each row group a block."""
    limit = 163 * 1024
    for Wh in range(1, 33):
        for Ww in range(1, 33):
            N, rows = Wh * Ww, (2 * Wh - 1) * (2 * Ww - 1)
            for windows in (1, 64, 8192):
                forward = PLANS.window_attention_simt_plan(windows, 3, N, D, rows, 132, False)
                assert forward["blocks"] == windows * 3 * -(-N // 16)
                assert forward["shared_bytes"] <= limit
                backward = PLANS.window_attention_simt_plan(windows, 3, N, D, rows, 132, True)
                assert 1 <= backward["chunks"] <= windows
                assert backward["blocks"] == 3 * backward["chunks"]
                assert backward["shared_bytes"] <= limit
