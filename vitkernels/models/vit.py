"""FusedViT: the Vision Transformer of Dosovitskiy et al. 2021 and its many children.

    images -> patches -> + class/register tokens, position -> blocks -> norm -> pool -> head

Constructor arguments, attribute names, methods and state_dict keys are those of timm's
VisionTransformer, so that its checkpoints load with load_state_dict(strict=True).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import dropout_p, positive_int
from .._dispatch import autocast_dtype
from ..nn import Block, LayerNorm, Linear, PatchDropout, PatchEmbed, Pending
from ..nn.block import TOKEN_WISE, skips_rows
from ..nn.known import known
from ..nn.mlp import Mlp
from ..nn.pending import add, add_norm, chainable, fusable
from ..nn.resample import resample_pos_embed
from ..nn.watched import keeps, plain, untouched
from .init import SCHEMES, init_weights, trunc_normal_
from .intermediates import IntermediateFeatures
from .loaders import ViTLoaders
from .maps import attention_maps

POOLS = ("", "avg", "avgmax", "max", "token")


class FusedViT(ViTLoaders, IntermediateFeatures, nn.Module):
    """Vision Transformer on fused kernels.

    Args: as timm's VisionTransformer. global_pool is "token", "avg", "avgmax", "max" or "".
    Arguments that take classes (norm_layer, act_layer, ...) accept the ones known here, by class or
    by name. mean, std: of each channel, in units of images in [0, 1], with which uint8 images are
    normalised inside; float images are taken as normalised.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer=PatchEmbed,
        embed_norm_layer=None,
        norm_layer=None,
        act_layer=None,
        block_fn=Block,
        mlp_layer=Mlp,
        attn_layer="attn",
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        _check_pool("FusedViT", global_pool, class_token)
        _check_options(pos_embed, weight_init, drop_path_rate)
        for name, size in (("embed_dim", embed_dim), ("depth", depth), ("num_heads", num_heads)):
            positive_int("FusedViT", name, size)
        norm_layer = known("FusedViT", "norm_layer", norm_layer, LayerNorm)
        act_layer = known("FusedViT", "act_layer", act_layer, nn.GELU)
        block_fn = known("FusedViT", "block_fn", block_fn)
        embed_layer = known("FusedViT", "embed_layer", embed_layer)
        mlp_layer = known("FusedViT", "mlp_layer", mlp_layer)
        known("FusedViT", "attn_layer", attn_layer)

        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens, self.has_class_token = reg_tokens, class_token
        self.no_embed_class, self.pool_include_prefix = no_embed_class, pool_include_prefix
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=known("FusedViT", "embed_norm_layer", embed_norm_layer),
            bias=not pre_norm,
            output_fmt="NHWC" if dynamic_img_size else None,
            strict_img_size=not dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            mean=mean,
            std=std,
            **where,
        )
        prefix = 0 if no_embed_class else self.num_prefix_tokens
        self.cls_token = _parameter(class_token and (1, 1, embed_dim), where)
        self.reg_token = _parameter(reg_tokens and (1, reg_tokens, embed_dim), where)
        positions = (1, prefix + self.patch_embed.num_patches, embed_dim)
        self.pos_embed = _parameter(pos_embed == "learn" and positions, where)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens)
        self.norm_pre = norm_layer(embed_dim, **where) if pre_norm else nn.Identity()

        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                block_fn(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    qk_norm,
                    scale_attn_norm,
                    scale_mlp_norm,
                    proj_bias,
                    proj_drop_rate,
                    attn_drop_rate,
                    init_values,
                    drop_path[i],
                    act_layer,
                    norm_layer,
                    mlp_layer,
                    **where,
                )
                for i in range(depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        norms = [norm_layer(embed_dim, **where) if final_norm else nn.Identity(), nn.Identity()]
        self.norm, self.fc_norm = reversed(norms) if after_pool else norms
        self.attn_pool = None
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(**where)

        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's schemes; fix_init divides the last Linear of each branch by sqrt(2 layer)."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        init_weights(self, mode or self.weight_init_mode, reset=needs_reset)
        if self.fix_init:
            with torch.no_grad():
                for layer, block in enumerate(self.blocks, start=1):
                    block.attn.proj.weight.div_((2.0 * layer) ** 0.5)
                    block.mlp.fc2.weight.div_((2.0 * layer) ** 0.5)

    # --- forward ----------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is None and not is_causal and self._head_reads_prefix_only():
            return self.forward_head(self._chained_features(self._embed(x), rows=self._head_rows))
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens after the last norm, (B, N, embed_dim)."""
        x = self._embed(x)
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:  # Tensors between blocks: a Pending would save two
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        elif chainable(self.blocks, Block):
            return self._chained_features(x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def _chained_features(self, x: Tensor, rows: int | None = None) -> Tensor:
        """forward_features with a Pending between blocks; of the first rows only where told."""
        *blocks, last = self.blocks
        pending = Pending(x)
        for block in blocks:
            pending = block(pending)
        pending = last(pending, rows=rows)
        if fusable(self.norm):
            return add_norm(pending, self.norm, pending.stream.dtype)[0]
        return self.norm(add(pending))

    _head_rows = 1  # the tokens that a head with global_pool "token" reads

    def _head_reads_prefix_only(self) -> bool:
        """Whether the last block needs to compute those tokens only, and nobody sees it."""
        return (
            self.global_pool == "token"
            and not self.grad_checkpointing
            and keeps(self, self._owner(), "forward_features", "forward_head", "pool")
            and chainable(self.blocks, Block)
            and skips_rows(self.blocks[-1])
            and untouched(self.norm, *TOKEN_WISE)
        )

    @classmethod
    def _owner(cls) -> type:
        """The class whose methods the fused forward knows: a user's subclass has its own."""
        return FusedViT

    def _prefix(self) -> list[nn.Parameter]:
        """The tokens before the patches."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _embed(self, x: Tensor) -> Tensor:
        """Images -> tokens that enter the first block."""
        if not self._embeds_in_one_call(x):
            return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self._tokens(x, self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:])))

    def _tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches of images, or of maps, with positions and prefix tokens in one call."""
        prefix = self._prefix()
        pos_embed = self._positions(grid)
        x = self.patch_embed.tokens(x, pos_embed, torch.cat(prefix, dim=1) if prefix else None)
        return self.norm_pre(self.patch_drop(x if pos_embed is None else self.pos_drop(x)))

    def _has_plain_embed(self) -> bool:
        return (
            untouched(self.patch_embed, PatchEmbed)
            and self.patch_embed.in_one_call()
            and untouched(self.patch_embed.norm, nn.Identity)
        )

    def _embeds_in_one_call(self, x: Tensor) -> bool:
        """Not under autocast: there timm adds positions to the 16-bit patches in fp32."""
        return (
            self._has_plain_embed()
            and keeps(self, FusedViT, "_pos_embed")
            and keeps(self, self._owner(), "_prefix")
            and plain(*self._prefix(), self.pos_embed)
            and autocast_dtype(x.device) is None
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Class and register tokens before the patches; position on all, or on patches only."""
        B, grid = x.shape[0], x.shape[1:-1]
        x = x.flatten(1, -2)
        prefix = [token.expand(B, -1, -1) for token in self._prefix()]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        pos_embed = self._positions(grid)
        if self.no_embed_class:
            x = x + pos_embed
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        return self.pos_drop(x if self.no_embed_class else x + pos_embed)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """pos_embed, resampled to this grid for a dynamic image size."""
        if self.pos_embed is None or not self.dynamic_img_size:
            return self.pos_embed
        tokens = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, tokens)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N, C) -> (B, C); with pool type "" nothing is pooled."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if pool_type == "":
            return x
        if pool_type == "token":
            return x[:, 0]
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if pool_type == "avg":
            return x.mean(dim=1)
        return x.amax(dim=1) if pool_type == "max" else 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def attention_maps(self, images: Tensor, rows=None) -> list[Tensor]:
        """(B, heads, rows, N) of every block; see vitkernels.models.attention_maps."""
        return attention_maps(self, images, rows)

    # --- what training scripts ask of a timm model ------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none), and another pooling when it is named."""
        if global_pool is not None:
            _check_pool("reset_classifier", global_pool, self.has_class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        some = next(self.parameters())
        self.head = self._make_head(device=some.device, dtype=some.dtype).train(self.training)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Another image or patch size: position embedding and patch projection are resampled."""
        old_size = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        if self.pos_embed is not None:
            tokens = 0 if self.no_embed_class else self.num_prefix_tokens
            resampled = resample_pos_embed(
                self.pos_embed.detach(), self.patch_embed.grid_size, old_size, tokens
            )
            self.pos_embed = nn.Parameter(resampled, self.pos_embed.requires_grad)

    def _make_head(self, **where) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        return Linear(self.embed_dim, self.num_classes, **where)


def _parameter(shape, where: dict) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape, **where)) if shape else None


def _check_pool(owner: str, global_pool: str, class_token: bool) -> None:
    if global_pool in ("map", "prr"):
        raise ValueError(
            f"{owner}: global_pool {global_pool!r} (attention pooling) is not supported"
        )
    if global_pool not in POOLS:
        raise ValueError(f"{owner}: global_pool must be one of {POOLS}, got {global_pool!r}")
    if global_pool == "token" and not class_token:
        raise ValueError(f"{owner}: global_pool='token' needs class_token=True, got False")


def _check_options(pos_embed: str, weight_init: str, drop_path_rate: float) -> None:
    if pos_embed not in ("", "none", "learn"):
        raise ValueError(f"FusedViT: pos_embed must be learn, none or '', got {pos_embed!r}")
    if weight_init not in (*SCHEMES, "skip"):
        raise ValueError(
            f"FusedViT: weight_init must be one of {SCHEMES} or skip, got {weight_init!r}"
        )
    dropout_p("FusedViT", drop_path_rate, "drop_path_rate")
