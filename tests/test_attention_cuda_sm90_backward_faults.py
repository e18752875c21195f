"""Planted bugs in attention's backward on Hopper: each barrier, fence and wait that is taken away
shows in the emulator, as an error or in the values.

The kernel's own source is compiled with switches at the places below."""

import ctypes

import pytest
import torch
from emulated import CXX_FLAGS, Kernels
from native_build import CACHE, CSRC, CXX, cached_build, files_under

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

FOLDER = CSRC / "attention"
# What is switched: the text, there once, and what replaces it, with `planted` for the switch. The
# barrier after dK is not among them: emulated loads come when no thread can go on, so that whoever
# has waited for the next k finds all the others through with dK.
FAULTS = {
    "P is not fenced": (
        "fence_proxy_async();\n    __syncthreads();  // P is there",
        "if (!planted) fence_proxy_async();\n    __syncthreads();  // P is there",
    ),
    "no barrier before dV": (
        "__syncthreads();  // P is there",
        "if (!planted) __syncthreads();  // P is there",
    ),
    "no barrier after dV": (
        "__syncthreads();  // nobody reads P but",
        "if (!planted) __syncthreads();  // nobody reads P but",
    ),
    "dS is not fenced": (
        "fence_proxy_async();\n    __syncthreads();  // dS is there",
        "if (!planted) fence_proxy_async();\n    __syncthreads();  // dS is there",
    ),
    "no barrier before dK": (
        "__syncthreads();  // dS is there",
        "if (!planted) __syncthreads();  // dS is there",
    ),
    "no wait for q": (
        "mbarrier_wait(&loaded[kQ], phase);",
        "if (!planted) mbarrier_wait(&loaded[kQ], phase);",
    ),
    "no wait for k": (
        "mbarrier_wait(&loaded[kK], phase);",
        "if (!planted) mbarrier_wait(&loaded[kK], phase);",
    ),
    "no wait for dout": (
        "mbarrier_wait(&loaded[kDout], phase);",
        "if (!planted) mbarrier_wait(&loaded[kDout], phase);",
    ),
    "no wait for v": (
        "mbarrier_wait(&loaded[kV], phase);",
        "if (!planted) mbarrier_wait(&loaded[kV], phase);",
    ),
    "the phase stays": ("phase ^= 1", "phase ^= !planted"),
    "barriers are not shown to TMA": (
        "mbarrier_fence_init();",
        "if (!planted) mbarrier_fence_init();",
    ),
    "swizzle of 64 bytes": (
        "swizzled(Swizzle::k128,",
        "swizzled(planted ? Swizzle::k64 : Swizzle::k128,",
    ),
    "narrow panel without swizzle": (
        "swizzled(Swizzle::k32,",
        "swizzled(planted ? Swizzle::kNone : Swizzle::k32,",
    ),
    "the next q in this one's place": (
        "(1 - phase) * kLayout.next_q",
        "(planted ? phase : 1 - phase) * kLayout.next_q",
    ),
    "a panel too far": ("n / 8 * ROWS * 128", "n / 8 * (planted ? 64 : ROWS) * 128"),
    "rows of the next half": ("half * 1024", "half * (planted ? 512 : 1024)"),
}

RUNNER = """
#include "exports.h"

static int vk_planted = -1;
EXPORT plant(int which) {{
  vk_planted = which;
  return nullptr;
}}
{source}
EXPORT run(const void* q, const void* k, const void* v, const void* dout, float* lse, void* dq,
           void* dk, void* dv, int B, int N) {{
  using namespace vitkernels;
  using namespace vitkernels::attention;
  const auto view = [&](const void* data) {{
    return HeadView{{const_cast<void*>(data), int64_t{{N}} * 64, 64, 64}};
  }};
  Args a{{}};
  a.B = B, a.H = 1, a.Nq = a.Nk = N, a.D = 64, a.dtype = DType::kBF16, a.scale = 0.125f;
  a.q = view(q), a.k = view(k), a.v = view(v), a.dout = view(dout), a.lse = lse;
  a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  const auto p = sm90_backward::plan(B, 1, N, N, 64, 1, sm90_backward::Bias::kNone);
  return ::vitkernels::launch(
      backward_kernel<DType::kBF16, 144, 64, false>, static_cast<unsigned>(p.blocks), 384,
      sm90_backward::layout(144, 64).bytes, map_of(a, a.q, N, p), map_of(a, a.k, N, p),
      map_of(a, a.v, N, p), map_of(a, a.dout, N, p), a, static_cast<float*>(nullptr));
}}
"""


def switched_source() -> str:
    header = (FOLDER / "attention_sm90_backward.cuh").read_text().replace("#pragma once", "")
    source = (FOLDER / "attention_sm90_backward.cu").read_text()
    include = '#include "attention/attention_sm90_backward.cuh"'
    assert source.count(include) == 1
    source = source[: source.index("template <DType TYPE, int WIDTH, bool BIAS>\nvoid launch(")]
    text = source.replace(include, header) + "}}  // namespace vitkernels::attention"
    for number, (name, (old, new)) in enumerate(FAULTS.items()):
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new.replace("planted", f"(vk_planted == {number})"))
    return text


@pytest.fixture(scope="module")
def kernels():
    CACHE.mkdir(parents=True, exist_ok=True)
    source = CACHE / "attention_sm90_backward_faults.cpp"
    text = RUNNER.format(source=switched_source())
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    torch_root = torch.__path__[0]
    includes = [CSRC / "emulator", CSRC, CSRC.parent / "tests/emulator"]
    command = [CXX, *CXX_FLAGS, "-Wno-attributes", "-Wno-psabi"]
    command += ["-Wno-maybe-uninitialized", "-Wno-unused-function"]
    command += [f"-I{folder}" for folder in includes] + ["-isystem", f"{torch_root}/include"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", str(source)]
    command += map(str, sorted((CSRC / "emulator").glob("*.cpp")))
    command += [f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root}/lib"]
    inputs = [*files_under(CSRC / "emulator", CSRC / "common", FOLDER), source]
    built, _ = cached_build("attention_sm90_backward_faults.so", [*command, "-lpthread"], inputs)
    return Kernels(built)


def gradients(kernels, fault, seed=1):
    """dq, dk, dv of four items that one block takes in turn; None: the emulator objected."""
    B, N = 4, 130
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(B, N, 64, generator=generator).bfloat16() for _ in range(4))
    lse = (q.float() @ k.float().mT * 0.125).logsumexp(-1).contiguous()
    out = [torch.full((B, N, 64), torch.nan, dtype=torch.bfloat16) for _ in range(3)]
    kernels.set_seed(seed)
    kernels.plant(ctypes.c_int(-1 if fault is None else list(FAULTS).index(fault)))
    try:
        kernels.run(q, k, v, dout, lse, *out, B, N)
    except RuntimeError:
        assert fault is not None
        return None
    return torch.stack(out)


@pytest.fixture(scope="module")
def right(kernels):
    result = gradients(kernels, None)
    assert torch.isfinite(result).all()
    return result


def test_the_kernel_passes(kernels, right):
    for seed in (2, 3):
        assert torch.equal(gradients(kernels, None, seed), right)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_bug_is_caught(kernels, right, fault):
    for seed in range(1, 5):
        result = gradients(kernels, fault, seed)
        if result is None or not torch.equal(result, right):
            return
    raise AssertionError("four runs went as if nothing were missing")
