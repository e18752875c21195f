"""patch_embed's CUDA paths by name: values, refusals, equal bits, plans and instructions."""

import itertools

import pytest
import torch
from compiled_code import counts, disassembler, sass
from native_build import NVCC, ROOT
from patch_embed_problems import UINT8, patch_embed_problem
from problems import DTYPE_IDS, INPUT_DTYPE_IDS, check, check_repeats

from vitkernels import _native
from vitkernels.testing import available_for, cuda_path

FP32, BF16, FP16 = DTYPE_IDS
PLANS = _native.build_facts()

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_cuda = pytest.mark.skipif(
    "cuda" not in available_for("patch_embed"), reason="neither a GPU nor the emulator is here"
)
needs_plans = pytest.mark.skipif(PLANS is None, reason="vitkernels._C is not built")


def case(grid, patch, D, images, dtype, layout="contiguous", **options):
    return grid, patch, D, images, dtype, layout, options


# grid, patch, D, images, dtype, layout of the images, options. Rows of a tile: 128; columns: 128,
# 192, 256; columns of a patch are padded to 16 for each channel; groups of 64 rows of the backward
# of sm_90 are neighbours of one image or of many.
ANY = [
    case((2, 3), 4, 24, UINT8, BF16),
    case((3, 5), 16, 40, UINT8, BF16, prefix=5),
    case((2, 2), 14, 200, UINT8, FP16, prefix=0),
    case((1, 2), 32, 136, UINT8, BF16, prefix=None, pos=None),
    case((2, 3), (3, 5), 40, UINT8, FP16, bias=False),
    case((3, 3), (8, 4), 264, BF16, BF16, pos="patches", prefix=2),
    case((2, 3), 16, 48, FP16, FP16, "channels_last"),
    case((2, 3), 16, 48, UINT8, BF16, "channels_last"),
    case((2, 3), 8, 48, UINT8, BF16, "cropped"),
    case((2, 3), 8, 48, UINT8, BF16, "columns_apart"),
    case((2, 3), 14, 48, BF16, BF16, "rows_apart"),
    case((2, 3), 7, 48, BF16, BF16),
    case((2, 3), 14, 48, FP32, BF16, autocast=BF16, mean=None, std=None),
    case((2, 3), 8, 48, FP32, BF16, autocast=BF16),
    case((2, 3), 5, 48, FP16, BF16, autocast=BF16),
    case((9, 15), 4, 128, UINT8, BF16, B=1, pos="patches"),
    case((8, 16), 4, 8, UINT8, FP16, B=1, Cin=1, prefix=1, pos_dtype=FP32),
    case((13, 10), 2, 96, UINT8, BF16, B=2, Cin=7, weight_dtype=BF16, bias_dtype=FP32),
    case((2, 3), 14, 64, UINT8, BF16, mean=None, std=None),
    case((2, 2), 8, 64, UINT8, BF16, std=(1e-3, 1.0, 1e3)),
    case((16, 18), 4, 384, UINT8, BF16, B=1),
    case((7, 4), 3, 248, UINT8, BF16, B=19),
    case((9, 15), 8, 264, BF16, BF16, B=5),
    case((5, 13), 8, 248, FP16, FP16, B=1),
    case((2, 1), (6, 24), 32, BF16, BF16, B=70, mean=None, std=None),
]


def name_of(values):
    grid, patch, D, images, dtype, layout, options = values
    kinds = f"{INPUT_DTYPE_IDS[images]} {DTYPE_IDS[dtype]}"
    return " ".join([f"{grid} p{patch} D{D} {kinds} {layout}", *(f"{k}={v}" for k, v in
                                                                options.items())])  # fmt: skip


def made(values):
    grid, patch, D, images, dtype, layout, options = values
    return patch_embed_problem(grid, patch, D, images, dtype, **options), layout


@needs_cuda
@pytest.mark.parametrize("values", ANY, ids=name_of)
@pytest.mark.parametrize("path", ["simt", "sm80", "auto"])
def test_a_path_by_name(path, values):
    """Forward and every gradient. auto: sm_90."""
    problem, layout = made(values)
    with cuda_path(path):
        check(problem, "cuda", shape_class=f"{path} {name_of(values)}", layout=layout,
              grad_layout="contiguous")  # fmt: skip


@needs_cuda
@pytest.mark.parametrize("values", [
    case((2, 3), 4, 24, UINT8, FP32),
    case((3, 5), 14, 33, UINT8, FP32, prefix=5, pos="patches"),
    case((2, 2), 16, 65, FP32, FP32, "channels_last"),
    case((5, 13), (3, 2), 70, UINT8, BF16, prefix=0, Cin=4),
    case((2, 3), 8, 40, FP32, FP32, "cropped", bias=False),
    case((1, 1), 7, 1, BF16, BF16, Cin=2, std=None),
], ids=name_of)  # fmt: skip
def test_simt_takes_any_call(values):
    problem, layout = made(values)
    with cuda_path("simt"):
        check(problem, "cuda", shape_class=f"simt {name_of(values)}", layout=layout,
              grad_layout="contiguous")  # fmt: skip


@needs_cuda
@pytest.mark.parametrize("path", ["sm80", "sm90"])
@pytest.mark.parametrize(("options", "why"), [
    ({"dtype": FP32}, "bf16 and fp16"),
    ({"D": 20}, "multiple of 8"),
    ({"patch": 37}, "4096 elements"),
], ids=str)  # fmt: skip
def test_refusals(path, options, why):
    options = {"patch": 4, "D": 24, "dtype": BF16} | options
    problem = patch_embed_problem(
        1, options["patch"], options["D"], UINT8, options["dtype"], B=1, prefix=None
    )
    message = f"path {path} cannot serve this call: .*{why}"
    with cuda_path(path), torch.no_grad(), pytest.raises(RuntimeError, match=message):
        problem.ours("cuda")(*problem.inputs.values())


@needs_cuda
@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_the_backward_refuses_rows_off_their_lines(path):
    problem = patch_embed_problem((2, 2), 4, 24, UINT8, BF16, B=1)
    message = f"path {path} cannot serve this call: rows of dtokens must lie on 16-byte lines"
    with cuda_path(path), pytest.raises(RuntimeError, match=message):
        check(problem, "cuda", shape_class="refused", grad_layout="misaligned_1")


@needs_cuda
def test_the_backward_takes_strides_that_tma_does_not():
    """One gradient for all images: sm90 says so, auto goes on with sm80."""
    problem = patch_embed_problem((2, 2), 4, 24, UINT8, BF16, B=3)
    tokens, tensors = problem.ours("cuda"), list(problem.inputs.values())
    one = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1)).to(BF16)

    def gradients(incoming):
        leaves = [None if t is None else t.clone().requires_grad_(t.is_floating_point())
                  for t in tensors]  # fmt: skip
        tokens(*leaves).backward(incoming)
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad]

    with cuda_path("sm90"), pytest.raises(RuntimeError, match="rows of dtokens must lie apart"):
        gradients(one.expand(3, -1, -1))
    for got, expected in zip(
        gradients(one.expand(3, -1, -1)), gradients(one.repeat(3, 1, 1)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@needs_cuda
@pytest.mark.parametrize("path", ["simt", "auto"])
def test_repeats_are_bitwise_equal_and_unwanted_gradients_change_nothing(path):
    problem = patch_embed_problem((5, 7), 8, 40, BF16, BF16, B=4, prefix=2)
    with cuda_path(path):
        check_repeats(problem, "cuda")


# ---- Plans


@needs_plans
@pytest.mark.parametrize("D", [8, 96, 128, 192, 384, 768, 1024, 1280, 1408, 1536, 4096])
def test_sm90_plans(D):
    """The width leaves the fewest columns empty; shared memory fits; every block has a tile."""
    for rows, columns in itertools.product((1, 128, 129, 50176), (48, 624, 768, 3072, 4096)):
        p = PLANS.patch_embed_sm90_plan(rows, D, columns, 132)
        waste = {w: -(-D // w) * w for w in (256, 192, 128)}
        assert waste[p["width"]] == min(waste.values())
        assert p["items"] == -(-rows // (128 * p["pair"])) * -(-D // p["width"])
        assert p["blocks"] == min(p["pair"] * p["items"], 132)
        assert p["pair"] == (1 if rows <= 128 else 2)
        assert p["shared_bytes"] <= 232448


@needs_plans
def test_padded_columns():
    """(segments, used, length) with statistics and without, in steps of sm_80 and of sm_90."""
    for step, padded in {16: (16, 208, 256, 1024), 64: (64, 256, 256, 1024)}.items():
        for patch, length in zip((4, 14, 16, 32), padded, strict=True):
            pixels = patch * patch
            assert PLANS.patch_embed_padded(3, pixels, True, step) == (3, pixels, length)
    assert PLANS.patch_embed_padded(3, 196, False, 16) == (1, 588, 592)
    assert PLANS.patch_embed_padded(3, 196, False, 64) == (1, 588, 640)


@needs_plans
def test_splits_cover_every_step_once():
    for tiles, steps, blocks in itertools.product((1, 36, 500), (1, 7, 784), (8, 264)):
        splits, each = PLANS.patch_embed_split(tiles, steps, blocks)
        assert (splits - 1) * each < steps <= splits * each and splits <= 64


@needs_plans
def test_splits_keep_the_multiprocessors_busy():
    """ViT-B/16, B 256: 18 tiles in 7 parts are 126 of 132; 72 tiles (ViT-B/32) would be 72."""
    assert PLANS.patch_embed_split(18, 784, 132) == (7, 112)
    splits, each = PLANS.patch_embed_split(72, 196, 132)
    assert splits * 72 * each / (-(-splits * 72 // 132) * 132 * each) > 0.9


@needs_plans
@pytest.mark.parametrize("N", [1, 6, 49, 64, 196, 197, 576, 729, 1369])
def test_sm90_groups(N):
    """Each row is in one group; the fewest groups that 64 / patches images of patches allow."""
    for B in (1, 2, 3, 16, 100, 256):
        patches, images, across, count = PLANS.patch_embed_sm90_groups(B, N)
        assert patches * images == 64
        assert across == -(-N // patches) and count == across * -(-B // images)
        counts = [-(-N // p) * -(-B // (64 // p)) for p in (64, 32, 16, 8, 4, 2, 1)]
        assert count == min(counts) and 64 // 2 ** counts.index(count) == patches
    assert PLANS.patch_embed_sm90_groups(256, 196) == (4, 16, 49, 784)


@needs_plans
@pytest.mark.parametrize(("D", "features"), [(96, 128), (192, 128), (256, 256), (384, 128),
                                             (768, 256), (1024, 256), (1152, 256)])  # fmt: skip
def test_sm90_backward_plans(D, features):
    for B, columns in itertools.product((1, 256), (48, 624, 768, 4096)):
        p = PLANS.patch_embed_sm90_backward_plan(B, 196, D, columns, 132)
        groups = PLANS.patch_embed_sm90_groups(B, 196)[3]
        assert p["features"] == features
        assert p["dweight_tiles"] == -(-D // features) * -(-columns // 128)
        assert p["dimages_tiles"] == -(-groups // 4) * -(-columns // 128)
        assert p["dimages_blocks"] == min(p["dimages_tiles"], 132)
        assert p["pair"] == 2 - -(-columns // 128) % 2 and p["dimages_blocks"] % p["pair"] == 0
        assert max(p["dweight_shared_bytes"], p["dimages_shared_bytes"]) <= 232448


# ---- What nvcc made of them

needs_sass = pytest.mark.skipif(
    NVCC is None or disassembler() is None, reason="no nvcc or cuobjdump here"
)
WORDS = ("HGMMA", "UTMALDG", "MULTICAST", "HMMA", "LDGSTS", "LDL", "STL", "ATOM", "RED.E")


def present(lines):
    return {word: count for word, count in counts(lines, WORDS).items() if count}


@needs_sass
def test_sm90_instructions_are_those_of_the_plan():
    """Four steps of 16 columns in a stage, two boxes, to both blocks of a pair."""
    code = sass(ROOT / "build/native/inplace/obj/patch_embed_patch_embed_sm90.cu.cuda.o", "sm_90a")
    assert set(code) == {f"forward_kernel<{t},{w}>" for t in (1, 2) for w in (128, 192, 256)}
    for lines in code.values():
        assert present(lines) == {"HGMMA": 4, "UTMALDG": 2, "MULTICAST": 2}


@needs_sass
def test_sm90_backward_instructions_are_those_of_the_plan():
    """Four steps of 16 rows, each of one or two times 64 lines; a box for each 64 x 64."""
    name = "build/native/inplace/obj/patch_embed_patch_embed_sm90_backward.cu.cuda.o"
    code = sass(ROOT / name, "sm_90a")
    expected = {f"dimages_kernel<{t}>": {"HGMMA": 8, "UTMALDG": 6, "MULTICAST": 4} for t in (1, 2)}
    for t, halves in itertools.product((1, 2), (1, 2)):
        expected[f"dweight_kernel<{t},{halves}>"] = {
            "HGMMA": 4 * halves,
            "UTMALDG": 2 * halves,
            "MULTICAST": 2 * halves,
        }
    assert {kernel: present(lines) for kernel, lines in code.items()} == expected


@needs_sass
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sm80_instructions_are_those_of_the_plan(arch):
    """A stage is 4 steps of 16 mma; copies of 16 bytes: 4 of an operand, before the loop and in."""
    for part, kernels in {"": {"forward": 8}, "_backward": {"dweight": 8, "dimages": 16}}.items():
        name = f"build/native/inplace/obj/patch_embed_patch_embed_sm80{part}.cu.cuda.o"
        code = sass(ROOT / name, arch)
        assert set(code) == {f"{kernel}_kernel<{t}>" for kernel in kernels for t in (1, 2)}
        for (kernel, copies), t in itertools.product(kernels.items(), (1, 2)):
            lines = code[f"{kernel}_kernel<{t}>"]
            assert present(lines) == {"HMMA": 64, "LDGSTS": copies}
