"""What nvcc makes of the kernels that test the tensor-core primitives: no warning, no spill, and
the instructions that they are there for, counted."""

from __future__ import annotations

import re
from functools import cache

import pytest
from compiled_code import disassembler, sass
from native_build import CSRC, NVCC, ROOT, cached_build, files_under

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: nothing to compile"),
    pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here"),
]

FLAGS = ["-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-c"]
FLAGS += ["--expt-relaxed-constexpr", "-Xptxas=-v,-warn-spills", "-I", str(CSRC)]
FOLDER = ROOT / "tests" / "emulator"


@cache
def instructions(source: str, arch: str) -> dict[str, list[str]]:
    """{kernel: SASS} of a file of tests/emulator/, compiled without warning or spill."""
    code = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    command = [NVCC, *FLAGS, code, str(FOLDER / source)]
    inputs = files_under(CSRC / "common", FOLDER)
    path, said = cached_build(f"{source}.{arch}.o", command, inputs)
    assert "warning" not in said.lower() and "Performance Loss" not in said
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert stacks and set(stacks) == {("0", "0")}
    return sass(path, arch)


def count(kernel: list[str], pattern: str) -> int:
    return sum(re.search(rf"\b{pattern}\b", line) is not None for line in kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["<1,0,0>", "<1,1,0>", "<2,1,0>"])
def test_product_sm80(arch, kernel):
    code = instructions("sm80.cu", arch)[f"product_kernel{kernel}"]
    bf16 = r"HMMA\.16816\.F32\.BF16" if kernel.startswith("<1") else r"HMMA\.16816\.F32"
    assert count(code, bf16) == count(code, "HMMA") == 32  # 4 steps of k x 8 columns of tiles
    assert count(code, r"LDSM\.16\.M88\.4") == count(code, "LDSM") == 20  # 4 x (1 of A + 4 of B)
    assert count(code, r"LDGSTS\.E\.BYPASS\.128\S*") == count(code, "LDGSTS") == 8  # of 1024 chunks
    assert count(code, "LDGDEPBAR") == 2 and count(code, r"DEPBAR\.LE") == 2
    assert count(code, r"BAR\.SYNC") == 2


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(n):
    code = instructions("sm80.cu", "sm_80")
    suffix = "" if n == 1 else rf"\.{n}"
    assert count(code[f"load_matrices_kernel<{n},0>"], rf"LDSM\.16\.M88{suffix}") == 1
    assert count(code[f"load_matrices_kernel<{n},1>"], rf"LDSM\.16\.MT88{suffix}") == 1


def test_movmatrix():
    code = instructions("sm80.cu", "sm_80")["transpose_matrix_kernel"]
    assert count(code, r"MOVM\.16\.MT88") == 1


@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async(bytes_):
    code = instructions("sm80.cu", "sm_80")[f"copy_async_kernel<{bytes_},0>"]
    width = {4: r"LDGSTS\.E", 8: r"LDGSTS\.E\.64", 16: r"LDGSTS\.E\.BYPASS\.128"}[bytes_]
    assert count(code, width) == count(code, "LDGSTS") == 1


def test_barriers_of_a_part_of_the_block():
    code = instructions("sm80.cu", "sm_80")["pairs_kernel<0>"]
    assert count(code, r"BAR\.SYNC") and count(code, r"BAR\.ARV")


# product_kernel<TYPE, N, SWIZZLE, A_MAJOR, B_MAJOR, SOURCE, BUG> with the TMA loads of a part each:
# 64 k (or rows) in rows as wide as the swizzle; those of a loop that stays one count once.
PRODUCTS_SM90 = {
    "<1,64,128,0,0,0,0>": ("64x64x16.F32.BF16", 2),
    "<1,64,0,1,1,0,0>": ("64x64x16.F32.BF16", 16),
    "<2,8,32,0,0,0,0>": ("64x8x16.F32", 8),
    "<2,136,64,0,1,2,0>": ("64x136x16.F32", 5),
    "<1,256,128,0,0,2,0>": ("64x256x16.F32.BF16", 1),
    "<1,64,128,0,0,1,0>": ("64x64x16.F32.BF16", 1),
}


@pytest.mark.parametrize("kernel", PRODUCTS_SM90)
def test_product_sm90(kernel):
    code = instructions("sm90.cu", "sm_90a")[f"product_kernel{kernel}"]
    shape, loads = PRODUCTS_SM90[kernel]
    assert count(code, re.escape(f"HGMMA.{shape}")) == count(code, "HGMMA") == 4  # 64 k
    assert count(code, r"UTMALDG\.2D") == loads
    assert count(code, r"WARPGROUP\.ARRIVE") == 1 and count(code, r"WARPGROUP\.DEPBAR") == 1
    assert count(code, r"FENCE\.VIEW\.ASYNC\S*") == 1 + kernel.endswith(",1,0>")
    assert count(code, r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT") >= 1
    assert not count(code, "HMMA") and not count(code, "LDL") and not count(code, "STL")


def test_pipeline_sm90():
    code = instructions("sm90.cu", "sm_90a")["pipeline_kernel<0>"]
    assert count(code, "HGMMA") == 4 and count(code, r"UTMALDG\.2D") == 2  # a part of A, of B
    assert count(code, r"USETMAXREG\.DEALLOC\S*") == 1 and count(code, r"USETMAXREG\.TRY\S*") == 1


def test_clusters():
    code = instructions("cluster.cu", "sm_90a")["share_kernel<0>"]
    assert count(code, r"UTMALDG\.2D\.MULTICAST") == count(code, "UTMALDG") == 1
    assert count(code, "UCGABAR_ARV") == count(code, "UCGABAR_WAIT") == 2  # begin and end
    assert count(code, r"SYNCS\.ARRIVE\.TRANS64\.RED\.\S*") == 1
    assert count(code, r"MEMBAR\.\S*GPU") == 2  # of cluster_sync, none of an arrival


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_tma_of_every_rank(rank):
    code = instructions("sm90.cu", "sm_90a")[f"copy_tensor_kernel<{rank}>"]
    assert count(code, rf"UTMALDG\.{rank}D") == count(code, rf"UTMASTG\.{rank}D") == 1


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_of_every_width(n):
    code = instructions("sm90.cu", "sm_90a")[f"every_n_kernel<{n}>"]
    assert count(code, rf"HGMMA\.64x{n}x16\.F32\.BF16") == count(code, "HGMMA") == 1
    assert len([line for line in code if "STG" in line]) == n // 2
