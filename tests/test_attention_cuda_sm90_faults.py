"""The emulator catches what attention's sm_90 forward could do wrong: its source with one necessary
thing taken away, each in a namespace of its own, in one library."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from emulated import CXX_FLAGS, SEEDS, Kernels, nan
from native_build import CACHE, CSRC, CXX, ROOT, cached_build, files_under

from vitkernels.ops.attention import reference

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

# What is changed: the text, which must be there once, and what replaces it.
WAIT = "mbarrier_wait(pairs.full + pairs.slot(), pairs.phase());\n"
PRODUCTS = """  begin_scores<TYPE, WIDTH>(s0, q, w.tile * kTile, k, 0);
  if constexpr (kTwo) begin_scores<TYPE, WIDTH>(s1, q, w.tile * kTile, k, FIRST);
  wgmma_wait<0>(s0);
  if constexpr (kTwo) pin_registers(s1);
"""
FAULTS = {
    "nothing": ("", ""),
    "no wait for Q and K": (f"      {WAIT}      if (tile", "      if (tile"),
    "no wait for V": (
        "  mbarrier_wait(w.values.full + w.values.slot(), w.values.phase());\n  const Tile v",
        "  const Tile v",
    ),
    "tail does not wait": (f"    {WAIT}    mbarrier_wait(values", "    mbarrier_wait(values"),
    "loads over a pair in use": (
        "mbarrier_wait(pairs.empty + pairs.slot(), pairs.phase() ^ 1);",
        "",
    ),
    "loads over a V in use": (
        "mbarrier_wait(values.empty + values.slot(), values.phase() ^ 1);",
        "",
    ),
    "pair given up before its products": (
        f"{PRODUCTS}  if (last) w.release_pair();",
        f"  if (last) w.release_pair();\n{PRODUCTS}",
    ),
    "phase never turns": ("at = (phase() ^ 1) << 8", "at = 0"),
    "barriers not shown to TMA": ("    mbarrier_fence_init();\n", ""),
    "barriers not ready": ("  __syncthreads();\n", ""),
    "no fence before a product": ("  wgmma_fence(s);\n", ""),
    "scores read too early": ("  wgmma_wait<0>(s0);\n", ""),
    "swizzle of K": (
        "wgmma_operand<P::kFirstSwizzle>(k.first",
        "wgmma_operand<Swizzle::k64>(k.first",
    ),
    "swizzle of the tail": ("(lane_index() % 8 * pitch / 128) ^ high", "high"),
    "one column too many": ("if (8 * j + i % 2 >= mine)", "if (8 * j + i % 2 > mine)"),
}

RUN = """
EXPORT run_NUMBER(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                  float* lse, int H, int N) {
  using namespace attention;
  using namespace attention::fault_NUMBER;
  const int64_t row = H * 64, batch = N * row;
  const auto view = [&](const uint16_t* x) {
    return HeadView{const_cast<uint16_t*>(x), batch, row, 64};
  };
  Args a{};
  a.B = 1, a.H = H, a.Nq = a.Nk = N, a.D = 64, a.dtype = DType::kBF16, a.scale = 0.125f;
  a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.lse = lse;
  const Plan p = plan(1, H, N, N, 64, 0, false, 1);
  Maps maps{};
  const HeadView* const views[] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i)
    maps.first[i] = make_tensor_map(
        views[i]->data, a.dtype,
        {4, {64, N, H, 1}, {1, row, 64, 8}, {64, i == 0 ? p.query_rows : p.key_rows, 1, 1}},
        Swizzle::k128);
  return launch(forward_kernel<DType::kBF16, 64, 200, BiasPlace::kNone>, 1,
                static_cast<unsigned>(p.threads), static_cast<size_t>(p.shared_bytes), maps, a, p);
}
"""


def body(name: str) -> str:
    """A source without its includes and outer namespaces, up to its host code."""
    text = (CSRC / "attention" / name).read_text().partition("// ---- Host")[0]
    text = text[text.index("namespace vitkernels") :]
    text = text.partition("{\n")[2].replace("namespace {\n", "", 1)
    return text.rpartition("}  // namespace")[0] if name.endswith("h") else text


@pytest.fixture(scope="module")
def kernels():
    includes = ["attention/attention_cuda.h", "attention/attention_plan_sm90.h"]
    includes += [f"common/{name}.cuh" for name in ("device", "mma", "tma", "wgmma")]
    parts = ["#include <cmath>", "#include <type_traits>"]
    parts += [f'#include "{name}"' for name in includes]
    parts += [f'#include "{ROOT}/tests/emulator/exports.h"', "namespace vitkernels {"]
    source = "using namespace sm90;\n" + body("attention_sm90.cuh") + body("attention_sm90.cu")
    for number, (old, new) in enumerate(FAULTS.values()):
        assert not old or source.count(old) == 1, old
        text = source.replace(old, new) if old else source
        parts += [f"namespace attention::fault_{number} {{", text, "}"]
        parts += [RUN.replace("NUMBER", str(number))]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "attention_sm90_faults.cpp"
    path.write_text("\n".join([*parts, "}", ""]))
    sources = [path, *sorted((CSRC / "emulator").glob("*.cpp"))]
    flags = [f for f in CXX_FLAGS if f not in ("-Wall", "-Wextra", "-Werror")]
    command = [CXX, *flags, "-w", "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    command += ["-isystem", f"{torch.__path__[0]}/include"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", *map(str, sources), "-lpthread"]
    folders = [CSRC / name for name in ("attention", "common", "emulator")]
    inputs = [path, *files_under(*folders, ROOT / "tests/emulator")]
    return Kernels(cached_build("attention_sm90_faults.so", command, inputs)[0])


def wrong(kernels, number: int, seed: int, N: int) -> str:
    """What is wrong with 11 heads of N tokens: more than there are stages."""
    generator = torch.Generator().manual_seed(2)
    H = 11
    q, k, v = torch.randn(3, 1, N, H, 64, generator=generator).bfloat16()
    out, lse = nan(1, N, H, 64).bfloat16(), nan(1, H, N)
    kernels.set_seed(seed)
    try:
        getattr(kernels, f"run_{number}")(q, k, v, out, lse, ctypes.c_int(H), ctypes.c_int(N))
    except RuntimeError as error:
        return str(error)
    truth, exact = reference.attention(q, k, v, None, None, None, 0.125, 0.0)
    close = (out - truth).abs().max() < 0.02 and (lse - exact).abs().max() < 1e-4
    return "" if close else "other values"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_caught(kernels, fault):
    number = list(FAULTS).index(fault)
    found = []
    for seed, N in itertools.product(SEEDS, (66, 120)):  # with and without a tail
        found.append(wrong(kernels, number, seed, N))
        if fault != "nothing" and found[-1]:
            return
    assert fault == "nothing" and not any(found), found
