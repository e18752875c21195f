"""Multi-head self-attention in shifted windows; timm's arguments, attributes and state_dict keys.

Both modules take and return maps (B, H, W, C), where timm's take batches of windows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dispatch import no_autocast
from ..ops import linear, window_attention
from ..ops.window_attention import reference
from .linear import Linear
from .resample import resample_bias_table
from .trunc_normal import trunc_normal_
from .watched import own_part, plain
from .windows import Pair, Windows


class _WindowAttention(nn.Module):
    """What both share: from the map to the map, around one fused operator."""

    scale: float | None
    logit_scale: Tensor | None

    def forward(self, x: Tensor, windows: Windows | None = None) -> Tensor:
        """windows: how the map is cut; None: unshifted, of a map of whole windows."""
        windows = windows or Windows(self.window_size)
        out = window_attention(
            self._qkv(windows.fit(x)),
            self.bias_table(),
            window_size=windows.size,
            shift_size=windows.shift,
            num_heads=self.num_heads,
            scale=self.scale,
            logit_scale=own_part(self.logit_scale),
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(windows.crop(out, *x.shape[1:3])))

    def weights(self, x: Tensor, windows: Windows | None = None) -> Tensor:
        """The softmax that forward(x) would use, (B, windows, heads, N, N), fp32: for pictures."""
        windows = windows or Windows(self.window_size)
        qkv = self._qkv(windows.fit(x))
        where = (windows.size, windows.shift)
        q, k, _ = reference.unpack(qkv, self.num_heads, *where)
        table, logit_scale = self.bias_table(), self.logit_scale
        scores, _ = reference.scores(q, k, table, self.scale, logit_scale, qkv.shape, *where)
        return scores.softmax(-1)


class WindowAttention(_WindowAttention):
    """Swin's: softmax(q k^T / sqrt(D) + B) v with a learned table B of relative positions.

    Liu et al. 2021, section 3.2. The rows of qkv.weight are [all q | all k | all v], each
    head-major.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        window_size: Pair = (7, 7),
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self._set_window(window_size)
        head_dim = head_dim or dim // num_heads
        self.scale, self.logit_scale = head_dim**-0.5, None
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **where))
        self.qkv = Linear(dim, 3 * head_dim * num_heads, bias=qkv_bias, **where)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(head_dim * num_heads, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _set_window(self, window_size: Pair) -> None:
        self.window_size = tuple(window_size)
        self.window_area = window_size[0] * window_size[1]

    def set_window_size(self, window_size: Pair) -> None:
        """Another window; the table is resampled, as timm does it."""
        if tuple(window_size) == self.window_size:
            return
        table = self.relative_position_bias_table
        resampled = resample_bias_table(table.detach(), window_size, self.window_size)
        self.relative_position_bias_table = nn.Parameter(resampled, table.requires_grad)
        self._set_window(window_size)

    def bias_table(self) -> Tensor:
        return own_part(self.relative_position_bias_table)

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)


class WindowAttentionV2(_WindowAttention):
    """Swin V2's: cosine attention with a learned factor, and position biases from an MLP.

    softmax(exp(min(logit_scale, ln 100)) cos(q, k) + 16 sigmoid(cpb_mlp(coordinates))) v, with
    coordinates on a logarithmic scale; k has no bias. Liu et al. 2022, section 3.3.
    """

    def __init__(
        self,
        dim: int,
        window_size: Pair,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: Pair = (0, 0),
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.num_heads = dim, num_heads
        self.window_size = tuple(window_size)
        self.pretrained_window_size = tuple(pretrained_window_size)
        self.scale = None
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1, **where))
        self.cpb_mlp = nn.Sequential(
            Linear(2, 512, **where), nn.ReLU(), Linear(512, num_heads, bias=False, **where)
        )
        self.qkv = Linear(dim, 3 * dim, bias=False, **where)
        self.q_bias = nn.Parameter(torch.empty(dim, **where)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim, **where)) if qkv_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()
        self._renew_buffers()
        self.register_load_state_dict_post_hook(WindowAttentionV2._renew_buffers)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(10))
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def _renew_buffers(self, *_) -> None:
        """k_bias and the coordinates, beside the parameters: never from a meta tensor."""
        like = self.proj.weight
        k_bias = None if self.q_bias is None else torch.zeros_like(self.q_bias)
        table = log_coordinates(self.window_size, self.pretrained_window_size)
        table = table.to(device=like.device, dtype=like.dtype)
        self.register_buffer("k_bias", k_bias, persistent=False)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> WindowAttentionV2:
        super()._apply(fn, recurse)
        self._renew_buffers()
        return self

    def set_window_size(self, window_size: Pair) -> None:
        """Another window; the MLP gives its biases."""
        self.window_size = tuple(window_size)
        self._renew_buffers()

    def bias_table(self) -> Tensor:
        """((2 Wh - 1)(2 Ww - 1), heads), fp32 (float64 in float64), also under autocast."""
        with no_autocast(self.logit_scale.device):
            table = reference.widen(self.cpb_mlp(self.relative_coords_table)).flatten(0, 2)
            return 16 * torch.sigmoid(table)

    def _qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        if not plain(self.q_bias):  # heads split over processes: the Linear knows how
            q_bias, v_bias = own_part(self.q_bias), own_part(self.v_bias)
            qkv = self.qkv(x)
            return qkv + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)).to(qkv.dtype)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return (linear if plain(x, self.qkv.weight) else F.linear)(x, self.qkv.weight, bias)


def log_coordinates(window: Pair, pretrained: Pair) -> Tensor:
    """(1, 2 Wh - 1, 2 Ww - 1, 2) of each relative position: sign(d) log2(1 + |d|) / 3, where d is
    the distance in eighths of the (pretraining) window's."""
    reach = pretrained if pretrained[0] > 0 else window
    axes = [
        torch.arange(1 - w, w, dtype=torch.float32, device="cpu") / max(r - 1, 1)
        for w, r in zip(window, reach, strict=True)
    ]
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None] * 8
    return torch.sign(table) * torch.log2(table.abs() + 1.0) / math.log2(8)
