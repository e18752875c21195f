"""The block of Swin Transformer V2: the norms come after the branches."""

from __future__ import annotations

from torch import Tensor, nn

from .drop_path import DropPath
from .layer_norm import LayerNorm
from .mlp import Mlp
from .patch_embed import pair
from .res_post_block import norm_add
from .window_attention import WindowAttentionV2
from .windows import Pair, WindowedBlock


class SwinV2Block(WindowedBlock):
    """x += drop_path1(norm1(attn(x))); x += drop_path2(norm2(mlp(x))), x (B, H, W, C).

    Liu et al. 2022; timm's arguments, attributes and state_dict keys.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Pair,
        num_heads: int = 4,
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
        pretrained_window_size: int | Pair = 0,
        window_clamp: str = "axis",
        pad_mode: str = "pad_roll",
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.mlp_ratio = dim, num_heads, mlp_ratio
        self._set_geometry(
            input_resolution, pair(window_size), pair(shift_size), always_partition, window_clamp,
            pad_mode,
        )  # fmt: skip
        self.attn = WindowAttentionV2(
            dim, self.window_size, num_heads, qkv_bias, attn_drop, proj_drop,
            pair(pretrained_window_size), **where,
        )  # fmt: skip
        self.norm1 = norm_layer(dim, **where)
        self.drop_path1 = DropPath(drop_path)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **where)
        self.norm2 = norm_layer(dim, **where)
        self.drop_path2 = DropPath(drop_path)

    def init_weights(self) -> None:
        """Each branch begins at zero."""
        for norm in (self.norm1, self.norm2):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(x, windows=self.windows(*x.shape[1:3]))
        x = norm_add(branch, x, self.norm1, self.drop_path1)
        return norm_add(self.mlp(x), x, self.norm2, self.drop_path2)
