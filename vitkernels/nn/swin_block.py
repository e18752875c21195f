"""The block of Swin Transformer: attention in shifted windows and an MLP, each behind a norm."""

from __future__ import annotations

from torch import Tensor, nn

from .drop_path import DropPath
from .layer_norm import LayerNorm
from .mlp import Mlp
from .patch_embed import pair
from .pending import Pending, add, add_norm, left
from .window_attention import WindowAttention
from .windows import Pair, WindowedBlock


class SwinBlock(WindowedBlock):
    """x += drop_path1(attn(norm1(x))); x += drop_path2(mlp(norm2(x))), x (B, H, W, C).

    Liu et al. 2021; timm's arguments, attributes and state_dict keys. Given a Pending it returns a
    Pending, its last add still to be done.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Pair,
        num_heads: int = 4,
        head_dim: int | None = None,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        always_partition: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        window_clamp: str = "axis",
        pad_mode: str = "pad_roll",
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.mlp_ratio = dim, mlp_ratio
        self._set_geometry(
            input_resolution, pair(window_size), pair(shift_size), always_partition, window_clamp,
            pad_mode,
        )  # fmt: skip
        self.norm1 = norm_layer(dim, **where)
        self.attn = WindowAttention(
            dim, num_heads, head_dim, self.window_size, qkv_bias, attn_drop, proj_drop, **where
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **where)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **where)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor | Pending) -> Tensor | Pending:
        y, stream = add_norm(x if isinstance(x, Pending) else Pending(x), self.norm1)
        branch = self.attn(y, windows=self.windows(*y.shape[1:3]))
        y, stream = add_norm(left(stream, branch, self.drop_path1), self.norm2)
        pending = left(stream, self.mlp(y), self.drop_path2)
        return pending if isinstance(x, Pending) else add(pending)
