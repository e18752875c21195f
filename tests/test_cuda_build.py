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
def test_products_of_warpgroups_run_beside_other_work(source):
    """Where registers are too few, ptxas waits for each wgmma and says so, without a warning."""
    log = OBJECTS / f"{'_'.join(source.relative_to(CSRC).parts)}.cuda.o.log"
    assert "Performance Loss" not in log.read_text()


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


# 16-byte pieces of eight elements of branch, stream and y, by Widths; kAny, 0, has none of its own.
PIECES = {1: (2, 2, 2), 2: (1, 1, 1), 3: (1, 2, 1), 4: (1, 2, 2), 5: (1, 1, 2)}


def pieces_of_a_row(pieces, chunks, forward, gamma):
    """16-byte pieces of a thread's row: x and residual, or z, dz, dy (and x)."""
    branch, stream, y = pieces
    return chunks * (branch + stream if forward else 2 * stream + y + gamma * branch)


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sass_of_add_layer_norm(arch):
    """Template arguments: forward Form, Widths, VEC, BLOCK, CHUNKS; backward without Form.

    With widths fixed, each piece of a row is read once, by cp.async: in the loop and in what begins
    the first rows; and in the loop the next row's copies come before this row's reduction. Philox
    is there once, four calls side by side: 33 and 36 products with its two factors, since the
    second round's first is of constants.
    """
    compiled_file = OBJECTS / "add_layer_norm_add_layer_norm_cuda.cu.cuda.o"
    kernels = {k: v for k, v in sass(compiled_file, arch).items() if "finish" not in k}
    assert len(kernels) > 40
    for name, code in kernels.items():
        forward = "forward" in name
        form, widths, vectorized, _, chunks, gamma = (
            (*(int(n) for n in re.findall(r"\d+", name)), 0)
            if forward
            else (0, *(int(n) for n in re.findall(r"\d+", name)))
        )
        of = {
            kind: [i for i, line in enumerate(code) if re.search(rf"\b{kind}\b\S*\.128", line)]
            for kind in ("LDG", "LDGSTS", "STG")
        }
        if widths:
            branch, stream, y = PIECES[widths]
            pieces = pieces_of_a_row(PIECES[widths], chunks, forward, gamma)
            assert len(of["LDGSTS"]) == 2 * pieces and not of["LDG"], name
            shuffles = [i for i, line in enumerate(code) if re.search(r"\bSHFL\b", line)]
            assert max(of["LDGSTS"]) < min(shuffles), name
            written = y + (0 if form else stream) if forward else stream + branch
            assert len(of["STG"]) == chunks * written, name
            products = [sum(f in line for line in code) for f in ("-0x2daee0ad", "-0x326172a9")]
            assert products == ([0, 0] if form else [33, 36]), name
        elif vectorized:
            assert len(of["LDG"]) >= 2 * max(chunks, 1) and not of["LDGSTS"], name
            assert len(of["STG"]) >= 2 * max(chunks, 1), name
        else:
            assert not of["LDG"] and not of["LDGSTS"] and not of["STG"], name
        unwanted = [i for i in code if re.search(r"\b(ATOM|ATOMG|RED|LDL|STL)\b", i)]
        assert not unwanted, f"{name}: atomics or local memory"


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump and nvdisasm are not here")
def test_sass_of_dependent_launches():
    """griddepcontrol where the code is sm_90's own, and only there: the launcher asks for it."""
    compiled_file = OBJECTS / "add_layer_norm_add_layer_norm_cuda.cu.cuda.o"
    for arch, there in (("sm_80", False), ("sm_90a", True)):
        for name, code in sass(compiled_file, arch).items():
            waits = [i for i in code if re.search(r"\bACQBULK\b", i)]
            lets = [i for i in code if re.search(r"\bPREEXIT\b", i)]
            assert len(waits) == (there and name == "finish_kernel"), (name, arch)
            assert bool(lets) == (there and name.startswith("backward")), (name, arch)


# ---- Launch plans


def plan(
    rows, C, aligned=True, common_widths=True, multiprocessors=132, pass_="forward",
    architecture=90, branch=2, stream=2, y=2,
):  # fmt: skip
    """branch, stream, y: bytes of an element."""
    return _native.build_facts().add_layer_norm_plan(
        rows, C, aligned, common_widths, multiprocessors, pass_, architecture, branch, stream, y
    )


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
            if not p["fixed_widths"]:
                most = 4 if p["vectorized"] else 2
                instances = {most, 0} if p["block_per_row"] else {most}
            assert p["chunks"] in instances
            if not p["fixed_widths"]:
                assert p["shared_bytes"] <= 12 * 1024 and p["slots"] == 0
            if p["fixed_widths"] and not p["block_per_row"] and p["chunks"] > 1:
                assert p["lanes"] == 32  # kLanes


@needs_plans
@pytest.mark.parametrize("pass_", PASSES)
def test_grids(pass_):
    assert plan(0, 768, pass_=pass_)["blocks"] == 0
    assert plan(1, 768, pass_=pass_)["blocks"] == 1
    many = plan(2**31 - 1, 768, pass_=pass_)
    assert many["blocks"] == 132 * (3 if pass_ == "forward" else 1)
    assert many["fixed_widths"] and not plan(2**31, 768, pass_=pass_)["fixed_widths"]  # RowIndex
    assert plan(2**40, 768, common_widths=False)["blocks"] == 132 * 64
    for C in (8, 96, 768, 1536, 9000):  # no block without a row: its partial sums are read
        for rows in (1, 7, 200, 50432):
            p = plan(rows, C, pass_=pass_)
            per_block = 1 if p["block_per_row"] else p["threads"] // p["lanes"]
            assert (p["blocks"] - 1) * per_block < rows


@needs_plans
def test_plans_of_the_shapes_that_count():
    """(lanes, chunks, threads, slots, blocks) on 132 multiprocessors, for the README's shapes."""

    def brief(rows, C, pass_, **settings):
        p = plan(rows, C, pass_=pass_, **settings)
        return p["lanes"], p["chunks"], p["threads"], p["slots"], p["blocks"]

    vit_base, swin = 256 * 197, 128 * 3136
    assert brief(vit_base, 768, "forward") == (32, 3, 256, 2, 396)
    assert brief(vit_base, 768, "forward", stream=4) == (32, 3, 256, 2, 264)
    assert brief(vit_base, 768, "forward", architecture=80) == (32, 3, 256, 2, 264)
    assert brief(vit_base, 768, "backward") == (32, 3, 384, 3, 132)
    assert brief(vit_base, 768, "backward_gamma") == (32, 3, 256, 3, 132)
    assert brief(vit_base, 768, "backward_gamma", stream=4) == (32, 3, 256, 2, 132)
    assert brief(vit_base, 768, "backward", stream=4, y=4) == (32, 3, 352, 2, 132)
    assert brief(vit_base, 1024, "backward_gamma", branch=4, stream=4, y=4) == (32, 4, 192, 2, 132)
    assert brief(swin, 96, "forward") == (16, 1, 256, 3, 528)
    assert brief(swin, 96, "backward") == (16, 1, 256, 3, 396)
    assert brief(vit_base, 1280, "forward") == (0, 1, 160, 3, 528)


SHARED = {80: (164, 163), 86: (100, 99), 90: (228, 227)}  # KB of a multiprocessor, of one block


@needs_plans
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("pass_", PASSES)
def test_rings_fit_their_multiprocessor(pass_, architecture):
    """With a KB for the driver and 512 static bytes each, and room for the sums of all warps."""
    for pieces in PIECES.values():
        for C in (8, 96, 192, 384, 768, 1024, 1032, 1280, 1536, 2048, 2056, 4096):
            bytes_ = [2 * n for n in pieces]
            p = plan(2**30, C, True, True, 1, pass_, architecture, *bytes_)
            if not p["fixed_widths"]:  # not even one row fits
                assert architecture == 86 and C * max(bytes_) >= 8192
                continue
            assert 1 <= p["slots"] <= 3
            used = p["shared_bytes"] + 512
            assert used <= SHARED[architecture][1] << 10
            assert p["blocks"] * (used + 1024) <= SHARED[architecture][0] << 10
            lanes = p["threads"] if p["block_per_row"] else p["lanes"]
            of_row = pieces_of_a_row(pieces, p["chunks"], pass_ == "forward", pass_[8:] == "_gamma")
            words = 1 if pass_ == "forward" else 3
            parameters = (3 if pass_ == "forward" else 2) * 4 * 8 * lanes * p["chunks"]
            row = (16 * of_row + 4 * words) * p["threads"]
            assert p["shared_bytes"] == parameters + p["slots"] * row
            if pass_ != "forward" and not p["block_per_row"]:
                assert p["slots"] * row >= 12 * C
            if architecture != 86 and not p["block_per_row"]:
                assert p["slots"] >= 2  # the next row is under way


@needs_plans
@needs_nvcc
def test_persistent_blocks_fit_their_multiprocessor():
    """Registers are handed out 256 at a time to each warp; a multiprocessor has 65536."""
    source = CSRC / "add_layer_norm/add_layer_norm_cuda.cu"
    for (name, arch), used in compiled(source).items():
        if name == "finish_kernel":
            continue
        arguments = [int(n) for n in re.findall(r"\d+", name)]
        forward = name.startswith("forward")
        widths, _, block, chunks = arguments[1:5] if forward else arguments[:4]
        if block or not widths:
            continue
        pass_ = PASSES[0 if forward else 1 + arguments[4]]
        bytes_ = [2 * n for n in PIECES[widths]]
        p = plan(2**30, 256 * chunks, True, True, 1, pass_, int(arch[3:5]), *bytes_)
        assert p["chunks"] == chunks and p["fixed_widths"]
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
