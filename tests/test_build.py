"""What the build promises: stable ABI only, no code of one CPU level in another, quick import."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitkernels import _native

ROOT = Path(__file__).parent.parent
CPU_LIBRARY = _native.LIB_DIR / "libvitkernels_cpu.so"
LIBRARIES = sorted(_native.LIB_DIR.glob("libvitkernels_*.so"))

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs binutils"
)


def lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_the_cpu_library_is_built_here():
    assert CPU_LIBRARY.exists(), "make test builds it; g++ is required to run the tests"
    assert _native.missing["cpu"] is None


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.stem)
def test_only_stable_symbols_of_torch_are_used(library):
    undefined = [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", str(library))]
    torch_symbols = [s for s in undefined if "torch" in s]
    assert torch_symbols, "the library calls torch through its C shim"
    # Mangled names of at::, c10:: and torch:: are PyTorch's unstable C++ interface.
    unstable = [
        s
        for s in undefined
        if s.startswith(("_ZN2at", "_ZN3c10", "_ZNK2at", "_ZNK3c10", "_ZN5torch"))
    ]
    assert unstable == []


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.stem)
def test_torch_is_named_as_needed(library):
    needed = [line for line in lines("readelf", "-d", str(library)) if "NEEDED" in line]
    assert any("libtorch_cpu.so" in line for line in needed), needed


@needs_binutils
def test_instruction_set_objects_share_no_code():
    """A weak function compiled for AVX-512 could be the copy the linker keeps for every level."""
    objects = sorted((ROOT / "build/native/inplace/obj").glob("*_cpu_kernels.cpp.*.o"))
    assert objects, "make build leaves the objects here"
    for path in objects:
        weak = [line for line in lines("nm", str(path)) if " W " in line or " u " in line]
        assert weak == [], f"{path.name} exports {weak}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels exist on x86-64 only")
@pytest.mark.parametrize("level", _native.CPU_ISA_LEVELS)
def test_the_environment_lowers_the_level(level):
    env = dict(os.environ, VITKERNELS_CPU_ISA=level)
    code = "from vitkernels import _native; print(_native.build_facts().cpu_isa())"
    got = lines_env(env, sys.executable, "-c", code)[-1]
    order = _native.CPU_ISA_LEVELS
    highest = (
        _native.build_facts().cpu_isa() if "VITKERNELS_CPU_ISA" not in os.environ else order[-1]
    )
    assert got == order[min(order.index(level), order.index(highest))]


def lines_env(env: dict, *command: str) -> list[str]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=ROOT)
    return done.stdout.splitlines()


def test_without_native_code_the_package_still_works(tmp_path):
    """A copy without lib/ is what an install without a compiler leaves."""
    shutil.copytree(
        ROOT / "vitkernels", tmp_path / "vitkernels", ignore=shutil.ignore_patterns("*.so")
    )
    code = (
        "import torch, vitkernels\n"
        "from vitkernels import ops\n"
        "assert vitkernels.available_backends() == ['torch', 'reference']\n"
        "y, _ = ops.add_layer_norm(torch.randn(2, 3, 8), None, torch.ones(8), torch.zeros(8))\n"
        "default = torch.ops.vitkernels.attention_qkvpacked_fwd\n"
        "default(torch.randn(1, 4, 24), 2, None, None, None, 1.0, 0.0)\n"
        "try:\n"
        "    ops.attention_qkvpacked(torch.randn(1, 4, 24), 2, backend='cpu')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    env = {
        k: v for k, v in os.environ.items() if k not in ("VITKERNELS_EMULATE", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "libvitkernels_cpu.so is not built" in done.stdout
    assert "torch: can serve it" in done.stdout


def test_import_is_quick_and_quiet():
    """Under 50 ms beyond torch, no CUDA initialisation; Triton and the models come later."""
    code = (
        "import time, sys, torch\n"
        "start = time.process_time()\n"
        "import vitkernels\n"
        "print(time.process_time() - start)\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    env = {
        k: v for k, v in os.environ.items() if k not in ("VITKERNELS_EMULATE", "TRITON_INTERPRET")
    }
    seconds = min(float(lines_env(env, sys.executable, "-c", code)[-1]) for _ in range(3))
    assert seconds < 0.05
