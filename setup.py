"""Builds the native libraries by ninja: what is compiled here is decided by the tools found, never
by a visible GPU.

libvitkernels_cpu.so   C++ kernels, each *_cpu_kernels.cpp once per instruction set      needs g++
libvitkernels_cuda.so  CUDA C++ kernels on torch's stable ABI                           needs nvcc
libvitkernels_emu.so   the same .cu files for the CPU (VITKERNELS_EMULATOR=1; tests)    needs g++
_C                     build facts, CPU features, launch plans                          needs
Python.h and pybind11

A missing tool leaves that library out; `vitkernels info` says so. Environment: VITKERNELS_NATIVE=0
builds nothing, VITKERNELS_CUDA={auto,0,1}, VITKERNELS_CUDA_ARCHS="80;90a",
VITKERNELS_EMULATOR={0,1,tsan,asan}, CXX, NVCC, MAX_JOBS.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Warnings are errors in this project's own builds (see the Makefile), never in a user's install.
WERROR = os.environ.get("VITKERNELS_WERROR") == "1"
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized" + (" -Werror" if WERROR else "")
CXX_FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast {WARNINGS}"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISA_LEVELS = {"portable": ""}
if platform.machine() == "x86_64":
    ISA_LEVELS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512bf16"}
# torch 2.11: one binary for it and everything newer.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
# sm_80 code as SASS for 80 and, so that it can be tested on Hopper, for 90; PTX for what comes
# later.
CUDA_ARCHS = {
    "80": "-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]",
    "90a": "-gencode=arch=compute_90a,code=sm_90a",
}
NVCC_FLAGS = (
    "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    + (" --Werror=all-warnings" if WERROR else "")
    + " -lineinfo --expt-relaxed-constexpr -Xptxas=-v,-warn-spills -Xfatbin=-compress-all"
    + " -DUSE_CUDA"
)


def gencode_of(source: Path) -> str:
    """<op>_sm90.cu is for Hopper alone, <op>_sm80.cu is not for it; other files are for all."""
    wanted = os.environ.get("VITKERNELS_CUDA_ARCHS", ";".join(CUDA_ARCHS)).split(";")
    if "_sm90" in source.stem:
        wanted = ["90a"]
    elif "_sm80" in source.stem:
        wanted = ["80"]
    return " ".join(CUDA_ARCHS[arch] for arch in wanted)


# VITKERNELS_EMULATOR, one or more with commas -> name, flags of the kernels, flags of the emulator,
# which is not instrumented itself (csrc/emulator/sanitizer.h). Tests preload the sanitizer.
_TRACED = "-O1 -g -fno-omit-frame-pointer"
EMULATORS = {
    "1": ("emu", "", ""),
    "tsan": (
        "emu_tsan",
        f"-fsanitize=thread {_TRACED} -DVK_EMULATOR_TSAN",
        "-g -DVK_EMULATOR_TSAN",
    ),
    "asan": (
        "emu_asan",
        f"-fsanitize=address {_TRACED} -DVK_EMULATOR_ASAN",
        "-g -DVK_EMULATOR_ASAN",
    ),
}


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> str | None:
    wanted = os.environ.get("VITKERNELS_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = (
        os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    )
    if found is None and wanted == "1":
        sys.exit("vitkernels: VITKERNELS_CUDA=1 but no nvcc was found: put it on PATH or set NVCC")
    return found


class Ninja:
    """A ninja file under construction: rules once, then one edge per object and library."""

    def __init__(self, out: Path):
        self.out, self.lines, self.targets = out, [], []

    def rule(self, name: str, command: str) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if not name.endswith("link"):
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, rule: str, target: Path, sources: list[Path], flags: str) -> Path:
        quoted = " ".join(str(s).replace(" ", "$ ") for s in sources)
        self.lines += [
            f"build {str(target).replace(' ', '$ ')}: {rule} {quoted}",
            f"  flags = {flags}",
        ]
        return target

    def compile(self, rule: str, source: Path, flags: str, tag: str = "") -> Path:
        name = "_".join(source.relative_to(CSRC).parts) + (f".{tag}" if tag else "") + ".o"
        return self.edge(rule, self.out / "obj" / name, [source], flags)

    def link(self, target: Path, objects: list[Path], flags: str, rule: str = "link") -> None:
        self.targets.append(self.edge(rule, target, objects, flags))

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = shutil.which("ninja") or sys.exit(
                "vitkernels: ninja is missing: pip install ninja"
            )
        if subprocess.run([program, "-C", str(self.out), "-j", jobs]).returncode != 0:
            sys.exit(
                "vitkernels: the compiler failed (its message is above); VITKERNELS_NATIVE=0 "
                "installs without native code, VITKERNELS_CUDA=0 without CUDA"
            )


def quote(path: Path | str) -> str:
    return shlex.quote(str(path))


def plan_build(target_dir: Path, build_dir: Path) -> Ninja | None:
    """The ninja file for all that this machine can build into target_dir, or None for nothing."""
    torch, cxx = find_torch(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if os.environ.get("VITKERNELS_NATIVE") == "0" or torch is None or cxx is None:
        why = (
            "torch is not visible to the build"
            if torch is None
            else "no C++ compiler"
            if cxx is None
            else "asked"
        )
        print(
            f"vitkernels: no native code is built ({why}); "
            "the torch, reference and Triton backends remain"
        )
        return None
    torch_flags = f"-isystem {quote(torch / 'include')} {STABLE_ABI}"
    include = f"-I {quote(CSRC)}"
    link = f"-shared -L {quote(torch / 'lib')} -Wl,--no-as-needed -ltorch_cpu"
    n = Ninja(build_dir)
    n.rule("cxx", f"{cxx} {CXX_FLAGS} {include} $flags -MMD -MF $out.d -c $in -o $out")
    n.rule("link", f"{cxx} $in $flags -o $out")

    common = [n.compile("cxx", CSRC / "common/cpu_isa.cpp", "")]
    launchers = [
        n.compile("cxx", source, torch_flags) for source in sorted(CSRC.glob("*/*_cpu.cpp"))
    ]
    kernels = [
        n.compile("cxx", source, f"{flags} -DVK_ISA={level}", level)
        for source in sorted(CSRC.glob("*/*_cpu_kernels.cpp"))
        for level, flags in ISA_LEVELS.items()
    ]
    n.link(target_dir / "lib/libvitkernels_cpu.so", common + launchers + kernels, link)

    cu_files = sorted(CSRC.glob("*/*.cu"))
    cuda_common = [n.compile("cxx", CSRC / "common/cuda_path.cpp", torch_flags)]
    n.rule("emu", f"{cxx} {CXX_FLAGS} $flags {include} -MMD -MF $out.d -c $in -o $out")
    for kind in os.environ.get("VITKERNELS_EMULATOR", "0").split(","):
        if kind in ("", "0"):
            continue
        if kind not in EMULATORS:
            sys.exit(f"vitkernels: VITKERNELS_EMULATOR={kind}: must be 0 or of {[*EMULATORS]}")
        tag, of_kernels, of_emulator = EMULATORS[kind]
        here = f"-I {quote(CSRC / 'emulator')}"
        # -Wno-unknown-pragmas: nvcc's "#pragma unroll"
        flags = f"-x c++ {here} {torch_flags} -Wno-unknown-pragmas {of_kernels}"
        objects = [n.compile("emu", source, flags, tag) for source in cu_files]
        objects += [
            n.compile("emu", source, f"{here} {of_emulator}", tag)
            for source in sorted(CSRC.glob("emulator/*.cpp"))
        ]
        objects += cuda_common
        n.link(target_dir / f"lib/libvitkernels_{tag}.so", objects, f"{link} -lpthread")
    nvcc = find_nvcc()
    if nvcc is not None:
        # What ptxas says of registers and spills stays beside the object, for the tests.
        compile_to = f"{nvcc} {NVCC_FLAGS} {include} $flags -MD -MF $out.d -c $in -o $out"
        n.rule("nvcc", f"{compile_to} > $out.log 2>&1 || {{ cat $out.log; false; }}")
        # nvcc links its static runtime, wherever that is: the library then needs only the driver.
        n.rule("nvlink", f"{nvcc} -cudart static $in $flags -o $out")
        objects = [n.compile("nvcc", s, f"{gencode_of(s)} {torch_flags}", "cuda") for s in cu_files]
        objects += cuda_common
        n.link(
            target_dir / "lib/libvitkernels_cuda.so",
            objects,
            link.replace("-Wl,", "-Xlinker "),
            "nvlink",
        )

    if (Path(sysconfig.get_paths()["include"]) / "Python.h").exists() and importlib.util.find_spec(
        "pybind11"
    ):
        import pybind11

        facts = {"cxx": cxx, "nvcc": nvcc or "", "isa_levels": ",".join(ISA_LEVELS)}
        defines = " ".join(f"-DVK_{k.upper()}='\"{v}\"'" for k, v in facts.items())
        python = sysconfig.get_paths()["include"]
        includes = f"-isystem {quote(pybind11.get_include())} -isystem {quote(python)}"
        objects = [n.compile("cxx", CSRC / "bindings.cpp", f"{includes} {defines}"), *common]
        n.link(target_dir / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", objects, "-shared")
    return n


class BuildNative(build_ext):
    def run(self) -> None:
        package = (
            ROOT / "vitkernels" if self.inplace else Path(self.build_lib).resolve() / "vitkernels"
        )
        (package / "lib").mkdir(parents=True, exist_ok=True)
        self.ninja = plan_build(
            package, ROOT / "build" / "native" / ("inplace" if self.inplace else "wheel")
        )
        if self.ninja is not None:
            self.ninja.run()

    def get_outputs(self) -> list[str]:
        ninja = getattr(self, "ninja", None)
        return [str(t) for t in ninja.targets] if ninja else []

    def get_source_files(self) -> list[str]:
        return []


setup(ext_modules=[Extension("vitkernels._C", sources=[])], cmdclass={"build_ext": BuildNative})
