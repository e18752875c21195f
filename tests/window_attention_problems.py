"""Problems of window_attention, and two other ways to write it, neither of them the reference's."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from problems import Problem, lowest_precision

from vitkernels.ops._random import keep_mask
from vitkernels.testing import SIXTEEN_BIT

LN_100 = math.log(100.0)
LN_100_FP32 = torch.tensor(LN_100).item()  # the clamp of every backend that computes in fp32

MANY_HEADS = 32  # enough to compare the errors of one number for each head

# Beyond testing.LAYOUTS: how the map alone may lie, everything else contiguous.
MAP_LAYOUTS = ("channels_first", "columns_first", "cropped", "rows_apart", "columns_apart")
MAP_LAYOUTS += ("pixels_apart", "one_row")


@dataclasses.dataclass
class WindowProblem(Problem):
    def laid_out(self, layout: str) -> Problem:
        if layout not in MAP_LAYOUTS:
            return super().laid_out(layout)
        problem = super().laid_out("contiguous")
        problem.inputs["qkv"] = map_in(self.inputs["qkv"], layout)
        return problem

    def slack_of(self, names: tuple[str, ...]) -> float:
        slack = 1.0
        if self.precision is None:
            # A score of size L carries L eps into its probability, and lse in fp32 as much again.
            slack = max(1.0, 0.2 * self.largest_score())
        if names == ("logit_scale",):
            # A handful of long sums: the yardstick's own error is a lottery.
            slack *= 8.0 if self.inputs["logit_scale"].numel() < MANY_HEADS else 1.5
        return slack

    def largest_score(self) -> float:
        """About, without the position bias."""
        if "logit_scale" in self.inputs:
            return self.inputs["logit_scale"].float().clamp(max=LN_100).exp().max().item()
        q = self.inputs["qkv"][..., : self.inputs["qkv"].shape[-1] // 3]
        D = q.shape[-1] // self.options["num_heads"]
        scale = D**-0.5 if self.options["scale"] is None else abs(self.options["scale"])
        return 3 * scale * D**0.5 * q.float().std().item()


def map_in(qkv: torch.Tensor, layout: str) -> torch.Tensor:
    """An equal map in another layout (one_row: its first row, repeated); NaN lies around it.

    channels_first: as a convolution wrote it; columns_first: columns are the rows of memory;
    cropped: a window of a larger map; *_apart: every other row, column or pixel of a larger map.
    """
    B, H, W, C = qkv.shape
    if layout == "channels_first":
        return qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == "columns_first":
        return qkv.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one_row":
        return qkv[:, :1].clone().expand(B, H, W, C)
    larger = {
        "cropped": (H + 5, W + 7),
        "rows_apart": (2 * H, W),
        "columns_apart": (H, 2 * W),
        "pixels_apart": (2 * H, 3 * W),
    }[layout]
    whole = torch.full((B, *larger, C), math.nan, dtype=qkv.dtype, device=qkv.device)
    view = {
        "cropped": whole[:, 3 : 3 + H, 5 : 5 + W],
        "rows_apart": whole[:, ::2],
        "columns_apart": whole[:, :, ::2],
        "pixels_apart": whole[:, ::2, ::3],
    }[layout]
    return view.copy_(qkv)


def window_problem(
    window,
    shift=0,
    dtype=torch.float32,
    *,
    B=2,
    windows=(2, 2),
    heads=None,
    D=16,
    table_dtype=torch.float32,
    cosine=False,
    logit_scale=None,
    scale_dtype=torch.float32,
    scale=None,
    dropout_p=0.0,
    magnitude=1.0,
    autocast=None,
    seed=5,
) -> WindowProblem:
    """A map of rows x columns `windows`; `magnitude` is q's; two heads, or four of cosines.

    cosine: Swin V2, logit_scale around ln 10 in shape (heads,) or with "timm" (heads, 1, 1);
    logit_scale: its values instead, one for all heads or one for each.
    """
    (Wh, Ww), shift = pair(window), pair(shift)
    cosine = "(heads,)" if logit_scale is not None and not cosine else cosine
    heads = heads or (4 if cosine else 2)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    qkv = normal(B, windows[0] * Wh, windows[1] * Ww, 3 * heads * D)
    qkv[..., : heads * D] *= magnitude
    table = normal((2 * Wh - 1) * (2 * Ww - 1), heads)
    inputs = {"qkv": qkv.to(dtype), "bias_table": table.to(table_dtype)}
    if cosine:
        values = LN_100 / 2 + 0.3 * normal(heads)
        if logit_scale is not None:
            values = torch.as_tensor(logit_scale, dtype=torch.float32).expand(heads).clone()
        shape = (heads, 1, 1) if cosine == "timm" else (heads,)
        inputs["logit_scale"] = values.reshape(shape).to(scale_dtype)
    options = {"window_size": (Wh, Ww), "shift_size": shift, "num_heads": heads}
    # One token in a window: every score's gradient is 0, judged beside dv.
    groups = tuple((name,) for name in inputs) if Wh * Ww > 1 else (tuple(inputs),)
    computed = autocast or dtype
    return WindowProblem(
        "window_attention",
        inputs,
        options | {"scale": scale, "dropout_p": dropout_p},
        spec_window_attention,
        functools.partial(eager_window_attention, dtype=computed),
        ("out",),
        groups,
        lowest_precision(computed, table_dtype, scale_dtype) if computed in SIXTEEN_BIT else None,
        seed,
        autocast,
    )


def small_windows(backend, window=(2, 3), shift=1, dtype=torch.float32, **options) -> WindowProblem:
    """Two samples of 2 x 3 windows; for the interpreter one sample of 2 x 2."""
    sizes = {"windows": (2, 3), "B": 2}
    if backend == "triton":
        sizes = {"windows": (2, 2), "B": 1, "heads": 2}
    return window_problem(window, shift, dtype, **(sizes | options))


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# ---- The truth: every token by its address


def spec_window_attention(
    *, qkv, bias_table, logit_scale=None, window_size, shift_size, num_heads, scale, dropout_p, seed
):
    """No roll, no regions: a list of addresses for each window, and one rule for the seam.

    Two tokens of a window attend to each other when they are as far apart on the map as they are
    in the window; where the shift wrapped one of them around an edge they are not.
    """
    (Wh, Ww), (H, W) = window_size, qkv.shape[1:3]
    place = torch.tensor(
        [
            [(top + i, left + j) for i in range(Wh) for j in range(Ww)]
            for top in range(0, H, Wh)
            for left in range(0, W, Ww)
        ],
        device=qkv.device,
    )  # (windows, N, 2): row and column in the shifted map
    source = torch.stack([(place[..., 0] + shift_size[0]) % H, (place[..., 1] + shift_size[1]) % W])
    address = source[0] * W + source[1]  # (windows, N)
    tokens = qkv.flatten(1, 2)[:, address].unflatten(-1, (3, num_heads, -1))
    q, k, v = tokens.permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, N, D)

    if logit_scale is None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        s = torch.einsum("bwhid,bwhjd->bwhij", q, k) * scale
    else:
        factor = logit_scale.flatten()[:, None, None].clamp(max=LN_100_FP32).exp()
        s = torch.einsum("bwhid,bwhjd->bwhij", direction(q), direction(k)) * factor
    apart = place[:, :, None] - place[:, None]  # (windows, N, N, 2): query minus key
    dy, dx = apart[0].unbind(-1)
    table = bias_table.unflatten(0, (2 * Wh - 1, 2 * Ww - 1))
    s = s + table[dy + Wh - 1, dx + Ww - 1].permute(2, 0, 1)
    on_the_map = source[:, :, :, None] - source[:, :, None]  # (2, windows, N, N)
    attends = (on_the_map == apart.permute(3, 0, 1, 2)).all(0)
    p = s.masked_fill(~attends[:, None], -torch.inf).softmax(-1)
    if dropout_p > 0:
        p = p * keep_mask(seed, tuple(p.shape), dropout_p) / (1 - dropout_p)
    out = torch.einsum("bwhij,bwhjd->bwihd", p, v).flatten(3).flatten(1, 2)
    return out[:, address.flatten().argsort()].unflatten(1, (H, W))


def direction(x):
    """x / max(|x|, 1e-12), with no gradient into a shorter vector."""
    length = x.norm(dim=-1, keepdim=True)
    short = length < 1e-12
    return torch.where(short, x.detach() / 1e-12, x / torch.where(short, 1.0, length))


# ---- The yardstick: as timm writes it


def eager_window_attention(
    *, qkv, bias_table, logit_scale=None, window_size, shift_size, num_heads, scale, dropout_p,
    seed, dtype=None,
):  # fmt: skip
    """Roll, partition, scores, bias, mask, softmax, reverse, roll, each in the tested dtype."""
    qkv = qkv.to(dtype)
    (B, H, W, _), (Wh, Ww) = qkv.shape, window_size
    back = (-shift_size[0], -shift_size[1])
    x = torch.roll(qkv, back, (1, 2))
    x = partition(x, window_size).unflatten(-1, (3, num_heads, -1))
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)  # (B * windows, heads, N, D)
    if logit_scale is None:
        s = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    else:
        factor = logit_scale.reshape(-1, 1, 1).clamp(max=LN_100_FP32).exp().to(q.dtype)
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * factor
    index = relative_position_index(window_size).to(qkv.device)
    bias = bias_table[index.view(-1)].view(Wh * Ww, Wh * Ww, -1).permute(2, 0, 1)
    s = s + bias.to(s.dtype)
    if any(shift_size):
        seam = shift_mask((H, W), window_size, shift_size).to(qkv.device)
        s = s.unflatten(0, (B, -1)).masked_fill(seam[:, None], -torch.inf).flatten(0, 1)
    p = s.softmax(-1)
    if dropout_p > 0:
        keep = keep_mask(seed, (B, *s.unflatten(0, (B, -1)).shape[1:]), dropout_p)
        p = p * keep.flatten(0, 1) / (1 - dropout_p)
    x = (p @ v).transpose(1, 2).flatten(2).view(B, H // Wh, W // Ww, Wh, Ww, -1)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)
    return torch.roll(x, tuple(shift_size), (1, 2))


def partition(x, window):
    """(B, H, W, C) -> (B * windows, N, C)."""
    (B, H, W, C), (Wh, Ww) = x.shape, window
    x = x.view(B, H // Wh, Wh, W // Ww, Ww, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, Wh * Ww, C)


def relative_position_index(window):
    Wh, Ww = window
    coords = torch.stack(torch.meshgrid(torch.arange(Wh), torch.arange(Ww), indexing="ij"))
    coords = coords.flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += Wh - 1
    relative[:, :, 1] += Ww - 1
    relative[:, :, 0] *= 2 * Ww - 1
    return relative.sum(-1)


def shift_mask(size, window, shift):
    """(windows, N, N), True where timm's mask holds -100: nine regions, numbered by slices."""
    image, count = torch.zeros((1, *size, 1)), 0
    rows, columns = (
        (slice(0, -w), slice(-w, -s if s else None), slice(-s, None) if s else slice(0))
        for w, s in zip(window, shift, strict=True)
    )
    for row in rows:
        for column in columns:
            image[:, row, column] = count
            count += 1
    regions = partition(image, window).squeeze(-1)
    return (regions[:, None] - regions[:, :, None]) != 0
