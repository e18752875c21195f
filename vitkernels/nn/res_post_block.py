"""The Transformer block with the norm after each branch (res-post-norm, Swin V2)."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import layer_norm_add
from .attention import Attention
from .drop_path import DropPath
from .layer_norm import LayerNorm
from .mlp import Mlp
from .pending import fusable


class ResPostBlock(nn.Module):
    """x += drop_path1(norm1(attn(x))); x += drop_path2(norm2(mlp(x))).

    Liu et al. 2022, section 3.2; timm's arguments and state_dict keys. init_values is where the
    weights of the norms begin.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        mlp_layer=Mlp,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.init_values = init_values
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, proj_bias, attn_drop, proj_drop,
            norm_layer, **where,
        )  # fmt: skip
        self.norm1 = norm_layer(dim, **where)
        self.drop_path1 = DropPath(drop_path)
        self.mlp = mlp_layer(
            dim,
            int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **where,
        )
        self.norm2 = norm_layer(dim, **where)
        self.drop_path2 = DropPath(drop_path)
        self.init_weights()

    def init_weights(self) -> None:
        if self.init_values is not None:
            nn.init.constant_(self.norm1.weight, self.init_values)
            nn.init.constant_(self.norm2.weight, self.init_values)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        branch = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = norm_add(branch, x, self.norm1, self.drop_path1)
        return norm_add(self.mlp(x), x, self.norm2, self.drop_path2)


def norm_add(branch: Tensor, x: Tensor, norm: nn.Module, drop_path: nn.Module) -> Tensor:
    """x + drop_path(norm(branch)), in one pass where nobody looks between."""
    if not fusable(norm, drop_path):
        return x + drop_path(norm(branch))
    row_scale = drop_path.row_scale(branch)
    return layer_norm_add(branch, x, norm.weight, norm.bias, norm.eps, row_scale=row_scale)
