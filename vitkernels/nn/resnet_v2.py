"""The ResNet in front of a hybrid ViT: BiT's, without pre-activation; timm's names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import fail, positive_int
from .bottleneck import Bottleneck, std_conv
from .group_norm import GroupNormAct
from .same_padding import MaxPool2dSame

CHANNELS = (256, 512, 1024, 2048)


class ResNetStem(nn.Sequential):
    """images (B, in_chans, H, W) -> (B, 64, H/4, W/4): 7 x 7 convolution, norm, ReLU, pooling.

    padding: "same" (TensorFlow's, JAX's) or "symmetric"; sizes are rounded up.
    """

    reduction = 4

    def __init__(
        self, in_chans: int = 3, out_chs: int = 64, padding: str = "same", device=None, dtype=None
    ):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.num_features = out_chs
        self.conv = std_conv(in_chans, out_chs, 7, 2, padding, **where)
        self.norm = GroupNormAct(out_chs, **where)
        self.pool = MaxPool2dSame(3, 2) if padding == "same" else nn.MaxPool2d(3, 2, padding=1)

    def map_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Of the map that an image of this size gives."""
        return rounded_up(img_size, self.reduction)


class ResNetStage(nn.Module):
    """`depth` blocks; the first one strides and widens."""

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, depth: int, padding: str = "same", **where
    ):
        super().__init__()
        self.grad_checkpointing = False
        first = Bottleneck(in_chs, out_chs, stride, downsample=True, padding=padding, **where)
        others = [Bottleneck(out_chs, out_chs, padding=padding, **where) for _ in range(1, depth)]
        self.blocks = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class ResNetV2(nn.Module):
    """images -> the map of the last stage, (B, channels[-1], H/s, W/s) with s = 4, 8, 16, 32.

    layers: the number of blocks of each stage, as (3, 4, 9). Initial weights are those that timm
    draws.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (3, 4, 9),
        channels: tuple[int, ...] = CHANNELS,
        in_chans: int = 3,
        stem_chs: int = 64,
        padding: str = "same",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_sizes(layers, channels, stem_chs)
        where = {"device": device, "dtype": dtype}
        self.depths, self.in_chans = tuple(layers), in_chans
        self.stem = ResNetStem(in_chans, stem_chs, padding, **where)
        widths = (stem_chs, *channels)[: len(layers) + 1]
        self.num_features, self.reduction = widths[-1], 2 << len(layers)
        self.stages = nn.Sequential(
            *[
                ResNetStage(widths[i], widths[i + 1], 1 if i == 0 else 2, depth, padding, **where)
                for i, depth in enumerate(layers)
            ]
        )
        self.init_weights(zero_init_last=False)

    def init_weights(self, zero_init_last: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if zero_init_last and isinstance(module, Bottleneck):
                module.zero_init_last()

    def map_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Of the map that an image of this size gives."""
        return rounded_up(img_size, self.reduction)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


def rounded_up(img_size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Halving and rounding up, again and again, is one division that rounds up."""
    H, W = img_size
    return (H + reduction - 1) // reduction, (W + reduction - 1) // reduction


def _check_sizes(layers, channels, stem_chs) -> None:
    if not 0 < len(layers) <= len(channels):
        fail("ResNetV2", "layers", f"1 to {len(channels)} numbers of blocks", layers)
    for depth in layers:
        positive_int("ResNetV2", "layers", depth)
    widths = [("channels", width, 128) for width in channels]
    for name, width, multiple in (("stem_chs", stem_chs, 32), *widths):
        positive_int("ResNetV2", name, width)
        if width % multiple:  # 32 groups, also of a block's inner quarter
            fail("ResNetV2", name, f"a multiple of {multiple}", width)
