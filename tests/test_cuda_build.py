"""What nvcc made of the CUDA kernels: no warning, no spill, the registers of the committed tables,
128-bit accesses in the SASS; and the launch plans, which need no nvcc.

`make build` leaves what ptxas says beside each object. After a wanted change of registers,
`python tests/test_cuda_build.py` writes csrc/<op>/resources.json anew.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from compiled_code import disassembler, sass, short_name
from native_build import CSRC, NVCC, ROOT

from vitkernels import _native

OBJECTS = ROOT / "build/native/inplace/obj"
LIBRARY = _native.LIB_DIR / "libvitkernels_cuda.so"
CU_FILES = sorted(CSRC.glob("*/*.cu"))


def architectures(source: Path) -> tuple[str, ...]:
    """What a file's kernels are compiled for; a launcher has none of its own."""
    if "__global__" not in "".join(f.read_text() for f in with_includes(source)):
        return ()
    if "_sm90" in source.stem:
        return ("sm_90a",)
    return ("sm_80", "sm_90") if "_sm80" in source.stem else ("sm_80", "sm_90", "sm_90a")


def with_includes(source: Path) -> list[Path]:
    """The file and the operator's own headers that it includes."""
    own = re.findall(rf'#include "({source.parent.name}/[^"]+)"', source.read_text())
    return [source, *(CSRC / name for name in own)]


each_cu = pytest.mark.parametrize("source", CU_FILES, ids=lambda f: f.name)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: no CUDA build to check")
needs_plans = pytest.mark.skipif(
    not hasattr(_native.build_facts(), "add_layer_norm_plan"),
    reason="vitkernels._C is not built (it needs Python.h and pybind11)",
)


@cache
def compiled(source: Path) -> dict:
    """{(kernel, architecture): {"registers", "shared", "stack", "spills"}} of one .cu file."""
    log = OBJECTS / f"{'_'.join(source.relative_to(CSRC).parts)}.cuda.o.log"
    assert log.exists(), f"{log} is missing: make build"
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.S,
    )
    found = {}
    for m in pattern.finditer(log.read_text()):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        found[short_name(m["name"]), m["arch"]] = {
            "registers": int(m["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(m["stack"]),
            "spills": int(m["stores"]) + int(m["loads"]),
        }
    return found


@cache
def nvcc_version() -> str:
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def table_of(source: Path) -> dict:
    """What resources.json holds: registers and static shared memory of each kernel."""
    table: dict = {}
    for (name, arch), used in sorted(compiled(source).items()):
        table.setdefault(name, {})[arch] = [used["registers"], used["shared"]]
    return table


# ---- The compiled code


def test_there_is_cuda_code():
    assert CU_FILES


@needs_nvcc
@each_cu
def test_compiled_for_every_architecture_without_a_warning(source):
    assert {arch for _, arch in compiled(source)} == set(architectures(source))
    for arch in architectures(source):  # the same kernels for each
        names = {name for name, a in compiled(source) if a == arch}
        assert names == {name for name, _ in compiled(source)}
    log = OBJECTS / f"{'_'.join(source.relative_to(CSRC).parts)}.cuda.o.log"
    assert not [line for line in log.read_text().splitlines() if "warning" in line.lower()]


@needs_nvcc
@each_cu
def test_both_builds_compile_it(source):
    stem = "_".join(source.relative_to(CSRC).parts)
    for build in ("cuda", "emu"):
        assert (OBJECTS / f"{stem}.{build}.o").exists(), "make build"


@needs_nvcc
@each_cu
def test_nothing_spills(source):
    spilling = {k: u for k, u in compiled(source).items() if u["spills"] or u["stack"]}
    assert not spilling


@needs_nvcc
@each_cu
def test_registers_are_those_of_the_table(source):
    tables = json.loads((source.parent / "resources.json").read_text())
    if tables["nvcc"] != nvcc_version():
        pytest.skip(f"the table is of nvcc {tables['nvcc']}, this is {nvcc_version()}")
    assert table_of(source) == tables[source.name]


@needs_nvcc
def test_library_needs_no_cuda_library():
    said = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", said.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "torch_cuda" in name]


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sass_of_add_layer_norm(arch):
    """Template arguments: forward Form, Types, VEC, BLOCK, CHUNKS; backward without Form."""
    compiled_file = OBJECTS / "add_layer_norm_add_layer_norm_cuda.cu.cuda.o"
    kernels = {k: v for k, v in sass(compiled_file, arch).items() if "finish" not in k}
    assert len(kernels) > 40
    for name, code in kernels.items():
        arguments = [int(n) for n in re.findall(r"\d+", name)]
        vectorized, _, chunks = arguments[2:5] if "forward" in name else arguments[1:4]
        loads = [i for i in code if re.search(r"\bLDG\S*\.128", i)]
        stores = [i for i in code if re.search(r"\bSTG\S*\.128", i)]
        if vectorized:  # x and residual, or z and dy; y and z, or dresidual and dx
            assert len(loads) >= 2 * max(chunks, 1), name
            assert len(stores) >= 2 * max(chunks, 1), name
        else:
            assert not loads and not stores, name
        wanted = [i for i in code if re.search(r"\b(ATOM|ATOMG|RED|LDL|STL)\b", i)]
        assert not wanted, f"{name}: atomics or local memory"


# ---- Launch plans


def plan(rows, C, aligned=True, common_types=True, multiprocessors=132, pass_="forward"):
    facts = _native.build_facts()
    return facts.add_layer_norm_plan(rows, C, aligned, common_types, multiprocessors, pass_)


PASSES = ("forward", "backward", "backward_gamma")


@needs_plans
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("C", [*range(1, 130), *range(1000, 1050), 1280, 2048, 2056, 4096, 4104,
                               6144, 8192, 8200, 9001, 65536, 2**24])  # fmt: skip
def test_every_element_of_a_row_has_one_place(C, pass_):
    for aligned in (True, False):
        for common in (True, False):
            p = plan(1000, C, aligned, common, pass_=pass_)
            assert p["vectorized"] == (aligned and C % 8 == 0)
            assert p["threads"] % 32 == 0 and 32 <= p["threads"] <= 384
            threads = p["threads"] if p["block_per_row"] else p["lanes"]
            if p["chunks"] > 0:
                assert threads * 8 * p["chunks"] >= C
            if not p["block_per_row"]:
                assert p["lanes"] in (1, 2, 4, 8, 16, 32) and 1 <= p["chunks"] <= 4
            instances = {1, 2, 3, 4} if not p["block_per_row"] else {1, 2}
            if not p["fixed_types"]:
                most = 4 if p["vectorized"] else 2
                instances = {most, 0} if p["block_per_row"] else {most}
            assert p["chunks"] in instances
            assert p["shared_bytes"] <= 12 * 1024
            if p["fixed_types"] and not p["block_per_row"] and p["chunks"] > 1:
                assert p["lanes"] == 32  # kLanes


@needs_plans
@pytest.mark.parametrize("pass_", PASSES)
def test_grids(pass_):
    assert plan(0, 768, pass_=pass_)["blocks"] == 0
    assert plan(1, 768, pass_=pass_)["blocks"] == 1
    large = plan(2**40, 768, pass_=pass_)
    assert large["blocks"] == 132 * (64 if pass_ == "forward" else 1)
    for C in (8, 96, 768, 1536, 9000):  # no block without a row: its partial sums are read
        for rows in (1, 7, 200, 50432):
            p = plan(rows, C, pass_=pass_)
            per_block = 1 if p["block_per_row"] else p["threads"] // p["lanes"]
            assert (p["blocks"] - 1) * per_block < rows


@needs_plans
def test_plans_of_the_shapes_that_count():
    """(lanes, chunks, threads, blocks) on 132 multiprocessors, for the README's shapes."""

    def brief(rows, C, pass_):
        p = plan(rows, C, pass_=pass_)
        return p["lanes"], p["chunks"], p["threads"], p["blocks"]

    vit_base, swin = 256 * 197, 128 * 3136
    assert brief(vit_base, 768, "forward") == (32, 3, 256, 6304)
    assert brief(vit_base, 768, "backward") == (32, 3, 384, 132)
    assert brief(vit_base, 768, "backward_gamma") == (32, 3, 256, 132)
    assert brief(swin, 96, "forward") == (16, 1, 256, 8448)
    assert brief(swin, 96, "backward") == (16, 1, 256, 396)
    assert brief(vit_base, 1280, "forward") == (0, 1, 160, 8448)


@needs_plans
@needs_nvcc
def test_persistent_blocks_fit_their_multiprocessor():
    """Registers are handed out 256 at a time to each warp; a multiprocessor has 65536."""
    source = CSRC / "add_layer_norm/add_layer_norm_cuda.cu"
    for (name, arch), used in compiled(source).items():
        if not name.startswith("backward_kernel"):
            continue
        types, vectorized, block, chunks, gamma = (int(n) for n in re.findall(r"\d+", name))
        if block or not types:
            continue
        C = 256 * chunks
        p = plan(2**30, C, bool(vectorized), True, 1, PASSES[1 + gamma])
        assert p["chunks"] == chunks and p["fixed_types"]
        per_warp = (used["registers"] * 32 + 255) // 256 * 256
        assert p["blocks"] * p["threads"] // 32 * per_warp <= 65536, (name, arch)


if __name__ == "__main__":
    for folder in sorted({source.parent for source in CU_FILES}):
        tables = {source.name: table_of(source) for source in CU_FILES if source.parent == folder}
        text = json.dumps({"nvcc": nvcc_version(), **tables}, indent=1)
        text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)
        text = re.sub(
            r"\{\s+(\"sm_[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text
        )
        (folder / "resources.json").write_text(text + "\n")
