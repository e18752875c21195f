"""An operator's emulated kernels with one text of their source replaced, and what they do."""

import os
import subprocess
import sys

import torch
from native_build import CSRC, CXX, ROOT

OBJECTS = ROOT / "build/native/inplace/obj"
CAN_BUILD = CXX is not None and (OBJECTS / "emulator_emulator.cpp.emu.o").exists()


def run_mutant(op, change, check, folder, *arguments):
    """The finished process of `python -c check arguments`.

    change: (file of csrc/op, or "common/FILE", the text there, which must be there once, what
    replaces it, the source that is compiled).
    """
    changed, old, new, source = change
    copy = folder / "csrc" / op
    copy.mkdir(parents=True)
    if changed.startswith("common/"):  # the includes find it before csrc's
        (copy.parent / "common").mkdir()
        (copy.parent / changed).write_text((CSRC / changed).read_text())
        changed = f"../{changed}"
    for path in (CSRC / op).glob("*.*h"):
        (copy / path.name).write_text(path.read_text())
    (copy / source).write_text((CSRC / op / source).read_text())
    text = (copy / changed).read_text()
    assert not old or text.count(old) == 1, f"{old!r} is in {changed} {text.count(old)} times"
    (copy / changed).write_text(text.replace(old, new) if old else text)

    mutant = folder / "mutant.so"
    torch_folder = torch.__path__[0]
    replaced = f"{op}_{source}.emu.o"
    objects = [o for o in sorted(OBJECTS.glob("*.emu.o")) if o.name != replaced]
    objects.append(OBJECTS / "common_cuda_path.cpp.o")
    command = [CXX, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-Wno-psabi"]
    command += ["-shared", "-I", str(copy.parent), "-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    command += ["-isystem", f"{torch_folder}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-x", "c++", str(copy / source), "-x", "none", *map(str, objects)]
    command += ["-L", f"{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lpthread"]
    subprocess.run([*command, "-o", str(mutant)], check=True)

    package_with(mutant, folder)
    paths = os.pathsep.join([str(folder), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "VITKERNELS_EMULATE": "1"}
    command = [sys.executable, "-c", check, *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


def check_verdict(done, faulty):
    """A mutant that is none passes; any other ends with an error of the emulator or of a check."""
    if not faulty:
        assert done.returncode == 0, done.stderr[-2000:]
        return
    assert done.returncode == 1, "not caught" if done.returncode == 0 else done.stderr[-2000:]
    assert "Error" in done.stderr, done.stderr[-2000:]


def package_with(library, folder):
    """A copy of the package, all links, whose emulated kernels are that library's."""
    package = folder / "vitkernels"
    package.mkdir()
    for path in (ROOT / "vitkernels").iterdir():
        if path.name not in ("lib", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "lib").mkdir()
    for path in (ROOT / "vitkernels/lib").iterdir():
        if path.name != "libvitkernels_emu.so":
            (package / "lib" / path.name).symlink_to(path)
    (package / "lib/libvitkernels_emu.so").symlink_to(library)
