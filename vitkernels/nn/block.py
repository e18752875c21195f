"""The pre-norm Transformer block.

A block given a Pending returns a Pending, its last add still to be done. Given a Tensor it returns
a Tensor, as timm's does. With rows=n it computes the first n tokens of its output only: all tokens
are normalised and give keys and values, the n go through the rest.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention import Attention
from .drop_path import DropPath
from .glu_mlp import GluMlp
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .linear import Linear
from .mlp import GELUTanh, Mlp, QuickGELU
from .pending import Pending, add_norm, fusable
from .watched import plain, untouched


class Block(nn.Module):
    """x += drop_path1(ls1(attn(norm1(x)))); x += drop_path2(ls2(mlp(norm2(x)))).

    Dosovitskiy et al. 2021, with LayerScale and DropPath; timm's arguments and state_dict keys.
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
        self.norm1 = norm_layer(dim, **where)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, proj_bias, attn_drop, proj_drop,
            norm_layer, **where,
        )  # fmt: skip
        self.ls1 = LayerScale(dim, init_values, **where)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **where)
        self.mlp = mlp_layer(
            dim,
            int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **where,
        )
        self.ls2 = LayerScale(dim, init_values, **where)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self,
        x: Tensor | Pending,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rows: int | None = None,
    ) -> Tensor | Pending:
        y, stream = add_norm(x if isinstance(x, Pending) else Pending(x), self.norm1)
        if rows is None:
            branch = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
        else:
            branch, stream = self.attn(y, rows=rows), stream[:, :rows]
        if fusable(self.norm2, self.ls1, self.drop_path1):
            row_scale = self.drop_path1.row_scale(branch)
            y, stream = add_norm(Pending(stream, branch, self.ls1.gamma, row_scale), self.norm2)
        else:
            stream = stream + self.drop_path1(self.ls1(branch))
            y = self.norm2(stream)
        branch = self.mlp(y)
        if isinstance(x, Pending) and fusable(self.ls2, self.drop_path2):
            # Only tensors made here leave the block: FSDP frees a Parameter after its unit.
            gamma = None if self.ls2.gamma is None else self.ls2.gamma.clone()
            return Pending(stream, branch, gamma, self.drop_path2.row_scale(branch))
        stream = stream + self.drop_path2(self.ls2(branch))
        return Pending(stream) if isinstance(x, Pending) else stream


# Modules that compute each token by itself, given the keys and values of all.
TOKEN_WISE = (
    Attention, DropPath, GELUTanh, GluMlp, LayerNorm, LayerScale, Linear, Mlp, QuickGELU,
    nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.SiLU,
)  # fmt: skip


def skips_rows(block: Block) -> bool:
    """Whether block(x, rows=n) gives the first rows of block(x), and nobody sees the difference.

    Not with an active dropout: its mask would be another.
    """
    return (
        type(block.attn) is Attention
        and not (block.attn.training and block.attn.attn_drop.p > 0)  # not called: has no say
        and untouched(block.attn.qkv, Linear)
        and plain(block.attn.qkv.weight)
        and all(
            untouched(module, Block, *TOKEN_WISE)
            and not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
            for module in block.modules()
        )
    )
