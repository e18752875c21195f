"""Triton forward of patch_embed: an implicit-im2col product straight from the images.

    tokens[b, P + n] = sum_ch scale_ch * (patch - centre_ch) W_ch^T + b' + pos[n]

Channels follow each other in one fp32 accumulator, which is multiplied by scale_before / scale_ch
between them, so no weight is folded or rounded a second time. Bytes are centred by an integer c,
exact in 16 bits; b' = bias + sum_ch scale_ch * (c_ch - 255 mean_ch) * sum(W_ch) makes up for it.
The prefix rows are written by programs behind those of the product, in the same launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vitkernels._triton import (
    FLOATS,
    Tile,
    cdiv,
    choose_tile,
    dot_dtype,
    fail,
    multiprocessors,
    on_device,
    split_columns,
    stages,
)
from vitkernels.ops.patch_embed._triton_tiles import (
    VARYING,
    block_of_channel,
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


@triton.jit(do_not_specialize=VARYING)
def _fold_bias_kernel(
    weight_ptr, bias_ptr, mean_ptr, std_ptr, folded_ptr, C, D,
    PADDED_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """b' (D,) of centred bytes; weight_ptr is (D, C, PADDED_K). Grid: (ceil(D / BLOCK_D),)."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for channel in range(C):
        rest = channel_rest(mean_ptr, channel, True) * channel_scale(std_ptr, channel, True)
        for start in range(0, PADDED_K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offset = (d.to(tl.int64) * C + channel)[:, None] * PADDED_K + k[None, :]
            mask = (d < D)[:, None] & (k < PADDED_K)[None, :]
            total += rest * tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    folded = tl.sum(total, 1)
    if bias_ptr is not None:
        folded += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(folded_ptr + d, folded, mask=d < D)


@triton.jit
def _write_prefix(
    prefix_ptr, pos_ptr, tokens_ptr, row, column, B, N, D, P, first_position,
):  # fmt: skip
    """tokens[b, p] = prefix[p] + pos[p] of the rows b * P + p."""
    b = row // P
    p = row - b * P
    mask = (row < B * P)[:, None] & (column < D)[None, :]
    offset = p.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(prefix_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if pos_ptr is not None:  # noqa: SIM102 (decided when compiling; the next one when running)
        if first_position > 0:
            value += tl.load(pos_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    offset += (b.to(tl.int64) * (P + N) * D)[:, None]
    tl.store(tokens_ptr + offset, value.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(
    images_ptr, weight_ptr, bias_ptr, pos_ptr, prefix_ptr, mean_ptr, std_ptr, tokens_ptr,
    B, C, N, D, P, grid_width, first_position, image_strides,
    PATCH: tl.constexpr, PADDED_K: tl.constexpr, IS_BYTE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of B * N patches, then tiles of B * P prefix rows), each by D in BLOCK_N.

    weight_ptr is (D, C, PADDED_K) in the dtype of the product; pos_ptr (first_position + N, D).
    Tiles of one run of patches follow each other, so that their pixels stay in L2.
    Limits: B * (P + N) < 2^31 - BLOCK_M.
    """
    K: tl.constexpr = PATCH[0] * PATCH[1]
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    tile_n = tl.program_id(0) - tile_m * tiles_n
    patch_tiles = tl.cdiv(B * N, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile_m >= patch_tiles:
        if prefix_ptr is not None:
            row = (tile_m - patch_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            _write_prefix(prefix_ptr, pos_ptr, tokens_ptr, row, column, B, N, D, P, first_position)
        return
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    patch = images_ptr + patch_offset(row, N, grid_width, image_strides, PATCH)
    weight = weight_ptr + column.to(tl.int64) * C * PADDED_K

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    scale = channel_scale(std_ptr, 0, IS_BYTE)
    for channel in range(C):
        if std_ptr is not None:
            before = scale
            scale = channel_scale(std_ptr, channel, IS_BYTE)
            total *= before / scale
        centre = mean_ptr
        if mean_ptr is not None:
            centre = channel_centre(mean_ptr, channel, IS_BYTE)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            pointers = patch[:, None] + pixel_offset(k, image_strides, PATCH)[None, :]
            mask = (row < B * N)[:, None]
            if K % BLOCK_K != 0:
                mask = mask & (k < K)[None, :]
            pixels = tl.load(pointers, mask=mask, other=0)
            pixels = centred(pixels, centre, DOT)
            mask = (column < D)[:, None]
            if PADDED_K % BLOCK_K != 0:
                mask = mask & (k < PADDED_K)[None, :]
            pointers = weight[:, None] + (channel * PADDED_K + k)[None, :]
            w = tl.load(pointers, mask=mask, other=0.0).to(DOT)
            total = tl.dot(pixels, w.T, total, input_precision="ieee")
        patch += image_strides[1]

    parts = split_columns(total, BLOCK_N // 32)
    b = row // N
    n = row - b * N
    token = (b.to(tl.int64) * (P + N) + P + n) * D
    for i in tl.static_range(len(parts)):
        d = tile_n * BLOCK_N + i * 32 + tl.arange(0, 32)
        mask = (row < B * N)[:, None] & (d < D)[None, :]
        value = parts[i] * scale
        if bias_ptr is not None:
            value += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if pos_ptr is not None:
            offset = (first_position + n).to(tl.int64)[:, None] * D + d[None, :]
            value += tl.load(pos_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        offset = token[:, None] + d[None, :]
        tl.store(tokens_ptr + offset, value.to(tokens_ptr.dtype.element_ty), mask=mask)


# --- launch settings -----------------------------------------------------------------------------

# K is short (three channels of 256) and each channel starts its loads anew, so at least two blocks
# share a multiprocessor: 255 registers of 4 warps. 128 x 128 has 85 FLOPs a byte of L2 from bytes;
# 64 x 256 halves the gathers of pixels that do not lie side by side; on sm_80 both would spill.
SMALL = Tile(64, 64, 32, 4, 3)
SM90 = (Tile(128, 128, 32, 4, 4), SMALL)
SM90_GATHERED = (Tile(64, 256, 32, 4, 3), SMALL)
SM80 = (Tile(64, 128, 32, 4, 4), SMALL)


# --- launchers -----------------------------------------------------------------------------------


def padded_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(D, Cin, K) in the dtype of the product, K padded by zeros to 16, so that rows are aligned.

    Only 14 x 14 and odd patches need it; 0.6 million elements against 50 million pixels.
    """
    flat = weight.to(dtype).flatten(2).contiguous()
    rest = -flat.shape[2] % 16
    return F.pad(flat, (0, rest)) if rest else flat


def _bias(weight, bias, mean, std, is_byte):
    """bias, or b' in fp32 where bytes are centred. weight is the padded one."""
    if not is_byte or mean is None:
        return None if bias is None else bias.contiguous()
    D, C, padded_k = weight.shape
    folded = torch.empty(D, dtype=torch.float32, device=weight.device)
    with on_device(weight):
        _fold_bias_kernel[(cdiv(D, 4),)](
            weight, None if bias is None else bias.contiguous(), mean, std, folded, C, D,
            PADDED_K=padded_k, BLOCK_D=4, BLOCK_K=256, num_warps=4,
        )  # fmt: skip
    return folded


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def patch_embed_fwd(images, weight, bias, pos_embed, prefix_tokens, mean, std, out_dtype):
    op = "patch_embed_fwd"
    sizes = check_patches(op, images, weight, bias, pos_embed, prefix_tokens, mean, std)
    if out_dtype not in FLOATS:
        fail(op, "out_dtype", "float32 or bfloat16 or float16", out_dtype)
    B, C, N, D, P, patch, width = sizes
    tokens = torch.empty((B, P + N, D), dtype=out_dtype, device=images.device)
    if B == 0:
        return tokens
    is_byte, images = images.dtype == torch.uint8, operand_images(images, out_dtype)
    pos_embed, prefix_tokens, mean, std = _contiguous(pos_embed, prefix_tokens, mean, std)
    weight = padded_weight(weight, out_dtype)
    bias = _bias(weight, bias, mean, std, is_byte)
    table = tiles_for(
        SM90 if images.stride(3) == 1 else SM90_GATHERED, SM80, out_dtype, images.device
    )
    tile = choose_tile(table, B * N, D, multiprocessors(images.device))
    tiles = (cdiv(B * N, tile.m) + cdiv(B * P, tile.m)) * cdiv(D, tile.n)
    with on_device(images):
        _forward_kernel[(tiles,)](
            images, weight, bias, pos_embed, prefix_tokens if P else None, mean, std, tokens,
            B, C, N, D, P, width, 0 if pos_embed is None else pos_embed.shape[1] - N,
            images.stride(), PATCH=patch, PADDED_K=weight.shape[2], IS_BYTE=is_byte,
            DOT=dot_dtype(out_dtype), BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_K=min(tile.k, block_of_channel(sizes.K)),
            num_warps=tile.num_warps, num_stages=stages(images.device, tile.num_stages),
        )  # fmt: skip
    return tokens
