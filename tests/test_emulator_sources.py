"""The emulator and the kernels' sources: one source for every machine, no CUDA header in it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from native_build import CSRC, CXX, ROOT

OPERATOR_SOURCES = [
    f
    for f in sorted(CSRC.glob("*/*.cu*"))
    if f.parent.name not in ("common", "emulator")
]  # fmt: skip
TEST_SOURCES = sorted((ROOT / "tests/emulator").glob("*.cuh"))
CU_FILES = [f for f in OPERATOR_SOURCES if f.suffix == ".cu"]


def test_there_are_kernels():
    assert CSRC / "add_layer_norm" / "add_layer_norm_cuda.cu" in CU_FILES


@pytest.mark.parametrize("source", OPERATOR_SOURCES + TEST_SOURCES, ids=lambda f: f.name)
def test_kernels_do_not_know_that_they_are_emulated(source):
    lines = source.read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("//"))
    for line in text.splitlines():
        assert not re.match(r"\s*#\s*(if|ifdef|ifndef|elif)\b", line), f"{source.name}: {line}"
    for word in ("emulator", "__cudacc__", "__cuda_arch__", "cuda_runtime"):
        assert word not in text.lower(), word


@pytest.mark.parametrize("source", OPERATOR_SOURCES, ids=lambda f: f.name)
def test_launch_bounds_are_repeated_in_the_kernel(source):
    text = re.sub(r"\s+", "", source.read_text())
    kernels = re.findall(
        r"__launch_bounds__\((.*?)\)+\w+_kernel\(.*?\)\{(check_launch\w*<.*?>\(\))?", text
    )
    assert len(kernels) == text.count("__global__")
    for bounds, check in kernels:
        threads = check.removeprefix("check_launch_bounds<").removesuffix(">()")
        assert threads and bounds.startswith(threads), f"{source.name}: {bounds} but {check}"


@pytest.mark.parametrize("source", CU_FILES, ids=lambda f: f.name)
def test_emulator_build_includes_no_cuda_header(source):
    include = ["-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    torch_include = f"{torch.__path__[0]}/include"
    command = [CXX, "-std=c++17", "-M", "-x", "c++", *include, "-isystem", torch_include]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", str(source)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ours = [f for f in listed if f.startswith(str(CSRC))]
    assert f"{CSRC}/emulator/common/platform.cuh" in ours
    assert f"{CSRC}/common/platform.cuh" not in ours and f"{CSRC}/common/launch.cuh" not in ours
    cuda = [
        f
        for f in set(listed) - set(ours)
        if re.search(r"/(cuda\w*|cu\w*_runtime\w*|device_launch\w*)\.h(pp)?$", f)
    ]
    assert not cuda


TWINS = sorted(f.name for f in (CSRC / "emulator/common").glob("*.cuh"))


def test_every_twin_is_of_something():
    assert {"platform.cuh", "launch.cuh", "mma.cuh", "async_copy.cuh", "tma.cuh"} <= set(TWINS)
    assert all((CSRC / "common" / name).exists() for name in TWINS)
    for header in (CSRC / "common").glob("*.cuh"):  # PTX has a twin
        if header.name != "wgmma_instructions.cuh":  # the device's half of wgmma.cuh
            assert header.name in TWINS or "asm" not in header.read_text(), header.name


@pytest.mark.parametrize("name", [n for n in TWINS if n != "launch.cuh"])
def test_every_primitive_has_a_twin(name):
    primitive = re.compile(r"^(?:inline )?\w+ (\w+)\(", re.M)
    device = (CSRC / "common" / name).read_text()
    twin = (CSRC / "emulator/common" / name).read_text()
    names = set(re.findall(r"^VK_DEVICE \w+ (\w+)\(", device, re.M))
    assert names and names - {"check_launch_bounds"} <= set(primitive.findall(twin))
    structs = re.compile(r"^(?:struct|class) (?:alignas\(\d+\) )?(\w+)", re.M)
    assert set(structs.findall(device)) <= set(structs.findall(twin))
    assert set(re.findall(r"#define (VK_\w+)", device)) <= set(
        re.findall(r"#define (VK_\w+)", twin)
    )


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-as") is None, reason="no AArch64 assembler")
def test_the_aarch64_switch_assembles(tmp_path):
    blocks = re.findall(r'asm\(R"\((.*?)\)"\);', (CSRC / "emulator/fiber.h").read_text(), re.S)
    (tmp_path / "switch.s").write_text(next(b for b in blocks if "stp x19" in b))
    command = ["aarch64-linux-gnu-as", str(tmp_path / "switch.s"), "-o", str(tmp_path / "switch.o")]
    subprocess.run(command, check=True)
