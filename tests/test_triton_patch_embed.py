"""Triton patch_embed through the interpreter: patches, channels, strides, sums, every gradient.

Values are fp32 (the interpreter's 16-bit arithmetic is wrong), with a 16-bit smoke case for each
kind of image; `what` names the case.
"""

import itertools
import math
import os

import pytest
import torch
from triton_values import compare, double

from vitkernels import testing
from vitkernels.ops.patch_embed import reference
from vitkernels.testing import in_layout

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this session runs kernels on a GPU", allow_module_level=True)

import triton
import triton.language as tl

from vitkernels.ops.patch_embed import _triton as kernels
from vitkernels.ops.patch_embed import _triton_backward as backward
from vitkernels.ops.patch_embed import _triton_forward as forward
from vitkernels.ops.patch_embed import _triton_tiles as tiles

U8, FP32, BF16, FP16 = torch.uint8, torch.float32, torch.bfloat16, torch.float16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- plans: no kernel runs -----------------------------------------------------------------------


def test_channels_are_cut_into_blocks_with_little_padding():
    blocks = {p: tiles.block_of_channel(p * p) for p in (2, 4, 8, 14, 16, 32)}
    assert blocks == {2: 16, 4: 16, 8: 32, 14: 32, 16: 32, 32: 32}
    for K in range(16, 1025):
        block = tiles.block_of_channel(K)
        assert -(-K // block) * block - K < 32


def test_weights_of_odd_patches_are_padded_by_zeros():
    weight = torch.randn(5, 3, 14, 14)
    padded = forward.padded_weight(weight, BF16)
    assert padded.shape == (5, 3, 208) and padded.dtype == BF16 and not padded[..., 196:].any()
    assert torch.equal(padded[..., :196], weight.to(BF16).flatten(2))
    assert forward.padded_weight(weight[..., :8, :8].contiguous(), FP32).shape == (5, 3, 64)


def test_sums_over_images_are_cut_into_runs_that_cover_them_once():
    for B, T, D, processors in itertools.product((1, 3, 256), (1, 197), (96, 768), (2, 132)):
        _, _, splits, per_split = backward.sums_plan(B, T, D, processors)
        assert splits * per_split >= B > (splits - 1) * per_split


# --- values --------------------------------------------------------------------------------------


def make(
    B=2, size=(8, 12), patch=(4, 4), D=10, C=3, P=1, pos="all", images=U8, bias=True, mean=MEAN,
    std=STD,
):  # fmt: skip
    """(images, weight, bias, pos_embed, prefix_tokens, mean, std)."""
    N = size[0] // patch[0] * (size[1] // patch[1])
    shape = (B, C, *size)
    pixels = (
        torch.randint(0, 256, shape, dtype=U8) if images == U8 else torch.rand(shape).to(images)
    )
    weight = torch.randn(D, C, *patch) / math.sqrt(C * patch[0] * patch[1])
    position = {"all": P + N, "patches": N}.get(pos)
    statistics = [None if s is None else torch.tensor((s * C)[:C]) for s in (mean, std)]
    return [
        pixels, weight, torch.randn(D) if bias else None,
        None if position is None else torch.randn(1, position, D),
        torch.randn(1, P, D) if P else None, *statistics,
    ]  # fmt: skip


def check(arguments, *, what, dtokens=None, wanted=(True,) * 5, **label):
    """Forward and backward of the raw operators in fp32."""
    what = f"patch_embed {what}"
    images, weight, bias, pos, prefix, _, _ = arguments
    wide = double(*arguments)
    tokens = kernels.patch_embed_fwd(*arguments, FP32)
    base = reference.patch_embed_fwd(*arguments, FP32)
    exact = reference.patch_embed_fwd(*wide, torch.float64)
    compare([tokens], [base], [exact], what, **label)
    if dtokens is None:
        dtokens = torch.randn_like(tokens)
    present = (images.dtype != U8, True, bias is not None, pos is not None, prefix is not None)
    wanted = [a and b for a, b in zip(wanted, present, strict=True)]
    ours = kernels.patch_embed_bwd(dtokens, *arguments, wanted)
    peer = reference.patch_embed_bwd(dtokens, *arguments, wanted)
    truth = reference.patch_embed_bwd(dtokens.double(), *wide, wanted)
    for mine, like in zip(ours, (images, weight, bias, pos, prefix), strict=True):
        assert mine is None or (mine.dtype, mine.shape) == (like.dtype, like.shape)
        assert mine is None or mine.is_contiguous()
    compare(ours, peer, truth, what + " backward", **label)
    return tokens, ours


GRIDS = [
    ((4, 4), (8, 12), 3), ((14, 14), (28, 42), 3), ((16, 16), (16, 48), 3), ((8, 8), (16, 8), 1),
    ((3, 5), (6, 15), 2), ((1, 1), (3, 4), 5), ((32, 32), (32, 64), 3), ((2, 2), (20, 40), 4),
    ((7, 7), (7, 7), 3),
]  # fmt: skip


@pytest.mark.parametrize(("patch", "size", "C"), GRIDS, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
def test_patch_sizes_maps_and_channels(patch, size, C, images):
    arguments = make(2, size, patch, 18, C, images=images)
    check(arguments, what=f"{patch} of {size} C={C} {images}")


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
@pytest.mark.parametrize("pos", ["all", "patches", None])
@pytest.mark.parametrize("P", [0, 1, 5])
def test_prefix_tokens_and_positions(P, pos, images):
    check(make(3, D=33, P=P, pos=pos, images=images), what=f"P={P} pos={pos} {images}")


@pytest.mark.parametrize("D", [1, 31, 64, 130, 200])
def test_widths(D):
    check(make(D=D, images=FP32), what=f"D={D}")


@pytest.mark.parametrize("B", [1, 5, 23])
def test_batches(B):
    """23 images of 6 patches: tiles and sums go across images."""
    check(make(B, D=20), what=f"B={B}")


STATISTICS = {
    "none": (None, None),
    "mean only": (MEAN, None),
    "std only": (None, STD),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "ends of the bytes": ((0.0, 1.0, 0.998), (1.0, 1.0, 1.0)),
    "outside": ((-0.4, 2.5, 100.0), (0.3, 0.3, 2.0)),
    "far apart": ((0.1, 0.5, 0.9), (0.01, 1.0, 30.0)),
}


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics(kind, images):
    mean, std = STATISTICS[kind]
    check(make(images=images, mean=mean, std=std), what=f"statistics {kind} {images}")


def test_without_bias():
    check(make(bias=False), what="no bias")
    check(make(bias=False, images=FP32, mean=None, std=None, P=0, pos=None), what="bare")


@triton.jit
def _centre_kernel(mean_ptr, centre_ptr):
    tl.store(centre_ptr, tiles.channel_centre(mean_ptr, 0, True))


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.001, 0.002, 0.485, 0.5, 1.0, 1.002, 100.0])
def test_bytes_are_centred_by_an_integer_of_eight_bits(mean):
    """So that 16 bits hold the difference; fp32 values cannot show it."""
    centre = torch.empty(1)
    _centre_kernel[(1,)](torch.tensor([mean]), centre)
    assert centre.item() == min(max(math.floor(255 * mean + 0.5), 0), 255)


def test_bytes_at_their_centre_leave_the_bias_alone():
    """u - c is 0 everywhere, so what is left is b', where 255 mean is an integer the bias."""
    for value in (0, 1, 128, 255):
        arguments = make(mean=(value / 255,) * 3, pos=None, P=0)
        arguments[0].fill_(value)
        tokens = kernels.patch_embed_fwd(*arguments, FP32)
        torch.testing.assert_close(tokens, arguments[2].expand_as(tokens), rtol=1e-5, atol=1e-5)


LAYOUTS = [name for name in testing.LAYOUTS if name != "contiguous"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
def test_layouts_of_every_tensor(layout, images):
    tensors = make(2, D=18, P=2, images=images)
    if layout == "channels_last":
        tensors[:2] = (t.to(memory_format=torch.channels_last) for t in tensors[:2])
        dtokens = torch.randn(18, 8, 2).permute(2, 1, 0)
    else:
        tensors = [in_layout(t, layout) for t in tensors]
        dtokens = in_layout(torch.randn(2, 8, 18), layout)
    with testing.unchanged(*tensors, dtokens):
        check(tensors, dtokens=dtokens, what=f"strides {images}", layout=layout)


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
def test_gradient_of_a_sum_is_expanded(images):
    arguments = make(3, D=18, images=images)
    check(arguments, dtokens=torch.ones(()).expand(3, 7, 18), what="ones", layout="incoming ones")


FORWARD_TILES = {*forward.SM90, *forward.SM90_GATHERED, *forward.SM80}
BACKWARD_TILES = {*backward.DWEIGHT_SM90, *backward.DWEIGHT_SM80, *backward.DIMAGES_SM80}


@pytest.mark.parametrize("tile", sorted(FORWARD_TILES | BACKWARD_TILES), ids=str)
def test_every_tile(monkeypatch, tile):
    if tile in FORWARD_TILES:
        monkeypatch.setattr(forward, "tiles_for", lambda *_: (tile,))
    if tile in BACKWARD_TILES:
        monkeypatch.setattr(backward, "tiles_for", lambda *_: (tile,))
    arguments = make(7, (20, 20), (5, 4), tile.n + 9, P=19, images=FP32)
    check(arguments, what=f"tile {tile}")


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
def test_tiles_of_the_fp32_kernels_on_a_gpu(monkeypatch, images):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    check(make(3, (20, 20), (5, 4), 40, images=images), what=f"fp32 tiles {images}")


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_sums_in_one_piece_and_in_several(monkeypatch, pieces):
    def cut(tile, M, N, K, processors):
        steps = -(-K // tile.k)
        per_split = -(-steps // pieces)
        return -(-steps // per_split), per_split

    monkeypatch.setattr(backward, "reduction_splits", cut)
    monkeypatch.setattr(backward, "multiprocessors", lambda device: 2 * pieces)
    check(make(13, (20, 20), (4, 4), 20, P=2), what=f"sums in {pieces} pieces")


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=4)), ids=str)
def test_only_the_gradients_asked_for(wanted, images):
    for dimages in {False, images == FP32}:
        mask = (dimages, *map(bool, wanted))
        check(make(images=images), wanted=mask, what=f"wants {mask}")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("images", ["bytes", "fp32", "same"])
def test_sixteen_bit_smoke(images, dtype):
    kind = {"bytes": U8, "fp32": FP32, "same": dtype}[images]
    arguments = make(2, (16, 32), (16, 16), 40, images=kind)
    arguments[1] = arguments[1].to(dtype)
    arguments[3] = arguments[3].to(dtype)
    tokens = kernels.patch_embed_fwd(*arguments, dtype)
    exact = reference.patch_embed_fwd(*double(*arguments), torch.float64)
    dtokens = torch.randn_like(tokens)
    wanted = [kind != U8, True, True, True, True]
    ours = kernels.patch_embed_bwd(dtokens, *arguments, wanted)
    truths = reference.patch_embed_bwd(dtokens.double(), *double(*arguments), wanted)
    names = ("tokens", "dimages", "dweight", "dbias", "dpos", "dprefix")
    likes = (tokens, *arguments[:5])
    for name, mine, truth, like in zip(
        names, (tokens, *ours), (exact, *truths), likes, strict=True
    ):
        if truth is not None:
            assert mine.dtype == like.dtype, name
            error = (mine.double() - truth).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * truth.abs().max(), f"{name}: {error}"
    label = "bf16" if dtype == BF16 else "fp16"
    testing.cases.record("patch_embed", "triton", label, f"smoke {images}", "contiguous")


MIXES = [
    (U8, BF16, FP32, FP16, FP32), (FP16, FP32, BF16, FP32, FP32), (BF16, BF16, FP32, FP32, FP16),
    (FP32, FP16, FP16, BF16, BF16),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_each_tensor_has_its_own_dtype(dtypes):
    *tensors, mean, std = make(2, D=18, images=dtypes[0])
    tensors = [t.to(d) for t, d in zip(tensors, dtypes, strict=True)]
    wide = double(*tensors, mean, std)
    tokens = kernels.patch_embed_fwd(*tensors, mean, std, FP32)
    exact = reference.patch_embed_fwd(*wide, torch.float64)
    narrow = [t if t.dtype == U8 else t.float() for t in tensors]
    base = reference.patch_embed_fwd(*narrow, mean, std, FP32)
    label = "+".join(str(t)[6:] for t in dtypes)
    compare([tokens], [base], [exact], "patch_embed mixed dtypes", dtype=label)
    wanted = [dtypes[0] != U8, True, True, True, True]
    dtokens = torch.randn_like(tokens)
    ours = kernels.patch_embed_bwd(dtokens, *tensors, mean, std, wanted)
    truths = reference.patch_embed_bwd(dtokens.double(), *wide, wanted)
    for mine, truth, like in zip(ours, truths, tensors, strict=True):
        if truth is not None:
            assert mine.dtype == like.dtype
            limit = 2 * torch.finfo(mine.dtype).eps * truth.abs().max()
            assert (mine.double() - truth).abs().max() <= limit


def test_no_images():
    arguments = make(0, images=FP32)
    tokens = kernels.patch_embed_fwd(*arguments, FP32)
    assert tokens.shape == (0, 7, 10)
    for gradient in kernels.patch_embed_bwd(tokens, *arguments, [True] * 5):
        assert not gradient.any()


@pytest.mark.parametrize("images", [U8, FP32], ids=["bytes", "fp32"])
def test_the_same_bits_every_time_and_none_left_unwritten(images):
    arguments = make(13, (20, 20), (4, 4), 70, P=2, images=images)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        first, dtokens = None, torch.randn(13, 27, 70)
        for _ in range(2):
            tokens = kernels.patch_embed_fwd(*arguments, FP32)
            wanted = [images != U8] + [True] * 4
            every = (tokens, *kernels.patch_embed_bwd(dtokens, *arguments, wanted))
            first = first or every
            testing.assert_bitwise_equal(first, every)
            assert not any(t.isnan().any() for t in every if t is not None)
    finally:
        torch.use_deterministic_algorithms(False)
