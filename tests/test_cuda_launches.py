"""Every CUDA kernel is launched by its operator's launchers."""

import re

import pytest
from native_build import CSRC

OPS = sorted({path.parent for path in CSRC.glob("*/*.cu")})
KERNEL = re.compile(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", re.S)


def unlaunched(text: str) -> list[str]:
    kernels = KERNEL.findall(text)
    return [k for k in kernels if len(re.findall(rf"\b{k}\b", text)) <= kernels.count(k)]


@pytest.mark.parametrize("folder", OPS, ids=lambda folder: folder.name)
def test_no_kernel_is_without_a_launcher(folder):
    for path in sorted(folder.glob("*.cu")):
        assert not unlaunched(path.read_text()), path.name


def test_a_forgotten_kernel_is_seen():
    text = "__global__ void lost_kernel(int n) {}\n__global__ void used_kernel(int n) {}\n"
    assert unlaunched(text + "launch(used_kernel, 1);") == ["lost_kernel"]
