"""Triton backward of patch_embed, with g[b, n] = dtokens[b, P + n]:

    dpos = sum_b dtokens;  dprefix = sum_b dtokens[:, :P];  dbias = sum_bn g
    dweight[d, ch] = scale_ch * (sum_bn g[d] (pixels - centre_ch) + (c_ch - 255 mean_ch) dbias[d])
    dimages = scale_ch * g W, for float images

The last term of dweight is what centring bytes by an integer c left out. Every sum has two stages
of a fixed order, no atomics: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vitkernels._triton import (
    Tile,
    cdiv,
    check_like,
    check_wanted,
    choose_tile,
    dot_dtype,
    multiprocessors,
    on_device,
    reduction_splits,
    split_columns,
    stages,
    sum_partials,
)
from vitkernels.ops.patch_embed._triton_tiles import (
    VARYING,
    Sizes,
    centred,
    channel_centre,
    channel_rest,
    channel_scale,
    check_patches,
    operand_images,
    patch_offset,
    pixel_offset,
    tiles_for,
)


@triton.jit
def _gradient_offset(row, N, P, dtokens_strides):
    """Where g of each row b * N + n lies in dtokens."""
    b = row // N
    token = P + row - b * N
    return b.to(tl.int64) * dtokens_strides[0] + token.to(tl.int64) * dtokens_strides[1]


# --- sums over the images: dpos, dprefix, dbias --------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _token_sums_kernel(
    dtokens_ptr, partial_ptr, B, T, D, images_per_split, dtokens_strides,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial_ptr (splits, T, D), each the sum of dtokens over a run of images.

    Grid: (ceil(D / BLOCK_D), ceil(T / BLOCK_T), splits).
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    mask = (t < T)[:, None] & (d < D)[None, :]
    offset = (t.to(tl.int64) * dtokens_strides[1])[:, None]
    offset += (d.to(tl.int64) * dtokens_strides[2])[None, :]
    first = split * images_per_split
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for b in range(first, tl.minimum(first + images_per_split, B)):
        image = dtokens_ptr + tl.full((), b, tl.int64) * dtokens_strides[0]
        total += tl.load(image + offset, mask=mask, other=0.0).to(tl.float32)
    here = (split.to(tl.int64) * T + t)[:, None] * D + d[None, :]
    tl.store(partial_ptr + here, total, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _token_gradients_kernel(
    partial_ptr, dpos_ptr, dprefix_ptr, dbias_ptr, splits, T, D, P, first_position,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dpos (tokens from first_position on) and dprefix (the first P) from the sums over images.

    dbias_ptr (blocks of tokens, D) gets the sums of the patches among each. Any may be None.
    Grid: (ceil(D / BLOCK_D), ceil(T / BLOCK_T)).
    """
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (t < T)[:, None] & (d < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for split in range(splits):
        here = (tl.full((), split, tl.int64) * T + t)[:, None] * D + d[None, :]
        total += tl.load(partial_ptr + here, mask=mask, other=0.0)
    if dprefix_ptr is not None:
        here = t.to(tl.int64)[:, None] * D + d[None, :]
        value = total.to(dprefix_ptr.dtype.element_ty)
        tl.store(dprefix_ptr + here, value, mask=mask & (t < P)[:, None])
    if dpos_ptr is not None:
        here = (t - first_position).to(tl.int64)[:, None] * D + d[None, :]
        value = total.to(dpos_ptr.dtype.element_ty)
        tl.store(dpos_ptr + here, value, mask=mask & (t >= first_position)[:, None])
    if dbias_ptr is not None:
        of_patches = tl.sum(tl.where((t >= P)[:, None], total, 0.0), 0)
        here = tl.program_id(1).to(tl.int64) * D + d
        tl.store(dbias_ptr + here, of_patches, mask=d < D)


# --- dweight -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _dweight_kernel(
    dtokens_ptr, images_ptr, mean_ptr, partial_ptr,
    rows, C, N, D, P, grid_width, splits, steps_per_split, dtokens_strides, image_strides,
    PATCH: tl.constexpr, IS_BYTE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial_ptr (splits, D, C * K): sums of g (pixels - centre) over runs of patches.

    Grid: (tiles of (D, C * K) times splits,). Limits: rows = B * N < 2^31 - BLOCK_K.
    """
    K: tl.constexpr = PATCH[0] * PATCH[1]
    columns = C * K
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(D, BLOCK_M) * tiles_n
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) - split * tiles
    d = tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.minimum(column // K, C - 1)
    pixel = channel.to(tl.int64) * image_strides[1] + pixel_offset(column % K, image_strides, PATCH)
    centre = mean_ptr
    if mean_ptr is not None:
        centre = channel_centre(mean_ptr, channel, IS_BYTE)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, tl.cdiv(rows, BLOCK_K))):
        row = step * BLOCK_K + tl.arange(0, BLOCK_K)
        offset = _gradient_offset(row, N, P, dtokens_strides)
        pointers = dtokens_ptr + offset[:, None] + (d.to(tl.int64) * dtokens_strides[2])[None, :]
        g = tl.load(pointers, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
        patch = patch_offset(row, N, grid_width, image_strides, PATCH)
        pointers = images_ptr + patch[:, None] + pixel[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        pixels = tl.load(pointers, mask=mask, other=0)
        pixels = centred(pixels, centre, DOT)
        total = tl.dot(g.to(DOT).T, pixels, total, input_precision="ieee")

    offset = (split.to(tl.int64) * D + d)[:, None] * columns + column[None, :]
    tl.store(partial_ptr + offset, total, mask=(d < D)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _finish_dweight_kernel(
    partial_ptr, dbias_ptr, mean_ptr, std_ptr, dweight_ptr, splits, C, D,
    K: tl.constexpr, IS_BYTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight of each element i of (D, C, K). Grid: (ceil(D * C * K / BLOCK),)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = D.to(tl.int64) * C * K
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * size + i, mask=i < size, other=0.0)
    row = i // K
    d = tl.minimum(row // C, D - 1)
    channel = row % C
    if dbias_ptr is not None:
        total += channel_rest(mean_ptr, channel, IS_BYTE) * tl.load(dbias_ptr + d)
    total *= channel_scale(std_ptr, channel, IS_BYTE)
    tl.store(dweight_ptr + i, total.to(dweight_ptr.dtype.element_ty), mask=i < size)


# --- dimages -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def _dimages_kernel(
    dtokens_ptr, weight_ptr, std_ptr, dimages_ptr,
    rows, C, N, D, P, grid_width, dtokens_strides, dimages_strides,
    PATCH: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every pixel belongs to one patch: a product (rows, D) (D, C * K) written as it lies.

    Grid: (tiles of (rows, C * K),). Limits: rows = B * N < 2^31 - BLOCK_M.
    """
    K: tl.constexpr = PATCH[0] * PATCH[1]
    columns = C * K
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) - tile_m * tiles_n
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    g_ptr = dtokens_ptr + _gradient_offset(row, N, P, dtokens_strides)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        pointers = g_ptr[:, None] + (d.to(tl.int64) * dtokens_strides[2])[None, :]
        g = tl.load(pointers, mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
        pointers = weight_ptr + d.to(tl.int64)[:, None] * columns + column[None, :]
        w = tl.load(pointers, mask=(d < D)[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(g.to(DOT), w.to(DOT), total, input_precision="ieee")

    patch = dimages_ptr + patch_offset(row, N, grid_width, dimages_strides, PATCH)
    parts = split_columns(total, BLOCK_N // 32)
    for i in tl.static_range(len(parts)):
        j = tile_n * BLOCK_N + i * 32 + tl.arange(0, 32)
        channel = tl.minimum(j // K, C - 1)
        value = parts[i]
        if std_ptr is not None:
            value *= channel_scale(std_ptr, channel, False)[None, :]
        pixel = channel.to(tl.int64) * dimages_strides[1]
        pixel += pixel_offset(j % K, dimages_strides, PATCH)
        mask = (row < rows)[:, None] & (j < columns)[None, :]
        pointers = patch[:, None] + pixel[None, :]
        tl.store(pointers, value.to(dimages_ptr.dtype.element_ty), mask=mask)


# --- launch settings -----------------------------------------------------------------------------

# dweight: centred pixels pass through registers into shared memory, and a long sum needs no second
# block: 128 x 128 to 8 warps. dimages: a plain product, two blocks that share a multiprocessor.
SMALL = Tile(64, 64, 32, 4, 3)
DWEIGHT_SM90 = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3))
DWEIGHT_SM80 = (Tile(128, 128, 32, 8, 3), SMALL)
DIMAGES_SM90 = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3))
DIMAGES_SM80 = (Tile(128, 128, 32, 8, 4), SMALL)


def sums_plan(B: int, T: int, D: int, processors: int) -> tuple[int, int, int, int]:
    """(BLOCK_T, BLOCK_D, splits, images per split): 16 bytes a thread, 8 blocks of 4 warps each."""
    block_t, block_d = 4, 256
    blocks = cdiv(T, block_t) * cdiv(D, block_d)
    per_split = cdiv(B, max(1, min(B, cdiv(8 * processors, blocks))))
    return block_t, block_d, cdiv(B, per_split), per_split


# --- launchers -----------------------------------------------------------------------------------


def _token_gradients(dtokens, sizes: Sizes, first_position, dpos, dprefix, dbias) -> None:
    """Writes dpos, dprefix and dbias (D,) in fp32; any may be None."""
    B, D, T = sizes.B, sizes.D, dtokens.shape[1]
    like = {"dtype": torch.float32, "device": dtokens.device}
    plan = sums_plan(B, T, D, multiprocessors(dtokens.device))
    block_t, block_d, splits, per_split = plan
    grid = (cdiv(D, block_d), cdiv(T, block_t))
    partial = torch.empty((splits, T, D), **like)
    of_blocks = None if dbias is None else torch.empty((grid[1], D), **like)
    blocks = {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 4}
    with on_device(dtokens):
        _token_sums_kernel[(*grid, splits)](
            dtokens, partial, B, T, D, per_split, dtokens.stride(), **blocks
        )
        _token_gradients_kernel[grid](
            partial, dpos, dprefix, of_blocks, splits, T, D, sizes.P, first_position, **blocks
        )
    if dbias is not None:
        sum_partials(of_blocks, dbias)


def _dweight(dtokens, images, sizes: Sizes, mean, std, dbias, dweight) -> None:
    """dbias: the fp32 one where centred bytes are to be corrected, else None."""
    B, C, N, D, P, patch, width = sizes
    rows, columns, device = B * N, C * sizes.K, images.device
    is_byte, images = images.dtype == torch.uint8, operand_images(images, dtokens.dtype)
    processors = multiprocessors(device)
    table = tiles_for(DWEIGHT_SM90, DWEIGHT_SM80, dtokens.dtype, device)
    tile = choose_tile(table, D, columns, processors)
    splits, steps = reduction_splits(tile, D, columns, rows, processors)
    partial = torch.empty((splits, D, columns), dtype=torch.float32, device=device)
    tiles = cdiv(D, tile.m) * cdiv(columns, tile.n)
    with on_device(images):
        _dweight_kernel[(tiles * splits,)](
            dtokens, images, mean, partial, rows, C, N, D, P, width, splits, steps,
            dtokens.stride(), images.stride(), PATCH=patch, IS_BYTE=is_byte,
            DOT=dot_dtype(dtokens.dtype), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.num_warps, num_stages=stages(device, tile.num_stages),
        )  # fmt: skip
        _finish_dweight_kernel[(cdiv(D * columns, 1024),)](
            partial, dbias, mean, std, dweight, splits, C, D, K=sizes.K, IS_BYTE=is_byte,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip


def _dimages(dtokens, weight, sizes: Sizes, std, dimages) -> None:
    B, C, N, D, P, patch, width = sizes
    rows, columns, device = B * N, C * sizes.K, dtokens.device
    table = tiles_for(DIMAGES_SM90, DIMAGES_SM80, dtokens.dtype, device)
    tile = choose_tile(table, rows, columns, multiprocessors(device))
    weight = weight.to(dtokens.dtype).contiguous()
    with on_device(dtokens):
        _dimages_kernel[(cdiv(rows, tile.m) * cdiv(columns, tile.n),)](
            dtokens, weight, std, dimages, rows, C, N, D, P, width, dtokens.stride(),
            dimages.stride(), PATCH=patch, DOT=dot_dtype(dtokens.dtype), BLOCK_M=tile.m,
            BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps,
            num_stages=stages(device, tile.num_stages),
        )  # fmt: skip


def patch_embed_bwd(
    dtokens, images, weight, bias, pos_embed, prefix_tokens, mean, std, output_mask
):
    op = "patch_embed_bwd"
    tensors = (images, weight, bias, pos_embed, prefix_tokens)
    names = ("images", "weight", "bias", "pos_embed", "prefix_tokens")
    sizes = check_patches(op, *tensors, mean, std)
    check_wanted(op, output_mask, dict(zip(names, tensors, strict=True)))
    if output_mask[0]:
        check_like(op, "images whose gradient is wanted", images, images.shape)
    B, N, D, P = sizes.B, sizes.N, sizes.D, sizes.P
    check_like(op, "dtokens", dtokens, (B, P + N, D))
    gradients = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if m else None
        for t, m in zip(tensors, output_mask, strict=True)
    ]
    dimages, dweight, dbias, dpos, dprefix = gradients
    if B == 0:
        return tuple(None if g is None else g.zero_() for g in gradients)
    mean, std = (None if t is None else t.contiguous() for t in (mean, std))
    corrected = dweight is not None and images.dtype == torch.uint8 and mean is not None
    wide = None
    if dbias is not None or corrected:
        wide = torch.empty(D, dtype=torch.float32, device=dtokens.device)
    if any(g is not None for g in (wide, dpos, dprefix)):
        first_position = 0 if pos_embed is None else P + N - pos_embed.shape[1]
        _token_gradients(dtokens, sizes, first_position, dpos, dprefix, wide)
    if dbias is not None:
        dbias.copy_(wide)
    if dweight is not None:
        _dweight(dtokens, images, sizes, mean, std, wide if corrected else None, dweight)
    if dimages is not None:
        _dimages(dtokens, weight, sizes, std, dimages)
    return dimages, dweight, dbias, dpos, dprefix
