"""ThreadSanitizer and AddressSanitizer on emulated kernels, in processes of their own.

`make test-emu-tsan` and `make test-emu-asan`: the planted bugs are found and their right twins are
not; then every small case of every CUDA kernel is clean.
"""

import re
import subprocess

import pytest
from native_build import CSRC, CXX, ROOT, cached_build, files_under
from sanitized import REPORTED, command, preloaded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
]

SOURCE = ROOT / "tests" / "emulator" / "planted.cpp"
FLAGS = {"tsan": "-fsanitize=thread", "asan": "-fsanitize=address"}
CASES = (
    "add_layer_norm", "layer_norm_add", "attention", "window_attention", "patch_embed",
    "patch_merge_layer_norm", "linear_gelu", "distillation_loss",
)  # fmt: skip
# kernel, argument with the bug, arguments without
RACES = [("handover", 0, (1, 2, 3)), ("handover", 4, ()), ("reuse", 0, (1,)), ("blocks", 0, (1,))]
BOUNDS = [("bounds", 1, (0,)), ("bounds", 2, ()), ("bounds", 3, ())]
PLANTED = [("tsan", *row) for row in RACES] + [("asan", *row) for row in BOUNDS]


def build(kind):
    """The kernels instrumented, the emulator not."""
    macro = f"-DVK_EMULATOR_{kind.upper()}"
    common = [CXX, "-std=c++17", "-g", "-fPIC", macro, "-Wno-unknown-pragmas"]
    common += ["-I", str(CSRC / "emulator"), "-I", str(CSRC)]
    inputs = files_under(CSRC / "emulator", CSRC / "common", ROOT / "tests" / "emulator")
    objects = []
    for source in (SOURCE, *sorted((CSRC / "emulator").glob("*.cpp"))):
        traced = [FLAGS[kind], "-O1"] if source == SOURCE else ["-O2"]
        command = [*common, *traced, "-c", str(source)]
        objects.append(cached_build(f"planted_{kind}_{source.stem}.o", command, inputs)[0])
    link = [CXX, "-shared", FLAGS[kind], *map(str, objects), "-lpthread"]
    return cached_build(f"planted_{kind}.so", link, inputs)[0]


def run(kind, *arguments):
    whole = command(arguments[0], kind, *map(str, arguments[1:]))
    done = subprocess.run(whole, env=preloaded(kind), capture_output=True, text=True, timeout=1500)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("kind", "kernel", "bug", "right"), PLANTED)
def test_a_planted_bug_is_reported_at_its_line(kind, kernel, bug, right):
    library = build(kind)
    for argument in right:
        status, out, err = run(kind, "planted", library, kernel, argument)
        assert (status, out) == (0, "launched\n"), err[-3000:]
    status, _, err = run(kind, "planted", library, kernel, bug)
    assert status == REPORTED[kind], err[-3000:]
    assert ("data race" if kind == "tsan" else "AddressSanitizer") in err
    marked = {
        i
        for i, line in enumerate(SOURCE.read_text().splitlines(), 1)
        if line.endswith("// race" if kind == "tsan" else "// bounds")
    }
    named = {int(n) for n in re.findall(r"planted\.cpp:(\d+)", err)}
    assert named & marked, f"{named}, expected one of {marked}\n{err[-3000:]}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("kind", FLAGS)
def test_every_small_case_is_clean(kind, text):
    library = ROOT / "vitkernels" / "lib" / f"libvitkernels_emu_{kind}.so"
    if not library.exists():
        pytest.skip(f"{library.name} is not built: make test-emu-{kind} does")
    status, out, err = run(kind, "cases", text if "attention" in text else f"{text} cuda")
    assert status == 0, f"{out}\n{err[-6000:]}"
    assert "passed" in out
