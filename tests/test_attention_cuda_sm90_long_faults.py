"""Planted bugs in attention's kernels of many tokens on Hopper: each wait, release and turn that is
taken away shows in the emulator, as an error or in the values.

The kernels' own sources are compiled with switches at the places below."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import CXX_FLAGS, Kernels
from native_build import CACHE, CSRC, CXX, ROOT, cached_build, files_under

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler: there is nothing to emulate")

# What is switched: the text, there once, and what replaces it, with `planted` for the switch.
FORWARD = {
    "no wait for Q": (
        "mbarrier_wait(shared.query_full(group), query_phase);",
        "if (!planted) mbarrier_wait(shared.query_full(group), query_phase);",
    ),
    "no wait for K": (
        "mbarrier_wait(keys.full + keys.slot(), keys.phase());\n    if (!FIRST)",
        "if (!planted) mbarrier_wait(keys.full + keys.slot(), keys.phase());\n    if (!FIRST)",
    ),
    "no wait for V": ("if (!FIRST) mbarrier_wait", "if (!FIRST && !planted) mbarrier_wait"),
    "no wait for the last V": (
        "mbarrier_wait(values.full + values.slot(), values.phase());\n    begin_sums",
        "if (!planted) mbarrier_wait(values.full + values.slot(), values.phase());\n    begin_sums",
    ),
    "loads over a Q in use": (
        "mbarrier_wait(shared.query_empty(group), query_phase[group] ^ 1);",
        "if (!planted) mbarrier_wait(shared.query_empty(group), query_phase[group] ^ 1);",
    ),
    "loads over a K in use": (
        "mbarrier_wait(keys.empty + keys.slot(), keys.phase() ^ 1);",
        "if (!planted) mbarrier_wait(keys.empty + keys.slot(), keys.phase() ^ 1);",
    ),
    "loads over a V in use": (
        "mbarrier_wait(values.empty + values.slot(), values.phase() ^ 1);",
        "if (!planted) mbarrier_wait(values.empty + values.slot(), values.phase() ^ 1);",
    ),
    "Q given up a tile early": ("tile == p.tiles - 1", "tile == p.tiles - (planted ? 2 : 1)"),
    "scores read too early": (
        "wgmma_wait<FIRST ? 0 : 1>(s);",
        "if (!planted) wgmma_wait<FIRST ? 0 : 1>(s);",
    ),
    "sums scaled too early": (
        "finish_values(o);\n      pin_all(weights);",
        "if (!planted) finish_values(o);\n      pin_all(weights);",
    ),
    "turn kept": (
        "begin_sums(o, weights, tile > 1);\n    pass_turn();",
        "begin_sums(o, weights, tile > 1);\n    if (!planted) pass_turn();",
    ),
    "nobody begins": ("if (group == 1) pass_turn();", "if (group == 1 && !planted) pass_turn();"),
    "an idle group keeps V": (
        "release_values();\n    }\n  }\n\n  VK_DEVICE void run",
        "if (!planted) release_values();\n    }\n  }\n\n  VK_DEVICE void run",
    ),
    "the phase of Q stays": ("query_phase ^= 1;", "query_phase ^= !planted;"),
    "earlier sums not scaled": (
        "o.at(j, i) *= rescale[i / 2]",
        "o.at(j, i) *= planted ? 1.0f : rescale[i / 2]",
    ),
    "barriers not shown to TMA": ("mbarrier_fence_init();", "if (!planted) mbarrier_fence_init();"),
    "a tail does not wait for K": (
        "keys.phase());\n        mbarrier_wait(v",
        "keys.phase() ^ planted);\n        mbarrier_wait(v",
    ),
    "a tail does not wait for V": (
        "values.phase());\n        if (tail",
        "values.phase() ^ planted);\n        if (tail",
    ),
    "a tail gives K up early": (
        "        if (tail != kNoTail) add_tile(rows, tile);\n        __syncwarp();\n",
        "        if (planted) release(keys.empty + keys.slot());\n"
        "        if (tail != kNoTail) add_tile(rows, tile);\n        __syncwarp();\n"
        "        if (!planted)\n",
    ),
    "a tail keeps K": (
        "release(keys.empty + keys.slot());\n        release(v",
        "if (!planted) release(keys.empty + keys.slot());\n        release(v",
    ),
    "a tail is merged before all of it is there": (
        "rows.give(shared.handed(share));\n    barrier_sync(",
        "rows.give(shared.handed(share));\n    if (!planted) barrier_sync(",
    ),
    "a tail's warps have the same keys": (
        "int at = share * Rows::kKeys;",
        "int at = (planted ? 0 : share) * Rows::kKeys;",
    ),
}
BACKWARD = {
    "no wait for the rows": (
        "mbarrier_wait(shared.near_full(group), near_phase);",
        "if (!planted) mbarrier_wait(shared.near_full(group), near_phase);",
    ),
    "no wait for a tile": (
        "mbarrier_wait(ring.full + ring.slot(), ring.phase());\n    begin_scores",
        "if (!planted) mbarrier_wait(ring.full + ring.slot(), ring.phase());\n    begin_scores",
    ),
    "loads over rows in use": (
        "mbarrier_wait(shared.near_empty(group), near_phase[group] ^ 1);",
        "if (!planted) mbarrier_wait(shared.near_empty(group), near_phase[group] ^ 1);",
    ),
    "loads over a tile in use": (
        "mbarrier_wait(ring.empty + ring.slot(), ring.phase() ^ 1);",
        "if (!planted) mbarrier_wait(ring.empty + ring.slot(), ring.phase() ^ 1);",
    ),
    "rows given up a tile early": ("tile == p.tiles - 1", "tile == p.tiles - (planted ? 2 : 1)"),
    "scores read too early": ("wgmma_wait<1>(s);", "if (!planted) wgmma_wait<1>(s);"),
    "dP read too early": ("wgmma_wait<0>(dp);", "if (!planted) wgmma_wait<0>(dp);"),
    "a tile is kept": (
        "if (before != nullptr) release(before);",
        "if (before != nullptr && !planted) release(before);",
    ),
    "an idle group keeps a tile": (
        "release(ring.empty + ring.slot());",
        "if (!planted) release(ring.empty + ring.slot());",
    ),
    "the phase of the rows stays": ("near_phase ^= 1;", "near_phase ^= !planted;"),
    "the sums' first product adds": (
        "begin_values<TYPE>(sums, ds, first, 0, COLUMNS, tile > 0);",
        "begin_values<TYPE>(sums, ds, first, 0, COLUMNS, tile > 0 || planted);",
    ),
    "barriers not shown to TMA": ("mbarrier_fence_init();", "if (!planted) mbarrier_fence_init();"),
}

PROLOGUE = """
#include "emulator/exports.h"

static int vk_planted = -1;
EXPORT plant_DIRECTION(int which) {
  vk_planted = which;
  return nullptr;
}
"""
ARGUMENTS = """
  using namespace vitkernels;
  using namespace vitkernels::attention;
  const auto view = [&](const void* data) {
    return HeadView{const_cast<void*>(data), int64_t{H} * N * 64, 64, int64_t{N} * 64};
  };
  Args a{};
  a.B = 1, a.H = H, a.Nq = a.Nk = N, a.D = 64, a.dtype = DType::kBF16, a.scale = 0.125f;
  a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.lse = lse;
"""
RUN_FORWARD = f"""
EXPORT run_forward(const void* q, const void* k, const void* v, void* out, float* lse, int H,
                   int N) {{{ARGUMENTS}
  ForwardPlan p = forward_plan(1, H, N, N, 64, true, 2);  // of kNarrow keys
  p.stages = 2;  // so that they are used again soon
  Maps maps{{}};
  maps.first[0] = map_of(a.q, a, N, 64, 64);
  maps.first[1] = map_of(a.k, a, N, kNarrow, 64);
  maps.first[2] = map_of(a.v, a, N, stage_rows(kNarrow), 64);
  return ::vitkernels::launch(forward_kernel<DType::kBF16, 64, kNarrow, false>,
                              static_cast<unsigned>(p.blocks), kLongThreads,
                              static_cast<size_t>(p.shared_bytes), maps, a, p);
}}
"""
RUN_BACKWARD = f"""
template <bool BY_KEY>
const char* run_pass(const vitkernels::attention::Args& a, const void* stats) {{
  using namespace vitkernels;
  using namespace vitkernels::attention;
  constexpr int kColumns = backward_columns(64, BY_KEY);
  BackwardPlan p = backward_plan(1, a.H, a.Nq, a.Nk, 64, BY_KEY, 2);
  p.stages = 2;  // so that they are used again soon
  Maps maps[2] = {{}};
  const HeadView* const views[2][2] = {{{{&a.q, &a.dout}}, {{&a.k, &a.v}}}};
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < 2; ++i)
      maps[side].first[i] =
          map_of(*views[side][i], a, a.Nq, (side == 1) == BY_KEY ? 64 : kColumns, 64);
  return ::vitkernels::launch(gradient_kernel<DType::kBF16, 64, kColumns, BY_KEY>,
                              static_cast<unsigned>(p.blocks), kLongThreads,
                              static_cast<size_t>(p.shared_bytes), maps[BY_KEY], maps[!BY_KEY], a,
                              p, static_cast<const RowStats*>(stats));
}}
EXPORT run_backward(const void* q, const void* k, const void* v, void* out, float* lse,
                    const void* dout, void* stats, void* dq, void* dk, void* dv, int H, int N) {{
{ARGUMENTS}
  a.dout = view(dout), a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  const int rows = stats_rows(N, 64);
  const unsigned blocks = static_cast<unsigned>(H * rows * kStatsLanes / kStatsThreads);
  if (const char* error = ::vitkernels::launch(stats_kernel, blocks, kStatsThreads, size_t{{0}}, a,
                                               rows, static_cast<RowStats*>(stats)))
    return error;
  if (const char* error = run_pass<false>(a, stats)) return error;
  return run_pass<true>(a, stats);
}}
"""


def switched_source(name: str, direction: str, faults: dict, run: str) -> str:
    text = (CSRC / "attention" / name).read_text().partition("// ---- Host")[0]
    for number, (fault, (old, new)) in enumerate(faults.items()):
        assert text.count(old) == 1, f"{fault}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new.replace("planted", f"(vk_planted == {number})"))
    closing = "}  // namespace\n}  // namespace vitkernels::attention\n"
    return PROLOGUE.replace("DIRECTION", direction) + text + closing + run


@pytest.fixture(scope="module")
def kernels():
    CACHE.mkdir(parents=True, exist_ok=True)
    written = []
    for name, direction, faults, run in (
        ("attention_sm90_long.cu", "forward", FORWARD, RUN_FORWARD),
        ("attention_sm90_long_backward.cu", "backward", BACKWARD, RUN_BACKWARD),
    ):
        path, text = CACHE / f"{name}.faults.cpp", switched_source(name, direction, faults, run)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        written.append(path)
    flags = [f for f in CXX_FLAGS if f not in ("-Wall", "-Wextra", "-Werror")]
    command = [CXX, *flags, "-w", *(f"-I{f}" for f in (CSRC / "emulator", CSRC, ROOT / "tests"))]
    command += ["-isystem", f"{torch.__path__[0]}/include"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", *map(str, written)]
    command += map(str, sorted((CSRC / "emulator").glob("*.cpp")))
    folders = [CSRC / name for name in ("attention", "common", "emulator")]
    inputs = [*written, *files_under(*folders, ROOT / "tests/emulator")]
    return Kernels(
        cached_build("attention_sm90_long_faults.so", [*command, "-lpthread"], inputs)[0]
    )


# Three tiles of keys, the last with few; an item of one group; items for each block; in the forward
# a tail of one query, beside either item of two groups.
H, SIZES = 3, {"forward": 321, "backward": 305}
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def problems():
    """Of each direction: q, k, v, dout; out and lse."""
    generator, made = torch.Generator().manual_seed(3), {}
    for direction, N in SIZES.items():
        q, k, v, dout = (torch.randn(H, N, 64, generator=generator).to(BF16) for _ in range(4))
        scores = q.float() @ k.float().mT * 0.125
        out = (scores.softmax(-1) @ v.float()).to(BF16)
        made[direction] = q, k, v, dout, out, scores.logsumexp(-1)
    return made


def outcome(kernels, problems, direction: str, fault: str | None, seed: int = 1):
    """What the kernels make of it; None: the emulator objected."""
    q, k, v, dout, out, lse = problems[direction]
    faults = FORWARD if direction == "forward" else BACKWARD
    number = -1 if fault is None else list(faults).index(fault)
    kernels.set_seed(seed)
    getattr(kernels, f"plant_{direction}")(ctypes.c_int(number))
    made = [torch.full_like(q, torch.nan) for _ in range(3)]
    sizes = ctypes.c_int(H), ctypes.c_int(SIZES[direction])
    try:
        if direction == "forward":
            own_lse = torch.full_like(lse, torch.nan)
            kernels.run_forward(q, k, v, made[0], own_lse, *sizes)
            return torch.cat([made[0].flatten().float(), own_lse.flatten()])
        stats = torch.full((H, 2 * SIZES[direction], 2), torch.nan)
        kernels.run_backward(q, k, v, out, lse, dout, stats, *made, *sizes)
        return torch.stack(made)
    except RuntimeError:
        if fault is None:
            raise
        return None


@pytest.fixture(scope="module")
def right(kernels, problems):
    return {d: outcome(kernels, problems, d, None) for d in ("forward", "backward")}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_kernels_pass(kernels, problems, right, direction):
    *_, out, lse = problems[direction]
    assert torch.isfinite(right[direction]).all()
    if direction == "forward":
        assert (right[direction][: out.numel()] - out.flatten().float()).abs().max() < 0.02
        assert (right[direction][out.numel() :] - lse.flatten()).abs().max() < 1e-4
    assert torch.equal(outcome(kernels, problems, direction, None, seed=2), right[direction])


@pytest.mark.parametrize(
    ("direction", "fault"),
    [*(("forward", f) for f in FORWARD), *(("backward", f) for f in BACKWARD)],
)
def test_a_planted_bug_is_caught(kernels, problems, right, direction, fault):
    for seed in range(1, 5):
        result = outcome(kernels, problems, direction, fault, seed)
        if result is None or not torch.equal(result, right[direction]):
            return
    raise AssertionError("four runs went as if nothing were missing")
