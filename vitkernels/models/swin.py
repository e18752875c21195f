"""FusedSwin: Swin Transformer (Liu et al. 2021), its V2 (Liu et al. 2022), and S3's windows.

    images -> patches -> 4 stages of (patch merging, blocks) -> norm -> pool -> head

Maps are (B, H, W, C). Constructor arguments, attribute names, methods and state_dict keys are those
of timm's SwinTransformer and SwinTransformerV2, so that its checkpoints load with
load_state_dict(strict=True).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import count
from ..nn import ClassifierHead, PatchEmbed, SwinStage
from ..nn.known import known
from ..nn.patch_embed import pair
from ..nn.pending import add, add_norm, fusable
from ..nn.watched import global_hooks, hooked, untouched
from .init import init_weights
from .loaders import SwinLoaders
from .swin_checks import check_pool, check_swin, number_of_stages, per_stage
from .swin_features import SwinFeatures
from .swin_windows import scaled_windows, stage_windows

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FusedSwin(SwinLoaders, SwinFeatures, nn.Module):
    """Swin Transformer on fused kernels.

    Args: as timm's SwinTransformer, and SwinTransformerV2 with version=2. embed_dim and window_size
    may be one for each stage. Off the grid of windows libraries differ:
    pad_mode: "pad_roll" (Microsoft's detection code, torchvision, Hugging Face): zeros are appended
    to the normalised map, then it rolls; "timm": it rolls first.
    window_clamp: what maps smaller than the window do: "axis" (timm), "min" (Microsoft, Hugging
    Face) or "pad" (torchvision); see vitkernels.nn.windows. always_partition=True: none of them.
    mean, std: of each channel, in units of images in [0, 1], with which uint8 images are normalised
    inside; float images are taken as normalised. No forward changes the model.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int | tuple[int, ...] = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        head_dim: int | tuple[int, ...] | None = None,
        window_size=7,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float | tuple[float, ...] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        embed_layer=PatchEmbed,
        norm_layer=None,
        act_layer=None,
        pretrained_window_sizes: tuple = (0, 0, 0, 0),
        weight_init: str = "",
        version: int = 1,
        pad_mode: str = "pad_roll",
        window_clamp: str = "axis",
        mean: float | tuple[float, ...] = IMAGENET_MEAN,
        std: float | tuple[float, ...] = IMAGENET_STD,
        device=None,
        dtype=None,
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        stages = number_of_stages(depths)
        widths = per_stage("embed_dim", embed_dim, stages, doubling=True)
        head_dims = per_stage("head_dim", head_dim, stages)
        mlp_ratios = per_stage("mlp_ratio", mlp_ratio, stages)
        windows = stage_windows("FusedSwin", window_size, stages)
        check_swin(
            version, in_chans, num_classes, widths, depths, num_heads, head_dims, windows,
            mlp_ratios, global_pool, weight_init, pad_mode, window_clamp, pretrained_window_sizes,
            drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )  # fmt: skip
        norm_layer = known("FusedSwin", "norm_layer", norm_layer or nn.LayerNorm)
        act_layer = known("FusedSwin", "act_layer", act_layer, nn.GELU)
        embed_layer = known("FusedSwin", "embed_layer", embed_layer, PatchEmbed)

        self.version, self.num_classes, self.in_chans = version, num_classes, in_chans
        self.global_pool, self.output_fmt = global_pool, "NHWC"
        self.num_layers, self.embed_dim, self.num_features = stages, embed_dim, widths[-1]
        self.dynamic_img_size = dynamic_img_size or not strict_img_size
        self.pad_mode, self.window_clamp = pad_mode, window_clamp
        self.patch_embed = embed_layer(
            img_size,
            patch_size,
            in_chans,
            widths[0],
            norm_layer=norm_layer,
            output_fmt="NHWC",
            strict_img_size=not self.dynamic_img_size,
            mean=_of_channels(mean, IMAGENET_MEAN, in_chans),
            std=_of_channels(std, IMAGENET_STD, in_chans),
            **where,
        )
        # What set_input_size scales, so that each stage keeps its ratio of window to map.
        self._ref_window_sizes, self._ref_grid_size = windows, self.patch_embed.grid_size

        self.feature_info = [
            {"num_chs": width, "reduction": max(pair(patch_size)) * 2**i, "module": f"layers.{i}"}
            for i, width in enumerate(widths)
        ]
        if version == 1:
            own = [{"head_dim": head_dim} for head_dim in head_dims]
        else:
            own = [{"pretrained_window_size": pair(w)} for w in pretrained_window_sizes]
        shared = {
            "always_partition": always_partition,
            "qkv_bias": qkv_bias,
            "proj_drop": proj_drop_rate,
            "attn_drop": attn_drop_rate,
            "act_layer": act_layer,
            "window_clamp": window_clamp,
            "pad_mode": pad_mode,
        }
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.Sequential(
            *[
                SwinStage(
                    version,
                    widths[max(i - 1, 0)],
                    widths[i],
                    self._map_before(i),
                    windows[i],
                    rates[i].tolist(),
                    downsample=i > 0,
                    norm_layer=norm_layer,
                    block={
                        "num_heads": num_heads[i],
                        "mlp_ratio": mlp_ratios[i],
                        **own[i],
                        **shared,
                    },
                    **where,
                )
                for i in range(stages)
            ]
        )
        self.norm = norm_layer(self.num_features, **where)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **where)
        self.head_hidden_size = self.head.num_features

        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's schemes; V2's branches begin at zero."""
        init_weights(self, mode or self.weight_init_mode, reset=needs_reset)
        if self.version == 2:
            for stage in self.layers:
                for block in stage.blocks:
                    block.init_weights()

    def _map_before(self, stage: int) -> tuple[int, int]:
        """The size of the map that enters a stage."""
        scale = 2 ** max(stage - 1, 0)
        return tuple((side + scale - 1) // scale for side in self.patch_embed.grid_size)

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last norm, (B, H, W, num_features)."""
        x = self.patch_embed(x)
        if global_hooks() or hooked(self.layers) or not untouched(self.layers[-1], SwinStage):
            return self.norm(self.layers(x))
        *stages, last = self.layers
        for stage in stages:
            x = stage(x)
        pending = last.pending(x)
        if fusable(self.norm):
            return add_norm(pending, self.norm, pending.stream.dtype)[0]
        return self.norm(add(pending))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    # --- what training scripts ask of a timm model ------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        apart = ("relative_position_bias_table",)
        if self.version == 2:
            apart = ("cpb_mlp", "logit_scale")
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if any(part in name for part in apart)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of parameter groups for layer-wise learning rates."""
        fine = [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        stem = r"^patch_embed" if self.version == 1 else r"^absolute_pos_embed|patch_embed"
        return {"stem": stem, "blocks": r"^layers\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for num_classes (0: none), and another pooling when it is named."""
        if global_pool is not None:
            check_pool("reset_classifier", global_pool)
        count("reset_classifier", "num_classes", num_classes)
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        some = next(self.parameters())
        self.head.reset(
            num_classes, global_pool, self.num_features, device=some.device, dtype=some.dtype
        )
        self.head_hidden_size = self.head.num_features

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        window_size=None,
        window_ratio: int | tuple[int, ...] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Another image, patch or window size; position biases and patch projection are resampled.

        window_size: one, (height, width), or one for each stage. window_ratio: the window is the
        patch grid divided by it (one, or one for each stage). With neither, windows scale with the
        patch grid. Sizes that are refused change nothing.
        """
        sizes = scaled_windows(
            "set_input_size", len(self.layers), window_size, window_ratio, self.window_clamp
        )
        if img_size is not None or patch_size is not None:
            self.patch_embed.set_input_size(img_size, patch_size)
        if patch_size is not None:
            for i, info in enumerate(self.feature_info):
                info["reduction"] = max(self.patch_embed.patch_size) * 2**i
        grid = self.patch_embed.grid_size
        windows = sizes(grid, self._ref_window_sizes, self._ref_grid_size)
        if window_size is not None or window_ratio is not None:
            self._ref_window_sizes, self._ref_grid_size = windows, grid
        for i, stage in enumerate(self.layers):
            stage.set_input_size(self._map_before(i), windows[i], always_partition)


def _of_channels(values, default: tuple[float, ...], in_chans: int):
    """ImageNet's three values are averaged for images of other channels."""
    return sum(default) / 3 if values is default and in_chans != 3 else values
