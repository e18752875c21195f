"""Reads compiled CUDA code: the SASS of each kernel by a short name."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def short_name(mangled: str) -> str:
    """forward_kernel<0,3,1,0,2>: the kernel's template arguments as numbers, in their order."""
    end = mangled.index("_kernel") + len("_kernel")  # an identifier follows its length
    length = next(n for n in range(8, 99) if mangled[: end - n].endswith(str(n)))
    arguments = re.findall(r"L(?:[a-z]|S\w*?_|N\w+?E)(\d+)E", mangled[end:])
    return mangled[end - length : end] + (f"<{','.join(arguments)}>" if arguments else "")


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends/nvidia/bin" if spec else None
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    return shutil.which("cuobjdump", path=path) if shutil.which("nvdisasm", path=path) else None


@cache
def sass(path: Path, arch: str) -> dict[str, list[str]]:
    """{kernel: instructions} of a library, object or cubin."""
    tool = disassembler()
    env = dict(os.environ, PATH=f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}")
    command = [tool, "-sass", "-arch", arch, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    found = {}
    for part in re.split(r"\n\s*Function : ", said)[1:]:
        name, _, body = part.partition("\n")
        found[short_name(name.strip())] = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;]*);", body)
    return found


def counts(lines: list[str], words: Iterable[str]) -> dict[str, int]:
    """How many instructions of a kernel have each word."""
    return {word: sum(word in line for line in lines) for word in words}
